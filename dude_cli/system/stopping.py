"""How a signal ends a command: at once while nothing is open, else by unwinding; always one line and one exit code.

The training loop has an answer of its own, `runtime.stop_signals`: it saves a checkpoint first.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dude_cli.errors import StoppedError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def leave_on_signals() -> None:
    """From now on a signal ends the process at once. For the imports before a command, and the way out after it."""
    for number in SIGNALS:
        signal.signal(number, _leave)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # one that came when nobody could answer, a launcher has kept


def ignore_signals() -> None:
    """From now on the process ends with the exit code that it has, whatever comes."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def handling(handler: Callable[[int], None]) -> Iterator[None]:
    """Within, `handler` answers the signals to this process.

    One that a library forks meanwhile ends by a signal, as it would without: pools end theirs so. A Ctrl-C at the
    terminal reaches it too, and a pool that has lost a process in that way may wait for it.
    """
    global _handled
    before = {number: signal.signal(number, lambda number, _: handler(number)) for number in SIGNALS}
    _handled += 1
    try:
        yield
    finally:
        _handled -= 1
        for number, earlier in before.items():
            signal.signal(number, earlier)


_handled = 0  # scopes of `handling` that are open
_mask: set[Any] = set()  # what was blocked before a fork


def _before_fork() -> None:
    # A child forgets a signal that comes before it is set up, and would be waited for in vain: it waits in the kernel.
    global _mask
    _mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS if _handled else ())


def _after_fork_in_child() -> None:
    if _handled:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask)


os.register_at_fork(
    before=_before_fork,
    after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, _mask),
    after_in_child=_after_fork_in_child,
)


class Interrupted(BaseException):
    """A signal came. Once a KeyboardInterrupt has left `exec`, Python would end by SIGINT, handled or not."""


@contextmanager
def interrupting_signals() -> Iterator[None]:
    """Within, a signal raises Interrupted: what is half-written is cleaned up on the way out."""
    has_come = False

    def interrupt(_number: int) -> None:
        nonlocal has_come
        has_come = True
        raise Interrupted

    def unraisable(error: Any) -> None:
        # Python drops an exception that is raised while it frees an object, or inside an import's lock.
        if error.exc_type is Interrupted:
            _leave()
        sys.__unraisablehook__(error)

    hook, sys.unraisablehook = sys.unraisablehook, unraisable
    try:
        with handling(interrupt):
            yield
    except Exception as error:
        if has_come:  # a library that was interrupted in an import or in C may say so with an error of its own
            raise Interrupted from error
        raise
    finally:
        sys.unraisablehook = hook


def _leave(*_: Any) -> None:
    if os.environ.get("RANK", "0") == "0":  # of several ranks one talks
        os.write(2, b"error: stopped\n")
        if "--json" in sys.argv:
            os.write(1, (json.dumps({"error": StoppedError("stopped").document()}, indent=2) + "\n").encode())
    os._exit(StoppedError.exit_code)
