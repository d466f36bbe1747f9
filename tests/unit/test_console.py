"""What is shown is what the user wrote."""

from __future__ import annotations

import itertools
from io import StringIO
from types import SimpleNamespace

from rich.console import Group
from rich.table import Table

from dude_cli import console
from dude_cli.console import Output


def test_progress_is_a_few_plain_lines_without_a_terminal_and_nothing_when_quiet(monkeypatch):
    clock = itertools.count(1000, 0.5)  # each step takes half a second
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    for is_quiet, wanted in ((False, [f"layer {done}/70" for done in (1, 21, 41, 61)]), (True, [])):
        output = Output(is_quiet=is_quiet)
        output.out.file, output.err.file = StringIO(), StringIO()
        with output.counter("layer") as count:
            for number in range(1, 71):
                count(number, 70)
        assert output.err.file.getvalue().splitlines() == wanted
        assert output.out.file.getvalue() == ""


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


def test_without_a_terminal_an_entry_is_one_line_without_spaces_at_its_end():
    output = Output()
    output.out.file = StringIO()
    table = Table.grid(padding=(0, 2))
    table.add_row("configs/a.yaml", "long " * 60)
    table.add_row("configs/b.yaml", "short")
    output.result(Group("two:", table), {})
    lines = output.out.file.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["two:", "configs/a.yaml", "configs/b.yaml"]
    assert all(line == line.rstrip() for line in lines)
    assert lines[1].count("long") == 60
