from __future__ import annotations

import resource

import pytest
from command import dude_here
from forked import Ranks
from quickstart_config import quickstart_config
from training import train_here

from dude_cli.errors import DivergedError

# The first step makes A and B 1e33 times as large.
OVERFLOWING = ("train.learning_rate=1000", "train.weight_decay=1e30", "train.warmup_ratio=0")


def test_a_loss_that_is_not_finite_stops_before_the_step_and_names_the_rows(tmp_path):
    """There is no validation data, so only the step itself can find it."""
    settings = ["data.validation=null", *OVERFLOWING, "train.max_grad_norm=null"]
    stopped = dude_here("train", quickstart_config(tmp_path), *settings)
    assert stopped.returncode == 4, stopped.stderr
    assert "no weight was changed" in stopped.stderr
    assert "training rows" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert not (tmp_path / "run/adapter").exists()


def test_an_evaluation_loss_that_is_not_finite_stops_the_run(tmp_path):
    settings = [*OVERFLOWING, "train.eval_steps=1"]
    with pytest.raises(DivergedError, match=r"the evaluation loss is (nan|inf) after step 1"):
        train_here(quickstart_config(tmp_path), *settings)
    assert not (tmp_path / "run/adapter").exists()


class SmallFiles:
    """A limit on the size of one file stands for a full disk: both fail in the same write."""

    def arm(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    ranks = Ranks(["train", quickstart_config(tmp_path)], tmp_path, strikes={0: SmallFiles()})
    assert ranks.wait() == [5], ranks.said()
    assert "Traceback" not in ranks.said()
    assert not [path for path in tmp_path.rglob("*") if ".partial" in path.name]
