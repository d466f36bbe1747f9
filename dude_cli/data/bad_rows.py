"""All rows that cannot be used, in one error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dude_cli.errors import DataError

_NAMED = 5


class BadRows:
    """Collects what is wrong with rows, each an error of its own; the first five of them are named in the end.

    What to do about them is the error's fix where it is one thing for all five, else it stands beside each.
    """

    def __init__(self) -> None:
        self.count = 0
        self._first: list[DataError] = []

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Within, a row's DataError is collected."""
        try:
            yield
        except DataError as error:
            self.count += 1
            if self.count <= _NAMED:
                self._first.append(error)

    def check(self, rows: int, where: str) -> None:
        """Raise one DataError if any of the `rows` rows of `where` is wrong."""
        if self.count == 1:
            raise self._first[0]
        if self.count:
            lines = [f"{self.count:,} of {rows:,} rows cannot be used:"]
            fixes = {error.fix for error in self._first}
            for error in self._first:
                own = f"; {error.fix}" if len(fixes) > 1 and error.fix else ""
                lines.append(f"  {error.where}: {error.what}{own}")
            if self.count > _NAMED:
                lines.append(f"  and {self.count - _NAMED:,} more")
            fix = self._first[0].fix if len(fixes) == 1 else "do what stands behind each row"
            raise DataError("\n".join(lines), where=where, fix=fix)
