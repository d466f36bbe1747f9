"""`dude export` and `dude import` as a user meets them: one run goes out in every format and comes back."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import dude, dude_here, environment
from exporting import save_base, save_trained
from peft import PeftModel
from quickstart_config import quickstart_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from dude_cli import quickstart
from dude_cli.adapter import AdapterConfig, load_adapter, patch_model, save_adapter
from dude_cli.export import export_lora, export_peft
from dude_cli.target import find_target, load_target

IDS = torch.arange(3, 43)[None]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run in `run`."""
    folder = tmp_path_factory.mktemp("place")
    config = quickstart_config(folder, max_steps="3", output_dir="run")
    done = dude_here("train", config, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def base() -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(quickstart.MODEL_DIR, dtype=torch.float32).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture(scope="module")
def expected(place: Path) -> torch.Tensor:
    model = base()
    load_adapter(model, place / "run/adapter")
    return logits(model)


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return float((found - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_a_run_goes_out_in_every_format_and_comes_back(place, expected):
    assert not close(logits(base()), expected)

    done = dude("export", "run", "merged", "--format", "merged", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["relative_difference"] <= document["tolerance"]
    merged = AutoModelForCausalLM.from_pretrained(place / "merged", dtype=torch.float32).eval()
    assert close(logits(merged), expected)
    assert len(AutoTokenizer.from_pretrained(place / "merged")) == len(
        AutoTokenizer.from_pretrained(place / "run/adapter")
    )

    done = dude_here("export", "run", "peft", "--format", "peft", cwd=place)
    assert done.returncode == 0, done.stderr
    assert "largest logit difference" in done.stdout
    assert close(logits(PeftModel.from_pretrained(base(), place / "peft")), expected)

    done = dude_here("export", "run/adapter", "lora", "--format", "lora", "--rank", "4", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    low_rank = json.loads(done.stdout)["low_rank"]
    assert 0 < max(low_rank["by_layer"].values()) < 1
    assert low_rank["by_layer"][low_rank["worst_layer"]] == max(low_rank["by_layer"].values())

    done = dude("import", "peft", "imported", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["method"] == "dora"
    model = base()
    load_adapter(model, place / "imported")
    assert close(logits(model), expected)
    done = dude_here("eval", "imported", "--task", "quickstart_choices", "--limit", "1", "--json", cwd=place)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kind", ["peft", "lora"])
def test_an_export_for_peft_is_used_as_its_readme_says(kind, tmp_path):
    """The tokenizer comes along, and the base of the snippet is one that transformers finds, the embedded one too."""
    model = patch_model(base(), AdapterConfig(rank=2))
    model.config.name_or_path = quickstart.NAME
    tokenizer = AutoTokenizer.from_pretrained(quickstart.MODEL_DIR)
    tokenizer.chat_template = "{{ messages[0].content }}"
    save_adapter(model, tmp_path / "adapter", tokenizer=tokenizer)
    loaded = load_target(find_target(str(tmp_path / "adapter")))
    (export_peft if kind == "peft" else export_lora)(loaded, tmp_path / "out")
    written = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert written.get_vocab() == tokenizer.get_vocab()
    assert written.chat_template == tokenizer.chat_template
    snippet = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names: dict[str, torch.nn.Module] = {}
    exec(snippet.replace("path/to/this/folder", str(tmp_path / "out")), names)
    assert close(logits(names["model"].eval()), logits(loaded.model))


def refused(place: Path, code: int, message: str, *arguments: object) -> None:
    """An error with its code and all its parts, no traceback, nothing on standard output, and nothing written."""
    before = sorted(place.rglob("*"))
    done = dude_here(*arguments, cwd=place)
    assert done.returncode == code, done.stderr
    for part in (message, "where:", "fix:"):
        assert part in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert sorted(place.rglob("*")) == before


def test_what_an_export_refuses(place):
    (place / "dangling").symlink_to("nowhere")
    for taken in ("run", "config.yaml", ".", "dangling", "config.yaml/out"):
        message = "no folder can be made here" if "/" in taken else "is there already"
        refused(place, 2, message, "export", "run", taken, "--format", "merged")
    refused(place, 2, "--rank is for --format lora", "export", "run", "out", "--format", "merged", "--rank", 8)
    refused(
        place, 2, "--dtype is for --format merged", "export", "run", "out", "--format", "peft", "--dtype", "float16"
    )
    both = ("--rank", 8, "--max-error", 0.1)
    refused(place, 2, "both say how close", "export", "run", "out", "--format", "lora", *both)
    refused(place, 2, "at rank 128 nothing is left out", "export", "run", "out", "--format", "lora", "--rank", 999)
    refused(place, 2, "there is nothing to export", "export", "embedded:quickstart", "out", "--format", "merged")
    refused(place, 2, "unknown dtype", "export", "run", "out", "--format", "merged", "--dtype", "half")
    assert dude_here("export", "run", "out", "--format", "gguf", cwd=place).returncode == 2


def test_what_an_import_refuses(place, tmp_path):
    refused(place, 3, "no PEFT adapter is here", "import", "nowhere", "out")
    refused(place, 3, "an adapter of dude's already", "import", "run/adapter", "out")
    refused(place, 2, "unknown quantisation q4", "import", "peft", "out", "--quantization", "q4")
    shutil.copytree(place / "run/adapter", tmp_path / "peft")
    (tmp_path / "peft/adapter_config.json").write_text('{"peft_type": "IA3"}')
    refused(place, 3, "type IA3 cannot become", "import", tmp_path / "peft", "out")
    (tmp_path / "peft/adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused(place, 3, "names no base model", "import", tmp_path / "peft", "out")


def test_a_tokenizer_beside_the_imported_adapter_comes_along(place):
    tokenizer = AutoTokenizer.from_pretrained(place / "run/adapter")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(place / "peft")
    assert dude_here("import", "peft", "with-template", cwd=place).returncode == 0
    assert AutoTokenizer.from_pretrained(place / "with-template").chat_template == tokenizer.chat_template


def test_a_checkpoint_is_exported_by_its_folder(tmp_path):
    config = quickstart_config(tmp_path, max_steps="2", output_dir="run", extra="  save_steps: 1")
    assert dude_here("train", config, cwd=tmp_path).returncode == 0
    done = dude_here("export", "run/checkpoints/step-000001", "out", "--format", "peft", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_what_appears_during_an_export_is_not_replaced(place, monkeypatch):
    def meanwhile(*_: object) -> None:
        (place / "out").mkdir()
        (place / "out/notes.txt").write_text("precious")

    monkeypatch.setattr("dude_cli.export.peft_format.check", meanwhile)
    done = dude_here("export", "run", "out", "--format", "peft", cwd=place)
    assert done.returncode == 2, done.stderr
    assert "Directory not empty" in done.stderr
    assert [file.name for file in (place / "out").iterdir()] == ["notes.txt"]
    shutil.rmtree(place / "out")
    assert not list(place.glob(".*partial*"))


@pytest.mark.parametrize("kind", ["merged", "peft"])
def test_a_full_disk_in_an_export_has_its_own_exit_code(kind, place):
    command = f"ulimit -f 100; exec {sys.executable} -m dude_cli export run out --format {kind}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=place, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 5, done.stderr
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(place.glob("out")) + list(place.glob(".*partial*"))


@pytest.mark.parametrize("kind", ["merged", "peft", "lora"])
def test_a_disk_that_fills_up_in_the_tokenizer_alone_is_no_bug(kind, place, tmp_path):
    """With a tokenizer of more bytes than the weights have, and a limit between the two."""
    shutil.copytree(place / "run", tmp_path / "run")
    file = tmp_path / "run/adapter/tokenizer.json"
    tokenizer = json.loads(file.read_text())
    token = tokenizer["added_tokens"][-1]
    tokenizer["added_tokens"].append(token | {"id": token["id"] + 1, "content": "x" * 6_000_000})
    file.write_text(json.dumps(tokenizer))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, before[1]))
    try:
        done = dude_here("export", "run", "out", "--format", kind, cwd=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert done.returncode == 5, done.stderr
    assert "the disk is full: File too large" in done.stderr
    assert not list(tmp_path.glob("out")) + list(tmp_path.glob(".*partial*"))


def test_a_base_may_have_moved_and_another_one_must_be_allowed(tmp_path):
    first = save_base(tmp_path / "first", "llama")
    save_trained(tmp_path / "adapter", first, AdapterConfig(method="dude", rank=4))
    first.rename(tmp_path / "moved")
    save_base(tmp_path / "other", "llama", seed=1)
    export = ("export", "adapter", "out", "--format", "peft")
    refused(tmp_path, 2, "or say where it is: --base-model", *export)
    refused(tmp_path, 3, "--allow-other-base", *export, "--base-model", tmp_path / "other")
    assert dude_here(*export, "--base-model", tmp_path / "moved", cwd=tmp_path).returncode == 0
    (tmp_path / "out").rename(tmp_path / "first-out")
    done = dude_here(*export, "--base-model", tmp_path / "other", "--allow-other-base", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    refused(tmp_path, 2, "has no base model", "eval", "moved", "--task", "gsm8k", "--base-model", "other")


@pytest.fixture(scope="module")
def with_settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `run`, whose base in `base` may get any generation config: it has no part in the training."""
    folder = tmp_path_factory.mktemp("settings")
    shutil.copytree(quickstart.MODEL_DIR, folder / "base")
    config = quickstart_config(folder, max_steps="1", rows="16", output_dir="run")
    done = dude_here("train", config, f"model.name_or_path={folder / 'base'}", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize(
    ("keys", "written"),
    [
        ({"temperature": 0.9, "top_p": 0.6}, {"do_sample": True, "temperature": 0.9, "top_p": 0.6}),
        ({"do_sample": True, "top_p": 0.6}, {"do_sample": True, "top_p": 0.6}),
        ({"temperature": 0.0, "top_p": 0.6}, {}),
    ],
)
def test_sampling_keys_without_do_sample_are_put_right(with_settings, tmp_path, keys, written):
    """transformers refuses to save them; with a temperature of 0 nothing could be sampled."""
    (with_settings / "base/generation_config.json").write_text(json.dumps({"eos_token_id": 2, **keys}))
    done = dude_here("export", "run", tmp_path / "out", "--format", "merged", cwd=with_settings)
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert {key: saved[key] for key in ("do_sample", "temperature", "top_p") if saved.get(key) is not None} == written
    assert ("note: the base's generation config" in done.stderr) == (keys != written)


def test_a_generation_config_that_cannot_be_saved_is_refused_before_the_weights_are_merged(with_settings, monkeypatch):
    monkeypatch.setattr("dude_cli.adapter.merge_adapter", lambda *_: pytest.fail("they were merged"))
    (with_settings / "base/generation_config.json").write_text('{"early_stopping": true}')
    refused(with_settings, 2, "only used in beam-based", "export", "run", "out", "--format", "merged")
