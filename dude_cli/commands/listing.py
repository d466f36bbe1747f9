"""What `dude ls` and `dude cp` do."""

from __future__ import annotations

from pathlib import Path

from dude_cli import shipped
from dude_cli.console import Output


def list_shipped(output: Output) -> None:
    """The shipped configs and recipes, with what each is for."""
    from rich.table import Table

    found = shipped.list_shipped()
    table = Table.grid(padding=(0, 2))
    for name, description in found:
        table.add_row(name, description)
    output.result(table, [{"name": name, "description": description} for name, description in found])


def copy_shipped(name: str, dest: Path, output: Output) -> None:
    """Copy a shipped config or recipe, to edit it."""
    copied = shipped.copy_shipped(name, dest)
    output.result(f"copied to {copied}", {"path": str(copied)})
