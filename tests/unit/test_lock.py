"""One process at a time, and none that is gone is in the way."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dude_cli.system.lock import locked

# Forks one that lives on until its standard input ends, and is killed within the lock.
KILLED = """\
import os, signal, sys
from pathlib import Path
from dude_cli.system.lock import locked

with locked(Path(sys.argv[1]), print):
    if os.fork() == 0:
        os.write(1, b"forked")
        os.read(0, 1)
        os._exit(0)
    os.read(int(sys.argv[2]), 1)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def no_word(line: str) -> None:
    raise AssertionError(line)


def test_a_second_one_is_told_of_the_first_and_the_end_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "runs/a/.lock"
    with locked(path, no_word):
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on "), locked(path, no_word):
            pass
        assert path.exists()  # it is the first one's
    assert os.listdir(tmp_path) == []


def test_what_was_put_beside_it_stays(tmp_path: Path) -> None:
    with locked(tmp_path / "a/.lock", no_word):
        (tmp_path / "a/file").write_text("x")
    assert os.listdir(tmp_path / "a") == ["file"]


def test_one_that_waits_has_the_lock_after_the_first_alone(tmp_path: Path) -> None:
    """The file that it waits for is gone by then, and a third one would lock another."""
    path, said = tmp_path / ".lock", list[str]()

    def second() -> None:
        with locked(path, no_word, wait=True):
            with pytest.raises(BlockingIOError), locked(path, no_word):
                pass
            said.append("second")

    with locked(path, no_word):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.2)
        said.append("first")
    thread.join(60)
    assert said == ["first", "second"]


def test_one_that_was_killed_is_not_in_the_way_nor_what_it_had_forked(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    theirs, ours = os.pipe()
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, path, str(theirs)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[theirs],
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(6) == b"forked"
        with pytest.raises(BlockingIOError, match=f"process {process.pid} on "), locked(path, no_word):
            pass
        os.write(ours, b"x")
        process.wait(60)
        assert path.exists()
        with locked(path, no_word):
            assert str(os.getpid()) in path.read_text()
    os.close(theirs), os.close(ours)


def test_where_there_are_no_locks_it_goes_on_with_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    said: list[str] = []
    with locked(tmp_path / ".lock", said.append):
        pass
    assert len(said) == 1
    assert "cannot be locked (No locks available)" in said[0]
