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


class DudeError(Exception):
    """A failure that is explained to the user without a traceback.

    `what` says what failed and names the value; `where` is a path, a `file:line:column`, a layer or a column;
    `fix` is the next thing to do.
    """

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__("\n".join(self._lines()))

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
    pass


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


def nearest(name: str, candidates: list[str], count: int = 3) -> list[str]:
    """Return up to `count` of `candidates` that are spelt most like `name`, best first; empty if none is close."""
    import difflib

    lowered = {candidate.lower(): candidate for candidate in reversed(candidates)}
    found = difflib.get_close_matches(name.lower(), list(lowered), n=count, cutoff=0.5)
    return [lowered[match] for match in found]
