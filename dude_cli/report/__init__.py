"""Run folders in, one page out: tables, curves and tests, for the screen, for Markdown and for machines."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dude_cli.report.collect import read_run
from dude_cli.report.page import html_page, markdown
from dude_cli.system.files import write_text

__all__ = ["write_report", "write_report_if_possible"]


def write_report(folders: Sequence[Path], html: Path, *, losses: Sequence[float] = ()) -> dict[str, Any]:
    """Write the report of some run folders to `html`, and as Markdown beside it, under the same name with `.md`.

    `losses`, in nats per token, are those that the convergence table looks up. Returns every table with its raw
    numbers, and the paths that were written. The same run folders give the same bytes. Raises UsageError for a folder
    that is no run.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # where it cannot keep a cache, it says so
    from dude_cli.report.build import build_report  # only here: it imports matplotlib

    runs = [read_run(folder) for folder in folders]
    report = build_report(runs, title=_title(folders), losses=losses)
    markdown_path = html.with_suffix(".md")
    write_text(markdown_path, markdown(report))
    write_text(html, html_page(report))
    written = {"html": str(html), "markdown": str(markdown_path), "runs": [str(folder) for folder in folders]}
    return report.record() | written


def write_report_if_possible(folders: Sequence[Path], html: Path, say: Callable[[str], None]) -> None:
    """`write_report` at the end of what matters more: if it fails, one line says so, and nothing else is lost."""
    try:
        write_report(folders, html)
    except Exception as error:
        say(f"no report was written: {type(error).__name__}: {error}")


def _title(folders: Sequence[Path]) -> str:
    return folders[0].absolute().name if len(folders) == 1 else f"{len(folders)} runs"
