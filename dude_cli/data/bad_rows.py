"""All rows that cannot be used, in one error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dude_cli.errors import DataError

_NAMED = 5


class BadRows:
    """Collects what is wrong with rows, each an error of its own; the first five of them are named in the end."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[DataError] = []
        self._fixes: dict[str, None] = {}  # each once, in order

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Within, a row's DataError is collected."""
        try:
            yield
        except DataError as error:
            self.count += 1
            if self.count <= _NAMED:
                self._first.append(error)
                self._fixes[error.fix or ""] = None

    def check(self, rows: int, where: str) -> None:
        """Raise one DataError if any of the `rows` rows of `where` is wrong."""
        if self.count == 1:
            raise self._first[0]
        if self.count:
            lines = [f"{self.count:,} of {rows:,} rows cannot be used:"]
            lines += [f"  {error.where}: {error.what}" for error in self._first]
            if self.count > _NAMED:
                lines.append(f"  and {self.count - _NAMED:,} more")
            raise DataError("\n".join(lines), where=where, fix="; ".join(self._fixes))
