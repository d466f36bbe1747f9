from dude_cli.cli import main

main()
