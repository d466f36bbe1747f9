"""Write the tables of docs/study.md, and their raw numbers, from the folders of its two recipes.

    dude reproduce recipes/quickstart.yaml
    dude reproduce docs/study/gsm8k-text-recipe.yaml
    python tools/study.py runs/reproduce/quickstart runs/reproduce/gsm8k-text-recipe [another/machines/quickstart]

Each block of the page between `<!-- table NAME -->` and `<!-- end -->` is written anew; NAME is a part of the study and
a table of it. `docs/study/PART.json` has the numbers unrounded. Without folders the tables come from these files.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "study.md"
FOLDER = PAGE.with_suffix("")
PARTS = ("quickstart", "gsm8k-text", "quickstart-again")
KEPT = "quickstart_base"  # the task of what the base knew


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
        "markdown": {"rates": _rates(result["settings"]), "kept": _kept(folder, result["settings"])} | pages,
    }


def _rates(settings: list[dict[str, Any]]) -> str:
    """The development loss at each rate, with the chosen one in bold."""

    def text(setting: dict[str, Any], rate: str) -> str:
        loss = setting["development"].get(rate, "not tried")
        return "–" if loss == "not tried" else "diverged" if loss is None else f"{loss:.4f}"

    return _by_rate(settings, text)


def _kept(folder: Path, settings: list[dict[str, Any]]) -> str:
    """The share of right answers and the perplexity on `KEPT` of the first seed at each rate, where it was scored."""

    def text(setting: dict[str, Any], rate: str) -> str:
        found = sorted(folder.glob(f"{setting['name']}-lr{rate}-seed*/eval/{KEPT}.json"))
        if not found:
            return "–"
        scores = json.loads(found[0].read_text(encoding="utf-8"))["results"][KEPT]
        return f"{scores['acc,none']:.1%}, {scores['perplexity,none']:.3g}"

    return _by_rate(settings, text)


def _by_rate(settings: list[dict[str, Any]], text: Callable[[dict[str, Any], str], str]) -> str:
    rates = sorted({rate for setting in settings for rate in setting["development"]}, key=float)
    lines = ["| setting | " + " | ".join(rates) + " |", "| --- |" + " ---: |" * len(rates)]
    for setting in settings:
        cells = [(text(setting, rate), float(rate) == setting["learning_rate"]) for rate in rates]
        lines.append(f"| {setting['name']} | " + " | ".join(f"**{c}**" if best else c for c, best in cells) + " |")
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
