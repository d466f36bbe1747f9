"""Two gloo ranks on a CPU: the same rows, rates, losses and gradients as one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch
from command import dude_here, environment
from forked import dude_forked, two_ranks
from quickstart_config import quickstart_config
from rich.console import Console
from safetensors.torch import load_file
from training import StopAfter, init_here, train_here

from dude_cli.adapter import adapter_layers
from dude_cli.cli import app
from dude_cli.errors import StoppedError
from dude_cli.system.runtime import StopSignal, make_accelerator
from dude_cli.training.checkpoint import checkpoints, is_valid
from dude_cli.training.loop import train
from dude_cli.training.metrics import read_metrics


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One epoch of 37 rows in windows of 9, micro-batches of 2: one rank has more of them, and in the end all."""
    folders = {}
    for name, launch in (("one", dude_here), ("two", two_ranks)):
        folder = tmp_path_factory.mktemp(name)
        changes = {
            "rows": "37",
            "global_batch_size": "9",
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


def wait_for_step(run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not any(r["step"] >= step and "loss" in r for r in read_metrics(run_dir)) and time.monotonic() < deadline:
        time.sleep(0.01)


def test_what_our_launcher_began_torchrun_continues(tmp_path):
    """Started in earnest, both: a signal to our launcher stops its ranks at one step, and they leave a checkpoint."""
    config, run_dir = quickstart_config(tmp_path, max_steps="40", extra="  save_steps: 1"), tmp_path / "run"
    command = [sys.executable, "-m", "dude_cli", "train", str(config), "--num-processes", "2"]
    launcher = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        wait_for_step(run_dir, 3)
        ranks = psutil.Process(launcher.pid).children()
        assert {child.environ()["RANK"] for child in ranks} == {"0", "1"}
        launcher.send_signal(signal.SIGINT)
        stderr = launcher.communicate(timeout=30)[1]
        assert not any(child.is_running() for child in ranks)
    finally:
        launcher.kill()
    assert launcher.returncode == 75, stderr
    assert stderr.count("error: stopped by SIGINT") == 1
    saved = checkpoints(run_dir)
    assert all(is_valid(folder) for folder in saved)

    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "dude_cli"]
    command += ["train", str(config), "--json"]
    again = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count(f"continuing after step {int(saved[0].name.removeprefix('step-'))}") == 1
    assert json.loads(again.stdout)["steps"] == 40  # one document, of one rank
    steps = [r["step"] for r in read_metrics(run_dir) if "loss" in r]
    assert steps == list(range(1, 41))


def train_sharded_and_score(arguments: list[str]) -> None:
    """Stopped after three steps and resumed; then the command that the last arguments are."""
    config, overrides = Path(arguments[0]), json.loads(arguments[1])
    try:
        train_here(config, *overrides, stop=StopAfter(3))
    except StoppedError:
        accelerator = make_accelerator()
        prepared = init_here(config, *overrides, accelerator=accelerator)
        train(prepared, accelerator, Console(quiet=True), StopSignal())
        weights = [layer.base_layer.weight for layer in adapter_layers(prepared.model).values()]
        sharded = sum(hasattr(weight, "device_mesh") for weight in weights)
        if accelerator.is_main_process:
            print(json.dumps({"sharded": sharded, "layers": len(weights), "own": weights[0].to_local().numel()}))
    app(arguments[2:])


# Examples that are drawn at random, one draw after the other.
DRAWN = """
task: drawn
custom_dataset: !function dude_cli.quickstart.documents.choice_splits
output_type: multiple_choice
test_split: test
fewshot_split: train
num_fewshot: 1
doc_to_text: "{{question.strip()}} {{choices[0]}}, {{choices[1]}}, {{choices[2]}} or {{choices[3]}}? Answer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def sharded(runs, tmp_path_factory):
    """The run `two` once more with its base sharded, stopped and resumed, then scored, by the same two ranks.

    With gradient checkpointing, and with early stopping, which puts the best adapter back at the end.
    """
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "drawn.yaml").write_text(DRAWN)
    overrides = [f"output_dir={folder / 'run'}", "train.distributed=fsdp", "train.gradient_checkpointing=true"]
    overrides += ["train.eval_steps=3", "train.early_stopping_patience=5"]
    score = ["eval", str(folder / "run"), "--task", "drawn", "--task", "quickstart_problems", "--limit", "3"]
    rows = [{"prompt": f"Question: {number} cups\nAnswer:", "completion": f" {number}"} for number in range(4)]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    score += ["--rows", str(folder / "own.jsonl")]
    score += ["--base", "--batch-size", "2", "--include-path", str(folder)]
    arguments = [runs["two"].parent / "config.yaml", json.dumps(overrides), *score, "--quiet"]
    done = dude_forked(*arguments, count=2, command=train_sharded_and_score)
    assert done.returncode == 0, done.stderr
    alone = dude_here(*score, "--output", folder / "alone")
    assert alone.returncode == 0, alone.stderr
    return folder, done.stdout


def test_a_sharded_base_trains_saves_resumes_and_gives_the_adapter_of_ddp(runs, sharded):
    folder, printed = sharded
    found = json.loads(printed.splitlines()[0])
    assert found["sharded"] == found["layers"] > 0
    assert found["own"] == 128 * 128 // 2
    one, two = (load_file(run / "adapter/adapter.safetensors") for run in (runs["two"], folder / "run"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-6)
    losses = [[r["loss"] for r in read_metrics(run) if "loss" in r] for run in (runs["two"], folder / "run")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert is_valid(folder / "run/checkpoints/step-000003")


def test_an_evaluation_that_two_ranks_share_has_the_prompts_and_scores_of_one(sharded):
    folder, printed = sharded
    assert printed.count("difference") == 1  # the heading
    for task in ("drawn", "quickstart_problems"):
        file = f"{task}.limit-3.json"
        two, one = (json.loads((place / file).read_text()) for place in (folder / "run/eval", folder / "alone"))
        for key in ("results", "prompt_hashes", "task_hashes", "prompts_cut", "n-samples", "base", "difference"):
            assert two[key] == one[key], key
    two, one = (
        [json.loads(line) for line in (place / "samples_drawn.limit-3.jsonl").read_text().splitlines()]
        for place in (folder / "run/eval", folder / "alone")
    )
    assert [sample["doc_id"] for sample in two] == [0, 1, 2]
    # Each answer is its own question's: equal scores alone may be chance.
    assert [likelihoods(sample) for sample in two] == [pytest.approx(likelihoods(sample), rel=1e-4) for sample in one]


def test_own_rows_that_two_ranks_share_have_the_loss_of_one(sharded):
    folder, _ = sharded
    file = "own.jsonl.rows.limit-3.json"
    two, one = (json.loads((place / file).read_text()) for place in (folder / "run/eval", folder / "alone"))
    assert two["prompt_hashes"] == one["prompt_hashes"]
    for side in ((two, one), (two["base"], one["base"])):
        losses = [part["results"]["own.jsonl"]["loss,none"] for part in side]
        assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_comparison_that_two_ranks_share_is_that_of_one(runs, tmp_path):
    """Two models one after the other, with several tasks each, and then from what was saved."""
    compare = ["eval", "--compare", runs["one"], runs["two"], "--task", "quickstart_choices"]
    compare += ["--task", "quickstart_problems", "--limit", "5", "--batch-size", "2", "--json"]
    shared = two_ranks(*compare, "--output", tmp_path / "shared")
    assert shared.returncode == 0, shared.stderr
    alone = dude_here(*compare, "--output", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    two, one = json.loads(shared.stdout), json.loads(alone.stdout)
    assert [row["task"] for row in two["comparisons"]] == [row["task"] for row in one["comparisons"]]
    for row, own in zip(two["comparisons"], one["comparisons"], strict=True):
        for key in ("score_a", "score_b", "test"):
            assert row[key] == own[key], (row["task"], key)
    assert shared.stderr.count("evaluating run") == 2  # the other rank is silent
    again = dude_here(*compare, "--output", tmp_path / "shared")
    assert json.loads(again.stdout) == two
    assert "evaluating" not in again.stderr


def likelihoods(sample):
    return [float(value) for value, _ in sample["filtered_resps"]]


def test_a_run_goes_on_with_another_number_of_ranks_and_says_so(tmp_path):
    """No library talks in between: accelerate passes on an option that newer torch warns about on each rank."""
    config = quickstart_config(tmp_path, max_steps="6", extra="  save_steps: 3")
    assert dude_here("train", config).returncode == 0
    shutil.rmtree(tmp_path / "run/adapter")
    shutil.rmtree(tmp_path / "run/checkpoints/step-000006")
    refused = two_ranks("train", config)
    assert refused.stderr.count("different are: world size (1, now 2)") == 2  # each rank says why it ends
    again = two_ranks("train", config, "--allow-changes")
    assert again.returncode == 0, again.stderr
    assert "continuing although different are: world size (1, now 2)" in again.stderr
    assert "Warning" not in again.stderr


def test_two_ranks_reuse_a_decomposition_and_start_anew(tmp_path):
    """`init` first, then a training, then another one over it: no rank may wait for one that went another way."""
    config = quickstart_config(tmp_path, max_steps="2", rows="16")
    assert dude_here("init", config).returncode == 0
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
