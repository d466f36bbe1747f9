"""Data flows one way: a module imports only from those below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "dude_cli"

# Top to bottom, as docs/architecture.md draws them.
LAYERS = [
    "__main__",
    "cli",
    "commands",
    "scoring",
    "exchanging",
    "reproduce",
    "report",
    "init_report",
    "evaluation",
    "export",
    "train",
    "prepare",
    "estimate",
    "live_bytes",
    "start",
    "decompositions",
    "init_from",
    "disk",
    "resume",
    "run_dir",
    "checkpoint",
    "train_step",
    "uncalled",
    "sharding",
    "loss",
    "metrics",
    "schedule",
    "model_card",
    "smoke",
    "conversation",
    "generate",
    "target",
    "data",
    "model",
    "adapter",
    "config",
    "console",
    "shipped",
    "template",
    "memory",
    "ranks",
    "runtime",
    "launch",
    "gpu",
    "cpu",
    "lock",
    "files",
    "cache_dir",
    "stopping",
    "garbage",
    "errors",
    "quickstart",
]


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_layers(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            if node.module == "dude_cli":
                found |= {alias.name for alias in node.names if not alias.name.startswith("__")}
            elif node.module.startswith("dude_cli."):
                found.add(node.module.split(".")[1])
    return found


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    layer = layer_of(path)
    if layer == "__init__":
        return
    assert layer in LAYERS, f"{layer} has no place in the architecture yet"
    above = {name for name in imported_layers(path) - {layer} if LAYERS.index(name) <= LAYERS.index(layer)}
    assert not above, f"{layer} imports from above: {sorted(above)}"


def test_the_architecture_page_has_the_same_picture():
    page = (PACKAGE.parent / "docs/architecture.md").read_text().partition("## The method")[0]
    drawn = [
        line.split()[0].removesuffix("/").removesuffix(".py") for line in page.splitlines() if line.startswith("      ")
    ]
    assert [name for name in drawn if name in LAYERS] == LAYERS[1:]


def test_no_module_is_longer_than_500_lines():
    assert not [path for path in PACKAGE.rglob("*.py") if len(path.read_text().splitlines()) > 500]


def test_no_file_of_ours_is_read_or_written_as_a_pickle():
    """torch.load, torch.save, pickle and numpy's object arrays run code when they are read."""
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        for name in ("import pickle", "torch.load", "torch.save", "allow_pickle", "joblib", "shelve"):
            assert name not in text, f"{path}: {name}"
