"""When Python looks for garbage: rarely until the model is loaded, then as usual.

Importing the libraries below us makes a million objects, all of which stay. Looking through them again and again is a
sixth of what a start takes. With a model it must be usual: a cycle nobody holds may have tensors in it.
"""

from __future__ import annotations

import gc

# New objects before a look; Python's own is 700. A few megabytes at most wait for it.
RARELY = 100_000

_usual: tuple[int, int, int] | None = None


def collect_rarely() -> None:
    """For a process whose work is still to be imported; to be called once."""
    global _usual
    _usual = gc.get_threshold()
    gc.set_threshold(RARELY)


def collect_as_usual() -> None:
    """Undo `collect_rarely`, if it was called. What there is by now stays, and is not looked at again."""
    global _usual
    if _usual is not None:
        gc.freeze()
        gc.set_threshold(*_usual)
        _usual = None
