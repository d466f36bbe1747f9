"""A signal at each stage of a training, to one rank or to all: exit code 75, a whole checkpoint, and the same end.

`make chaos` runs every signal at every stage; the short form one signal for each.
"""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path

import pytest
from forked import STAGES, Ranks, Strike
from quickstart_config import quickstart_config

from dude_cli.training.checkpoint import checkpoints, is_valid
from dude_cli.training.metrics import read_metrics

IS_LONG = os.environ.get("DUDE_CHAOS") == "long"
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]
BEFORE_STEP_1 = ("data", "load", "decomposition", "first evaluation")
RESULT = "adapter/adapter.safetensors"
# (stage, signal, number of ranks, the ranks that get it); only the main rank saves.
ALL = [
    (stage, number, count, struck)
    for stage, number, (count, struck) in itertools.product(STAGES, SIGNALS, [(1, (0,)), (2, (1,)), (2, (0, 1))])
    if stage != "save" or 0 in struck
]
SHORT = [
    ("data", signal.SIGTERM, 1, (0,)),
    ("load", signal.SIGUSR2, 2, (0, 1)),
    ("decomposition", signal.SIGINT, 1, (0,)),
    ("first evaluation", signal.SIGTERM, 1, (0,)),
    ("step", signal.SIGUSR1, 2, (1,)),
    ("evaluation", signal.SIGUSR2, 2, (1,)),
    ("save", signal.SIGINT, 1, (0,)),
]


def config_in(folder: Path) -> Path:
    extra = "  save_steps: 2\n  eval_steps: 4\n  early_stopping_patience: 50"
    return quickstart_config(folder, max_steps="6", per_device_batch_size="2", extra=extra)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """By the number of ranks: their sums are rounded otherwise."""
    folders = {count: tmp_path_factory.mktemp(f"ranks{count}") for count in (1, 2)}
    for count, folder in folders.items():
        ranks = Ranks(["train", config_in(folder)], folder, count)
        assert ranks.wait() == [0] * count, ranks.said()
    return {count: folder / "run" for count, folder in folders.items()}


def numbers(run_dir: Path) -> list[tuple[object, ...]]:
    return [(r["step"], r.get("loss"), r.get("grad_norm"), r.get("eval_loss")) for r in read_metrics(run_dir)]


@pytest.mark.parametrize(("stage", "number", "count", "struck"), ALL if IS_LONG else SHORT)
def test_a_signal_at_a_stage(stage, number, count, struck, undisturbed, tmp_path, monkeypatch):
    monkeypatch.setenv("DUDE_CACHE_DIR", str(tmp_path / "cache"))  # there is something to decompose
    config, run_dir = config_in(tmp_path), tmp_path / "run"
    ranks = Ranks(["train", config], tmp_path, count, {rank: Strike.at(stage, number) for rank in struck})
    assert ranks.wait() == [75] * count, ranks.said()
    assert "Traceback" not in ranks.said()
    assert "stopped" in ranks.logs[struck[0]].read_text()
    if stage not in BEFORE_STEP_1:
        others = [ranks.logs[rank].read_text() for rank in range(count) if rank not in struck]
        assert all("stopped by a signal to another rank" in log for log in others)
    saved = checkpoints(run_dir)
    assert all(is_valid(folder) for folder in saved)
    if stage in BEFORE_STEP_1:
        assert not saved
    else:
        # What was done is saved: nothing after it is in the log.
        assert saved[0].name == f"step-{read_metrics(run_dir)[-1]['step']:06d}"
    again = Ranks(["train", config], tmp_path, count)
    assert again.wait() == [0] * count, again.said()
    assert ("continuing after step" in again.said()) == bool(saved)
    assert numbers(run_dir) == numbers(undisturbed[count])
    assert (run_dir / RESULT).read_bytes() == (undisturbed[count] / RESULT).read_bytes()


def test_a_second_interrupt_stops_at_once_and_takes_the_other_rank_along(tmp_path):
    """The first is only remembered, up to the end of the step; the second comes within the same step."""
    twice = Twice("dude_cli.training.step", "accumulate_gradients", 2, signal.SIGINT)
    ranks = Ranks(["train", config_in(tmp_path)], tmp_path, 2, {1: twice})
    assert ranks.wait() == [75, 75], ranks.said()
    assert "Traceback" not in ranks.said()
    assert "what was not saved is lost" in ranks.logs[1].read_text()
    assert not checkpoints(tmp_path / "run")


class Twice(Strike):
    def arm(self) -> None:
        super().arm()
        Strike(self.module, self.name, self.count, self.number).arm()
