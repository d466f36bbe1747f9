"""Write the tables of docs/study.md, and their raw numbers, from the folders of its two recipes.

    dude reproduce recipes/quickstart.yaml
    dude reproduce docs/study/gsm8k-text-recipe.yaml
    python tools/study.py runs/reproduce/quickstart runs/reproduce/gsm8k-text-recipe

Each block of the page between `<!-- table NAME -->` and `<!-- end -->` is written anew; NAME is a part of the study and
a table of it. `docs/study/PART.json` has the numbers unrounded. Without folders the tables come from these files.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "study.md"
FOLDER = PAGE.with_suffix("")
PARTS = ("quickstart", "gsm8k-text")


def read_part(folder: Path) -> dict[str, Any]:
    """The tables of one recipe's folder, as Markdown and as numbers: of the chosen runs, and of the search."""
    from dude_cli.report.build import build_report
    from dude_cli.report.collect import read_run
    from dude_cli.report.page import markdown_table

    result = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    chosen = [read_run(folder / name) for setting in result["settings"] for name in setting["runs"]]
    report = build_report(chosen, title=folder.name)
    tables = [table for section in report.sections for table in section.tables if table.rows]
    pages = {table.name: markdown_table(table) for table in tables}
    return {
        "commits": sorted({str(run.environment.get("git_commit")) for run in chosen}),
        "recipe": result,
        "tables": report.record()["tables"],
        "markdown": {"rates": _rates(result["settings"])} | pages,
    }


def _rates(settings: list[dict[str, Any]]) -> str:
    """The development loss at each rate, with the chosen one in bold."""
    rates = sorted({rate for setting in settings for rate in setting["development"]}, key=float)
    lines = ["| setting | " + " | ".join(rates) + " |", "| --- |" + " ---: |" * len(rates)]
    for setting in settings:
        cells = []
        for rate in rates:
            loss = setting["development"].get(rate, "not tried")
            text = "–" if loss == "not tried" else "diverged" if loss is None else f"{loss:.4f}"
            cells.append(f"**{text}**" if float(rate) == setting["learning_rate"] else text)
        lines.append(f"| {setting['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def render(text: str, parts: dict[str, dict[str, Any]]) -> str:
    """`text` with each block written anew."""

    def block(found: re.Match[str]) -> str:
        part, table = found[1].split()
        return f"<!-- table {found[1]} -->\n\n{parts[part]['markdown'][table].rstrip()}\n\n<!-- end -->"

    return re.sub(r"<!-- table (.+?) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


def main(folders: list[str]) -> None:
    for part, folder in zip(PARTS, folders, strict=False):
        # Where the folders lay is nobody's concern, and another machine's tables are to differ in numbers alone.
        text = json.dumps(read_part(Path(folder)), indent=1, ensure_ascii=False).replace(f"{Path(folder)}/", "")
        (FOLDER / f"{part}.json").write_text(text + "\n", encoding="utf-8")
    parts = {part: json.loads((FOLDER / f"{part}.json").read_text(encoding="utf-8")) for part in PARTS}
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), parts), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
