"""The configs and recipes that come with the package: list them, find one by name, copy one to edit.

They sit at the top level of a checkout (`configs/`, `recipes/`) and inside the package in an installed wheel
(`dude_cli/configs/`, `dude_cli/recipes/`). A name is the same in both: `configs/gsm8k.yaml`.
"""

from __future__ import annotations

from pathlib import Path

from dude_cli.errors import UsageError, nearest

KINDS = ("configs", "recipes")
_PACKAGE = Path(__file__).parent


def list_shipped() -> list[tuple[str, str]]:
    """Return the name and the description (the first comment line) of each shipped file."""
    return [(f"{kind}/{file.name}", _description(file)) for kind in KINDS for file in _files(kind)]


def find_shipped(name: str) -> Path | None:
    """Return the shipped file called `name`, such as `configs/gsm8k.yaml`, or None."""
    return {f"{kind}/{file.name}": file for kind in KINDS for file in _files(kind)}.get(name)


def copy_shipped(name: str, dest: Path) -> Path:
    """Copy a shipped file to `dest`, a folder or a new file's name, and return the new file.

    Raises UsageError for an unknown name, a destination that exists already, and one that cannot be written.
    """
    source = find_shipped(name)
    if source is None:
        names = [shipped for shipped, _ in list_shipped()]
        close = nearest(name, names)
        fix = f"did you mean {' or '.join(close)}?" if close else f"the shipped ones are {', '.join(names)}"
        raise UsageError("no shipped config or recipe has this name", where=name, fix=fix)
    target = dest / source.name if dest.is_dir() else dest
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(source.read_text(encoding="utf-8"))
    except FileExistsError as error:
        raise UsageError("this file exists already", where=str(target), fix="give another name or folder") from error
    except OSError as error:
        raise UsageError(
            f"cannot write the copy: {error.strerror or error}", where=str(target), fix="give another name or folder"
        ) from error
    return target


def _files(kind: str) -> list[Path]:
    installed, checkout = _PACKAGE / kind, _PACKAGE.parent / kind
    in_checkout = (_PACKAGE.parent / "pyproject.toml").is_file()
    return sorted((checkout if in_checkout else installed).glob("*.yaml"))


def _description(file: Path) -> str:
    first = file.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
