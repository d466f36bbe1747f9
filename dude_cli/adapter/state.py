"""The adapter folder: save, load, verify.

adapter.safetensors     <layer>.lora_A, .lora_B, .magnitude, .initial_A, .initial_B, float32
adapter_config.json     format version, the AdapterConfig, the base model, the checksum of the file above
    README.md, tokenizer    the model card and the tokenizer, when they are given
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dude_cli import files
from dude_cli.adapter.layer import Factors
from dude_cli.adapter.patch import adapter_layers, patch_with_factors
from dude_cli.adapter.weight import is_linear, quantization, quantization_state, weight_shape
from dude_cli.config import AdapterConfig, DType
from dude_cli.errors import AdapterError

FORMAT_VERSION = 1
TENSORS_FILE = "adapter.safetensors"
CONFIG_FILE = "adapter_config.json"
# Values of one parameter that the fingerprint reads: all of a small one; of a 7B model, in all, a quarter of a GB.
FINGERPRINT_VALUES = 2**19


@dataclass(frozen=True)
class SavedAdapter:
    """What `adapter_config.json` says."""

    config: AdapterConfig
    base_model: str
    base_revision: str | None
    base_dtype: DType
    base_quantization: str | None
    base_fingerprint: str
    sha256: str


def save_adapter(
    model: PreTrainedModel,
    folder: Path | str,
    *,
    base_revision: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    model_card: str | None = None,
) -> None:
    """Write the adapter of `model` to `folder`, replacing one that is there only when the new one is complete."""
    layers = adapter_layers(model)
    if not layers:
        raise AdapterError("the model has no adapter to save", fix="call patch_model first")
    with files.new_folder(Path(folder)) as partial:
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if model_card is not None:
            (partial / "README.md").write_text(model_card, encoding="utf-8")
        files.save_tensors(adapter_tensors(model), partial / TENSORS_FILE)
        config = next(iter(layers.values())).config
        saved = {
            "format_version": FORMAT_VERSION,
            "adapter": config.model_dump(mode="json"),
            "base_model": {
                "name_or_path": model.config.name_or_path,
                "revision": base_revision,
                "dtype": str(model.dtype).removeprefix("torch."),
                "quantization": quantization(model),
                "fingerprint": base_fingerprint(model),
            },
            "sha256": files.sha256(partial / TENSORS_FILE),
        }
        files.write_text(partial / CONFIG_FILE, json.dumps(saved, indent=2) + "\n")


def load_adapter(model: PreTrainedModel, folder: Path | str, settings: AdapterConfig | None = None) -> AdapterConfig:
    """Patch `model`, the base that the adapter was made on, with the adapter of `folder`; no SVD is redone.

    `settings` replaces the saved config, for one that differs in what the tensors do not depend on, such as dropout.
    Raises AdapterError, before the model is touched, for a folder that is not an adapter, a wrong checksum, missing
    or misshapen tensors, and another base model.
    """
    folder = Path(folder)
    saved = read_adapter_config(folder)
    factors = _read_factors(folder, saved)
    for name, given in factors.items():
        _check_layer(model, folder, name, given)
    _check_base(model, folder, saved)
    config = settings or saved.config
    patch_with_factors(model, config, factors)
    return config


def restore_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Copy the tensors of an adapter folder into `model`, which is patched with an adapter of the same config.

    Raises AdapterError, before the model is touched, for a folder that is not an adapter, a wrong checksum, another
    base model and an adapter of other layers.
    """
    saved = read_adapter_config(folder)
    factors = _read_factors(folder, saved)
    layers = adapter_layers(model)
    if set(factors) != set(layers):
        raise AdapterError(
            f"the adapter is not of the model's layers: {', '.join(sorted(set(factors) ^ set(layers))[:4])} differ",
            where=str(folder),
            fix="use the config that it was trained with",
        )
    _check_base(model, folder, saved)
    with torch.no_grad():
        for name, layer in layers.items():
            for field, tensor in factors[name]._asdict().items():
                if tensor is not None:
                    getattr(layer, field).copy_(tensor)


def read_adapter_config(folder: Path) -> SavedAdapter:
    """What the adapter folder says of itself. Raises AdapterError if it is not one of ours."""
    path = folder / CONFIG_FILE
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        if saved.get("peft_type"):
            raise AdapterError(
                f"this is an adapter in PEFT's format (peft_type {saved['peft_type']}), not one of dude's",
                where=str(path),
                fix="give an adapter that `dude train` wrote: the folder `adapter` of a run",
            )
        if saved["format_version"] != FORMAT_VERSION:
            raise AdapterError(
                f"adapter format {saved['format_version']} is not the one this version reads, {FORMAT_VERSION}",
                where=str(path),
                fix="use the version of dude that wrote it",
            )
        base = saved["base_model"]
        return SavedAdapter(
            config=AdapterConfig.model_validate(saved["adapter"]),
            base_model=base["name_or_path"],
            base_revision=base["revision"],
            base_dtype=base["dtype"],
            base_quantization=base.get("quantization"),
            base_fingerprint=base["fingerprint"],
            sha256=saved["sha256"],
        )
    except OSError as error:
        raise AdapterError(
            f"no adapter is here: {error.strerror}", where=str(path), fix="name a folder that `dude train` wrote"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, ValidationError) as error:
        raise AdapterError(
            f"{CONFIG_FILE} cannot be read: {error}", where=str(path), fix="train again, or restore the file"
        ) from error


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors by their name on disk, contiguous, on the CPU, in the model's order."""
    return {
        f"{name}.{field}": tensor.detach().contiguous().cpu()
        for name, layer in adapter_layers(model).items()
        for field in Factors._fields
        if (tensor := getattr(layer, field)) is not None
    }


def base_fingerprint(model: nn.Module) -> str:
    """SHA-256 over every parameter of the base model: its name, its shape and rows of it, rounded to bfloat16.

    A parameter of up to FINGERPRINT_VALUES values is read whole, a larger one every k-th row, from the first on: a
    change of other rows alone goes unseen; a fine-tuned, pruned or extended copy does not. Adapters are left out, so a
    patched model and its base agree. The rounding makes one model in float32 and in bfloat16 the same base.
    A quantised weight is read as the bytes that it is packed into, and the scales beside it without rounding.
    """
    digest = hashlib.sha256()
    for name, tensor in _base_tensors(model):
        digest.update(f"{name}:{tuple(tensor.shape)};".encode())
        rows = tensor.reshape(-1, tensor.shape[-1] if tensor.ndim else 1)
        chosen = rows[:: -(-tensor.numel() // FINGERPRINT_VALUES)]
        if chosen.is_floating_point():
            chosen = chosen.to(torch.bfloat16)
        digest.update(chosen.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _base_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The base model's parameters, each tied one once, and what quantised ones mean, by their names there."""
    own = {f"{name}.{field}" for name in adapter_layers(model) for field in Factors._fields}
    for name, parameter in model.named_parameters():
        if name not in own:
            yield name.replace(".base_layer.", "."), parameter.detach()
    for name, module in model.named_modules():
        for field, tensor in quantization_state(module).items():
            # One value a row, float32 as integers: neither left out as part of a long row nor rounded.
            exact = tensor.view(torch.int32) if tensor.is_floating_point() else tensor
            yield f"{name}.{field}".replace(".base_layer.", "."), exact.reshape(-1, 1)


def _read_factors(folder: Path, saved: SavedAdapter) -> dict[str, Factors]:
    path = folder / TENSORS_FILE
    try:
        checksum = files.sha256(path)
        if checksum != saved.sha256:
            raise AdapterError(
                f"{TENSORS_FILE} is damaged: its checksum is not the one that was saved with it",
                where=f"{path}: sha256 {checksum[:12]}, saved {saved.sha256[:12]}",
                fix="restore the file from a copy, or train again",
            )
        tensors = load_file(path)
    except OSError as error:
        raise AdapterError(
            f"{TENSORS_FILE} cannot be read: {error.strerror}", where=str(path), fix="restore the file"
        ) from error
    except SafetensorError as error:
        raise AdapterError(
            f"{TENSORS_FILE} is not a safetensors file: {error}", where=str(path), fix="restore the file"
        ) from error
    by_layer: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition(".")
        by_layer.setdefault(name, {})[field] = tensor
    return {name: _factors(path, saved.config, name, fields) for name, fields in by_layer.items()}


def _factors(path: Path, config: AdapterConfig, name: str, fields: dict[str, Tensor]) -> Factors:
    wanted = {"lora_A", "lora_B"}
    wanted |= {"magnitude"} if config.has_magnitude else set()
    wanted |= {"initial_A", "initial_B"} if config.has_svd_init else set()
    if set(fields) != wanted:
        missing, extra = sorted(wanted - set(fields)), sorted(set(fields) - wanted)
        raise AdapterError(
            f"{name} has not the tensors of a {config.method} adapter: missing {missing}, unexpected {extra}",
            where=str(path),
            fix="restore the file from a copy, or train again",
        )
    return Factors(**fields)


def _check_base(model: PreTrainedModel, folder: Path, saved: SavedAdapter) -> None:
    fingerprint, quantized = base_fingerprint(model), quantization(model)
    if fingerprint != saved.base_fingerprint:
        # A weight in another dtype may be quantised to other bytes.
        settings = f", with model.quantization: {saved.base_quantization or 'null'}, model.dtype: {saved.base_dtype}"
        raise AdapterError(
            f"the adapter was made on {saved.base_model}, whose weights are not those of {model.config.name_or_path}",
            where=f"{folder / CONFIG_FILE}: fingerprint {saved.base_fingerprint[:12]}, the model's {fingerprint[:12]}; "
            f"quantization {saved.base_quantization or 'none'}, the model's {quantized or 'none'}",
            fix=f"load {saved.base_model} as the base model, at the same revision"
            + (settings if saved.base_quantization or quantized else ""),
        )


def _check_layer(model: PreTrainedModel, folder: Path, name: str, factors: Factors) -> None:
    where = str(folder / TENSORS_FILE)
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    if layer is None or not is_linear(layer):
        raise AdapterError(
            f"the adapter has a layer {name}, and {model.config.name_or_path} has no such linear layer",
            where=where,
            fix="load the base model that the adapter was made on",
        )
    out_features, in_features = weight_shape(layer)
    rank = factors.lora_A.shape[0]
    shape_A, shape_B = (rank, in_features), (out_features, rank)
    shapes = (shape_A, shape_B, (out_features,), shape_A, shape_B)
    for field, tensor, shape in zip(Factors._fields, factors, shapes, strict=True):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != torch.float32):
            raise AdapterError(
                f"{name}.{field} is {tuple(tensor.shape)} {tensor.dtype}, "
                f"and the model's layer needs {shape} torch.float32",
                where=where,
                fix="load the base model that the adapter was made on",
            )
