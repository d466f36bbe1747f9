"""What an adapter folder holds, read and verified before anything is done with it.

adapter.safetensors     <layer>.lora_A, .lora_B, .magnitude, .initial_A, .initial_B, float32
adapter_config.json     format version, the AdapterConfig, the base model, a digest of each layer's tensors, and the
                        sha256 of all that, which names the adapter
README.md, tokenizer    the model card and the tokenizer with its chat template, when they are given

No decomposition is redone at load: the initial factors are part of the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from dude_cli.adapter.factors import Factors
from dude_cli.config import AdapterConfig, DType
from dude_cli.errors import AdapterError
from dude_cli.system import files

FORMAT_VERSION = 2
TENSORS_FILE = "adapter.safetensors"
CONFIG_FILE = "adapter_config.json"
_RESTORE = "restore the file from a copy, or train again"


@dataclass(frozen=True)
class SavedAdapter:
    """What `adapter_config.json` says.

    `layer_digests` has a SHA-256 of each layer's tensors by the layer's name. `sha256` is that of the settings and the
    digests together: two adapters that have it in common compute the same difference to the same base.
    """

    config: AdapterConfig
    base_model: str
    base_revision: str | None
    base_dtype: DType
    base_quantization: str | None
    base_fingerprint: str
    layer_digests: dict[str, str]
    sha256: str


def read_adapter_config(folder: Path) -> SavedAdapter:
    """What the adapter folder says of itself. Raises AdapterError if it is not one of ours."""
    path = folder / CONFIG_FILE
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved.get("peft_type"):
            raise AdapterError(
                f"this is an adapter in PEFT's format (peft_type {saved['peft_type']}), not one of dude's",
                where=str(path),
                fix=f"make it one with `dude import {folder} OUT`",
            )
        if saved["format_version"] != FORMAT_VERSION:
            raise AdapterError(
                f"adapter format {saved['format_version']} is not the one this version reads, {FORMAT_VERSION}",
                where=str(path),
                fix="use the version of dude that wrote it",
            )
        if saved["sha256"] != adapter_sha256(saved["adapter"], saved["layers"]):
            raise AdapterError(
                f"{CONFIG_FILE} was changed after it was saved: its settings and digests do not fit its sha256",
                where=str(path),
                fix=_RESTORE,
            )
        base = saved["base_model"]
        return SavedAdapter(
            config=AdapterConfig.model_validate(saved["adapter"]),
            base_model=base["name_or_path"],
            base_revision=base["revision"],
            base_dtype=base["dtype"],
            base_quantization=base["quantization"],
            base_fingerprint=base["fingerprint"],
            layer_digests=saved["layers"],
            sha256=saved["sha256"],
        )
    except OSError as error:
        raise AdapterError(
            f"no adapter is here: {error.strerror}", where=str(path), fix="name a folder that `dude train` wrote"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise AdapterError(f"{CONFIG_FILE} cannot be read: {error}", where=str(path), fix=_RESTORE) from error


def read_factors(folder: Path, saved: SavedAdapter) -> dict[str, Factors]:
    """The tensors of an adapter folder by layer, on the CPU, each as it was saved.

    Raises AdapterError, with a message of its own, for a file that is cut off, a tensor that is missing, layers that
    stand in each other's place, and a layer whose tensors are not the saved ones.
    """
    path = folder / TENSORS_FILE
    by_layer: dict[str, dict[str, Tensor]] = {name: {} for name in saved.layer_digests}
    for key, tensor in _load_tensors(path).items():
        name, _, field = key.rpartition(".")
        by_layer.setdefault(name, {})[field] = tensor
    factors = {name: _factors(path, saved, name, fields) for name, fields in by_layer.items()}
    _check_digests(path, saved, {name: digest(given) for name, given in factors.items()})
    return factors


def digest(factors: Factors) -> str:
    """SHA-256 over the tensors of one layer: names, shapes, dtypes, bytes. The layer's own name is not in it."""
    total = hashlib.sha256()
    for field, tensor in factors._asdict().items():
        if tensor is not None:
            total.update(f"{field}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
            total.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def adapter_sha256(config: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    """SHA-256 over the settings and the layers' digests of an adapter: what it computes, whatever it is called."""
    return hashlib.sha256(json.dumps([config, digests], sort_keys=True).encode()).hexdigest()


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return files.load_tensors(path)
    except OSError as error:
        raise AdapterError(f"{path.name} cannot be read: {error.strerror}", where=str(path), fix=_RESTORE) from error
    except SafetensorError as error:
        reason = str(error).rpartition(": ")[2]
        is_cut = "not fully covered" in reason or "too small" in reason or "invalid header length" in reason
        what = "is cut off" if is_cut else "is not a safetensors file"
        raise AdapterError(f"{path.name} {what}: {reason}", where=str(path), fix=_RESTORE) from error


def _factors(path: Path, saved: SavedAdapter, name: str, fields: dict[str, Tensor]) -> Factors:
    config = saved.config
    wanted = {"lora_A", "lora_B"} if name in saved.layer_digests else set()
    wanted |= {"magnitude"} if wanted and config.has_magnitude else set()
    wanted |= {"initial_A", "initial_B"} if wanted and config.has_svd_init else set()
    if set(fields) != wanted:
        missing, extra = sorted(wanted - set(fields)), sorted(set(fields) - wanted)
        raise AdapterError(
            f"{name} has not the tensors of a {config.method} adapter: missing {missing}, unexpected {extra}",
            where=str(path),
            fix=_RESTORE,
        )
    return Factors(**fields)


def _check_digests(path: Path, saved: SavedAdapter, found: dict[str, str]) -> None:
    owners = {value: name for name, value in saved.layer_digests.items()}
    for name, value in found.items():
        if value == saved.layer_digests[name]:
            continue
        if value in owners:
            raise AdapterError(
                f"layers are swapped: {name} has the tensors of {owners[value]}", where=str(path), fix=_RESTORE
            )
        raise AdapterError(
            f"{path.name} is damaged: the tensors of {name} are not those that were saved",
            where=f"{path}: sha256 {value[:12]}, saved {saved.layer_digests[name][:12]}",
            fix=_RESTORE,
        )
