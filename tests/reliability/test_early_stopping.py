"""The adapter of the lowest evaluation is kept where it is to be, and the card says which it is."""

from __future__ import annotations

import io
import shutil

import pytest
import torch
from quickstart_config import quickstart_config
from rich.console import Console
from training import StopAfter, init_here, train_here

from dude_cli.adapter import load_adapter
from dude_cli.config import load_config
from dude_cli.data import collate, prepare_data
from dude_cli.errors import StoppedError
from dude_cli.model import load_model, load_tokenizer
from dude_cli.report.build import build_report
from dude_cli.report.collect import read_run
from dude_cli.system.files import delete
from dude_cli.system.runtime import StopSignal, make_accelerator
from dude_cli.training.checkpoint import checkpoints
from dude_cli.training.loop import train
from dude_cli.training.loss import SummedLoss, with_targets
from dude_cli.training.metrics import read_metrics


def validation_loss(config, adapter) -> float:
    rows = prepare_data(config.data, load_tokenizer(config.model), config.seed).validation
    model = load_model(config.model)
    load_adapter(model, adapter)
    with torch.no_grad():
        return float(SummedLoss(model)(with_targets(collate(list(rows), pad_id=0)))) / int(rows.target_tokens.sum())


def test_early_stopping_keeps_the_lowest_evaluations_adapter(tmp_path):
    """A rate far too high: the loss falls, then rises."""
    extra = "  eval_steps: 1\n  early_stopping_patience: 2\n  warmup_ratio: 0.5\n  logging_steps: 100"
    path = quickstart_config(tmp_path, extra=extra, max_steps="20")
    console = Console(file=io.StringIO(), width=200)
    prepared = init_here(path, "train.learning_rate=0.1", "train.report_to=[tensorboard]")
    summary = train(prepared, make_accelerator(), console, StopSignal())
    assert 0 < summary["kept_step"] < summary["steps"] < 20
    told = f"stopped early after step {summary['steps']} of 20: evaluations since the lowest loss: 2"
    assert told in console.file.getvalue()
    assert summary["lowest_eval_loss"] < summary["last_eval_loss"] - 0.01
    kept = validation_loss(load_config(path), tmp_path / "run/adapter")
    assert kept == pytest.approx(summary["lowest_eval_loss"], rel=1e-5)
    last = read_metrics(tmp_path / "run")[-2:]
    assert [record["step"] for record in last] == [summary["steps"]] * 2
    card = (tmp_path / "run/adapter/README.md").read_text()
    assert f"of step {summary['kept_step']}, evaluation loss {summary['lowest_eval_loss']:.4f}" in card
    assert f"{summary['lowest_eval_loss']:.4f}" in card
    assert list((tmp_path / "run/tensorboard").iterdir())


def test_without_early_stopping_the_best_adapter_is_kept_if_it_is_asked_for(tmp_path):
    """A rate far too high, and all steps: the adapter is that of the lowest evaluation all the same."""
    path = quickstart_config(tmp_path, extra="  eval_steps: 2\n  keep: best\n  warmup_ratio: 0.5", max_steps="8")
    summary = train_here(path, "train.learning_rate=0.1")
    assert 0 < summary["kept_step"] < summary["steps"] == 8
    assert summary["kept_eval_loss"] == summary["lowest_eval_loss"] < summary["last_eval_loss"] - 0.01
    assert validation_loss(load_config(path), tmp_path / "run/adapter") == pytest.approx(summary["kept_eval_loss"])
    card = (tmp_path / "run/adapter/README.md").read_text()
    assert f"of step {summary['kept_step']}, evaluation loss {summary['kept_eval_loss']:.4f}" in card
    (row,) = build_report([read_run(tmp_path / "run")], title="").record()["tables"]["runs"]["rows"]
    assert (row["kept"], row["eval_loss"]) == (summary["kept_step"], summary["kept_eval_loss"])


def test_early_stopping_ends_with_the_last_adapter_if_it_is_asked_for(tmp_path):
    extra = "  eval_steps: 1\n  early_stopping_patience: 1\n  warmup_ratio: 0.0"
    path = quickstart_config(tmp_path, extra=extra)
    summary = train_here(path, TOO_HIGH, "train.keep=last")
    assert summary["kept_step"] == summary["steps"] == 1
    assert summary["kept_eval_loss"] is None
    assert not (tmp_path / "run/best").exists()
    kept = validation_loss(load_config(path), tmp_path / "run/adapter")
    assert kept == pytest.approx(summary["last_eval_loss"], rel=1e-5)
    assert kept > summary["lowest_eval_loss"] + 0.01
    assert read_run(tmp_path / "run").eval_loss == summary["last_eval_loss"]


@pytest.mark.parametrize("steps", [8, 3], ids=["with steps to go", "at its last step"])
def test_a_run_that_gets_patience_on_its_way_keeps_the_best_from_there(steps, tmp_path):
    """With a rate far too high the lowest evaluation is the first one, and its adapter was not kept."""
    path = quickstart_config(tmp_path, extra="  eval_steps: 1\n  warmup_ratio: 0.0", max_steps="8")
    with pytest.raises(StoppedError):
        train_here(path, "train.learning_rate=0.5", "train.save_steps=3", stop=StopAfter(4))
    delete(tmp_path / "run/checkpoints/step-000004")  # that of step 3 has its evaluation behind it
    now = ("train.learning_rate=0.5", f"train.max_steps={steps}", "train.early_stopping_patience=2")
    summary = train_here(path, *now, allow_changes=True)
    evaluations = [(line["eval_loss"], line["step"]) for line in read_metrics(tmp_path / "run") if "eval_loss" in line]
    assert min(evaluations)[1] == 0
    loss, step = min(line for line in evaluations if line[1] >= 3)
    assert summary["kept_step"] == step
    assert validation_loss(load_config(path), tmp_path / "run/adapter") == pytest.approx(loss, rel=1e-5)
    assert f"of step {step}, evaluation loss {loss:.4f}" in (tmp_path / "run/adapter/README.md").read_text()


SPARE = "  eval_steps: 5\n  save_steps: 10\n  early_stopping_patience: 2\n  warmup_ratio: 0.0"


@pytest.fixture(scope="module")
def beyond_its_checkpoint(tmp_path_factory):
    """A run whose best adapter is that of step 15, after its checkpoint of step 10, from which it goes on."""
    folder = tmp_path_factory.mktemp("beyond")
    path = quickstart_config(folder, extra=SPARE, max_steps="100")
    with pytest.raises(StoppedError):
        train_here(path, "train.learning_rate=1e-3", stop=StopAfter(16))
    delete(folder / "run/checkpoints/step-000016")
    return folder


@pytest.fixture
def killed(beyond_its_checkpoint, tmp_path):
    shutil.copytree(beyond_its_checkpoint / "run", tmp_path / "run")
    before = tmp_path / "run/config.yaml"
    before.write_text(before.read_text().replace(str(beyond_its_checkpoint), str(tmp_path)))
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["step-000010"]
    return quickstart_config(tmp_path, extra=SPARE, max_steps="100")


# The loss rises from the first step with it.
TOO_HIGH = "train.learning_rate=0.5"


def test_the_best_adapter_is_one_of_the_steps_that_the_run_has_taken(killed, tmp_path):
    summary = train_here(killed, TOO_HIGH, allow_changes=True)
    assert summary["kept_step"] == 10
    kept = validation_loss(load_config(killed), tmp_path / "run/adapter")
    assert kept == pytest.approx(summary["lowest_eval_loss"], rel=1e-5)


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_the_best_adapter_is_that_of_the_checkpoint_whatever_became_of_the_other(damage, killed, tmp_path):
    file = tmp_path / "run/best/adapter.safetensors"
    if damage == "gone":
        delete(file.parent)
    else:
        file.write_bytes(b"\0" + file.read_bytes()[1:])
    summary = train_here(killed, TOO_HIGH, allow_changes=True)
    kept = validation_loss(load_config(killed), tmp_path / "run/adapter")
    assert kept == pytest.approx(summary["lowest_eval_loss"], rel=1e-5)


def test_losses_on_other_validation_rows_are_not_compared(killed, tmp_path):
    others = "data.validation=[{path: 'embedded:quickstart', split: 'dev[16:30]'}]"
    summary = train_here(killed, TOO_HIGH, others, allow_changes=True)
    losses = {line["step"]: line["eval_loss"] for line in read_metrics(tmp_path / "run") if "eval_loss" in line}
    assert list(losses) == [0, 5, 10, 15, 20]
    assert summary["kept_step"] == 10
    assert summary["lowest_eval_loss"] == min(losses[step] for step in (10, 15, 20))
    assert summary["first_eval_loss"] is None  # of these rows there is none before the training
    assert "before, after, lowest | -," in (tmp_path / "run/adapter/README.md").read_text()
    now = load_config(killed, [others])
    assert validation_loss(now, tmp_path / "run/adapter") == pytest.approx(summary["lowest_eval_loss"], rel=1e-5)


def test_a_run_that_has_more_steps_than_it_is_to_have_now_is_evaluated(tmp_path):
    path = quickstart_config(tmp_path, extra="  save_steps: 2", max_steps="50")
    with pytest.raises(StoppedError):
        train_here(path, stop=StopAfter(4))
    summary = train_here(path, "train.max_steps=4", allow_changes=True)
    assert summary["steps"] == 4
    assert summary["last_eval_loss"] < summary["first_eval_loss"]
    last = [record for record in read_metrics(tmp_path / "run") if "eval_loss" in record][-1]
    assert (last["step"], last["eval_loss"]) == (4, summary["last_eval_loss"])


def test_a_run_that_goes_on_keeps_the_best_adapter_of_before(tmp_path):
    path = quickstart_config(tmp_path, extra="  eval_steps: 1\n  early_stopping_patience: 4\n  warmup_ratio: 0.0")
    with pytest.raises(StoppedError):
        train_here(path, TOO_HIGH, stop=StopAfter(3))
    summary = train_here(path, TOO_HIGH)
    assert (summary["kept_step"], summary["steps"]) == (0, 4)
    kept = validation_loss(load_config(path), tmp_path / "run/adapter")
    assert kept == pytest.approx(summary["first_eval_loss"], rel=1e-5)


def test_a_run_without_patience_keeps_no_best_adapter_for_when_it_gets_it_back(tmp_path):
    path = quickstart_config(tmp_path, extra="  eval_steps: 2\n  save_steps: 2\n  warmup_ratio: 0.0", max_steps="40")
    patient = "train.early_stopping_patience=50"
    for changes, steps in (([patient], 3), ([], 4)):
        with pytest.raises(StoppedError):
            train_here(path, *changes, stop=StopAfter(steps), allow_changes=True)
    assert not (tmp_path / "run/best").exists()
    summary = train_here(path, TOO_HIGH, "train.early_stopping_patience=1", allow_changes=True)
    kept = validation_loss(load_config(path), tmp_path / "run/adapter")
    assert kept == pytest.approx(summary["kept_eval_loss"], rel=1e-5)
    assert summary["kept_step"] > 3
