"""Which of PEFT's adapters can be imported: those that are a low-rank difference to the base that is there."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, TypeGuard

from dude_cli.config import LEAST_ALPHA, MOST_ALPHA
from dude_cli.errors import AdapterError
from dude_cli.export.peft_files import CONFIG_FILE, PeftAdapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PEFT_ALPHA = 8  # LoraConfig's own default
# Starts that leave the base as it is, and those that subtract their factors from it.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
SUBTRACTED_STARTS = ("pissa", "olora", "corda", "lora_ga")
# LoraConfig's keys that say nothing of what a saved adapter computes, or that are read below.
_KNOWN_KEYS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config", "exclude_modules",
    "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "loftq_config",
    "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size",
    "r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora",
}  # fmt: skip


def refuse_unsupported(adapter: PeftAdapter) -> None:
    """Raise AdapterError for settings that add something else to the base, and for those that are not known."""
    config, start = adapter.config, adapter.config.get("init_lora_weights", True)
    unsupported = {key: value for key, value in config.items() if key not in _KNOWN_KEYS and value}
    if config.get("bias", "none") != "none":
        unsupported["bias"] = config["bias"]
    if not (start in PLAIN_STARTS or str(start).startswith(SUBTRACTED_STARTS)):
        unsupported["init_lora_weights"] = start
    if unsupported:
        raise AdapterError(
            "the adapter computes more than a low-rank difference: "
            + ", ".join(f"{key} is {value!r}" for key, value in sorted(unsupported.items())),
            where=str(adapter.folder / CONFIG_FILE),
            fix="import adapters without these settings",
        )


def check_numbers(adapter: PeftAdapter) -> None:
    """Raise AdapterError unless each layer's alpha and the dropout are within the bounds that ours have."""
    config = adapter.config
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(map(_is_pattern, patterns)):
        raise _unusable(adapter, "alpha_pattern", patterns, "it names layers by regular expressions")
    alphas = {"lora_alpha": config.get("lora_alpha", PEFT_ALPHA)}
    alphas |= {f"alpha_pattern: {key}": value for key, value in patterns.items()}
    for key, alpha in alphas.items():
        if not _is_number(alpha) or not LEAST_ALPHA <= alpha <= MOST_ALPHA:
            raise _unusable(adapter, key, alpha, f"a scaling is a number from {LEAST_ALPHA:g} to {MOST_ALPHA:g}")
    dropout = config.get("lora_dropout", 0.0)
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise _unusable(adapter, "lora_dropout", dropout, "a dropout is a number from 0 on and below 1")


def check_common_alpha(adapter: PeftAdapter, alpha: float, rank: int) -> None:
    """Raise AdapterError for the alpha that layers with scalings of their own have at one rank, if it cannot be one."""
    if not LEAST_ALPHA <= alpha <= MOST_ALPHA:
        raise AdapterError(
            f"the layers' scalings are those of an alpha of {alpha:g} at rank {rank}, and one is a number from "
            f"{LEAST_ALPHA:g} to {MOST_ALPHA:g}",
            where=str(adapter.folder / CONFIG_FILE),
            fix="lower lora_alpha or alpha_pattern, and scale lora_B up by as much",
        )


def _unusable(adapter: PeftAdapter, key: str, value: object, wanted: str) -> AdapterError:
    return AdapterError(
        f"{key.partition(':')[0]} is {value!r}, and {wanted}",
        where=f"{adapter.folder / CONFIG_FILE}: {key}",
        fix="restore the file, or write a value that can be one there",
    )


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_pattern(key: str) -> bool:
    try:
        re.compile(key)
    except re.error:
        return False
    return True


def check_base_weights(model: PreTrainedModel, adapter: PeftAdapter) -> None:
    """PEFT saves the weight of an adapted head too: raise AdapterError if it is not the base's own."""
    import torch

    from dude_cli.adapter.weight import stored_weight

    for name, saved in adapter.base_weights.items():
        weight = stored_weight(model.get_submodule(name)).cpu()
        if not torch.equal(saved.to(weight.dtype), weight):
            raise AdapterError(
                f"the adapter has a weight of its own for {name}, other than the base's",
                where=str(adapter.folder),
                fix="an adapter with a trained or resized head cannot be imported; else name its base: --base-model",
            )
