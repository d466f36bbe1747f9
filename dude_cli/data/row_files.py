"""Read a file of rows: JSON, CSV, plain text or parquet, the first three also compressed.

The standard library and pyarrow read them rather than `datasets.load_dataset`: a broken line can be named, no text
is turned into a number or a null by guessing types, and nothing is copied into a cache.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO, cast

from dude_cli.data.bad_rows import BadRows
from dude_cli.errors import DataError

Row = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Rows, and where each of them stands, for messages: a `file:line` where that is known."""

    values: list[Row]
    places: list[str]


def read_file(path: Path) -> Rows:
    """Return the rows of a file; its suffix says the format. Raises DataError with the lines of what is wrong."""
    suffix = next((suffix for suffix in FILE_SUFFIXES if path.name.lower().endswith(suffix)), None)
    if suffix is None:
        raise DataError(f"cannot tell the format of {path.name}", where=str(path), fix=f"name the file {SUFFIXES_HINT}")
    try:
        return _READERS[suffix.removesuffix(_compression(suffix))](path)
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 text: {error.reason} at byte {error.start}", where=str(path), fix="save the file as UTF-8"
        ) from error
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        if error.errno is None:  # bz2's way to say that
            raise _damaged(path, error) from error
        raise DataError(
            f"cannot read the file: {error.strerror or error}", where=str(path), fix="check its permissions"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, shortened; the type's name where there is no message."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _compression(name: str) -> str:
    """The suffix that says how a file is compressed; empty for one that is not."""
    return next((suffix for suffix in _OPENERS if name.lower().endswith(suffix)), "")


def _open(path: Path, newline: str | None = None) -> TextIO:
    file = _OPENERS.get(_compression(path.name), open)(path, "rt", encoding="utf-8-sig", newline=newline)
    return cast(TextIO, file)


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(
        f"cannot unpack the file: {first_line(error)}",
        where=str(path),
        fix="write or download it again; its name says how it is compressed",
    )


def _read_jsonl(path: Path) -> Rows:
    with _open(path) as file:
        return _parse_lines(path, file)


def _parse_lines(path: Path, lines: Iterable[str]) -> Rows:
    rows, bad = Rows([], []), BadRows()
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}:{number}"
            with bad.collected():
                rows.values.append(_as_object(_parsed(line, where), where))
                rows.places.append(where)
    bad.check(len(rows.values) + bad.count, str(path))
    return rows


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line.rstrip("\n"))
    except (json.JSONDecodeError, RecursionError) as error:
        problem = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else first_line(error)
        raise DataError(
            f"not valid JSON: {problem}",
            where=where,
            fix="write one JSON object per line, or remove this line",
        ) from error


def _as_object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(
            f"a row is a JSON object, and this is {type(row).__name__}: {str(row)[:60]}",
            where=where,
            fix='write each row as {"column": "text", ...}',
        )
    return row


def _read_json(path: Path) -> Rows:
    """A list of objects; many .json files hold one object per line instead, and those are read too."""
    with _open(path) as file:
        text = file.read()
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("{") and "\n" in text.strip():
            return _parse_lines(path, text.split("\n"))
        raise DataError(
            f"not valid JSON: {error.msg}",
            where=f"{path}:{error.lineno}:{error.colno}",
            fix="write a list of objects, or one object per line",
        ) from error
    except RecursionError as error:
        raise DataError(
            f"not valid JSON: {first_line(error)}",
            where=str(path),
            fix="write what nests so deeply as text, or remove its row",
        ) from error
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise DataError(
            f"the file holds {type(content).__name__}, not rows", where=str(path), fix="write a list of objects"
        )
    rows = numbered(content, str(path))
    bad = BadRows()
    for row, where in zip(content, rows.places, strict=True):
        with bad.collected():
            _as_object(row, where)
    bad.check(len(content), str(path))
    return rows


def _read_csv(path: Path, delimiter: str = ",") -> Rows:
    """Every cell is text as it stands: "007", "NA" and "" stay so. A row that is too short has nulls."""
    csv.field_size_limit(2**31 - 1)
    rows, bad = Rows([], []), BadRows()
    with _open(path, newline="") as file:
        reader = csv.DictReader(file, strict=True, delimiter=delimiter)
        try:
            for row in reader:
                rows.values.append(row)
                rows.places.append(f"{path}:{reader.line_num}")  # its last line: a cell may hold line breaks
        except csv.Error as error:
            raise DataError(
                f"not valid CSV: {error}",
                where=f"{path}:{reader.line_num}",
                fix='put text with commas, quotes or line breaks in double quotes, and write " inside as ""',
            ) from error
    for row, where in zip(rows.values, rows.places, strict=True):
        with bad.collected():
            _check_cells(row, where)
    bad.check(len(rows.values), str(path))
    return rows


def _check_cells(row: dict[Any, Any], where: str) -> None:
    if None in row:
        raise DataError("more cells than the header names", where=where, fix="put text with commas in double quotes")


def _read_text(path: Path) -> Rows:
    """One text a line, as `datasets` reads such a file; lines without text are none."""
    with _open(path) as file:
        lines = [(number, line.rstrip("\n")) for number, line in enumerate(file, start=1) if line.strip()]
    return Rows([{"text": line} for _, line in lines], [f"{path}:{number}" for number, _ in lines])


def _read_parquet(path: Path) -> Rows:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(
            f"not a readable parquet file: {first_line(error)}", where=str(path), fix="write or download it again"
        ) from error
    return numbered(without_fillers(rows), str(path))


def without_fillers(rows: list[Row]) -> list[Row]:
    """Rows of an Arrow table without the nulls inside of their values.

    Such a table has every field in each object of a column if one of them has it: the arguments of one tool would be
    written into the calls of all others. A null that a value had is not told from these.
    """
    return [{column: _without_nulls(value) for column, value in row.items()} for row in rows]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def numbered(rows: list[Row], where: str) -> Rows:
    """Rows of which only the number is known."""
    return Rows(rows, [f"{where}, row {number}" for number in range(1, len(rows) + 1)])


_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_TEXT_READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": partial(_read_csv, delimiter="\t"),
    ".txt": _read_text,
}
_READERS = {**_TEXT_READERS, ".parquet": _read_parquet}
FILE_SUFFIXES = (*_READERS, *(kind + packed for kind in _TEXT_READERS for packed in _OPENERS))
SUFFIXES_HINT = (
    f"by what it holds: {', '.join(_READERS)}; "
    f"all but .parquet may be compressed, with {', '.join(_OPENERS)} behind that"
)
