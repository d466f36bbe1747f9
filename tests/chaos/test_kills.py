"""SIGKILL at random moments: what comes out are the bytes of the undisturbed run, and each of its numbers.

`make chaos` runs the long form; DUDE_CHAOS_SEED repeats one.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from forked import Ranks, Strike
from quickstart_config import quickstart_config

from dude_cli.training.metrics import read_metrics

IS_LONG = os.environ.get("DUDE_CHAOS") == "long"
SEED = int(os.environ.get("DUDE_CHAOS_SEED", "1"))
STEPS = 40 if IS_LONG else 8
KILLS = {1: 20, 2: 20} if IS_LONG else {1: 1, 2: 1}
RESULT = "adapter/adapter.safetensors"
# The moments of a save: before the manifest, before the rename, before the check, before the oldest goes.
MOMENTS = [
    ("dude_cli.training.checkpoint", "_checksums"),
    ("dude_cli.system.files", "_replace_folder"),
    ("dude_cli.training.checkpoint", "is_valid"),
    ("dude_cli.training.checkpoint", "checkpoints"),
]


def config_in(folder: Path) -> Path:
    sizes = {"max_steps": str(STEPS), "global_batch_size": "3", "per_device_batch_size": "1"}
    return quickstart_config(folder, extra="  save_steps: 2\n  eval_steps: 5\n  early_stopping_patience: 50", **sizes)


def numbers(run_dir: Path) -> list[tuple[object, ...]]:
    return [(r["step"], r.get("loss"), r.get("grad_norm"), r.get("eval_loss")) for r in read_metrics(run_dir)]


@pytest.mark.parametrize("world_size", KILLS)
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bytes(world_size, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ranks = Ranks(["train", config_in(whole)], whole, world_size)
    assert ranks.wait() == [0] * world_size, ranks.said()
    config, choose = config_in(parts), random.Random(f"{SEED} {world_size}")
    print(f"\nDUDE_CHAOS_SEED={SEED}, {world_size} ranks, {STEPS} steps, {KILLS[world_size]} kills")
    for number in range(KILLS[world_size]):
        # The first is in a save, then the moments are drawn.
        how = kill_in_a_save if number == 0 or choose.random() < 0.4 else kill_at_a_step
        print(f"  kill {number + 1}: {how(config, parts, world_size, choose)}")
    ranks = Ranks(["train", config], parts, world_size)
    assert ranks.wait() == [0] * world_size, ranks.said()
    assert (parts / "run" / RESULT).read_bytes() == (whole / "run" / RESULT).read_bytes()
    assert numbers(parts / "run") == numbers(whole / "run")
    print(f"  {len(numbers(parts / 'run'))} lines of numbers and {RESULT} are those of the undisturbed run")


def kill_in_a_save(config: Path, folder: Path, world_size: int, choose: random.Random) -> str:
    """The main rank dies in the first save that it comes to, or in its last steps if there is none."""
    module, name = choose.choice(MOMENTS)
    count = 1 if name == "_checksums" else choose.randint(1, 3)
    ranks = Ranks(["train", config], folder, world_size, {0: Strike(module, name, count, signal.SIGKILL)})
    died = ranks.wait()
    check_the_others(ranks, died)
    return f"rank 0 in {name} ({count}); {at(folder)}"


def kill_at_a_step(config: Path, folder: Path, world_size: int, choose: random.Random) -> str:
    """A rank dies a random time after a random one of the next steps is logged."""
    before, steps, delay_s = at(folder), choose.randint(1, 3), choose.random() * 0.2
    victim = choose.randrange(world_size)
    ranks = Ranks(["train", config], folder, world_size)
    start = before.step
    metrics, deadline = folder / "run/metrics.jsonl", time.monotonic() + 120
    started_s = time.time()
    while time.monotonic() < deadline and ranks.processes[victim].is_alive():
        is_ours = metrics.exists() and metrics.stat().st_mtime > started_s
        if is_ours and max((r["step"] for r in read_metrics(folder / "run")), default=0) >= start + steps:
            break
        time.sleep(0.001)
    time.sleep(delay_s)
    ranks.processes[victim].kill()
    died = ranks.wait()
    check_the_others(ranks, died)
    return f"rank {victim}, {delay_s:.3f} s after a step; before {before}, then {at(folder)}"


def check_the_others(ranks: Ranks, codes: list[int]) -> None:
    """A rank that is left alone ends with an error; that it had nothing left to do is possible too."""
    assert set(codes) <= {-signal.SIGKILL, 1, 0}, ranks.said()
    assert "Traceback" not in ranks.said()


class At:
    """Where a run stands: its last logged step, its newest checkpoint, and whether a save was cut off."""

    def __init__(self, folder: Path) -> None:
        self.step = max((record["step"] for record in read_metrics(folder / "run")), default=0)
        names = [path.name for path in (folder / "run/checkpoints").glob("*")]
        self.saved = max((name for name in names if name.startswith("step-")), default="none")
        self.is_mid_save = any(name.startswith(".") for name in names)

    def __str__(self) -> str:
        return f"step {self.step}, saved {self.saved}{', mid-save' if self.is_mid_save else ''}"


def at(folder: Path) -> At:
    return At(folder)
