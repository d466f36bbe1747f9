"""The page of the study: its tables are those of the numbers beside it, and those come from run folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from report_runs import write_run

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "tools"))

import study  # noqa: E402


def recipe_folder(folder: Path) -> Path:
    settings = []
    for method, losses in (("lora", {1e-3: 0.9, 2e-3: 0.6}), ("dude", {1e-3: 0.5, 4e-3: 0.7})):
        best = min(losses, key=lambda rate: losses[rate])
        names = [f"{method}-{seed}" for seed in (1, 2)]
        for seed, name in enumerate(names, start=1):
            write_run(folder / name, method=method, seed=seed, learning_rate=best, final_loss=losses[best])
        development = {f"{rate:g}": loss for rate, loss in losses.items()}
        settings.append({"name": method, "learning_rate": best, "development": development, "runs": names})
    (folder / "report.json").write_text(json.dumps({"recipe": "mine", "settings": settings}))
    return folder


def test_the_tables_come_from_the_chosen_runs_of_a_recipes_folder(tmp_path: Path) -> None:
    part = study.read_part(recipe_folder(tmp_path))
    assert "| lora | 0.9000 | **0.6000** | – |\n| dude | **0.5000** | – | 0.7000 |" in part["markdown"]["rates"]
    rows = part["tables"]["headline"]["rows"]
    assert [row["runs"] for row in rows] == [2, 2]
    page = study.render(
        "before\n<!-- table quickstart headline -->\nold\n<!-- end -->\nafter", {"quickstart": part, "gsm8k-text": part}
    )
    assert part["markdown"]["headline"].rstrip() in page
    assert "old" not in page
    assert page.startswith("before\n")
    assert page.endswith("\nafter")


@pytest.mark.parametrize("part", study.PARTS)
def test_the_page_has_the_tables_of_the_numbers_beside_it(part: str) -> None:
    parts = {name: json.loads((study.FOLDER / f"{name}.json").read_text(encoding="utf-8")) for name in study.PARTS}
    page = study.PAGE.read_text(encoding="utf-8")
    assert f"<!-- table {part} " in page
    assert study.render(page, parts) == page, "run: python tools/study.py"
