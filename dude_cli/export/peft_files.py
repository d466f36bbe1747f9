"""PEFT's adapter folder: its names on disk and its config, written and read.

    adapter_model.safetensors   base_model.model.<layer>.lora_A.weight (r, in), .lora_B.weight (out, r),
                                .lora_magnitude_vector (out,), with no `.weight` on disk
    adapter_config.json         LoraConfig's keys

Written by hand, not by PEFT: its `save_pretrained` writes sets, so the order changes from run to run.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dude_cli.errors import AdapterError
from dude_cli.system import files

if TYPE_CHECKING:
    from torch import Tensor

TENSORS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PREFIX = "base_model.model."
_SUFFIXES = {"lora_A": ".lora_A.weight", "lora_B": ".lora_B.weight", "magnitude": ".lora_magnitude_vector"}
_BASE_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.base_layer\.weight")
_KEY = re.compile(r"base_model\.model\.(?P<layer>.+)\.(?P<field>lora_A|lora_B|lora_magnitude_vector)(\.weight)?")


@dataclass(frozen=True)
class PeftLayer:
    """One layer's tensors, float32: y = W0 x + s B A x, or with a magnitude m / ||W0 + s B A|| times that."""

    lora_A: Tensor  # (r, in)
    lora_B: Tensor  # (out, r)
    magnitude: Tensor | None = None  # (out,)


@dataclass(frozen=True)
class PeftAdapter:
    """A folder as it was read: LoraConfig's keys, and the layers by name.

    `base_weights` are what PEFT saves beside an adapted head: the weight that is adapted.
    """

    folder: Path
    config: dict[str, Any]
    layers: dict[str, PeftLayer]
    base_weights: dict[str, Tensor]


def write_peft_adapter(folder: Path, layers: dict[str, PeftLayer], config: dict[str, Any]) -> None:
    """Write `layers`, which have one rank, in float32; the same layers and config give the same bytes."""
    tensors = {
        f"{_PREFIX}{name}{suffix}": tensor.detach().contiguous().cpu()
        for name, layer in layers.items()
        for field, suffix in _SUFFIXES.items()
        if (tensor := getattr(layer, field)) is not None
    }
    files.save_tensors(tensors, folder / TENSORS_FILE)
    files.write_text(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True) + "\n")


def lora_config(
    layers: dict[str, PeftLayer],
    *,
    alpha: float,
    targets: list[str],
    is_conv1d: bool,
    base_model: str,
    revision: str | None,
) -> dict[str, Any]:
    """LoraConfig's keys for a plain LoRA or DoRA on the untouched base; the scaling is alpha / r."""
    first = next(iter(layers.values()))
    return {
        "base_model_name_or_path": base_model,
        "bias": "none",
        "fan_in_fan_out": is_conv1d,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": first.lora_A.shape[0],
        "revision": revision,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "use_dora": first.magnitude is not None,
        "use_rslora": False,
    }


def read_peft_adapter(folder: Path) -> PeftAdapter:
    """Read a LoRA adapter's folder, tensors as float32 on the CPU.

    Raises AdapterError for a folder that has none, another kind of adapter, pickled tensors, a damaged file, tensors
    that belong to no LoRA layer, layers that lack one, and values that are not finite.
    """
    config = read_peft_config(folder)
    tensors = _load(folder)
    adapted = {match["layer"] for key in tensors if (match := _KEY.fullmatch(key))}
    matches = {key: match["layer"] for key in tensors if (match := _BASE_KEY.fullmatch(key))}
    base_weights = {name: tensors.pop(key) for key, name in matches.items() if name in adapted}
    layers = _layers(tensors, folder, needs_magnitude=bool(config.get("use_dora")))
    return PeftAdapter(folder, config, layers, base_weights)


def read_peft_config(folder: Path) -> dict[str, Any]:
    """LoraConfig's keys of PEFT's folder. Raises AdapterError for a folder without them, and for other kinds."""
    path = folder / CONFIG_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterError(
            f"no PEFT adapter is here: {error.strerror}",
            where=str(path),
            fix="name the folder that PEFT's save_pretrained wrote",
        ) from error
    except ValueError as error:
        raise AdapterError(f"{path.name} is not JSON: {error}", where=str(path), fix="restore the file") from error
    if isinstance(found, dict) and "format_version" in found:
        raise AdapterError(
            "this is an adapter of dude's already", where=str(path), fix="use it as it is: it needs no import"
        )
    if not isinstance(found, dict) or "peft_type" not in found:
        raise AdapterError(
            f"{path.name} is not PEFT's: it has no peft_type",
            where=str(path),
            fix="name the folder that PEFT's save_pretrained wrote",
        )
    if found["peft_type"] != "LORA":
        raise AdapterError(
            f"a PEFT adapter of type {found['peft_type']} cannot become one of dude's",
            where=f"{path}: peft_type",
            fix="import LoRA, DoRA or PiSSA adapters, whose peft_type is LORA",
        )
    return found


def _layers(tensors: dict[str, Tensor], folder: Path, *, needs_magnitude: bool) -> dict[str, PeftLayer]:
    by_layer: dict[str, dict[str, Tensor]] = {}
    foreign = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            foreign.append(key)
            continue
        field = match["field"].replace("lora_magnitude_vector", "magnitude")
        by_layer.setdefault(match["layer"], {})[field] = tensor.float()
    if foreign:
        raise AdapterError(
            f"{len(foreign)} tensors are of no LoRA layer: {', '.join(sorted(foreign)[:3])}",
            where=str(folder / TENSORS_FILE),
            fix="adapters on embeddings, biases and whole modules (modules_to_save) cannot be imported",
        )
    wanted = {"lora_A", "lora_B"} | ({"magnitude"} if needs_magnitude else set())
    for name, fields in by_layer.items():
        if set(fields) != wanted:
            raise AdapterError(
                f"{name} has {sorted(fields)}, and use_dora: {str(needs_magnitude).lower()} wants {sorted(wanted)}",
                where=str(folder / TENSORS_FILE),
                fix="a conversion may have dropped tensors: save the adapter again, without converting it",
            )
        for field, tensor in fields.items():
            if not tensor.isfinite().all():
                raise AdapterError(
                    f"{field} of {name} has infinite or NaN values",
                    where=str(folder / TENSORS_FILE),
                    fix="the training diverged, or a conversion overflowed: save an adapter from before that",
                )
    if not by_layer:
        raise AdapterError("the adapter has no layers", where=str(folder / TENSORS_FILE), fix="save it again")
    return {name: PeftLayer(**fields) for name, fields in by_layer.items()}


def _load(folder: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError

    path = folder / TENSORS_FILE
    try:
        return files.load_tensors(path)
    except OSError as error:
        is_pickled = (folder / "adapter_model.bin").is_file()
        fix = "adapter_model.bin is a pickle, which is never read: save the adapter again with a newer PEFT"
        raise AdapterError(
            f"{TENSORS_FILE} cannot be read: {error.strerror}",
            where=str(path),
            fix=fix if is_pickled else "restore the file",
        ) from error
    except SafetensorError as error:
        raise AdapterError(
            f"{TENSORS_FILE} is cut off or damaged: {error}", where=str(path), fix="restore the file from a copy"
        ) from error
