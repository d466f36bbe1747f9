"""What a run says that it will do, beside what its steps take."""

from __future__ import annotations

from pathlib import Path

from quickstart_config import quickstart_config
from training import init_here

from dude_cli.config import load_config
from dude_cli.training.forecast import estimate


def test_a_step_takes_no_more_rows_than_there_are(tmp_path: Path) -> None:
    config = quickstart_config(tmp_path, rows="6", global_batch_size="64", per_device_batch_size="4")
    said: list[str] = []
    plan = init_here(config, say=said.append).plan
    assert (plan.global_batch_size, plan.per_device_batch_size, plan.gradient_accumulation_steps) == (6, 4, 2)
    assert "note: train.global_batch_size is 64, and there are 6 rows: each step takes all of them" in said
    batch = estimate(load_config(config, ["train.per_device_batch_size=auto"]), world_size=2)[0].batch
    assert (batch.rows, batch.gradient_accumulation_steps) == (3, 1)
    said.clear()
    init_here(config, "train.global_batch_size=6", say=said.append)
    assert not [line for line in said if "global_batch_size" in line]
