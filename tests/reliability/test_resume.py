"""An interrupted run ends in the bytes of the undisturbed one; a damaged checkpoint is never used."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
from command import dude, environment
from gsm8k_config import gsm8k_config

from dude_cli.checkpoint import checkpoints, is_valid
from dude_cli.metrics import read_metrics

EXTRA = "  save_steps: 3\n  eval_steps: 5"


def config_in(folder, test_data, **changes):
    folder.mkdir(exist_ok=True)
    return gsm8k_config(test_data, folder, max_steps="12", extra=EXTRA, **changes)


def interrupted(config, run_dir, number, after_step: int) -> subprocess.Popen[str]:
    """Start a training and send it a signal once `after_step` is logged."""
    process = subprocess.Popen(
        [sys.executable, "-m", "dude_cli", "train", str(config)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if any(record.get("step", 0) >= after_step and "loss" in record for record in read_metrics(run_dir)):
            process.send_signal(number)
            break
        time.sleep(0.01)
    process.communicate(timeout=120)
    return process


def losses(run_dir):
    return [(r["step"], r.get("loss"), r.get("grad_norm"), r.get("eval_loss")) for r in read_metrics(run_dir)]


@pytest.fixture(scope="module")
def undisturbed(test_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    done = dude("train", config_in(folder, test_data))
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 75), (signal.SIGKILL, -9)])
def test_an_interrupted_run_ends_in_the_same_bytes(number, code, undisturbed, test_data, tmp_path):
    config, run_dir = config_in(tmp_path, test_data), tmp_path / "run"
    process = interrupted(config, run_dir, number, after_step=4)
    assert process.returncode == code
    assert all(is_valid(folder) for folder in checkpoints(run_dir))
    again = dude("train", config)
    assert again.returncode == 0, again.stderr
    assert "continuing after step" in again.stderr
    name = "adapter/adapter.safetensors"
    assert (run_dir / name).read_bytes() == (undisturbed / name).read_bytes()
    assert losses(run_dir) == losses(undisturbed)


def test_only_the_newest_checkpoints_are_kept(undisturbed):
    assert [folder.name for folder in checkpoints(undisturbed)] == ["step-000012", "step-000009"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing"])
def test_a_damaged_checkpoint_is_set_aside_and_the_older_one_used(damage, undisturbed, test_data, tmp_path):
    import shutil

    config, run_dir = config_in(tmp_path, test_data), tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    shutil.rmtree(run_dir / "adapter")
    (run_dir / "config.yaml").write_text((undisturbed / "config.yaml").read_text())
    file = run_dir / "checkpoints/step-000012/optimizer.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data[:-7] if damage == "truncate" else data)
    again = dude("train", config)
    assert again.returncode == 0, again.stderr
    assert "step-000012 is damaged" in again.stderr
    assert "continuing after step 9" in again.stderr
    name = "adapter/adapter.safetensors"
    assert (run_dir / name).read_bytes() == (undisturbed / name).read_bytes()
    assert losses(run_dir) == losses(undisturbed)
