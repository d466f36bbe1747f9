"""An interrupted run ends in the bytes of the undisturbed one; a damaged checkpoint is never used."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time

import pytest
from forked import Ranks, dude_forked
from quickstart_config import quickstart_config
from training import StopAfter, train_here

from dude_cli.errors import AdapterError, StoppedError, UsageError
from dude_cli.training import optimizer
from dude_cli.training.checkpoint import checkpoints, is_valid
from dude_cli.training.metrics import read_metrics

EXTRA = "  save_steps: 3\n  eval_steps: 5"
RESULT = "adapter/adapter.safetensors"


def interrupted(config, folder, number, after_step: int) -> int:
    """Start a training in `folder` and send it a signal once `after_step` is logged; its exit code."""
    ranks = Ranks(["train", config], folder)
    (process,) = ranks.processes
    deadline = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < deadline:
        if any(record.get("step", 0) >= after_step and "loss" in record for record in read_metrics(folder / "run")):
            os.kill(process.pid, number)
            break
        time.sleep(0.01)
    return ranks.wait()[0]


def losses(run_dir):
    return [(r["step"], r.get("loss"), r.get("grad_norm"), r.get("eval_loss")) for r in read_metrics(run_dir)]


def same_result(one, other) -> bool:
    return (one / RESULT).read_bytes() == (other / RESULT).read_bytes() and losses(one) == losses(other)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    train_here(quickstart_config(folder, extra=EXTRA))
    return folder / "run"


@pytest.fixture
def unfinished(undisturbed, tmp_path):
    """A copy of the run as it was before its result was written, with its checkpoints of step 9 and 12."""
    shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/adapter")
    return quickstart_config(tmp_path, extra=EXTRA)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 75), (signal.SIGKILL, -9)])
def test_an_interrupted_run_ends_in_the_same_bytes(number, code, undisturbed, tmp_path):
    config, run_dir = quickstart_config(tmp_path, extra=EXTRA), tmp_path / "run"
    assert interrupted(config, tmp_path, number, after_step=4) == code
    assert all(is_valid(folder) for folder in checkpoints(run_dir))
    again = dude_forked("train", config)
    assert again.returncode == 0, again.stderr
    assert "continuing after step" in again.stderr
    assert same_result(run_dir, undisturbed)


SETTINGS = {
    "dropout": {"adapter": "{method: dude, rank: 4, dropout: 0.2}"},
    "float16": {"dtype": "float16", "max_steps": "10"},
    "early stopping": {"extra": "  eval_steps: 1\n  early_stopping_patience: 2\n  warmup_ratio: 0.5"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_all_that_a_step_depends_on_is_in_a_checkpoint(name, tmp_path, monkeypatch):
    """With float16, a loss scale that starts too high falls in the first steps, which it skips."""
    monkeypatch.setattr(optimizer, "INITIAL_LOSS_SCALE", 2.0**21)
    overrides = ["train.learning_rate=0.1"] if name == "early stopping" else []
    whole, parts = (quickstart_config(tmp_path / part, **SETTINGS[name]) for part in ("whole", "parts"))
    summary = train_here(whole, *overrides)
    with pytest.raises(StoppedError):
        train_here(parts, *overrides, stop=StopAfter(summary["steps"] - 1))
    train_here(parts, *overrides)
    assert same_result(tmp_path / "parts/run", tmp_path / "whole/run")
    records = read_metrics(tmp_path / "whole/run")
    if name == "float16":
        skipped = [record["step"] for record in records if record.get("skipped")]
        assert skipped[0] == 1
        assert len(skipped) < 9
        assert all(record["grad_norm"] is None for record in records if record.get("skipped"))
    if name == "early stopping":
        assert summary["kept_step"] < summary["steps"] < 12


def test_a_signal_in_the_last_step_leaves_a_finished_run(tmp_path):
    stop = StopAfter(2)
    train_here(quickstart_config(tmp_path, max_steps="2"), "data.validation=null", stop=stop)
    assert stop.name
    assert (tmp_path / "run" / RESULT).is_file()


def test_only_the_newest_checkpoints_are_kept(undisturbed):
    assert [folder.name for folder in checkpoints(undisturbed)] == ["step-000012", "step-000009"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing"])
def test_a_damaged_checkpoint_is_set_aside_and_the_older_one_used(damage, undisturbed, unfinished, tmp_path):
    file = tmp_path / "run/checkpoints/step-000012/optimizer.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    else:
        data[len(data) // 2] ^= 1
        file.write_bytes(data[:-7] if damage == "truncate" else data)
    # The settings that are no part of the result may change on the way.
    train_here(unfinished, f"output_dir={tmp_path / 'run'}")
    assert (tmp_path / "run/checkpoints/step-000012.broken").is_dir()
    assert same_result(tmp_path / "run", undisturbed)


def test_a_run_does_not_go_on_with_other_rows(unfinished, monkeypatch):
    from dude_cli import quickstart

    monkeypatch.setattr(quickstart, "rows", lambda split, rows=quickstart.rows: rows(split)[1:])
    with pytest.raises(UsageError, match=r"data.train \(other rows\), data.validation \(other rows\)"):
        train_here(unfinished)


def test_a_run_does_not_go_on_with_another_base(unfinished, monkeypatch):
    import torch

    from dude_cli.training import prepare

    def other_model(config, device, load=prepare.load_model):
        model = load(config, device)
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        return model

    monkeypatch.setattr(prepare, "load_model", other_model)
    with pytest.raises(AdapterError, match="whose weights are not those"):
        train_here(unfinished)


@pytest.mark.parametrize(("given", "used"), [("2", 2), ("auto", 3)])
def test_only_an_automatic_batch_size_is_the_checkpoints(given, used, tmp_path):
    """Without a checkpoint `auto` would be 4 here."""
    config = quickstart_config(tmp_path, max_steps="2", per_device_batch_size="3", extra="  save_steps: 1")
    with pytest.raises(StoppedError):
        train_here(config, stop=StopAfter(1))
    train_here(config, f"train.per_device_batch_size={given}")
    state = json.loads((tmp_path / "run/checkpoints/step-000002/state.json").read_text())
    assert state["per_device_batch_size"] == used


def test_a_checkpoint_of_another_version_is_explained(unfinished, tmp_path):
    from dude_cli.system import files
    from dude_cli.training.checkpoint import _manifest

    folder = tmp_path / "run/checkpoints/step-000012"
    (folder / "state.json").write_text('{"epoch": 3}')
    files.write_text(folder / "manifest.json", _manifest(folder))
    with pytest.raises(AdapterError, match="another version"):
        train_here(unfinished)
