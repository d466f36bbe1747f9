"""One process at a time: a lock that the system releases however its process ends."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from dude_cli.errors import UsageError
from dude_cli.system.files import make_folder

LOCK_FILE = ".lock"
_held: set[int] = set()


def _let_go() -> None:
    """In a forked process: it has the locks too, and may live longer than the one that took them."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def alone_in(folder: Path, say: Callable[[str], None], *, where: str, fix: str) -> Iterator[None]:
    """Within, no other command works in `folder`. Raises UsageError if one does; `fix` names another folder's option.

    A folder in which nobody can write is left to the checks that follow: they have words for it.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / LOCK_FILE, say))
        except BlockingIOError as error:
            raise UsageError(
                f"another dude command works in {folder}: {error.strerror}",
                where=where,
                fix=f"wait until it has ended, or stop it, or {fix}",
            ) from error
        except OSError:
            pass
        yield


@contextmanager
def locked(path: Path, say: Callable[[str], None], *, wait: bool = False) -> Iterator[None]:
    """Within, no other process is within the same lock; its file names the process that is, and goes at the end.

    Raises BlockingIOError, with the name of the other process, unless it is to `wait` for that. Where the file system
    has no locks, as that of a network or of an object store may be, it goes on without, and `say` tells so.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    try:
        descriptor = _take(path, say, wait=wait)
        try:
            yield
        finally:
            if descriptor in _held:  # not in a process that was forked within
                path.unlink(missing_ok=True)  # before another one can have it
                _held.remove(descriptor)
                os.close(descriptor)
    finally:
        for folder in made:
            with suppress(OSError):  # there is something in it by now
                folder.rmdir()


def _take(path: Path, say: Callable[[str], None], *, wait: bool) -> int:
    import fcntl

    while True:
        make_folder(path.parent)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode(errors="replace").strip()
            os.close(descriptor)
            raise BlockingIOError(errno.EWOULDBLOCK, holder or "another process", str(path)) from None
        except OSError as error:
            say(f"{path} cannot be locked ({error.strerror}): start no other command on this run")
        except BaseException:  # a signal, while it waits
            os.close(descriptor)
            raise
        if os.fstat(descriptor).st_nlink:
            break
        os.close(descriptor)  # who held it has deleted the file, and a new one may be somebody's already
    _held.add(descriptor)
    with suppress(OSError):  # a full disk: the lock is there, with no name in it
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    return descriptor
