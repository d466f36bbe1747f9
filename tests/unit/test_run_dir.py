from __future__ import annotations

import json

import pytest

from dude_cli.config import Config
from dude_cli.errors import UsageError
from dude_cli.training.metrics import MEMORY_FILE, METRICS_FILE, read_metrics, run_summary
from dude_cli.training.model_card import model_card
from dude_cli.training.run_dir import INITIAL, check_run_dir, check_writable, initial_key
from dude_cli.training.start import initial_adapter_key


def config_in(folder, **sections):
    base = {
        "model": {"name_or_path": "m"},
        "data": {"train": [{"path": "rows.jsonl"}], "validation": [{"path": "rows.jsonl"}]},
        "output_dir": str(folder),
    }
    return Config.model_validate(base | sections)


@pytest.mark.parametrize("name", ["thesis.txt", "checkpoints/mine", "adapter/adapter_config.json"])
def test_a_folder_that_is_no_run_is_refused(name, tmp_path):
    file = tmp_path / "run" / name
    file.parent.mkdir(parents=True)
    file.write_text("x")
    with pytest.raises(UsageError, match="not empty and not a run"):
        check_run_dir(config_in(tmp_path / "run"))
    assert file.read_text() == "x"


@pytest.mark.parametrize("names", [[], [".initial.partial/x"], ["initial/key"], ["config.yaml", "environment.json"]])
def test_a_new_an_empty_a_prepared_folder_and_a_run_are_used(names, tmp_path):
    check_run_dir(config_in(tmp_path / "run"))
    for name in names:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("x")
    check_run_dir(config_in(tmp_path / "run"))


@pytest.mark.parametrize("name", ["initial", "adapter", "best"])
def test_a_folder_that_stepped_aside_before_a_process_was_killed_is_put_back(name, tmp_path):
    (tmp_path / f"run/.{name}.old").mkdir(parents=True)
    (tmp_path / f"run/.{name}.old/file").write_text("x")
    (tmp_path / "run/config.yaml").write_text("")
    (tmp_path / "run/environment.json").write_text("{}")
    check_run_dir(config_in(tmp_path / "run"))
    assert (tmp_path / "run" / name / "file").read_text() == "x"


def test_a_folder_that_cannot_be_written_is_a_usage_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="nothing can be written"):
        check_writable(tmp_path / "file/run")


def key(**sections):
    return initial_adapter_key(config_in("run", **sections))


def test_the_start_is_kept_when_only_what_it_does_not_depend_on_changes():
    same = key(adapter={"method": "dude", "rank": 8})
    assert key(adapter={"method": "dude", "rank": 8, "dropout": 0.1, "norm_gradient": "exact", "alpha": 8.0}) == same
    assert key(adapter={"rank": 8}, model={"name_or_path": "m", "attn_implementation": "eager"}) == same
    assert key(adapter={"rank": 8}, seed=1) == same  # a decomposition has no seed
    others = [
        key(adapter={"rank": 4}),
        key(adapter={"rank": 8, "alpha": 16.0}),
        key(adapter={"rank": 8, "method": "pissa"}),
        key(adapter={"rank": 8, "target_modules": ["q_proj"]}),
        key(adapter={"rank": 8, "svd": {"algorithm": "exact"}}),
        key(adapter={"rank": 8}, model={"name_or_path": "m", "dtype": "float32"}),
        key(adapter={"rank": 8}, model={"name_or_path": "m", "quantization": "nf4"}),
        key(adapter={"rank": 8, "method": "dora"}),
        key(adapter={"rank": 8, "method": "dora"}, seed=1),
    ]
    assert len({same, *others}) == 1 + len(others)


def metrics(folder, *records):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_the_summary_and_the_card_name_the_step_that_is_kept(tmp_path):
    metrics(
        tmp_path / "run",
        {"step": 0, "eval_loss": 3.0},
        {"step": 2, "loss": 2.0, "elapsed_s": 1.0},
        {"step": 2, "eval_loss": 1.5},
        {"step": 4, "loss": 1.0, "elapsed_s": 2.0},
        {"step": 4, "eval_loss": 2.5},
    )
    last = config_in(tmp_path / "run")
    best = config_in(tmp_path / "run", train={"eval_steps": 2, "early_stopping_patience": 1})
    assert (run_summary(last)["steps"], run_summary(last)["kept_step"]) == (4, 4)
    assert (run_summary(best)["steps"], run_summary(best)["kept_step"]) == (4, 2)
    card = model_card(best, run_summary(best))
    assert "of step 2, evaluation loss 1.5000 |" in card
    assert "3.0000, 2.5000, 1.5000" in card
    assert "of step 4 |" in model_card(last, run_summary(last))
    assert 'from_pretrained("m", dtype="bfloat16")' in card
    quantized = config_in(tmp_path / "run", model={"name_or_path": "m", "quantization": "nf4"})
    assert 'load_model(ModelConfig(name_or_path="m", dtype="bfloat16", quantization="nf4"))' in model_card(
        quantized, run_summary(quantized)
    )


def test_damaged_files_of_a_run_are_as_good_as_none(tmp_path):
    (tmp_path / INITIAL).mkdir()
    (tmp_path / INITIAL / "key").write_bytes(b"\xf5")
    assert initial_key(tmp_path / INITIAL) is None
    good = json.dumps({"step": 1, "loss": 2.0}).encode() + b"\n"
    for bad in (b"\xf5", b"{", b"7", b"[]", b"{}", b'{"step": "x"}', b"[" * 100_000):
        (tmp_path / METRICS_FILE).write_bytes(good + bad + b"\n" + good)
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
    for bad in (b"\xf5", b"{", b"7", b"{}"):
        (tmp_path / MEMORY_FILE).write_bytes(bad)
        assert run_summary(config_in(tmp_path))["memory"] is None
