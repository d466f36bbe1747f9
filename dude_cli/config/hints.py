"""What to suggest for an unknown key: the nearest spelling, the section where the key lives, other tools' names."""

from __future__ import annotations

from difflib import SequenceMatcher

from dude_cli.config.keys import Path, field_at, has_entries, key_paths, path_of, section_at
from dude_cli.config.schema import Config
from dude_cli.config.section import Section
from dude_cli.config.strict_yaml import Loc
from dude_cli.errors import nearest

_TYPO = 0.75  # how alike two keys are when one letter of the shortest key (seed, rank) is wrong

_CONVERSATIONS = (
    "conversations stand in a column `messages` or `conversations`, with `role` and `content` or `from` and `value`"
)
_FIRST_ROWS = 'the first rows are taken with `split: "train[:1000]"` in an entry of `data.train`'
# Other tools' names: whose name it is, our key ("" where there is none), and what differs. A name that means something
# in one section only is written with that section.
FOREIGN: dict[str, tuple[str, str, str]] = {
    "base_model": ("axolotl's", "model.name_or_path", ""),
    "model_name_or_path": ("LLaMA-Factory's and TRL's", "model.name_or_path", ""),
    "model_id": ("transformers'", "model.name_or_path", ""),
    "pretrained_model_name_or_path": ("transformers'", "model.name_or_path", ""),
    "checkpoint_dir": ("torchtune's", "model.name_or_path", ""),
    "checkpointer": ("torchtune's", "model.name_or_path", ""),
    "torch_dtype": ("transformers'", "model.dtype", ""),
    "bf16": ("transformers' and axolotl's", "model.dtype", " (`bfloat16`)"),
    "fp16": ("transformers' and axolotl's", "model.dtype", " (`float16`)"),
    "fp32": ("torchtune's", "model.dtype", " (`float32`)"),
    "flash_attention": ("axolotl's", "model.attn_implementation", " (`flash_attention_2`)"),
    "flash_attn": ("LLaMA-Factory's", "model.attn_implementation", " (`flash_attention_2`)"),
    "use_flash_attention": ("several scripts'", "model.attn_implementation", " (`flash_attention_2`)"),
    "use_flash_attention_2": ("transformers'", "model.attn_implementation", " (`flash_attention_2`)"),
    "load_in_4bit": ("axolotl's and TRL's", "model.quantization", " (`nf4`)"),
    "load_in_8bit": ("axolotl's and TRL's", "model.quantization", " (`int8`)"),
    "quantization_bit": ("LLaMA-Factory's", "model.quantization", " (`nf4` for 4, `int8` for 8)"),
    "quantize_base": ("torchtune's", "model.quantization", " (`nf4`)"),
    "peft_type": ("PEFT's", "adapter.method", " (`dude`, `dora`, `pissa` or `lora`)"),
    "finetuning_type": ("LLaMA-Factory's", "adapter.method", " (`dude`, `dora`, `pissa` or `lora`)"),
    "use_dora": ("PEFT's and torchtune's", "adapter.method", " (`dora`, or `dude` with an SVD start)"),
    "peft_use_dora": ("axolotl's", "adapter.method", " (`dora`, or `dude` with an SVD start)"),
    "pissa_init": ("LLaMA-Factory's", "adapter.method", " (`pissa`, or `dude` with magnitudes)"),
    "init_lora_weights": ("PEFT's", "adapter.method", " (`pissa` and `dude` start from an SVD)"),
    "peft_init_lora_weights": ("axolotl's", "adapter.method", " (`pissa` and `dude` start from an SVD)"),
    "r": ("PEFT's", "adapter.rank", ""),
    "lora_r": ("axolotl's and TRL's", "adapter.rank", ""),
    "lora_rank": ("LLaMA-Factory's and torchtune's", "adapter.rank", ""),
    "lora_alpha": ("every LoRA tool's", "adapter.alpha", ""),
    "lora_dropout": ("every LoRA tool's", "adapter.dropout", ""),
    "use_rslora": ("PEFT's and LLaMA-Factory's", "adapter.rank_stabilized", ""),
    "peft_use_rslora": ("axolotl's", "adapter.rank_stabilized", ""),
    "lora_target_modules": ("axolotl's and TRL's", "adapter.target_modules", ""),
    "lora_target_linear": ("axolotl's", "adapter.target_modules", " (`all-linear`)"),
    "lora_target": ("LLaMA-Factory's", "adapter.target_modules", ""),
    "lora_attn_modules": ("torchtune's", "adapter.target_modules", ""),
    "apply_lora_to_mlp": ("torchtune's", "adapter.target_modules", ""),
    "lora_model_dir": ("axolotl's", "adapter.init_from", ""),
    "adapter_name_or_path": ("LLaMA-Factory's", "adapter.init_from", ""),
    "adapter_checkpoint": ("torchtune's", "adapter.init_from", ""),
    "resume_adapter_file": ("mlx-lm's", "adapter.init_from", ""),
    "datasets": ("axolotl's", "data.train", " (a list of entries with `path`)"),
    "dataset": ("LLaMA-Factory's and torchtune's", "data.train", " (a list of entries with `path`)"),
    "dataset_name": ("TRL's", "data.train", " (a list of entries with `path`)"),
    "data_path": ("several scripts'", "data.train", " (a list of entries with `path`)"),
    "data_files": ("datasets'", "data.train", " (one entry per file, each with `path`)"),
    "data.train.type": ("axolotl's", "data.train.format", ""),
    "max_samples": ("LLaMA-Factory's", "", _FIRST_ROWS),
    "max_train_samples": ("several scripts'", "", _FIRST_ROWS),
    "val_set_size": ("axolotl's", "data.validation", ""),
    "val_size": ("LLaMA-Factory's", "data.validation", ""),
    "test_split_size": ("TRL's", "data.validation", ""),
    "dataset_val": ("torchtune's", "data.validation", ""),
    "test_datasets": ("axolotl's", "data.validation", ""),
    "eval_dataset": ("LLaMA-Factory's and TRL's", "data.validation", ""),
    "sequence_len": ("axolotl's", "data.max_length", ""),
    "cutoff_len": ("LLaMA-Factory's", "data.max_length", ""),
    "max_seq_len": ("torchtune's", "data.max_length", ""),
    "max_seq_length": ("TRL's", "data.max_length", ""),
    "model_max_length": ("transformers'", "data.max_length", ""),
    "sample_packing": ("axolotl's", "data.packing", ""),
    "packed": ("torchtune's", "data.packing", ""),
    "train_on_prompt": ("LLaMA-Factory's", "data.train_on_inputs", ""),
    "train_on_input": ("torchtune's", "data.train_on_inputs", ""),
    "completion_only_loss": ("TRL's", "data.train_on_inputs", " (the opposite: true learns the prompt too)"),
    "template": ("LLaMA-Factory's", "data.format", " (or `data.prompt` and `data.completion`)"),
    "chat_template_jinja": ("axolotl's", "data.chat_template", " (a file)"),
    "chat_template_path": ("TRL's", "data.chat_template", " (a file)"),
    "enable_thinking": ("LLaMA-Factory's", "data.chat_template_kwargs", " (`{enable_thinking: false}`)"),
    "dataset_text_field": ("TRL's", "data.completion", ' (`"{column}"`, with `data.format: text`)'),
    "system_prompt": (
        "several tools'",
        "",
        "write it into `data.prompt`, or as the first message of each conversation",
    ),
    "field_messages": ("axolotl's", "", _CONVERSATIONS),
    "message_property_mappings": ("axolotl's", "", _CONVERSATIONS),
    "messages": ("LLaMA-Factory's", "", _CONVERSATIONS),
    "train_on_eos": ("axolotl's", "", "the end of each of the assistant's turns is learned"),
    "pretraining_dataset": ("axolotl's", "data.train", " (with `data.format: text`)"),
    "roles_to_train": ("axolotl's", "", "of a conversation the assistant's messages are learned"),
    "lr": ("torchtune's", "train.learning_rate", ""),
    "lr_scheduler": ("axolotl's and torchtune's", "train.lr_scheduler_type", ""),
    "warmup_steps": ("transformers'", "train.warmup_ratio", " (a share of the steps)"),
    "num_warmup_steps": ("torchtune's", "train.warmup_ratio", " (a share of the steps)"),
    "num_epochs": ("axolotl's", "train.num_train_epochs", ""),
    "epochs": ("torchtune's", "train.num_train_epochs", ""),
    "max_steps_per_epoch": ("torchtune's", "train.max_steps", " (over the whole run)"),
    "micro_batch_size": ("axolotl's", "train.per_device_batch_size", ""),
    "per_device_train_batch_size": ("transformers', TRL's and LLaMA-Factory's", "train.per_device_batch_size", ""),
    "per_device_eval_batch_size": ("transformers'", "train.per_device_batch_size", ""),
    "train_batch_size": ("DeepSpeed's", "train.global_batch_size", ""),
    "gradient_accumulation_steps": (
        "every trainer's",
        "train.global_batch_size",
        ", from which it follows: global_batch_size / (per_device_batch_size * world size)",
    ),
    "activation_checkpointing": ("transformers'", "train.gradient_checkpointing", ""),
    "enable_activation_checkpointing": ("torchtune's", "train.gradient_checkpointing", ""),
    "clip_grad_norm": ("torchtune's", "train.max_grad_norm", ""),
    "gradient_clipping": ("DeepSpeed's", "train.max_grad_norm", ""),
    "optimizer": ("axolotl's and torchtune's", "", "the optimizer is AdamW; its settings are `train.adam_*`"),
    "optim": ("transformers'", "", "the optimizer is AdamW; its settings are `train.adam_*`"),
    "log_every_n_steps": ("torchtune's", "train.logging_steps", ""),
    "log_interval": ("several scripts'", "train.logging_steps", ""),
    "evals_per_epoch": ("axolotl's", "train.eval_steps", ""),
    "saves_per_epoch": ("axolotl's", "train.save_steps", ""),
    "evaluation_strategy": ("transformers'", "train.eval_steps", ""),
    "eval_strategy": ("transformers'", "train.eval_steps", ""),
    "save_strategy": ("transformers'", "train.save_steps", ""),
    "early_stopping_threshold": ("transformers'", "train.early_stopping_patience", " (any lower loss counts)"),
    "load_best_model_at_end": ("transformers', TRL's and axolotl's", "train.keep", " (`best`)"),
    "metric_for_best_model": ("transformers'", "", "the best model is the one with the lowest evaluation loss"),
    "ddp_timeout": ("transformers'", "train.distributed_timeout_s", ""),
    "use_wandb": ("axolotl's", "train.report_to", " (`[wandb]`)"),
    "wandb_project": ("axolotl's", "train.report_to", " (`[wandb]`, with the project in WANDB_PROJECT)"),
    "metric_logger": ("torchtune's", "train.report_to", ""),
    "deepspeed": ("transformers' and axolotl's", "train.distributed", " (`fsdp` shards the base over the GPUs)"),
    "fsdp": ("transformers' and axolotl's", "train.distributed", " (`fsdp`)"),
    "fsdp_config": ("transformers' and axolotl's", "train.distributed", " (`fsdp`)"),
    "lm_eval_tasks": ("axolotl's", "eval.tasks", ""),
    "resume_from_checkpoint": (
        "transformers' and axolotl's",
        "",
        "the same `dude train` command goes on with an interrupted run",
    ),
    "overwrite_output_dir": ("transformers'", "", "`dude train --overwrite` starts anew in a folder that has a run"),
    "save_dir": ("several scripts'", "output_dir", ""),
    "random_seed": ("several scripts'", "seed", ""),
    "data_seed": ("transformers'", "seed", ""),
}


def unknown_key(loc: Loc, root: type[Section] = Config) -> str:
    """Return the message for the unknown key at `loc`: where it stands, and what was probably meant.

    In this order: another tool's name, in a config; a key of another section; a misspelt key of the same section, then
    of another one; the keys that the section has.
    """
    path = path_of(loc)
    key, section = path[-1], path[:-1]
    place = f"in `{'.'.join(str(part) for part in loc[:-1])}`" if section else "at the top level"
    return f"unknown key `{key}` {place}; {_advice(key, section, root)}"


def meant_by(loc: Loc, root: type[Section] = Config) -> list[Path]:
    """Return the keys that the unknown key at `loc` was probably meant to be, where that is not in doubt."""
    *section, key = path_of(loc)
    foreign = _foreign(path_of(loc), root)
    if foreign is not None:
        return [tuple(foreign[1].split("."))]
    siblings = list(getattr(section_at(tuple(section), root), "model_fields", {}))
    return [(*section, name) for name in closest(key, siblings, _TYPO)]


def key_of_option(option: str) -> str | None:
    """Return the dotted key that an option such as `--max_steps` was probably meant to be, None if there is none."""
    loc = tuple(option.lstrip("-").replace("-", "_").split("."))
    known = list(key_paths(Config))
    found = [path for path in known if path == loc or (path[-1:] == loc)] or [
        path for path in meant_by(loc) if all(path)
    ]
    return _dotted(found[0], Config) if found else None


def closest(word: str, candidates: list[str], cutoff: float) -> list[str]:
    """Return the candidates that are most like `word`: one, or several that are equally like it."""
    found = [(_likeness(word, candidate), candidate) for candidate in nearest(word, candidates)]
    best = max((likeness for likeness, _ in found), default=0.0)
    return [candidate for likeness, candidate in found if likeness >= max(cutoff, best - 0.01)]


def or_list(names: list[str]) -> str:
    return " or ".join(f"`{name}`" for name in names)


def _advice(key: str, section: Path, root: type[Section]) -> str:
    siblings = list(getattr(section_at(section, root), "model_fields", {}))
    foreign = _foreign((*section, key), root)
    if foreign is not None:
        owner, ours, note = foreign
        return f"it is {owner} name; here: `{ours}`{note}" if ours else f"it is {owner} name; {note}"
    elsewhere = [path for path in key_paths(root) if path[:-1] != section]
    same = [_dotted(path, root) for path in elsewhere if path[-1] == key]
    if same:
        return f"did you mean {or_list(same)}?"
    near = closest(key, siblings, 0.5)
    if near:
        return f"did you mean {or_list(near)}?"
    near = closest(key, sorted({path[-1] for path in elsewhere}), _TYPO)
    if near:
        return f"did you mean {or_list([_dotted(path, root) for path in elsewhere if path[-1] in near])}?"
    return "the keys here are " + ", ".join(f"`{name}`" for name in siblings)


def _foreign(path: Path, root: type[Section]) -> tuple[str, str, str] | None:
    return FOREIGN.get(".".join(path), FOREIGN.get(path[-1])) if root is Config else None


def _dotted(path: Path, root: type[Section]) -> str:
    """Write a path as in an override, with 0 for the first entry of a list."""
    return ".".join(
        f"{part}.0" if path[index + 1 :] and _is_list_of_sections(path[: index + 1], root) else part
        for index, part in enumerate(path)
    )


def _is_list_of_sections(path: Path, root: type[Section]) -> bool:
    field = field_at(path, root)
    return field is not None and has_entries(field)


def _likeness(word: str, candidate: str) -> float:
    return SequenceMatcher(None, candidate.lower(), word.lower()).ratio()
