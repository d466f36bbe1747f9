"""Data flows one way: a module imports only from those below it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "dude_cli"


def drawn_layers() -> list[str]:
    """The modules and packages of the architecture page, top to bottom: `cli`, ..., `training.loop`, ..., `data`."""
    picture = (PACKAGE.parent / "docs/architecture.md").read_text().partition("## The method")[0]
    layers, package = ["__main__"], ""
    for indent, name, end in re.findall(r"^      (  )?(\w+)(\.py|/) ", picture, re.MULTILINE):
        layers.append(f"{package}.{name}" if indent else name)
        package = name if end == "/" and not indent else package
    return layers


LAYERS = drawn_layers()


def layer_of(module: str) -> str:
    """`training.loop` for a name in it, because the page draws it by itself; `data` for one in `data.chat`."""
    parts = module.split(".")
    return ".".join(parts[:2]) if ".".join(parts[:2]) in LAYERS else parts[0]


def imported_layers(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            package, _, module = node.module.partition(".")
            if package == "dude_cli":
                names = {alias.name for alias in node.names if not alias.name.startswith("__")}
                found |= {layer_of(f"{module}.{name}".removeprefix(".")) for name in names}
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    layer = layer_of(".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"))
    if layer == "__init__":
        return
    assert layer in LAYERS, f"{layer} has no place in the architecture yet"
    above = {name for name in imported_layers(path) - {layer} if LAYERS.index(name) <= LAYERS.index(layer)}
    assert not above, f"{layer} imports from above: {sorted(above)}"


def test_the_architecture_page_draws_nothing_that_is_not_there():
    there = {".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*")}
    assert set(LAYERS) <= there


def test_the_architecture_page_draws_each_module_of_a_package_that_it_opens():
    for package in {layer.partition(".")[0] for layer in LAYERS if "." in layer}:
        modules = {f"{package}.{path.stem}" for path in (PACKAGE / package).glob("[a-z]*.py")}
        assert modules <= set(LAYERS)


def test_no_module_is_longer_than_500_lines():
    assert not [path for path in PACKAGE.rglob("*.py") if len(path.read_text().splitlines()) > 500]


def test_no_file_of_ours_is_read_or_written_as_a_pickle():
    """torch.load, torch.save, pickle and numpy's object arrays run code when they are read."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        for name in ("import pickle", "torch.load", "torch.save", "allow_pickle", "joblib", "shelve"):
            assert name not in text, f"{path}: {name}"
