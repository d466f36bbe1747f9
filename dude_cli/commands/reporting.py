"""What `dude report` does: the page of some runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dude_cli.console import Output
from dude_cli.errors import UsageError


def report(folders: Sequence[Path], out: Path | None, losses: Sequence[float], *, output: Output) -> None:
    """Write the page of some runs, and the same as Markdown beside it."""
    from dude_cli.report import write_report

    out = out or (folders[0] / "report.html" if len(folders) == 1 else Path("report.html"))
    if out.suffix != ".html":
        raise UsageError(
            f"the page is an HTML file, and `{out.name}` does not end in .html",
            where=f"--out {out}",
            fix=f"name it {out.with_suffix('.html').name}; the Markdown is written beside it",
        )
    document = write_report(folders, out, losses=losses)
    output.result(f"{document['html']}\n{document['markdown']}", document)
