"""Two gloo ranks on a CPU: the same rows, rates, losses and gradients as one process."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from unittest import mock

import pytest
from command import dude, dude_here, environment
from quickstart_config import quickstart_config

from dude_cli.checkpoint import checkpoints, is_valid
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


def start_ranks(*arguments: object) -> list[subprocess.Popen[str]]:
    """The same without a launcher, which would pass on a signal to all and hide the exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "dude_cli", *map(str, arguments)],
            env=environment(**world, RANK=rank, LOCAL_RANK=rank),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One epoch of 37 rows in windows of 7: no window and no epoch divides by two ranks."""
    folders = {}
    for name, launch in (("one", dude), ("two", two_ranks)):
        folder = tmp_path_factory.mktemp(name)
        changes = {
            "rows": "37",
            "global_batch_size": "7",
            "per_device_batch_size": "2",
            "max_steps": "6",
        }
        config = quickstart_config(folder, **changes)
        with mock.patch.dict(os.environ, {"DUDE_CACHE_DIR": str(folder / "cache")}):  # each decomposes for itself
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


def test_the_decomposition_of_two_ranks_has_the_bytes_of_one(runs):
    one, two = ((runs[name] / "initial/adapter/adapter.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_one_rank_writes_and_nothing_is_printed_twice(runs):
    lines = (runs["two"] / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(set(lines))


def test_a_signal_to_one_rank_stops_both_at_one_step(tmp_path):
    """Then the newest checkpoint is damaged: the ranks agree on an older one and go on to the end."""
    config, run_dir = quickstart_config(tmp_path, max_steps="30", extra="  save_steps: 1"), tmp_path / "run"
    ranks = start_ranks("train", config)
    try:
        deadline = time.monotonic() + 120
        while len(read_metrics(run_dir)) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        ranks[1].send_signal(signal.SIGTERM)
        errors = [rank.communicate(timeout=60)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [75, 75], errors
    assert "stopped by a signal to another rank" in errors[0]
    assert "stopped by SIGTERM" in errors[1]
    saved = checkpoints(run_dir)
    assert all(is_valid(folder) for folder in saved)
    (saved[0] / "state.json").write_text("{}")
    again = two_ranks("train", config)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("is damaged") == 1
    assert again.stderr.count(f"continuing after step {int(saved[1].name[5:])}") == 1
    assert [r["step"] for r in read_metrics(run_dir) if "loss" in r] == list(range(1, 31))


def test_a_run_goes_on_with_another_number_of_ranks_and_says_so(tmp_path):
    """No library talks in between: accelerate passes on an option that newer torch warns about on each rank."""
    config = quickstart_config(tmp_path, max_steps="6", extra="  save_steps: 3")
    assert dude("train", config).returncode == 0
    shutil.rmtree(tmp_path / "run/adapter")
    shutil.rmtree(tmp_path / "run/checkpoints/step-000006")
    again = two_ranks("train", config)
    assert again.returncode == 0, again.stderr
    assert "on 2 ranks, before on 1" in again.stderr
    assert "Warning" not in again.stderr


def test_two_ranks_reuse_a_decomposition_and_start_anew(tmp_path):
    """`init` first, then a training, then another one over it: no rank may wait for one that went another way."""
    config = quickstart_config(tmp_path, max_steps="2", rows="16")
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


def test_two_ranks_take_the_same_steps_on_a_quantised_base(tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    records = []
    for name, launch in (("one", dude_here), ("two", two_ranks)):
        config = quickstart_config(tmp_path / name, max_steps="2", rows="16")
        done = launch("train", config, "model.quantization=nf4")
        assert done.returncode == 0, done.stderr
        records.append([r for r in read_metrics(tmp_path / name / "run") if "loss" in r])
    for first, second in zip(*records, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-5)
