"""The columns that a format reads, and what may stand in them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from dude_cli.config import DataSource
from dude_cli.data.bad_rows import BadRows
from dude_cli.data.row_files import Row, Rows
from dude_cli.errors import DataError, nearest


@dataclass(frozen=True)
class Columns:
    """`required` must be there in every row, or `instead` of them others; `optional` may be absent or null.

    `are_texts`, or lists of messages.
    """

    required: tuple[str, ...]
    optional: tuple[str, ...] = ()
    are_texts: bool = True
    instead: tuple[str, ...] = ()

    def names(self, column: str) -> tuple[str, ...]:
        """The names that a column may have: that of conversations is `conversations` in ShareGPT's files."""
        return (column, "conversations") if column == "messages" and not self.are_texts else (column,)

    def read(self) -> list[str]:
        """All names of the columns that are read."""
        return [name for column in (*self.required, *self.optional, *self.instead) for name in self.names(column)]

    def wanted(self) -> str:
        """The required columns, or those instead, in words."""
        words = " and ".join(map(repr, self.required))
        return f"{words}, or lists of messages in {' and '.join(map(repr, self.instead))}" if self.instead else words

    def fit(self, row: Row) -> bool:
        """Whether a row has the required columns, or those instead, as texts or as lists, whichever is read."""
        has_lists = any(isinstance(row.get(name), list) for name in (*self.required, *self.instead))
        if self.are_texts:
            return set(self.required) <= set(row) and not has_lists
        is_named = all(set(self.names(column)) & set(row) for column in self.required)
        return is_named or (bool(self.instead) and set(self.instead) <= set(row) and has_lists)

    def unread(self, there: list[str], rows: list[Row]) -> list[str]:
        """Those of the columns that are there of which nothing is taken; `rows` are what `keep_columns` has kept."""
        ours = set(self.read()) - {name for name in self.instead if not any(name in row for row in rows)}
        return [name for name in there if name not in ours]


# The format of data that has such a column.
_FORMATS = {"messages": "chat", "conversations": "chat", "instruction": "alpaca", "text": "text"}


def check_columns(source: DataSource, there: list[str], columns: Columns, *, empty: bool) -> None:
    """Raise DataError if there are no rows, or not the required columns."""
    if empty:
        raise DataError(
            "the data set has no rows", where=f"{source.path}, split {source.split}", fix="check the file and the split"
        )
    if columns.instead and set(columns.instead) <= set(there):
        return
    for column in columns.required:
        if not set(columns.names(column)) & set(there):
            raise DataError(
                f"no column {' or '.join(map(repr, columns.names(column)))}; the columns are: {', '.join(there)}",
                where=source.path,
                fix=_other_columns(column, there, columns),
            )


def _other_columns(column: str, there: list[str], columns: Columns) -> str:
    """What to do where `column` is not there: another name, or another format."""
    close = nearest(column, there)
    hint = f"did you mean {close[0]!r}? " if close else ""
    if not columns.are_texts:
        return (
            f"{hint}give the column of the conversations the name `messages`, or those of their parts `prompt` and "
            "`completion`, or choose another `data.format`"
        )
    formats = [_FORMATS[name] for name in there if name in _FORMATS and name not in columns.required]
    choice = f"set data.format: {formats[0]}" if formats else "choose another `data.format`"
    return f"{hint}{choice}, or templates `data.prompt` and `data.completion`"


def keep_columns(source: DataSource, rows: Rows, columns: Columns) -> Rows:
    """Return the rows with just `columns`, an empty text where an optional one has no value.

    Raises DataError, naming the rows, for values that cannot be learned as they stand.
    """
    kept, bad = Rows([], rows.places), BadRows()
    for row, where in zip(rows.values, rows.places, strict=True):
        with bad.collected():
            kept.values.append(_kept(row, where, columns))
    bad.check(len(rows.values), f"{source.path}, split {source.split}")
    return kept


def _kept(row: Row, where: str, columns: Columns) -> Row:
    new = {column: _value(row, columns.names(column)) for column in columns.required}
    others = {column: row.get(column) for column in columns.instead}
    if all(map(_is_missing, new.values())) and not all(map(_is_missing, others.values())):
        new = others
    new |= {column: "" if _is_missing(row.get(column)) else row[column] for column in columns.optional}
    for column, value in new.items():
        problem = _problem(value, are_texts=columns.are_texts)
        if problem is not None:
            what, fix = problem
            raise DataError(f"column {column!r} {what}", where=where, fix=fix)
    return new


def _value(row: Row, names: tuple[str, ...]) -> Any:
    """The value under the first of these names that has one."""
    return next((row[name] for name in names if not _is_missing(row.get(name))), row.get(names[0]))


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _problem(value: Any, *, are_texts: bool) -> tuple[str, str] | None:
    """What is wrong with a value, and what to do; None if nothing is."""
    if _is_missing(value):
        return f"has no value ({'null' if value is None else 'NaN'})", "fill in or remove such rows"
    if are_texts and isinstance(value, (list, dict, bytes)):  # their text would be Python's notation
        kind = {list: "a list", dict: "an object", bytes: "bytes"}[type(value)]
        is_chat = isinstance(value, list) and all(
            isinstance(item, dict) and {"role", "from"} & set(item) for item in value
        )
        chat = "set data.format: chat, with the conversation in a column `messages`, or in `prompt` and `completion`"
        return f"is {kind}, not text", chat if is_chat else "write the text to learn into a column of its own"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = f" at character {error.start + 1}" if text is value else ""
        return (
            f"has half of a surrogate pair{where}",
            "remove it, or write the file again: a text was cut in a character",
        )
    return None
