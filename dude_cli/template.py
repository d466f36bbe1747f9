"""Text templates over the columns of a row: `{column}` is the column's value, `{{` and `}}` are literal braces.

This is the plain part of `str.format`: a field is a column's name and nothing else, so a template can neither
reach into an object nor run code, and a brace inside a value stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

_PIECE = re.compile(r"\{\{|\}\}|\{(?P<field>[^{}]*)\}|[{}]")
_NOT_IN_A_NAME = re.compile(r"[.\[\]!:]")


def parse_template(text: str) -> list[str]:
    """Return the columns that `text` names, each once, in order of first appearance.

    Raises ValueError for a brace without its partner, an empty field, and a field that is more than a name.
    """
    return list(dict.fromkeys(piece for piece, is_column in _pieces(text) if is_column))


def render(text: str, row: Mapping[str, Any]) -> str:
    """Return `text` with each `{column}` replaced by `str(row[column])`, and by nothing where the value is None.

    Raises KeyError for a column that the row lacks, and ValueError as `parse_template` does.
    """
    return "".join(_as_text(row[piece]) if is_column else piece for piece, is_column in _pieces(text))


def _as_text(value: Any) -> str:
    return "" if value is None else str(value)  # a missing answer must not be learned as the word "None"


@lru_cache(maxsize=64)
def _pieces(text: str) -> tuple[tuple[str, bool], ...]:
    """Split a template into (literal text, False) and (column name, True)."""
    pieces: list[tuple[str, bool]] = []
    end = 0
    for match in _PIECE.finditer(text):
        pieces.append((text[end : match.start()], False))
        end = match.end()
        found = match.group()
        if found in ("{{", "}}"):
            pieces.append((found[0], False))
        elif match["field"] is None:
            raise ValueError(
                f"`{found}` at character {match.start() + 1} has no partner; write `{found * 2}` for a literal brace"
            )
        else:
            pieces.append((_column(match["field"], match.start() + 1), True))
    pieces.append((text[end:], False))
    return tuple(pieces)


def _column(field: str, position: int) -> str:
    if not field.strip():
        raise ValueError(f"`{{{field}}}` at character {position} names no column; write `{{{{}}}}` for literal braces")
    if _NOT_IN_A_NAME.search(field) or field != field.strip():
        raise ValueError(
            f"`{{{field}}}` at character {position} is more than a column's name; "
            "a template has no attributes, indices, conversions or format specs"
        )
    return field
