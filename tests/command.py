"""Run the real command line in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, offline, one thread, without colours; `changes` on top."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("FORCE_COLOR", "COLUMNS"))}
    return env | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "100"} | changes


def dude(*arguments: object, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """`dude ARGUMENTS`; standard output and error as text."""
    command = [sys.executable, "-m", "dude_cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment(**env), capture_output=True, text=True, timeout=300)
