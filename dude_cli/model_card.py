"""The README.md of an adapter folder."""

from __future__ import annotations

from typing import Any

from dude_cli.config import Config

_CARD = """---
base_model: {base_model}
library_name: dude-cli
pipeline_tag: text-generation
tags: [{method}]
---
# {method} adapter for {base_model}

| | |
| --- | --- |
| method | {method}, rank {rank}, scaling {scaling:g} |
| target modules | {targets} |
| training data | {data} |
| steps | {steps} of {global_batch_size} rows, peak learning rate {learning_rate:g}, {schedule} |
| last training loss | {loss} |
| evaluation loss before, after, lowest | {first_eval_loss}, {last_eval_loss}, {lowest_eval_loss} |
| this adapter | of step {kept_step}{reason} |
| seed | {seed} |

```python
{load_base}
load_adapter(model, "path/to/this/folder")
```

The adapter never changes the base weights; `dude eval path/to/this/folder --task NAME` scores it.
"""

_LOAD_BASE = """from transformers import AutoModelForCausalLM
from dude_cli.adapter import load_adapter

model = AutoModelForCausalLM.from_pretrained("{name_or_path}", dtype="{dtype}")"""

_LOAD_QUANTIZED_BASE = """from dude_cli.adapter import load_adapter
from dude_cli.config import ModelConfig
from dude_cli.model import load_model

model = load_model(ModelConfig(name_or_path="{name_or_path}", dtype="{dtype}", quantization="{quantization}"))"""


def model_card(config: Config, summary: dict[str, Any]) -> str:
    """The model card, in Markdown: what was trained, on what, how, and how far the loss fell."""
    targets = config.adapter.target_modules
    load_base = _LOAD_BASE if config.model.quantization is None else _LOAD_QUANTIZED_BASE
    return _CARD.format(
        base_model=config.model.name_or_path,
        load_base=load_base.format_map(config.model.model_dump()),
        method=config.adapter.method,
        rank=config.adapter.rank,
        scaling=config.adapter.scaling,
        targets=targets if isinstance(targets, str) else ", ".join(targets),
        data=", ".join(f"{source.path} ({source.split})" for source in config.data.train),
        global_batch_size=config.train.global_batch_size,
        learning_rate=config.train.learning_rate,
        schedule=config.train.lr_scheduler_type,
        seed=config.seed,
        steps=summary["steps"],
        kept_step=summary["kept_step"],
        reason="" if config.train.early_stopping_patience is None else ", the lowest evaluation loss",
        **{key: _number(summary[key]) for key in ("loss", "first_eval_loss", "last_eval_loss", "lowest_eval_loss")},
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
