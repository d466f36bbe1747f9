"""A run says how long it took to its first step, and takes its rows as they are encoded already."""

from __future__ import annotations

import shutil

import pytest
from quickstart_config import quickstart_config
from training import StopAfter, init_here, train_here

from dude_cli.data import row_encoder
from dude_cli.data.encode import TextEncoder
from dude_cli.errors import StoppedError
from dude_cli.model import load_shape
from dude_cli.system.runtime import process_age_s
from dude_cli.training import estimate, prepare
from dude_cli.training.metrics import read_metrics

RESULT = "adapter/adapter.safetensors"


def test_the_time_to_the_first_step_is_in_the_log_and_in_the_summary(tmp_path):
    config = quickstart_config(tmp_path, max_steps="6", extra="  save_steps: 1\n  logging_steps: 2")
    before = process_age_s()
    with pytest.raises(StoppedError):
        train_here(config, stop=StopAfter(3))
    middle = process_age_s()
    summary = train_here(config)
    found = {
        record["step"]: record["first_step_s"] for record in read_metrics(tmp_path / "run") if "first_step_s" in record
    }
    assert list(found) == [2, 4]  # the first logged step of each part
    assert before < found[2] < middle < found[4] < process_age_s()
    assert summary["first_step_s"] == found[4]


def test_the_forecast_is_of_the_commit_that_is_trained_on(tmp_path, monkeypatch):
    """Not of what the branch points to by then, for which the hub would be asked once more."""
    asked = []
    monkeypatch.setattr(prepare, "hub_commit", lambda config: "a" * 40)
    monkeypatch.setattr(estimate, "load_shape", lambda config: asked.append(config.revision) or load_shape(config))
    init_here(quickstart_config(tmp_path))
    assert asked == ["a" * 40]


def test_a_run_on_rows_that_were_encoded_before_ends_in_the_same_bytes(tmp_path, monkeypatch):
    """By another run, with another method; and without a cache at all."""
    monkeypatch.setenv("DUDE_CACHE_DIR", str(tmp_path / "cache"))
    train_here(quickstart_config(tmp_path / "first", adapter="{method: lora, rank: 2}", max_steps="1"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TextEncoder, "encode_pairs", lambda *_, **__: pytest.fail("encoded again"))
        train_here(quickstart_config(tmp_path / "kept", max_steps="2"))
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(row_encoder, "token_key", lambda *_: None)
    train_here(quickstart_config(tmp_path / "none", max_steps="2"))
    results = [(tmp_path / name / "run" / RESULT).read_bytes() for name in ("kept", "none")]
    assert results[0] == results[1]
