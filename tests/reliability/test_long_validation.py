"""Validation rows may be far longer than training rows: an evaluation takes fewer of them at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from quickstart_config import quickstart_config
from training import train_here

from dude_cli.training import plan, validation
from dude_cli.training.metrics import read_metrics


def write_rows(path: Path, words: list[int]) -> str:
    rows = [{"prompt": "Add: ", "completion": " ".join("12" for _ in range(count))} for count in words]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"[{{path: {path}}}]"


def trained(folder: Path, batch: str, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[float]]:
    """How many rows each forward of an evaluation had, and the losses that it gave."""
    config, sizes = quickstart_config(folder, max_steps="1", per_device_batch_size=batch), list[int]()
    rows = {
        "train": write_rows(folder / "train.jsonl", [4] * 8),
        "validation": write_rows(folder / "dev.jsonl", [40] * 4),
    }

    def equal_batches(*args: Any) -> Iterator[Any]:
        for some in prepare_batches(*args):
            sizes.append(len(some))
            yield some

    with monkeypatch.context() as patched:
        prepare_batches = validation.equal_batches
        patched.setattr(validation, "equal_batches", equal_batches)
        # Four training rows at once, of up to 16 tokens; one validation row, of 40 and more.
        patched.setattr(plan, "AUTO_BATCH_TOKENS", 64)
        train_here(config, *(f"data.{name}={path}" for name, path in rows.items()))
    return sizes, [line["eval_loss"] for line in read_metrics(folder / "run") if "eval_loss" in line]


def test_an_automatic_batch_is_smaller_where_the_validation_rows_are_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, found = trained(tmp_path / "auto", "auto", monkeypatch)
    assert sizes == [1] * 4 * 2
    sizes, expected = trained(tmp_path / "four", "4", monkeypatch)
    assert sizes == [4] * 2  # a number that is given is taken as it is
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("rows", "longest", "size"), [(8, 2048, 8), (8, 100, 8), (8, 8192, 2), (4, 8192, 1), (1, 20_000, 1)]
)
def test_it_shrinks_with_the_batch_of_the_training(rows: int, longest: int, size: int) -> None:
    """The plan had 8 rows of up to 2048 tokens; when memory ran out they became 4."""
    assert plan.evaluation_batch(rows, planned=8, longest_row=longest) == size
