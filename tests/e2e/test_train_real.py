"""`dude init`, `dude train` and `dude eval` on a real pretrained model and real GSM8K text."""

from __future__ import annotations

import json

import pytest
from command import dude, dude_here
from gsm8k_config import gsm8k_config

from dude_cli.training.metrics import read_metrics


@pytest.fixture(scope="module")
def run(test_data, tmp_path_factory):
    """A finished run: init, then train, in a process of its own."""
    folder = tmp_path_factory.mktemp("run")
    config = gsm8k_config(test_data, folder)
    init = dude_here("init", config)
    assert init.returncode == 0, init.stderr
    train = dude("train", config, "--json")
    assert train.returncode == 0, train.stderr
    return {"dir": folder / "run", "config": config, "init": init, "train": train}


def test_the_held_out_loss_falls(run):
    losses = [record["eval_loss"] for record in read_metrics(run["dir"]) if "eval_loss" in record]
    assert losses[0] > losses[-1] + 1.5  # from about 7 to under 5 nats in 20 steps


def test_init_shows_layers_data_an_example_and_the_plan(run):
    shown = run["init"].stdout
    for part in (
        "energy captured",
        "q_proj",
        "trainable:",
        "bit for bit",
        "truncated",
        "not learned is dim",
        "20 steps",
    ):
        assert part in shown, part


def test_train_reuses_what_init_has_decomposed(run):
    assert "decompositions 1/" in run["init"].stderr
    assert "reusing the decomposition" in run["train"].stderr
    assert "decompositions 1/" not in run["train"].stderr


def test_the_run_folder_is_complete(run):
    names = {str(path.relative_to(run["dir"])) for path in run["dir"].rglob("*")}
    assert names >= {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "adapter/adapter.safetensors",
        "adapter/adapter_config.json",
        "adapter/README.md",
        "adapter/tokenizer.json",
    }
    assert not [name for name in names if ".partial" in name or ".old" in name]


def test_every_step_is_logged_with_its_rate(run):
    steps = [record for record in read_metrics(run["dir"]) if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, 21))
    assert set(steps[0]) >= {"loss", "grad_norm", "learning_rate", "tokens_per_s", "target_tokens"}
    assert steps[0]["learning_rate"] == 0
    assert max(record["learning_rate"] for record in steps) == pytest.approx(2e-3)


def test_json_is_one_document_on_stdout(run):
    summary = json.loads(run["train"].stdout)
    assert summary["steps"] == 20
    assert summary["last_eval_loss"] < summary["first_eval_loss"]


def test_a_finished_run_says_so_and_is_not_trained_again(run):
    before = (run["dir"] / "adapter/adapter.safetensors").stat().st_mtime_ns
    again = dude_here("train", run["config"])
    assert again.returncode == 0
    assert "finished" in again.stderr
    assert (run["dir"] / "adapter/adapter.safetensors").stat().st_mtime_ns == before


def test_another_config_in_the_same_folder_is_refused_with_the_keys(run):
    refused = dude_here("train", run["config"], "train.learning_rate=1e-3", "adapter.rank=4")
    assert refused.returncode == 2
    assert "adapter.rank, train.learning_rate" in refused.stderr
    assert "--overwrite" in refused.stderr


def test_eval_scores_the_run_and_its_base_offline(run, test_data):
    scored = dude("eval", run["dir"], "--base", "--data-dir", test_data, "--json")
    assert scored.returncode == 0, scored.stderr
    results = json.loads(scored.stdout)
    assert "exact_match,strict-match" in results["results"]["gsm8k"]
    assert results["difference"]["gsm8k"]
    assert (run["dir"] / "eval/gsm8k.shots-1.limit-2.json").is_file()


def test_the_same_config_and_seed_give_the_same_bytes(run, test_data, tmp_path):
    again = dude_here("train", gsm8k_config(test_data, tmp_path))
    assert again.returncode == 0, again.stderr
    first, second = (folder / "adapter/adapter.safetensors" for folder in (run["dir"], tmp_path / "run"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("method", ["lora", "dora", "pissa"])
def test_the_other_methods_train_too(method, test_data, tmp_path):
    trained = dude_here("train", gsm8k_config(test_data, tmp_path, method=method, max_steps="6"), "--json")
    assert trained.returncode == 0, trained.stderr
    assert json.loads(trained.stdout)["last_eval_loss"] < json.loads(trained.stdout)["first_eval_loss"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_bases_with_checkpointing_accumulation_and_packing(dtype, test_data, tmp_path):
    """Few tokens: a CPU without instructions for it takes twenty times as long in half precision."""
    sizes = {"max_steps": "6", "global_batch_size": "4", "per_device_batch_size": "3"}
    config = gsm8k_config(test_data, tmp_path, dtype=dtype, validation_split="train[7000:7008]", **sizes)
    options = [
        "train.gradient_checkpointing=true",
        "data.packing=true",
        "data.max_length=96",
        "train.weight_decay=0.01",
    ]
    trained = dude_here("train", config, "--json", *options)
    assert trained.returncode == 0, trained.stderr
    summary = json.loads(trained.stdout)
    assert summary["last_eval_loss"] < summary["first_eval_loss"] - 0.5
