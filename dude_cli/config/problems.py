"""What a schema finds wrong with a parsed file, in words and with the place of each problem."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from dude_cli.config.hints import closest, meant_by, or_list, unknown_key
from dude_cli.config.keys import (
    Path,
    choices,
    entry_key,
    example,
    field_at,
    key_paths,
    path_of,
    wanted,
    wanted_entry,
    without_union_tags,
)
from dude_cli.config.overrides import IN_A_SHELL
from dude_cli.config.section import Section
from dude_cli.config.strict_yaml import Document, Loc, Place, Problem, parse

S = TypeVar("S", bound=Section)


def validate(document: Document, root: type[S]) -> S | None:
    """Return a parsed file's values, or None after adding what is wrong with them to the document's problems.

    `root` is the schema of the whole file.

    Rules about several values cannot run while one value is wrong. So each faulty value is reported and then left out,
    and the rest is validated again. A rule about a value that was left out, or that an unknown key was meant to be, is
    not reported.
    """
    if document.value is None:
        return None
    values = copy.deepcopy(document.value)
    faulty = {_without_entries(loc) for loc in document.unread}
    for path in faulty:
        _leave_out(values, path, root)
    for _ in key_paths(root):  # each round leaves out at least one key
        try:
            valid = root.model_validate(values)
        except ValidationError as error:
            errors = list(_errors(error, root))
            unknown = [loc for loc, details in errors if details["type"] == "extra_forbidden"]
            faulty.update(path for loc in unknown for path in meant_by(loc, root))
            for loc, details in errors:
                document.problems += _problems(document, loc, details, faulty, root)
            for loc, details in errors:
                for path in _faulty_paths(loc, details):
                    faulty.add(path)
                    _leave_out(values, path, root)
        else:
            return None if faulty else valid
    return None


def _errors(error: ValidationError, root: type[Section]) -> Iterator[tuple[Loc, ErrorDetails]]:
    """Yield one error per location. A union reports each branch: keep what is deepest, where the branch did fit."""
    found = [(without_union_tags(details["loc"], root), details) for details in error.errors(include_url=False)]
    seen = set()
    for loc, details in found:
        deeper = any(other[: len(loc)] == loc and len(other) > len(loc) for other, _ in found)
        is_branch = len(loc) < len(details["loc"])
        if loc not in seen and not (is_branch and deeper):
            seen.add(loc)
            yield loc, details


def _problems(
    document: Document, loc: Loc, details: ErrorDetails, faulty: set[Path], root: type[Section]
) -> Iterator[Problem]:
    kind, value = details["type"], details["input"]
    if kind == "contradiction":
        for message, keys in details["ctx"]["contradictions"]:
            locs = [_below(loc, key) for key in keys]
            if not any(_overlap(path_of(key_loc), path) for key_loc in locs for path in faulty):
                given = [document.keys[key_loc] for key_loc in locs if key_loc in document.keys]
                yield Problem(max(given, default=_value_place(document, loc)), message)
    elif kind == "extra_forbidden":
        yield Problem(document.keys.get(loc) or _value_place(document, loc), unknown_key(loc, root))
    elif kind == "missing" and path_of(loc) not in faulty:
        yield Problem(_value_place(document, loc[:-1]), _missing(loc, root))
    elif kind == "value_error":
        message = details["msg"].removeprefix("Value error, ")
        yield Problem(_value_place(document, loc), f"`{_dotted(loc)}`: {message}")
    elif kind != "missing":
        place = _value_place(document, loc)
        yield Problem(place, _wrong_value(loc, value, root, is_override=place.is_override))


def _faulty_paths(loc: Loc, details: ErrorDetails) -> list[Path]:
    """Return the keys to leave out for an error."""
    if details["type"] != "contradiction":
        return [_without_entries(loc)]
    return [_without_entries(_below(loc, key)) for _, keys in details["ctx"]["contradictions"] for key in keys]


def _without_entries(loc: Loc) -> Path:
    """Return the key of the list that `loc` is in, or of the value itself outside lists."""
    end = next((index for index, part in enumerate(loc) if isinstance(part, int)), len(loc))
    return path_of(loc[:end])


def _leave_out(values: dict[str, Any], path: Path, root: type[Section]) -> None:
    """Remove the key at `path`, or give it a valid value where one is required."""
    for key in path[:-1]:
        values = values.get(key) or {}
        if not isinstance(values, dict):
            return
    field = field_at(path, root)
    values.pop(path[-1], None)
    if field is not None and field.is_required():
        values[path[-1]] = example(field)


def _below(loc: Loc, dotted: str) -> Loc:
    return (*loc, *(int(part) if part.isdecimal() else part for part in dotted.split(".")))


def _overlap(one: Path, other: Path) -> bool:
    length = min(len(one), len(other))
    return one[:length] == other[:length]


def _value_place(document: Document, loc: Loc) -> Place:
    """Return where the value at `loc` is written, or else what it would stand in."""
    return next(document.values[loc[:end]] for end in range(len(loc), -1, -1) if loc[:end] in document.values)


def _dotted(loc: Loc) -> str:
    return ".".join(str(part) for part in loc)


def _missing(loc: Loc, root: type[Section]) -> str:
    field = field_at(path_of(loc), root)
    assert field is not None
    sample = yaml.safe_dump({loc[-1]: example(field)}, default_flow_style=True, width=1000).strip()[1:-1]
    return f"`{_dotted(loc)}` is required, for example `{sample}`"


def _wrong_value(loc: Loc, value: Any, root: type[Section], *, is_override: bool) -> str:
    field = field_at(path_of(loc), root)
    if field is None:
        return f"`{_dotted(loc)}` is {_shown(value)}, which does not belong here"
    is_entry = isinstance(loc[-1], int)
    want = wanted_entry(field) if is_entry else wanted(field)
    key = entry_key(field)
    hint = _entry_hint(key, value, is_entry) if key else _hint(choices(field), want, value)
    if isinstance(value, dict) and want.startswith("text"):
        hint = _quotes_hint(value) + (f", {IN_A_SHELL}" if is_override else "")
    if value is None and not field.is_required() and not is_entry:
        hint = "leave the key out for its default"
    return f"`{_dotted(loc)}` is {_shown(value)}; wanted {want}" + (f"; {hint}" if hint else "")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list) and value:
        return "a list"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _quotes_hint(value: dict[str, Any]) -> str:
    """Say how to write a template: to YAML, `{answer}` without quotes is a mapping with the key `answer`."""
    column = next(iter(value)) if list(value.values()) == [None] else "column"
    return f'write `"{{{column}}}"`, with quotes'


def _entry_hint(key: str, value: Any, is_entry: bool) -> str:
    """Say how to write one entry of a list of sections."""
    if isinstance(value, dict):
        return f"start each entry with a dash: `- {key}: ...`"
    if isinstance(value, str):
        return f"write `{{{key}: {value}}}`" if is_entry else f"write `[{{{key}: {value}}}]`"
    return ""


def _hint(words: list[str], want: str, value: Any) -> str:
    if isinstance(value, float) and "whole number" in want and value.is_integer():
        return f"write `{int(value)}`"
    if not isinstance(value, str):
        return "quote it if it is text" if "text" in want and not isinstance(value, list | dict) else ""
    as_boolean = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
    if "true" in words and value.lower() in as_boolean:
        return f"write `{as_boolean[value.lower()]}`"
    if want.startswith("a list") and (value in words or not words):
        return f"write `[{value}]`"
    close = closest(value, words, 0.5)
    if close:
        return f"did you mean {or_list(close)}?"
    plain = value.replace("_", "").replace(",", "")
    if "number" in want and isinstance(parse(plain).value, int | float):
        return f"write `{plain}`, without quotes"
    return ""
