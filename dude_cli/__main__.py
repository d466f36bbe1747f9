"""Start the command line. Signals are answered before anything that takes time, typer included, is imported."""

from dude_cli.launch import follow_launcher
from dude_cli.stopping import ignore_signals, leave_on_signals


def main() -> None:
    leave_on_signals()
    follow_launcher()
    from dude_cli.cli import app

    try:
        app()
    finally:
        ignore_signals()


if __name__ == "__main__":
    main()
