"""What each verb does, in order; `cli.py` parses the command line and calls one."""
