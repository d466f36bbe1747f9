"""Two gloo ranks on a CPU: the same rows, rates, losses and gradients as one process."""

from __future__ import annotations

import subprocess
import sys

import pytest
from command import dude, environment
from gsm8k_config import gsm8k_config

from dude_cli.metrics import read_metrics


def two_ranks(*arguments: object) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "dude_cli"]
    return subprocess.run(
        [sys.executable, *launcher, *map(str, arguments)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def runs(test_data, tmp_path_factory):
    """One epoch of 37 rows in windows of 7: no window and no epoch divides by two ranks."""
    folders = {}
    for name, launch in (("one", dude), ("two", two_ranks)):
        folder = tmp_path_factory.mktemp(name)
        changes = {
            "train_split": "train[:37]",
            "global_batch_size": "7",
            "per_device_batch_size": "2",
            "max_steps": "6",
        }
        config = gsm8k_config(test_data, folder, **changes)
        done = launch("train", config)
        assert done.returncode == 0, done.stderr
        folders[name] = folder / "run"
    return folders


def test_losses_and_gradient_norms_are_equal_and_rates_identical(runs):
    one, two = ([r for r in read_metrics(runs[name]) if "loss" in r] for name in ("one", "two"))
    assert [r["step"] for r in one] == [r["step"] for r in two] == [1, 2, 3, 4, 5, 6]
    for first, second in zip(one, two, strict=True):
        assert first["learning_rate"] == second["learning_rate"]
        assert first["target_tokens"] == second["target_tokens"]
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)
        # Adam turns rounding into steps of full size where a gradient is nearly zero, so later steps drift a little.
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-5 if first["step"] <= 2 else 1e-3)


def test_evaluation_losses_are_equal(runs):
    one, two = ([r["eval_loss"] for r in read_metrics(runs[name]) if "eval_loss" in r] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-5)


def test_one_rank_writes_and_nothing_is_printed_twice(runs):
    lines = (runs["two"] / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(set(lines))


def test_two_ranks_reuse_a_decomposition_and_start_anew(test_data, tmp_path):
    """`init` first, then a training, then another one over it: no rank may wait for one that went another way."""
    config = gsm8k_config(test_data, tmp_path, max_steps="2", train_split="train[:16]")
    assert dude("init", config).returncode == 0
    first = two_ranks("train", config)
    assert first.returncode == 0, first.stderr
    assert "reusing the decomposition" in first.stderr
    result = (tmp_path / "run/adapter/adapter.safetensors").read_bytes()
    again = two_ranks("train", config, "--overwrite")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "run/adapter/adapter.safetensors").read_bytes() == result
    finished = two_ranks("train", config)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("finished") == 1
