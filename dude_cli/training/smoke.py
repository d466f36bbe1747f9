"""What `--smoke` puts in place of a config's model and data, so that any config runs offline in seconds.

The model is a random one of the config's architecture, scaled down; the tokenizer is the embedded one; the rows are
generated, with the config's own column names. All three are written as ordinary files, so the run takes its real path.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import random
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dude_cli import quickstart
from dude_cli.config import Config, ModelConfig, RowForm, resolved
from dude_cli.model import is_flash
from dude_cli.system import files
from dude_cli.target import smoke_inputs
from dude_cli.template import parse_template

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_RANK = 8
MAX_LENGTH = 128
STEPS = 3
BATCH_SIZE = 4
EVAL_LIMIT = 2
TRAIN_ROWS, VALIDATION_ROWS = 32, 8

# The model type that a hub name belongs to: the first of these that it contains.
_MODEL_TYPES = {
    "tinyllama": "llama", "codellama": "llama", "smollm3": "smollm3", "smollm": "llama", "llama": "llama",
    "mixtral": "mixtral", "mistral": "mistral", "qwen3": "qwen3", "qwen2": "qwen2", "qwen": "qwen2",
    "gemma-3": "gemma3_text", "gemma3": "gemma3_text", "gemma-2-": "gemma2", "gemma2": "gemma2", "gemma": "gemma",
    "phi-3": "phi3", "phi3": "phi3", "phi-4": "phi3", "phi": "phi", "gpt2": "gpt2", "pythia": "gpt_neox",
    "gpt-neox": "gpt_neox", "gpt-j": "gptj", "opt-": "opt", "bloom": "bloom", "falcon": "falcon",
    "stablelm": "stablelm", "olmo-2": "olmo2", "olmo2": "olmo2", "olmo": "olmo", "granite": "granite",
    "cohere": "cohere", "starcoder2": "starcoder2",
}  # fmt: skip

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def smoke_config(config: Config) -> Config:
    """The config on the inputs that `write_smoke_inputs` writes: small, short, in a run folder of its own."""
    import torch

    folder = _inputs_dir(config)
    values = resolved(config)
    model, adapter, data, train = values["model"], values["adapter"], values["data"], values["train"]
    model |= {"name_or_path": str(folder / "model"), "revision": None, "trust_remote_code": False}
    if not torch.cuda.is_available():
        model["dtype"] = "float32"
        if is_flash(config.model):
            model["attn_implementation"] = None
    if importlib.util.find_spec("bitsandbytes") is None:
        model["quantization"] = None

    rank = min(adapter["rank"], MAX_RANK)
    alpha = None if adapter["alpha"] is None else adapter["alpha"] * rank / adapter["rank"]
    adapter |= {"rank": rank, "alpha": alpha, "init_from": None}

    data |= {"train": _sources(config, folder, "train"), "max_length": min(data["max_length"], MAX_LENGTH)}
    if isinstance(data["validation"], list):
        data["validation"] = _sources(config, folder, "validation")
    elif data["validation"] is not None:
        data["validation"] = 0.25  # of so few rows, a smaller share may be none
    if data["chat_template"] is None:
        data["chat_template_kwargs"] = {}  # the model's template asks for them, and the embedded one for none

    train.pop("num_train_epochs", None)
    train |= {"max_steps": STEPS, "global_batch_size": BATCH_SIZE, "logging_steps": 1, "report_to": []}
    if train["per_device_batch_size"] != "auto":
        train["per_device_batch_size"] = min(train["per_device_batch_size"], BATCH_SIZE)
    for key in ("eval_steps", "save_steps"):
        train[key] = train[key] and min(train[key], 2)

    for task in values["eval"]["tasks"]:
        task["limit"] = EVAL_LIMIT
    values["output_dir"] = _output_dir(config)
    return Config.model_validate(values)


def write_smoke_inputs(config: Config) -> None:
    """Write what `smoke_config(config)` names: a small random model, a tokenizer and generated rows."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(quickstart.MODEL_DIR)
    if not tokenizer.chat_template:
        tokenizer.chat_template = _CHAT_TEMPLATE
    folder = _inputs_dir(config)
    folder.mkdir(parents=True, exist_ok=True)
    with files.disk_errors(folder / "model"):
        smoke_model(config, tokenizer).save_pretrained(folder / "model")
    files.save_tokenizer(tokenizer, folder / "model")
    for number, form in enumerate(config.data.forms()):
        _write_rows(folder / f"train-{number}.jsonl", generated_rows(form, TRAIN_ROWS, config.seed))
        _write_rows(folder / f"validation-{number}.jsonl", generated_rows(form, VALIDATION_ROWS, config.seed + 1))


def _sources(config: Config, folder: Path, name: str) -> list[dict[str, Any]]:
    """An entry for each form of rows in the config."""
    forms = enumerate(config.data.forms())
    return [{"path": str(folder / f"{name}-{number}.jsonl")} | asdict(form) for number, form in forms]


def smoke_model(config: Config, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Return a random model of the config's architecture: 2 layers, 64 wide, the tokenizer's vocabulary, float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rotary_dim": 8,
        "ffn_dim": 128,
        "word_embed_proj_dim": 64,
        "max_position_embeddings": 2048,  # room for the prompts of an evaluation
        "num_experts": 4,
        "num_local_experts": 4,
        "moe_intermediate_size": 64,
    }
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    architecture = AutoConfig.for_model(_model_type(config.model))
    known = {name: size for name, size in sizes.items() if _takes(architecture, name)}
    small = AutoConfig.for_model(architecture.model_type, **known, vocab_size=len(tokenizer), **special)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(small, dtype=torch.float32)
    return model


def _takes(architecture: object, name: str) -> bool:
    """Whether a model config has this size and does not derive it from others."""
    return hasattr(architecture, name) and not isinstance(getattr(type(architecture), name, None), property)


def generated_rows(form: RowForm, count: int, seed: int) -> list[dict[str, Any]]:
    """Return `count` rows of small sums, a function of `seed` alone, in the columns that a form of rows reads."""
    generator = random.Random(seed)
    sums = [(generator.randint(2, 99), generator.randint(2, 99)) for _ in range(count)]
    return [_row(form, f"What is {one} plus {two}?", str(one + two)) for one, two in sums]


def _row(form: RowForm, question: str, answer: str) -> dict[str, Any]:
    if form.completion is not None:
        learned = dict.fromkeys(parse_template(form.completion), answer)
        return {**learned, **dict.fromkeys(parse_template(form.prompt or ""), question)}
    if form.format == "chat":
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    if form.format == "alpaca":
        return {"instruction": question, "input": "", "output": answer}
    if form.format == "text":
        return {"text": f"{question} {answer}"}
    return {"prompt": f"{question} ", "completion": answer}


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _output_dir(config: Config) -> str:
    return config.output_dir.rstrip("/") + "-smoke"


def _inputs_dir(config: Config) -> Path:
    return smoke_inputs(_output_dir(config))


def _model_type(model: ModelConfig) -> str:
    """Return the architecture, from the model's own config where that is at hand, else from its name."""
    from transformers import AutoConfig

    name = model.name_or_path
    source = quickstart.MODEL_DIR if name == quickstart.NAME else name
    try:
        found = AutoConfig.from_pretrained(
            source, revision=model.revision or "main", local_files_only=True, trust_remote_code=False
        )
        return str(found.get_text_config().model_type)
    except (OSError, ValueError):  # not here, or of a type that transformers does not know
        known = next((kind for part, kind in _MODEL_TYPES.items() if part in name.lower()), None)
    if known is None:
        logging.getLogger(__name__).warning("smoke: no architecture known for %s; a llama stands in for it", name)
    return known or "llama"
