"""How a command's process ends: what is due is done, and nothing of a library's can change its exit code any more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command import environment

ROOT = Path(__file__).parents[2]


def run_with(before: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command in a process that has first done `before`."""
    code = f"{before}\nfrom dude_cli.__main__ import run\nsys.argv = {['dude', *arguments]!r}\nrun()\n"
    env = environment(PYTHONPATH=str(ROOT), **variables)
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(("arguments", "code"), [(["ls"], 0), (["cp", "nothing", "nowhere"], 2)])
def test_a_crash_while_python_takes_itself_apart_has_no_chance_to_happen(arguments, code):
    """As with a thread of gloo's that wanted to free a tensor then."""
    crash = "import os, sys\nclass Late:\n    def __del__(self):\n        os.abort()\nlate = Late()"
    done = run_with(crash, *arguments)
    assert done.returncode == code, done.stderr
    assert "Fatal" not in done.stderr


def test_what_is_due_at_the_end_is_done():
    due = (
        "import atexit, sys, threading, time\n"
        "atexit.register(lambda: print('registered', end=''))\n"
        "threading.Thread(target=lambda: (time.sleep(1), print('thread', end=' '))).start()"
    )
    done = run_with(due, "ls", "--quiet")
    assert done.returncode == 0
    assert done.stdout.endswith("thread registered")


@pytest.mark.parametrize("closed", [1, 2])
def test_an_output_that_was_closed_from_the_start_is_no_error(closed):
    command = [sys.executable, "-m", "dude_cli", "ls"]
    done = subprocess.run(command, env=environment(), capture_output=True, preexec_fn=lambda: os.close(closed))
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_terminal_without_a_sign_shows_another_one():
    says = "import sys\nfrom dude_cli.commands import listing\n"
    says += "listing.list_shipped = lambda output: output.result('1.5 \\xb1 0.2', {})"
    done = run_with(says, "ls", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout) == (0, "1.5 ? 0.2\n"), done.stderr


def test_a_crash_of_a_library_says_where_it_was():
    crash = "import ctypes, sys\nfrom dude_cli.commands import listing\n"
    crash += "listing.list_shipped = lambda _: ctypes.string_at(0)"
    done = run_with(crash, "ls")
    assert done.returncode == -11
    assert "Segmentation fault" in done.stderr
    assert "list_shipped" in done.stderr
