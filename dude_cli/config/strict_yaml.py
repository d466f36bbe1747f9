"""YAML to plain Python values, strictly, with the line and column of each key and value.

Scalars follow YAML 1.2's core schema, not PyYAML's 1.1: `1e-4` is a number, only true and false are booleans (so
`no`, `off` and `yes` stay text), dates stay text. A duplicate key, a tag, a merge key and an alias that
grows without bound are problems, not surprises.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml

Loc = tuple[str | int, ...]

MAX_VALUES = 10_000  # after aliases are expanded: far above any config, far below what fills the memory
MAX_DEPTH = 50

_TAG = "tag:yaml.org,2002:"
_SCALARS: dict[str, tuple[re.Pattern[str], Callable[[str], Any]]] = {
    "null": (re.compile(r"^(~|null|Null|NULL|)$"), lambda text: None),
    "bool": (re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), lambda text: text.lower() == "true"),
    "int": (re.compile(r"^([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), lambda text: _integer(text)),
    "float": (
        re.compile(r"^([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"),
        lambda text: float(text.replace(".i", "i").replace(".I", "I").replace(".n", "n").replace(".N", "N")),
    ),
}


# In this order, because the float pattern matches integers too.
SCALAR_PATTERNS = [(_TAG + name, pattern) for name, (pattern, _) in _SCALARS.items()]


class _Loader(yaml.SafeLoader):
    """PyYAML's parser with YAML 1.2's scalar rules in place of its own."""

    yaml_implicit_resolvers = {None: SCALAR_PATTERNS}  # noqa: RUF012


@dataclass(frozen=True, order=True)
class Place:
    """Where something is written; places sort in reading order, those in overrides after those in the file.

    In an override, `override` is its text and `line` its number on the command line.
    """

    is_override: bool = field(init=False, repr=False)
    line: int
    column: int
    override: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_override", self.override is not None)

    def in_file(self, name: str) -> str:
        """Write the place as `name:line:column`, or as the override that it is."""
        return f'override "{self.override}"' if self.is_override else f"{name}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Problem:
    place: Place
    message: str

    def record(self, file: str) -> dict[str, Any]:
        """The problem for a machine."""
        if self.place.is_override:
            return {"override": self.place.override, "message": self.message}
        return {"file": file, "line": self.place.line, "column": self.place.column, "message": self.message}


@dataclass
class Document:
    """A parsed text: its value, where each key and value of it is written, and what is wrong with it.

    A location is the path of keys and indices from the root, `("data", "train", 0, "path")`. After a syntax error
    `value` is None; a value that cannot be read, such as one with a tag, is None, and its location is in `unread`.
    """

    value: Any = None
    keys: dict[Loc, Place] = field(default_factory=dict)
    values: dict[Loc, Place] = field(default_factory=dict)
    unread: set[Loc] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)


def parse(text: str) -> Document:
    """Parse one YAML document; problems are collected in the result, nothing is raised for a bad text."""
    document = Document()
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.reader.ReaderError as error:
        place = place_of(text, int(error.position))
        document.problems.append(Problem(place, f"character #x{int(error.character):x} is not allowed in YAML"))
    except yaml.MarkedYAMLError as error:
        document.problems.append(_syntax_problem(error))
    except RecursionError:
        document.problems.append(Problem(Place(1, 1), f"nested more than {MAX_DEPTH} levels deep"))
    except (ValueError, OverflowError) as error:  # an escape such as "\\UFFFFFFFF", a %YAML version of 5000 digits
        document.problems.append(Problem(Place(1, 1), f"YAML syntax: {error}"))
    else:
        if root is not None:
            _Builder(document).build(root)
    return document


def place_of(text: str, index: int) -> Place:
    """Return the line and column of the character at `index`."""
    before = text[:index]
    return Place(before.count("\n") + 1, index - (before.rfind("\n") + 1) + 1)


def _syntax_problem(error: yaml.MarkedYAMLError) -> Problem:
    mark = error.problem_mark or error.context_mark
    message = f"YAML syntax: {error.problem or error.context}"
    if error.problem and "\\t" in error.problem:
        message += "; indent with spaces"
    elif error.context and error.context_mark and error.problem:
        message += f" ({error.context} that starts on line {error.context_mark.line + 1})"
    return Problem(Place(mark.line + 1, mark.column + 1) if mark else Place(1, 1), message)


def _integer(text: str) -> int:
    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


class _TooLargeError(Exception):
    pass


class _Builder:
    """Turns PyYAML's node graph into values, copying aliased nodes so that each value has one location."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.count = 0

    def build(self, root: yaml.Node) -> None:
        try:
            self.document.value = self._value(root, ())
        except _TooLargeError as error:
            self.document.value = None
            self.document.problems.append(Problem(_place(root), str(error)))

    def _value(self, node: yaml.Node, loc: Loc) -> Any:
        self.count += 1
        if self.count > MAX_VALUES:
            raise _TooLargeError(f"more than {MAX_VALUES} values after aliases are expanded")
        if len(loc) > MAX_DEPTH:
            raise _TooLargeError(f"nested more than {MAX_DEPTH} levels deep, or an alias that contains itself")
        self.document.values[loc] = _place(node)
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, loc)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self._value(item, (*loc, index)) for index, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode) and node.tag.startswith(_TAG):
            return self._scalar(node, loc)
        return self._unread_tag(node, loc)

    def _mapping(self, node: yaml.MappingNode, loc: Loc) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, place = key_node.value, _place(key_node)
            if not isinstance(key_node, yaml.ScalarNode):
                self._report(place, "a key must be a word, not a list or a mapping")
            elif key == "<<":
                self._report(place, "merge keys (`<<`) are not supported; write the keys out")
            elif key in result:
                self._report(place, f"duplicate key `{key}`, first given on line {self.document.keys[*loc, key].line}")
            else:
                self.document.keys[*loc, key] = place
                result[key] = self._value(value_node, (*loc, key))
        return result

    def _scalar(self, node: yaml.ScalarNode, loc: Loc) -> Any:
        text, name = str(node.value), node.tag.removeprefix(_TAG)
        if name == "str" and not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            return self._unread(node, loc, "half of a surrogate pair is not a character")
        if name == "str":
            return text
        if name not in _SCALARS:
            return self._unread_tag(node, loc)
        pattern, convert = _SCALARS[name]
        try:
            if pattern.match(text):
                return convert(text)
        except ValueError:  # Python converts no integer of more than 4300 digits
            pass
        return self._unread(node, loc, f"`{text[:40]}` cannot be read as {name}")

    def _unread_tag(self, node: yaml.Node, loc: Loc) -> None:
        tag = node.tag.replace(_TAG, "!!")
        self._unread(node, loc, f"tag `{tag}` is not allowed: values are plain text, numbers, lists and mappings")

    def _unread(self, node: yaml.Node, loc: Loc, message: str) -> None:
        self.document.unread.add(loc)
        self._report(_place(node), message)

    def _report(self, place: Place, message: str) -> None:
        self.document.problems.append(Problem(place, message))


def _place(node: yaml.Node) -> Place:
    return Place(node.start_mark.line + 1, node.start_mark.column + 1)
