"""What trackers are given, the numbers of metrics.jsonl, as one run however many parts it has; what fails in them."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
from command import dude
from quickstart_config import quickstart_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training import StopAfter, train_here
from wandb.proto import wandb_internal_pb2

from dude_cli.config import load_config
from dude_cli.errors import StoppedError, UsageError
from dude_cli.system.files import delete
from dude_cli.training import trackers
from dude_cli.training.metrics import read_metrics
from dude_cli.training.run_dir import clear_run
from dude_cli.training.trackers import Trackers, check_trackers

BLOCK = 32768  # of LevelDB's log format, which wandb's files have


@pytest.fixture(autouse=True)
def wandb_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def wandb_records(folder: Path) -> list[Any]:
    """What wandb has stored to be sent, part after part of the run; its process writes the end a little later."""
    paths = sorted((folder / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.parent.name)
    return [record for path in paths for record in _whole(path)]


def _whole(path: Path) -> list[Any]:
    for _ in range(300):
        records = list(_records(path.read_bytes()))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        time.sleep(0.1)
    raise AssertionError(f"{path} has no end")


def _records(data: bytes) -> Iterator[Any]:
    place, message = 7, b""
    while place + 7 <= len(data):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        message += data[place + 7 : place + 7 + length]
        place += 7 + length
        if place > len(data):  # it is being written
            return
        if kind in (1, 4):  # a whole record, or the last part of one
            yield wandb_internal_pb2.Record.FromString(message)
            message = b""


def wandb_history(folder: Path) -> list[dict[str, float]]:
    return [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in wandb_records(folder)
        if record.WhichOneof("record_type") == "history"
    ]


def numbers(record: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in record.items() if key != "kept" and value is not None}


def own(record: dict[str, float]) -> dict[str, float]:
    """Without what wandb adds."""
    return {key: value for key, value in record.items() if not key.startswith("_")}


def test_both_have_the_numbers_of_metrics_jsonl(tmp_path):
    path = quickstart_config(tmp_path, extra="  eval_steps: 2\n  early_stopping_patience: 5", max_steps="3")
    train_here(path, "train.report_to=[tensorboard,wandb]")
    records = [numbers(record) for record in read_metrics(tmp_path / "run")]
    assert any("kept" in record for record in read_metrics(tmp_path / "run"))
    assert {"step", "loss", "learning_rate", "grad_norm"} <= records[1].keys()
    assert [own(record) for record in wandb_history(tmp_path / "run")] == [pytest.approx(record) for record in records]
    board = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    for key in {key for record in records for key in record} - {"step"}:
        found = {event.step: event.value for event in board.Scalars(key)}
        assert found == pytest.approx({record["step"]: record[key] for record in records if key in record})


def test_wandb_is_told_what_runs_and_its_axis_is_the_step(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    path = quickstart_config(tmp_path, max_steps="1")
    train_here(path, "train.report_to=[wandb]")
    records = wandb_records(tmp_path / "run")
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name) == ("mine", "run")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    given = load_config(path, ["train.report_to=[wandb]"]).model_dump(mode="json")
    assert {key: config[key] for key in given} == given
    axes = {record.metric.glob_name: record.metric.step_metric for record in records if record.HasField("metric")}
    assert axes["*"] == "step"


def test_a_run_that_goes_on_is_the_same_one_and_a_new_one_another(tmp_path):
    """The step that is done again, for want of its checkpoint, replaces the first one or stands beside it."""
    path = quickstart_config(tmp_path, max_steps="4", extra="  save_steps: 2")
    change, folder = "train.report_to=[tensorboard,wandb]", tmp_path / "run"
    with pytest.raises(StoppedError):
        train_here(path, change, stop=StopAfter(3))
    delete(folder / "checkpoints/step-000003")
    train_here(path, change)
    runs = [record.run for record in wandb_records(folder) if record.WhichOneof("record_type") == "run"]
    assert len(runs) == 2
    assert len({run.run_id for run in runs}) == 1
    assert [record["step"] for record in wandb_history(folder) if "loss" in record] == [1, 2, 3, 3, 4]
    board = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4]
    clear_run(load_config(path))
    train_here(path, change)
    (anew,) = [record.run for record in wandb_records(folder) if record.WhichOneof("record_type") == "run"]
    assert anew.run_id != runs[0].run_id


class Failing:
    """A tracker that fails where it is told to."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __call__(self, config: Any, from_step: int) -> Failing:
        self.fail("start")
        return self

    def log(self, step: int, values: Any) -> None:
        self.fail("log")

    def close(self, failed: bool) -> None:
        self.fail("close")

    def fail(self, where: str) -> None:
        if where == self.where:
            raise OSError(f"no {where}")


@pytest.mark.parametrize("where", ["start", "log", "close"])
def test_no_training_ends_for_a_tracker(tmp_path, monkeypatch, where):
    monkeypatch.setitem(trackers._KINDS, "wandb", Failing(where))
    summary = train_here(quickstart_config(tmp_path, max_steps="2"), "train.report_to=[wandb,tensorboard]")
    assert summary["steps"] == 2
    assert len(EventAccumulator(str(tmp_path / "run/tensorboard")).Reload().Scalars("loss")) == 2


def test_a_tracker_that_fails_is_told_of_once(tmp_path, monkeypatch):
    monkeypatch.setitem(trackers._KINDS, "wandb", Failing("log"))
    said: list[str] = []
    both = Trackers(load_config(quickstart_config(tmp_path), ["train.report_to=[wandb]"]), 0, said.append)
    for step in (1, 2):
        both.log(step, {"loss": 1.0})
    both.close(failed=False)
    assert said == ["warning: wandb gets no numbers from now on, metrics.jsonl does: no log"]


def test_the_adapter_is_written_before_a_tracker_is_waited_for(tmp_path, monkeypatch):
    """wandb uploads then what it has not yet: without a network it may be a minute."""
    seen = []
    tracker = Failing("nowhere")
    tracker.close = lambda failed: seen.append(((tmp_path / "run/adapter").is_dir(), failed))
    monkeypatch.setitem(trackers._KINDS, "wandb", tracker)
    train_here(quickstart_config(tmp_path, max_steps="1"), "train.report_to=[wandb]")
    assert seen == [(True, False)]


def test_wandb_knows_a_run_that_failed_or_stopped_from_a_finished_one(tmp_path):
    path = quickstart_config(tmp_path, max_steps="2")
    with pytest.raises(StoppedError):
        train_here(path, "train.report_to=[wandb]", stop=StopAfter(1))
    train_here(path, "train.report_to=[wandb]")
    records = wandb_records(tmp_path / "run")
    assert [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"] == [1, 0]


@pytest.mark.parametrize("error", [TypeError("unexpected keyword argument 'prompt'"), ValueError("mode: ofline")])
def test_a_wandb_that_cannot_be_used_is_no_bug(monkeypatch, error):
    def setup() -> None:
        raise error

    monkeypatch.setattr(wandb, "setup", setup)
    with pytest.raises(UsageError, match=r"(?s)Weights & Biases cannot be used: .*wandb>=0\.31"):
        check_trackers(["wandb"])


def test_without_a_user_wandb_is_refused_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    done = dude("train", quickstart_config(tmp_path), "train.report_to=[wandb]")
    assert done.returncode == 2
    assert "nobody is logged in to Weights & Biases" in done.stderr
    assert "run `wandb login`" in done.stderr
    assert "loading" not in done.stderr
    assert not (tmp_path / "run/wandb").exists()


def test_a_tracker_that_is_not_installed_is_a_usage_error(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_trackers([])
    for name in ("tensorboard", "wandb"):
        with pytest.raises(UsageError, match=f"pip install {name}"):
            check_trackers([name])
