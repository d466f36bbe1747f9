"""Run the real command line, in a process of its own or, where that changes nothing, in this one."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, offline, one thread, without colours; `changes` on top."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("FORCE_COLOR", "COLUMNS"))}
    return env | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "100"} | changes


def dude(*arguments: object, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """`dude ARGUMENTS`; standard output and error as text."""
    command = [sys.executable, "-m", "dude_cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=300)


def dude_here(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The same without the seconds that the imports take: parser, errors and exit codes are those of a command."""
    from dude_cli.cli import app

    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, environment()))
        stack.enter_context(contextlib.chdir(cwd or Path.cwd()))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            app([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
    return subprocess.CompletedProcess(list(arguments), code, out.getvalue(), err.getvalue())
