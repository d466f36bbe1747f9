"""`key.sub=value` from the command line, put into a parsed config file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from dude_cli.config.strict_yaml import Document, Loc, Place, Problem, parse

# An override of one of these takes the place of the file's value of the other.
_ALTERNATIVES: dict[Loc, Loc] = {
    ("train", "max_steps"): ("train", "num_train_epochs"),
    ("train", "num_train_epochs"): ("train", "max_steps"),
}

# The shell takes one pair of quotes, YAML the other.
IN_A_SHELL = """in a shell such as `'data.prompt="Q: {question}\\nA:"'`"""


def apply_overrides(document: Document, overrides: Sequence[str]) -> None:
    """Change `document` by each override in turn; what is wrong with one is added to the document's problems.

    The key is dotted, with a number for an entry of a list (`data.train.0.path`; the number after the last one adds an
    entry). The value follows the same YAML rules as the file.
    """
    for number, override in enumerate(_joined(overrides), start=1):
        place = Place(number, 1, override)
        document.problems += [Problem(place, message) for message in _apply(document, override, place)]


def _joined(overrides: Sequence[str]) -> Iterator[str]:
    """The overrides, of which a key and a value that were given as two words are one, with a space."""
    words = iter(overrides)
    for word in words:
        value = next(words, "") if "=" not in word else ""
        if "=" in value:
            yield from (word, value)
        else:
            yield f"{word} {value}".rstrip() if value else word


def _apply(document: Document, override: str, place: Place) -> list[str]:
    name, equals, text = override.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        key, _, value = name.strip().partition(" ")
        meant = f"; write `{key}={value}`, as one word" if value else ""
        return [f"wanted `key.sub=value`, such as `train.learning_rate=1e-4`{meant}"]
    parsed = parse(text)
    if parsed.problems:
        *others, last = [problem.message for problem in parsed.problems]
        return [*others, f"{last}; for text, quote the value, {IN_A_SHELL}"]
    try:
        loc = _set(document, parts, parsed.value, place)
    except LookupError as error:
        return [str(error.args[0])]
    other = _ALTERNATIVES.get(loc)
    if other and parsed.value is not None and other in document.keys and not document.keys[other].is_override:
        document.value[other[0]].pop(other[1])
        _forget(document, other)
    return []


def _set(document: Document, parts: list[str], value: Any, place: Place) -> Loc:
    """Set the value at a dotted key, creating what is missing on the way, and return its location."""
    loc: Loc = ()
    container: Any = document.value
    for part, following in zip(parts, [*parts[1:], None], strict=True):
        key: Any = _key(container, part, loc)
        if isinstance(container, list) and key == len(container):
            container.append(None)
        loc = (*loc, key)
        if following is None:
            container[key] = value
            _forget(document, loc)
            document.keys[loc] = document.values[loc] = place
        else:
            child = container[key] if key in container or isinstance(container, list) else None
            if child is None:
                child = container[key] = [] if following.isdecimal() else {}
                document.keys[loc] = document.values[loc] = place
            container = child
    return loc


def _key(container: Any, part: str, loc: Loc) -> str | int:
    """Return the key or index that `part` means in `container`. Raises LookupError with the message for the user."""
    name = ".".join(str(key) for key in loc)
    if isinstance(container, dict):
        return part
    if not isinstance(container, list):
        raise LookupError(f"`{name}` is a single value and has no key `{part}`")
    if not part.isdecimal():
        raise LookupError(f"`{name}` is a list: name an entry by its number, such as `{name}.0`, not `{part}`")
    if int(part[:9]) > len(container):
        raise LookupError(f"`{name}` has {len(container)} entries, numbered from 0: there is no `{name}.{part}`")
    return int(part)


def _forget(document: Document, loc: Loc) -> None:
    """Drop the positions of a value that is no longer there, and of all below it."""
    for places in (document.keys, document.values):
        for old in [old for old in places if old[: len(loc)] == loc]:
            del places[old]
    document.unread = {old for old in document.unread if old[: len(loc)] != loc}
