"""Read a .jsonl, .json, .csv or .parquet file into rows.

The standard library and pyarrow read them rather than `datasets.load_dataset`: a broken line can be named, no text
is turned into a number or a null by guessing types, and nothing is copied into a cache.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dude_cli.errors import DataError

Row = dict[str, Any]

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def read_file(path: Path) -> list[Row]:
    """Return the rows of a file; its suffix says the format. Raises DataError with the line of what is wrong."""
    readers: list[Callable[[Path], list[Row]]] = [_read_jsonl, _read_json, _read_csv, _read_parquet]
    suffix = path.suffix.lower()
    if suffix not in FILE_SUFFIXES:
        raise DataError(
            f"cannot tell the format of {path.name}",
            where=str(path),
            fix=f"name the file by what it holds: {', '.join(FILE_SUFFIXES)}",
        )
    try:
        return readers[FILE_SUFFIXES.index(suffix)](path)
    except UnicodeDecodeError as error:
        raise DataError(
            f"not UTF-8 text: {error.reason} at byte {error.start}", where=str(path), fix="save the file as UTF-8"
        ) from error
    except OSError as error:
        raise DataError(
            f"cannot read the file: {error.strerror or error}", where=str(path), fix="check its permissions"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, shortened; the type's name where there is no message."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _read_jsonl(path: Path) -> list[Row]:
    with path.open(encoding="utf-8-sig") as file:
        return list(_parse_lines(path, file))


def _parse_lines(path: Path, lines: Iterator[str]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(
                f"not valid JSON: {first_line(error)}",
                where=where,
                fix="write one JSON object per line, or remove this line",
            ) from error
        yield _as_object(row, where)


def _as_object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(
            f"a row is a JSON object, and this is {type(row).__name__}: {str(row)[:60]}",
            where=where,
            fix='write each row as {"column": "text", ...}',
        )
    return row


def _read_json(path: Path) -> list[Row]:
    """A list of objects; many .json files hold one object per line instead, and those are read too."""
    text = path.read_text(encoding="utf-8-sig")
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("{") and "\n" in text.strip():
            return list(_parse_lines(path, iter(text.split("\n"))))
        raise DataError(
            f"not valid JSON: {error.msg}",
            where=f"{path}:{error.lineno}:{error.colno}",
            fix="write a list of objects, or one object per line",
        ) from error
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise DataError(
            f"the file holds {type(content).__name__}, not rows", where=str(path), fix="write a list of objects"
        )
    return [_as_object(row, f"{path}, row {number}") for number, row in enumerate(content, start=1)]


def _read_csv(path: Path) -> list[Row]:
    """Every cell is text as it stands: "007", "NA" and "" stay so. A row that is too short has nulls."""
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            rows = list(reader)
        except csv.Error as error:
            raise DataError(
                f"not valid CSV: {error}",
                where=f"{path}:{reader.line_num}",
                fix='put text with commas, quotes or line breaks in double quotes, and write " inside as ""',
            ) from error
    for number, row in enumerate(rows, start=1):
        if None in row:
            raise DataError(
                f"row {number} has more cells than the header names",
                where=f"{path}, row {number}",
                fix="put text with commas in double quotes",
            )
    return rows


def _read_parquet(path: Path) -> list[Row]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(
            f"not a readable parquet file: {first_line(error)}", where=str(path), fix="write or download it again"
        ) from error
    return rows
