"""The exceptions that a user can meet, and their exit codes.

    DudeError                    1   an unexpected bug has this code too
    ├── UsageError               2   the command line, a path, a model or a task name
    │   ├── ConfigError          2   the YAML file: every problem of it in one error
    │   └── DataError            2   the training or evaluation rows
    ├── AdapterError             3   an adapter or a checkpoint that cannot be used
    ├── DivergedError            4   a loss or a gradient that is not finite
    ├── ResourceError            5   out of memory, out of disk
    ├── NumberNotMetError        6   a required figure was not reached
    └── StoppedError            75   stopped by a signal; a training saves a checkpoint first

A message has four parts: what failed, the value, where, and what to do next.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any


class DudeError(Exception):
    """A failure that is explained to the user without a traceback.

    `what` says what failed and names the value; `where` is a path, a `file:line:column`, a layer or a column;
    `fix` is the next thing to do.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__("\n".join(self._lines()))

    def document(self) -> dict[str, Any]:
        """The error for a machine, as `--json` prints it."""
        return {"what": self.what, "where": self.where, "fix": self.fix, "exit_code": self.exit_code}

    def _lines(self) -> list[str]:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  fix:   {self.fix}")
        return lines


class UsageError(DudeError):
    exit_code = 2


class ConfigError(UsageError):
    """`problems` has each of a file's by itself: its message, and the line and column or the override that it is in."""

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        fix: str | None = None,
        problems: Sequence[dict[str, Any]] = (),
    ) -> None:
        super().__init__(what, where=where, fix=fix)
        self.problems = problems

    def document(self) -> dict[str, Any]:
        return super().document() | ({"problems": list(self.problems)} if self.problems else {})


class DataError(UsageError):
    pass


class AdapterError(DudeError):
    exit_code = 3


class DivergedError(DudeError):
    exit_code = 4


class ResourceError(DudeError):
    exit_code = 5


class NumberNotMetError(DudeError):
    exit_code = 6


class StoppedError(DudeError):
    exit_code = 75


def explained(error: BaseException) -> DudeError | None:
    """The error as the user can understand it, None for one that is a bug: memory and disk have many spellings."""
    if isinstance(error, DudeError):
        return error
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        where = str(error.filename) if error.filename else None
        return ResourceError(
            f"the disk is full: {error.strerror}", where=where, fix="free some space, and give the same command again"
        )
    if isinstance(error, OSError) and error.filename is not None:
        path = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else str(error.filename)
        return UsageError(f"cannot use this path: {error.strerror}", where=path, fix="choose another path")
    if is_lost_rank(error):
        first = str(error).strip().splitlines()[0]
        return DudeError(
            f"another rank is gone, or does not answer: {first[:200]}",
            fix="see what it said; the same command continues after the last checkpoint",
        )
    if is_out_of_memory(error):
        return ResourceError(
            "out of memory",
            fix="lower train.per_device_batch_size or data.max_length, or use model.dtype: bfloat16",
        )
    return None


def without_tokens(text: str) -> str:
    """`text` with Hugging Face's access tokens blotted out: what is printed or stored may be passed on."""
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    for secret in filter(None, (os.environ.get(name, "").strip() for name in names)):
        text = text.replace(secret, "***")
    return re.sub(r"hf_[A-Za-z0-9]{30,}", "***", text)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch's GPU allocator or its CPU allocator had no memory left."""
    is_torch = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't allocate" in str(error)
    return is_torch or isinstance(error, MemoryError)


@contextmanager
def memory_errors(what: str, *, where: str, fix: str) -> Iterator[None]:
    """Within, running out of memory, a device's or the machine's, is a ResourceError with this text."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(what, where=where, fix=fix) from error


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective operation failed: a rank has ended, or did not come within the time limit."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    text = str(error)
    is_gloo = isinstance(error, RuntimeError) and ("gloo" in text or "Connection closed by peer" in text)
    return is_gloo or bool(kinds & {"DistBackendError", "DistNetworkError", "DistStoreError"})


def nearest(name: str, candidates: list[str], count: int = 3) -> list[str]:
    """Return up to `count` of `candidates` that are spelt most like `name`, best first; empty if none is close."""
    import difflib

    lowered = {candidate.lower(): candidate for candidate in reversed(candidates)}
    found = difflib.get_close_matches(name.lower(), list(lowered), n=count, cutoff=0.5)
    return [lowered[match] for match in found]
