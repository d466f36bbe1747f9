"""What a command says in the end is read as it is meant."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dude_cli.export.probe import Difference
from dude_cli.export.report import ExportReport, ImportReport, export_shown, import_shown
from dude_cli.system.memory import PeakMemory
from dude_cli.training.init_report import memory_line
from dude_cli.training.metrics import summary_lines


def test_the_allowance_stands_beside_the_share_that_it_is_of() -> None:
    found = Difference(largest=2e-05, largest_logit=13.0, same_top_token=1.0)
    line = "largest logit difference 2e-05, 1.5e-06 of the largest logit (allowed 1e-05); same next token at 100.0% "
    exported = ExportReport("merged", Path("out"), "float32", found, 1e-5, None)
    imported = ImportReport(Path("out"), "lora", 8, "float32", found, 1e-5)
    assert line in export_shown(exported)
    assert line in import_shown(imported)
    assert "allowed" not in str(found)


@pytest.mark.parametrize(
    ("device", "told"), [("cpu", "2 MiB (resident set, what libraries take too), "), ("cuda", "2 MiB, ")]
)
def test_memory_that_is_not_of_tensors_alone_is_said_to_be_so(device: str, told: str) -> None:
    measured = PeakMemory(torch.device(device)).definition
    memory = {"predicted_training_bytes": 2**20, "measured_training_bytes": 2**21, "measured": measured}
    assert memory_line({"memory": memory}) == [f"peak memory of the training: {told}predicted 1 MiB"]


SUMMARY = {"steps": 20, "kept_step": 20, "loss": 0.5, "first_eval_loss": 3.0, "last_eval_loss": 1.0}


def lines(**changes: float | None) -> list[str]:
    return summary_lines(SUMMARY | {"lowest_eval_loss": 1.0} | changes)


def test_a_training_says_how_far_the_losses_fell() -> None:
    assert lines() == [
        "20 steps, the last one's loss 0.5000",
        "evaluation loss 3.0000 before, 1.0000 at the end, 1.0000 at the lowest",
    ]
    assert lines(first_eval_loss=None)[1] == "evaluation loss 1.0000 at the end, 1.0000 at the lowest"
    assert len(lines(first_eval_loss=None, last_eval_loss=None, lowest_eval_loss=None)) == 1
    assert lines(loss=None) == []


def test_a_training_that_kept_another_step_or_made_the_model_worse_says_so() -> None:
    worse = {"last_eval_loss": 4.0, "lowest_eval_loss": 2.0}
    assert lines(**worse)[2].startswith("warning: the evaluation loss is higher than before the training")
    kept = lines(**worse, kept_step=12, kept_eval_loss=2.5)
    assert kept[2:] == ["the adapter is that of step 12, evaluation loss 2.5000"]
