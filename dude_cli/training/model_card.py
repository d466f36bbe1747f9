"""The README.md of an adapter folder."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from dude_cli import quickstart
from dude_cli.config import AdapterConfig, Config, ModelConfig
from dude_cli.markup import escaped

if TYPE_CHECKING:
    from dude_cli.adapter import SavedAdapter

_CARD = """---
base_model: {base_model}
library_name: dude-cli
pipeline_tag: text-generation
tags: [{method}]
---
# {method} adapter for {name}

| | |
| --- | --- |
| method | {method}, rank {rank}, scaling {scaling:g} |
| target modules | {targets} |
| start | {start} |
| training data | {data} |
| steps | {steps} of up to {global_batch_size} rows, peak learning rate {learning_rate:g}, {schedule} |
| last training loss | {loss} |
| evaluation loss before, after, lowest | {first_eval_loss}, {last_eval_loss}, {lowest_eval_loss} |
| this adapter | of step {kept_step}{reason} |
| seed | {seed} |

```python
{usage}
```

The adapter never changes the base weights; `dude eval path/to/this/folder --task NAME` scores it.
"""

_USAGE = """from transformers import AutoModelForCausalLM
from dude_cli.adapter import load_adapter
{base_import}
model = AutoModelForCausalLM.from_pretrained({base}, dtype="{dtype}")
load_adapter(model, "path/to/this/folder")"""

_QUANTIZED_USAGE = """from dude_cli.adapter import load_adapter
from dude_cli.config import ModelConfig
from dude_cli.model import load_model

model = load_model(ModelConfig(name_or_path={named}, dtype="{dtype}", quantization="{quantization}"))
load_adapter(model, "path/to/this/folder")"""


def model_card(
    config: Config, summary: dict[str, Any], source_sha256: str | None = None, *, commit: str | None = None
) -> str:
    """The model card, in Markdown: what was trained, on what, how, and how far the loss fell.

    `commit` is that of a base from the hub, `source_sha256` identifies the adapter that the training continued from, if
    there was one.
    """
    targets = config.adapter.target_modules
    return _CARD.format(
        base_model=config.model.name_or_path,
        name=escaped(config.model.name_or_path),
        usage=_usage(config.model, commit),
        method=config.adapter.method,
        rank=config.adapter.rank,
        scaling=config.adapter.scaling,
        targets=escaped(targets if isinstance(targets, str) else ", ".join(targets)),
        start=escaped(_start(config.adapter, source_sha256)),
        data=escaped(", ".join(f"{source.path} ({source.split})" for source in config.data.train)),
        global_batch_size=config.train.global_batch_size,
        learning_rate=config.train.learning_rate,
        schedule=config.train.lr_scheduler_type,
        seed=config.seed,
        steps=summary["steps"],
        kept_step=summary["kept_step"],
        reason="" if summary["kept_eval_loss"] is None else f", evaluation loss {summary['kept_eval_loss']:.4f}",
        **{key: _number(summary[key]) for key in ("loss", "first_eval_loss", "last_eval_loss", "lowest_eval_loss")},
    )


def _start(adapter: AdapterConfig, source_sha256: str | None) -> str:
    if source_sha256 is not None:
        return f"the adapter of {adapter.init_from}, sha256 {source_sha256}; losses and steps here are since then"
    return "the base model; factors from its SVD" if adapter.has_svd_init else "the base model; random factors"


def _usage(model: ModelConfig, commit: str | None) -> str:
    template = _USAGE if model.quantization is None else _QUANTIZED_USAGE
    base = _base(model.name_or_path, commit, trust_remote_code=model.trust_remote_code)
    return template.format(dtype=model.dtype, quantization=model.quantization, **base)


def _base(name: str, commit: str | None, *, trust_remote_code: bool) -> dict[str, str]:
    """The base as arguments in Python: `named` for us, `base` for transformers.

    transformers does not know the embedded model by its name, but its folder.
    """
    options = f", revision={_quoted(commit)}" if commit else ""
    options += _trust(trust_remote_code)
    named = _quoted(name) + options
    if name == quickstart.NAME:
        import_line = "from dude_cli.quickstart import MODEL_DIR\n"
        return {"named": named, "base": f"MODEL_DIR{options}", "base_import": import_line}
    return {"named": named, "base": named, "base_import": ""}


def _trust(trust_remote_code: bool) -> str:
    return ", trust_remote_code=True" if trust_remote_code else ""


def _quoted(text: str) -> str:
    """A text as Python writes it in double quotes."""
    return json.dumps(text, ensure_ascii=False)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


_CONVERTED_CARD = """---
base_model: {base_model}
library_name: {library}
pipeline_tag: text-generation
tags: [{method}]
---
# {title}

| | |
| --- | --- |
| made from | {source} |
| loaded again, beside that | {measured} |

```python
{usage}
```
"""

_PEFT_USAGE = """from peft import PeftModel
from transformers import AutoModelForCausalLM
{base_import}
base = AutoModelForCausalLM.from_pretrained({base}, dtype="{dtype}")  # as it is, nothing subtracted
model = PeftModel.from_pretrained(base, "path/to/this/folder")"""

_QUANTIZED_PEFT_USAGE = """import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
{base_import}
# The base as it was quantised in the training: on a full one the adapter computes something else.
quantized = BitsAndBytesConfig({settings})
base = AutoModelForCausalLM.from_pretrained({base}, dtype="{dtype}", quantization_config=quantized)
model = PeftModel.from_pretrained(base, "path/to/this/folder")"""

_QUANTIZED_SETTINGS = {
    "nf4": 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.{dtype}',
    "int8": "load_in_8bit=True",
}

_MERGED_USAGE = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{trust}, dtype="{dtype}")"""


def merged_card(saved: SavedAdapter, dtype: str, measured: str, *, trust_remote_code: bool) -> str:
    """The model card of a merged model, in Markdown."""
    return _CONVERTED_CARD.format(
        base_model=saved.base_model,
        library="transformers",
        method=saved.config.method,
        title=escaped(f"{saved.base_model} with a {saved.config.method} adapter merged into it, in {dtype}"),
        source=escaped(_source(saved)),
        measured=escaped(measured),
        usage=_MERGED_USAGE.format(dtype=dtype, trust=_trust(trust_remote_code)),
    )


def peft_card(saved: SavedAdapter, title: str, measured: str, *, trust_remote_code: bool) -> str:
    """The model card of an adapter in PEFT's format, in Markdown."""
    return _CONVERTED_CARD.format(
        base_model=saved.base_model,
        library="peft",
        method=saved.config.method,
        title=escaped(f"{title} for {saved.base_model}"),
        source=escaped(_source(saved)),
        measured=escaped(measured),
        usage=_peft_usage(saved, trust_remote_code=trust_remote_code),
    )


def _peft_usage(saved: SavedAdapter, *, trust_remote_code: bool) -> str:
    base = _base(saved.base_model, saved.base_revision, trust_remote_code=trust_remote_code)
    settings = _QUANTIZED_SETTINGS.get(saved.base_quantization or "")
    if settings is None:  # not quantised, or so in its own files
        return _PEFT_USAGE.format(dtype=saved.base_dtype, **base)
    return _QUANTIZED_PEFT_USAGE.format(
        settings=settings.format(dtype=saved.base_dtype), dtype=saved.base_dtype, **base
    )


def imported_card(model: ModelConfig, adapter: AdapterConfig, source: str, measured: str, *, commit: str | None) -> str:
    """The model card of an adapter that was imported from PEFT's folder `source`, in Markdown."""
    return _CONVERTED_CARD.format(
        base_model=model.name_or_path,
        library="dude-cli",
        method=adapter.method,
        title=escaped(f"{adapter.method} adapter for {model.name_or_path}"),
        source=escaped(f"the PEFT adapter {source}, rank {adapter.rank}"),
        measured=escaped(measured),
        usage=_usage(model, commit),
    )


def _source(saved: SavedAdapter) -> str:
    revision = f" at {saved.base_revision}" if saved.base_revision else ""
    revision += f" in {saved.base_quantization}" if saved.base_quantization else ""
    adapter = f"a {saved.config.method} adapter of rank {saved.config.rank}"
    return f"{adapter} for {saved.base_model}{revision}, sha256 {saved.sha256}"
