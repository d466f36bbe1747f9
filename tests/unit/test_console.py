"""What is shown is what the user wrote."""

from __future__ import annotations

from io import StringIO

from rich.console import Group
from rich.table import Table

from dude_cli.console import Output


def test_names_with_brackets_and_colons_are_shown_as_they_are():
    output = Output()
    output.out.file = output.err.file = StringIO()
    table = Table.grid()
    table.add_row("runs/[red]a", ":smile:")
    output.say("reading [bold]rows.jsonl")
    output.progress.print("step 1 [dim]")
    output.result(Group("result in runs/[red]b", table), {})
    text = output.out.file.getvalue()
    for shown in ("reading [bold]rows.jsonl", "step 1 [dim]", "result in runs/[red]b", "runs/[red]a:smile:"):
        assert shown in text
