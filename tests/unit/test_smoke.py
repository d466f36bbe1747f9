from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dude_cli import quickstart, shipped
from dude_cli.config import Config
from dude_cli.config.read import dump_config, load_config
from dude_cli.training import smoke

CONFIGS = [name for name, _ in shipped.list_shipped() if name.startswith("configs/")]

pytestmark = pytest.mark.skipif(
    not (quickstart.MODEL_DIR / "tokenizer.json").is_file(), reason="the embedded tokenizer has not been trained yet"
)


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def smoke_inputs(config: Config) -> Config:
    smoke.write_smoke_inputs(config)
    return smoke.smoke_config(config)


def config_of(output_dir: str = "runs/a", **data: Any) -> Config:
    values = {"model": {"name_or_path": "gpt2"}, "data": {"train": [{"path": "rows.jsonl"}], **data}}
    return Config.model_validate({**values, "output_dir": output_dir})


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shipped_config_shrinks_to_local_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(Path(name))
    small = smoke_inputs(config)
    model = AutoModelForCausalLM.from_pretrained(small.model.name_or_path)
    tokenizer = AutoTokenizer.from_pretrained(small.model.name_or_path)
    rows = [json.loads(line) for line in Path(small.data.train[0].path).read_text(encoding="utf-8").splitlines()]
    assert model.config.model_type == "llama"
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    assert len(rows) == smoke.TRAIN_ROWS
    assert (small.train.max_steps, small.train.global_batch_size) == (smoke.STEPS, smoke.BATCH_SIZE)
    assert small.adapter.rank <= smoke.MAX_RANK
    assert small.adapter.scaling == config.adapter.scaling
    assert small.data.max_length <= smoke.MAX_LENGTH
    assert all(task.limit == smoke.EVAL_LIMIT for task in small.eval.tasks)
    assert small.output_dir == f"{config.output_dir}-smoke"
    assert small.adapter.target_modules == config.adapter.target_modules


def test_nothing_of_it_is_told_to_a_tracker() -> None:
    config = load_config(Path("configs/gsm8k.yaml"), ["train.report_to=[wandb]"])
    assert smoke.smoke_config(config).train.report_to == []


def test_a_shrunken_config_can_be_saved_and_read_again(tmp_path: Path) -> None:
    small = smoke.smoke_config(load_config(Path("configs/gsm8k.yaml")))
    (tmp_path / "small.yaml").write_text(dump_config(small), encoding="utf-8")
    assert load_config(tmp_path / "small.yaml") == small


@pytest.mark.parametrize(("is_installed", "kept"), [(True, "nf4"), (False, None)])
def test_quantisation_is_kept_where_it_can_be_done(
    is_installed: bool, kept: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if is_installed else None)
    config = load_config(Path("configs/gsm8k.yaml"), ["model.quantization=nf4"])
    assert smoke.smoke_config(config).model.quantization == kept


@pytest.mark.parametrize(
    ("data", "columns"),
    [
        ({}, {"prompt", "completion"}),
        ({"format": "alpaca"}, {"instruction", "input", "output"}),
        ({"format": "text"}, {"text"}),
        ({"format": "text", "completion": "{title}"}, {"title"}),
        ({"format": "chat"}, {"messages"}),
        ({"prompt": "{a} {b}", "completion": "{c}"}, {"a", "b", "c"}),
    ],
)
def test_rows_have_the_columns_of_the_config(data: dict[str, Any], columns: set[str]) -> None:
    rows = smoke.generated_rows(config_of(**data).data.forms()[0], 5, seed=1)
    assert len(rows) == 5
    assert all(set(row) == columns for row in rows)


def test_rows_and_weights_are_a_function_of_the_seed(tmp_path: Path) -> None:
    one, two = tmp_path / "one-smoke-inputs", tmp_path / "two-smoke-inputs"
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        smoke.write_smoke_inputs(config_of(output_dir=str(tmp_path / name)))
        assert torch.equal(torch.get_rng_state(), before)
    for file in ("train-0.jsonl", "validation-0.jsonl", "model/model.safetensors"):
        assert (one / file).read_bytes() == (two / file).read_bytes()
    assert (one / "train-0.jsonl").read_bytes() != (one / "validation-0.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("gpt2", "gpt2"),
        ("meta-llama/Llama-3.2-1B", "llama"),
        ("mistralai/Mistral-7B-v0.1", "mistral"),
        ("google/gemma-7b", "gemma"),
        ("google/gemma-2-2b", "gemma2"),
        ("google/gemma-3-1b-pt", "gemma3_text"),
        ("Qwen/Qwen2.5-0.5B", "qwen2"),
        ("Qwen/Qwen3-0.6B", "qwen3"),
        ("microsoft/phi-2", "phi"),
        ("EleutherAI/pythia-70m", "gpt_neox"),
        ("EleutherAI/gpt-j-6b", "gptj"),
        ("tiiuae/falcon-7b", "falcon"),
        ("nobody/knows", "llama"),
    ],
)
def test_the_architecture_follows_the_name(name: str, model_type: str) -> None:
    config = config_of().model_copy(update={"model": config_of().model.model_copy(update={"name_or_path": name})})
    tokenizer = AutoTokenizer.from_pretrained(quickstart.MODEL_DIR)
    model = smoke.smoke_model(config, tokenizer)
    logits = model(input_ids=torch.arange(3, 13)[None]).logits
    assert model.config.model_type == model_type
    assert torch.isfinite(logits).all()


def test_the_architecture_is_read_from_a_local_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "phi"}', encoding="utf-8")
    model = config_of().model.model_copy(update={"name_or_path": str(tmp_path)})
    assert smoke._model_type(model) == "phi"


@pytest.mark.parametrize(("template", "kept"), [(None, {}), ("own.jinja", {"enable_thinking": False})])
def test_values_for_the_models_own_template_are_not_given_to_another(
    template: str | None, kept: dict[str, Any]
) -> None:
    config = config_of(format="chat", chat_template=template, chat_template_kwargs={"enable_thinking": False})
    assert smoke.smoke_config(config).data.chat_template_kwargs == kept


def test_each_form_of_rows_has_a_file(tmp_path: Path) -> None:
    chat = {"path": "talks.jsonl", "format": "chat"}
    config = config_of(
        str(tmp_path / "run"), train=[{"path": "a"}, chat, {"path": "b"}], format="alpaca", validation=[chat]
    )
    small = smoke_inputs(config)
    assert small.data.forms() == config.data.forms()
    assert [source.format for source in small.data.train] == ["alpaca", "chat"]
    columns = [set(json.loads(Path(source.path).read_text().splitlines()[0])) for source in small.data.train]
    assert columns == [{"instruction", "input", "output"}, {"messages"}]


def test_chat_gets_a_template_and_a_share_stays_a_share(tmp_path: Path) -> None:
    small = smoke_inputs(config_of(str(tmp_path / "run"), format="chat", validation=0.01))
    tokenizer = AutoTokenizer.from_pretrained(small.model.name_or_path)
    row = smoke.generated_rows(small.data.forms()[0], 1, seed=1)[0]
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    assert text.startswith("user: What is ")
    assert small.data.validation == 0.25
