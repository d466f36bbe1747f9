"""What a schema says about a place in a file: its keys, the value wanted there, an example of it.

`root` is the schema of the whole file: that of a config, or another one that is made of sections.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from dude_cli.config.schema import Config
from dude_cli.config.section import Section
from dude_cli.config.strict_yaml import Loc

Path = tuple[str, ...]  # the names of keys from the root; entries of a list have their list's path


def sections(root: type[Section] = Config) -> Iterator[tuple[Path, type[Section]]]:
    """Yield the path and the class of each section, the root first, in the order of the schema."""
    yield from _sections_under((), root)


def section_at(path: Path, root: type[Section] = Config) -> type[Section] | None:
    """Return the class of the section at `path`, or None where the schema has no section."""
    return dict(sections(root)).get(path)


def field_at(path: Path, root: type[Section] = Config) -> FieldInfo | None:
    """Return the schema's field at `path`, or None where it has none."""
    section = section_at(path[:-1], root) if path else None
    return section.model_fields.get(path[-1]) if section else None


def key_paths(root: type[Section] = Config) -> list[Path]:
    """Return the path of each key that a file may have."""
    return [(*path, key) for path, section in sections(root) for key in section.model_fields]


def is_section(field: FieldInfo) -> bool:
    """Whether a field is one section, not a value or a list of sections."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, Section)


def has_entries(field: FieldInfo) -> bool:
    """Whether a field may be a list of sections."""
    return _list_in(field) is not None and _section_in(_list_in(field)) is not None


def path_of(loc: Loc) -> Path:
    """Return the names in a location, without the indices of list entries."""
    return tuple(part for part in loc if isinstance(part, str))


def without_union_tags(loc: Loc, root: type[Section] = Config) -> Loc:
    """Return a location in pydantic's error without the parts that name the branch of a union it was tried for."""
    kept: Loc = ()
    for part in loc:
        is_tag = isinstance(part, str) and kept and isinstance(kept[-1], str) and _is_union_at(kept, root)
        kept = kept if is_tag else (*kept, part)
    return kept


def wanted_entry(field: FieldInfo) -> str:
    """Say in words what the entries of a field's list are."""
    return next(_alternatives(get_args(_list_in(field))[0]))


def wanted(field: FieldInfo) -> str:
    """Say in words what value a field takes, such as "a whole number above 0, or null"."""
    annotation: Any = field.annotation
    if field.metadata and not _is_union(annotation):
        annotation = Annotated[annotation, *field.metadata]
    alternatives = list(_alternatives(annotation, tuple(field.metadata)))
    return ", or ".join(alternatives)


def choices(field: FieldInfo) -> list[str]:
    """Return the words that a field takes: those of its Literal types, and true and false for a boolean."""
    found: list[str] = []
    for annotation in _flat(field.annotation):
        if get_origin(annotation) is Literal:
            found += [str(choice) for choice in get_args(annotation)]
        elif annotation is bool:
            found += ["true", "false"]
    return found


def entry_key(field: FieldInfo) -> str | None:
    """Return the first key of the sections in a field's list, a required one if any is; None if it has no such list."""
    section = _section_in(field.annotation)
    if section is None or not has_entries(field):
        return None
    required = [name for name, inner in section.model_fields.items() if inner.is_required()]
    return (required or list(section.model_fields))[0]


def example(field: FieldInfo) -> Any:
    """Return a valid value for a required field: its own example, or a section with its required keys."""
    if field.examples:
        return field.examples[0]
    section = _section_in(field.annotation)
    assert section is not None, "a required field that is no section needs an example"
    value = {name: example(inner) for name, inner in section.model_fields.items() if inner.is_required()}
    return [value] if get_origin(field.annotation) is list else value


def _sections_under(path: Path, section: type[Section]) -> Iterator[tuple[Path, type[Section]]]:
    yield path, section
    for name, field in section.model_fields.items():
        inner = _section_in(field.annotation)
        if inner:
            yield from _sections_under((*path, name), inner)


def _flat(annotation: Any) -> Iterator[Any]:
    """Yield the types inside unions, lists and Annotated, each on its own."""
    if _is_union(annotation) or get_origin(annotation) is list:
        for inner in get_args(annotation):
            yield from _flat(inner)
    elif get_origin(annotation) is Annotated:
        yield from _flat(get_args(annotation)[0])
    else:
        yield annotation


def _list_in(field: FieldInfo) -> Any:
    """Return the list type that a field may have, or None."""
    members = get_args(field.annotation) if _is_union(field.annotation) else (field.annotation,)
    plain = [get_args(member)[0] if get_origin(member) is Annotated else member for member in members]
    return next((member for member in plain if get_origin(member) is list), None)


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, UnionType)


def _section_in(annotation: Any) -> type[Section] | None:
    found = [inner for inner in _flat(annotation) if isinstance(inner, type) and issubclass(inner, Section)]
    return found[0] if found else None


def _is_union_at(loc: Loc, root: type[Section]) -> bool:
    field = field_at(path_of(loc), root)
    return field is not None and _is_union(field.annotation)


def _alternatives(annotation: Any, metadata: tuple[Any, ...] = ()) -> Iterator[str]:
    if _is_union(annotation):
        members = sorted(get_args(annotation), key=lambda member: member is NoneType)
        for member in members:
            yield from _alternatives(Annotated[member, *metadata] if metadata else member)
    elif get_origin(annotation) is Annotated:
        base, *metadata_here = get_args(annotation)
        yield from _alternatives(base, tuple(_constraints(metadata_here)))
    elif get_origin(annotation) is Literal:
        names = [f"`{choice}`" for choice in get_args(annotation)]
        yield names[0] if len(names) == 1 else "one of " + ", ".join(names)
    elif get_origin(annotation) is list:
        minimum = "" if _is_empty_allowed(metadata) else "one or more "
        yield f"a list of {minimum}{_plural(get_args(annotation)[0])}"
    elif get_origin(annotation) is dict:
        yield "names with their values"
    elif isinstance(annotation, type) and issubclass(annotation, Section):
        yield "a section: lines such as " + ", ".join(f"`{key}: ...`" for key in list(annotation.model_fields)[:2])
    else:
        text = "text" if _is_empty_allowed(metadata) else "text that is not empty"
        name = {str: text, bool: "true or false", int: "a whole number", float: "a number", NoneType: "null"}
        yield name[annotation] + (_bounds(metadata) if annotation in (int, float) else "")


def _constraints(metadata: Iterable[Any]) -> Iterator[Any]:
    for item in metadata:  # `Annotated[int, Field(gt=0)]` holds a FieldInfo that holds the bound
        yield from item.metadata if isinstance(item, FieldInfo) else (item,)


def _is_empty_allowed(metadata: tuple[Any, ...]) -> bool:
    return not any(isinstance(item, MinLen) for item in metadata)


def _plural(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _plural(get_args(annotation)[0])
    plain = {str: "texts", int: "whole numbers", float: "numbers"}
    if annotation in plain:
        return plain[annotation]
    if get_origin(annotation) is Literal:
        return " and ".join(f"`{choice}`" for choice in get_args(annotation))
    return "entries with " + ", ".join(f"`{key}`" for key in annotation.model_fields)


def _bounds(metadata: tuple[Any, ...]) -> str:
    parts = []
    for bound in metadata:
        if isinstance(bound, Gt):
            parts.append(f"above {bound.gt}")
        elif isinstance(bound, Ge):
            parts.append(f"of at least {bound.ge}")
        elif isinstance(bound, Lt):
            parts.append(f"below {bound.lt}")
        elif isinstance(bound, Le):
            parts.append(f"of at most {bound.le}")
    return " " + " and ".join(parts) if parts else ""
