"""Start the command line, and end it. Signals are answered before anything that takes time, typer, is imported."""

import atexit
import faulthandler
import io
import os
import sys
import threading
from contextlib import suppress
from typing import NoReturn

from dude_cli.system.garbage import collect_rarely
from dude_cli.system.launch import follow_launcher
from dude_cli.system.stopping import ignore_signals, leave_on_signals


def main() -> None:
    """Run the command of `sys.argv`; raises SystemExit with its exit code."""
    if sys.stderr is not None:  # closed by who started us
        faulthandler.enable()  # what a library's crash was in the middle of
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a result is not lost for a sign that the terminal does not have
    leave_on_signals()
    collect_rarely()
    follow_launcher()
    from dude_cli.cli import app

    try:
        app()
    finally:
        ignore_signals()


def run() -> NoReturn:
    """`main`, and the end of the process without the end of the interpreter.

    A thread of a library that still runs there, of gloo's or Arrow's, and needs Python once more, aborts the process:
    after the work was done, and with an exit code that says it was not. The rest is done as Python does it: threads
    are waited for, what is registered for the exit is called, and the output is flushed.
    """
    try:
        main()
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise  # of a library, with words of its own
        code = end.code
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with suppress(OSError, ValueError):  # who read it is gone, or it was closed
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
