"""The cut of the quickstart recipe, trained and scored: what each method computes has its own reference numbers."""

from __future__ import annotations

import json
from pathlib import Path

from command import dude_here


def test_the_four_methods_give_their_reference_numbers(tmp_path: Path) -> None:
    done = dude_here("reproduce", "recipes/quickstart-ci.yaml", "--output", tmp_path / "ci", "--jobs", 1, "--json")
    verdicts = {number["name"]: number["verdict"] for number in json.loads(done.stdout)["numbers"]}
    assert done.returncode == 0, f"{verdicts}\n{done.stderr}"
    assert len(verdicts) >= 4
    assert set(verdicts.values()) == {"reproduced"}
