"""`dude train` and `dude eval` on a quantised base: the embedded model always, a real one where there is data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import dude_here
from forked import dude_forked
from gsm8k_config import gsm8k_config
from quickstart_config import quickstart_config
from rich.console import Console

from dude_cli.config import load_config
from dude_cli.system.runtime import StopSignal, make_accelerator
from dude_cli.target import find_target, load_target
from dude_cli.training.loop import train
from dude_cli.training.prepare import prepare

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


def logits_of_trained(arguments: list[str]) -> None:
    config, out, *overrides = arguments
    accelerator = make_accelerator()
    prepared = prepare(load_config(Path(config), overrides), accelerator, lambda text: None)
    train(prepared, accelerator, Console(quiet=True), StopSignal())
    with torch.no_grad():
        torch.save(prepared.model.eval()(input_ids=torch.arange(3, 43)[None]).logits, out)


def logits_of_targets(arguments: list[str]) -> None:
    *targets, out = arguments
    models = [load_target(find_target(name)).model for name in targets]
    with torch.no_grad():
        torch.save([model(input_ids=torch.arange(3, 43)[None]).logits for model in models], out)


def losses(run: Path) -> tuple[float, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line["eval_loss"] for line in lines if "eval_loss" in line]
    return found[0], found[-1]


@pytest.mark.parametrize(
    ("model", "quantization", "fall"),
    [("embedded", "nf4", 0.3), ("embedded", "int8", 0.3), ("real", "nf4", 1.5)],
)
def test_the_held_out_loss_falls_and_a_fresh_process_reloads_the_same_logits(
    model, quantization, fall, tmp_path, request
):
    if model == "real":
        config = gsm8k_config(request.getfixturevalue("test_data"), tmp_path)
    else:
        config = quickstart_config(tmp_path)
    arguments = (config, tmp_path / "trained.pt", f"model.quantization={quantization}")
    done = dude_forked(*arguments, command=logits_of_trained)
    assert done.returncode == 0, done.stderr
    trained = torch.load(tmp_path / "trained.pt")
    first, last = losses(tmp_path / "run")
    assert last < first - fall
    saved = json.loads((tmp_path / "run/adapter/adapter_config.json").read_text())
    assert saved["base_model"]["quantization"] == quantization
    targets = (tmp_path / "run", tmp_path / "run/adapter")  # an adapter alone knows its base
    done = dude_forked(*targets, tmp_path / "loaded.pt", command=logits_of_targets)
    assert done.returncode == 0, done.stderr
    loaded = torch.load(tmp_path / "loaded.pt")
    assert len(loaded) == 2
    assert all(torch.equal(each, trained) for each in loaded)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_half_precision_checkpointing_accumulation_and_packing_then_lm_eval(quantization, tmp_path):
    config = quickstart_config(tmp_path, dtype="bfloat16", per_device_batch_size="2")
    options = [f"model.quantization={quantization}", "train.gradient_checkpointing=true", "data.packing=true"]
    trained = dude_forked("train", config, "--json", *options)
    assert trained.returncode == 0, trained.stderr
    assert f"in bfloat16, quantised to {quantization}" in trained.stderr
    assert "float16 during quantization" not in trained.stderr  # bitsandbytes says so for each layer in each forward
    summary = json.loads(trained.stdout)
    assert summary["last_eval_loss"] < summary["first_eval_loss"]
    tasks = ["--task", "quickstart_choices", "--task", "quickstart_problems", "--limit", "2"]
    scored = dude_here("eval", tmp_path / "run", *tasks, "--base", "--json")
    assert scored.returncode == 0, scored.stderr
    assert json.loads(scored.stdout)["config"]["model_quantization"] == quantization


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_run_is_exported_as_a_merged_model_that_is_not_quantised_and_for_peft(quantization, tmp_path):
    done = dude_here("train", quickstart_config(tmp_path, max_steps="2"), f"model.quantization={quantization}")
    assert done.returncode == 0, done.stderr
    done = dude_here("export", tmp_path / "run", tmp_path / "merged", "--format", "merged", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["quantization"] == quantization
    assert f"in {quantization}" in (tmp_path / "merged/README.md").read_text()
    for_peft = dude_here("export", tmp_path / "run", tmp_path / "peft", "--format", "peft")
    if quantization == "nf4":
        assert for_peft.returncode == 0, for_peft.stderr
        assert "verified on the nf4 base that it was trained on" in for_peft.stdout
        assert 'bnb_4bit_quant_type="nf4"' in (tmp_path / "peft/README.md").read_text()
    else:
        assert for_peft.returncode == 2
        assert "PEFT cannot compute DoRA on an int8 base on a CPU" in for_peft.stderr
        assert not (tmp_path / "peft").exists()
    assert "quantization_config" not in (tmp_path / "merged/config.json").read_text()
    assert json.loads((tmp_path / "merged/config.json").read_text())["dtype"] == "float32"


def test_gradient_checkpointing_changes_no_byte(tmp_path):
    results = []
    for checkpointing in ("true", "false"):
        config = quickstart_config(tmp_path / checkpointing, max_steps="3")
        done = dude_here("train", config, "model.quantization=nf4", f"train.gradient_checkpointing={checkpointing}")
        assert done.returncode == 0, done.stderr
        results.append((tmp_path / checkpointing / "run/adapter/adapter.safetensors").read_bytes())
    assert results[0] == results[1]
