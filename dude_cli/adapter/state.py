"""Save an adapter, and load it onto the base that it was made on. What the folder holds is described in `folder.py`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dude_cli.adapter.factors import Factors
from dude_cli.adapter.folder import (
    CONFIG_FILE,
    FORMAT_VERSION,
    TENSORS_FILE,
    SavedAdapter,
    adapter_sha256,
    digest,
    read_adapter_config,
    read_factors,
)
from dude_cli.adapter.patch import adapter_layers, base_dtype, patch_with_factors, tied_layers
from dude_cli.adapter.weight import check_readable, is_linear, quantization, quantization_state, weight_shape
from dude_cli.config import AdapterConfig
from dude_cli.errors import AdapterError
from dude_cli.system import files

# Values of one parameter that the fingerprint reads: all of a small one; of a 7B model, in all, a quarter of a GB.
FINGERPRINT_VALUES = 2**19

_kept_fingerprints: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


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
            files.save_tokenizer(tokenizer, partial)
        if model_card is not None:
            (partial / "README.md").write_text(model_card, encoding="utf-8")
        files.save_tensors(adapter_tensors(model), partial / TENSORS_FILE)
        settings = next(iter(layers.values())).config.model_dump(mode="json")
        digests = {name: digest(layer.factors) for name, layer in layers.items()}
        saved = {
            "format_version": FORMAT_VERSION,
            "adapter": settings,
            "base_model": {
                "name_or_path": model.config.name_or_path,
                "revision": base_revision,
                "dtype": str(base_dtype(model)).removeprefix("torch."),
                "quantization": quantization(model),
                "fingerprint": base_fingerprint(model),
            },
            "layers": digests,
            "sha256": adapter_sha256(settings, digests),
        }
        files.write_text(partial / CONFIG_FILE, json.dumps(saved, indent=2) + "\n")


def load_adapter(
    model: PreTrainedModel,
    folder: Path | str,
    settings: AdapterConfig | None = None,
    *,
    allow_other_base: bool = False,
) -> AdapterConfig:
    """Patch `model`, the base that the adapter was made on, with the adapter of `folder`; no SVD is redone.

    `settings` replaces the saved config, for one that differs in what the tensors do not depend on, such as dropout.
    `allow_other_base` puts the learned difference on a base with other weights, of the same layers and shapes.
    Raises AdapterError, before the model is touched, for a folder that is not an adapter or is not as it was saved
    (see `folder.read_factors`), misshapen tensors, another base model and an offloaded one; UsageError for one whose
    weights cannot be read (see `check_readable`).
    """
    folder = Path(folder)
    saved = read_adapter_config(folder)
    factors = read_factors(folder, saved)
    check_factors(model, factors, str(folder / TENSORS_FILE))
    if not allow_other_base:
        check_base(model, folder, saved)
    config = settings or saved.config
    patch_with_factors(model, config, factors)
    return config


def restore_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Copy the tensors of an adapter folder into `model`, which is patched with an adapter of the same config.

    Raises AdapterError, before the model is touched, for a folder that is not an adapter or is not as it was saved,
    another base model and an adapter of other layers.
    """
    saved = read_adapter_config(folder)
    factors = read_factors(folder, saved)
    layers = adapter_layers(model)
    if set(factors) != set(layers):
        raise AdapterError(
            f"the adapter is not of the model's layers: {', '.join(sorted(set(factors) ^ set(layers))[:4])} differ",
            where=str(folder),
            fix="use the config that it was trained with",
        )
    check_base(model, folder, saved)
    for name, layer in layers.items():
        layer.set_factors(factors[name])


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors by their name on disk, contiguous, on the CPU, in the model's order."""
    return {
        f"{name}.{field}": tensor.detach().contiguous().cpu()
        for name, layer in adapter_layers(model).items()
        for field, tensor in layer.factors._asdict().items()
        if tensor is not None
    }


def base_fingerprint(model: nn.Module) -> str:
    """SHA-256 over every parameter of the base model: its name, its shape and rows of it, rounded to bfloat16.

    A parameter of up to FINGERPRINT_VALUES values is read whole, a larger one every k-th row, from the first on: a
    change of other rows alone goes unseen; a fine-tuned, pruned or extended copy does not. Adapters are left out, so a
    patched model and its base agree. The rounding makes one model in float32 and in bfloat16 the same base.
    A quantised weight is read as the bytes that it is packed into, and the scales beside it without rounding.
    """
    if model in _kept_fingerprints:
        return _kept_fingerprints[model]
    digest = hashlib.sha256()
    for name, tensor in _base_tensors(model):
        digest.update(f"{name}:{tuple(tensor.shape)};".encode())
        if tensor.numel() == 0:
            continue
        rows = tensor.reshape(-1, tensor.shape[-1] if tensor.ndim else 1)
        chosen = rows[:: -(-tensor.numel() // FINGERPRINT_VALUES)]
        if chosen.is_floating_point():
            chosen = chosen.to(torch.bfloat16)
        digest.update(chosen.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def keep_fingerprint(model: nn.Module) -> None:
    """Let the base's fingerprint of now stand from here on: its weights are about to be sharded over the ranks."""
    _kept_fingerprints[model] = base_fingerprint(model)


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


def check_base(model: PreTrainedModel, folder: Path, saved: SavedAdapter) -> None:
    """Raise AdapterError, with both sides, unless `model` has the weights that the adapter was made on."""
    fingerprint, quantized = base_fingerprint(model), quantization(model)
    if fingerprint != saved.base_fingerprint:
        settings = ""
        if saved.base_quantization or quantized:
            # The dtype too: a weight in another one may be quantised to other bytes.
            settings = f", model.quantization: {saved.base_quantization or 'null'}, model.dtype: {saved.base_dtype}"
        raise AdapterError(
            f"the adapter was made on {saved.base_model}, whose weights are not those of {model.config.name_or_path}",
            where=f"{folder / CONFIG_FILE}: fingerprint {saved.base_fingerprint[:12]}, the model's {fingerprint[:12]}; "
            f"quantization {saved.base_quantization or 'none'}, the model's {quantized or 'none'}",
            fix=f"load {saved.base_model} at the same revision{settings}",
        )


def check_factors(model: PreTrainedModel, factors: Mapping[str, Factors], where: str) -> None:
    """Raise AdapterError, naming `where` they come from, unless `factors` fit the layers of the base `model`.

    UsageError for a base whose weights cannot be read; see `check_readable`.
    """
    check_readable(model)
    tied = tied_layers(model)
    for name, given in factors.items():
        _check_layer(model, name, given, where, tied)


def _check_layer(model: PreTrainedModel, name: str, factors: Factors, where: str, tied: Collection[nn.Module]) -> None:
    base = model.config.name_or_path
    fix = "load the base model that the adapter was made on"
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    if layer is None or not is_linear(layer):
        raise AdapterError(f"the adapter has a layer {name}, and {base} has no such linear layer", where=where, fix=fix)
    if layer in tied:
        raise AdapterError(
            f"the adapter has a layer {name}, whose weight is the input embedding's or another layer's too in {base}",
            where=where,
            fix="adapters on tied layers are not supported: train without it",
        )
    out_features, in_features = weight_shape(layer)
    rank = factors.lora_A.shape[0]
    shape_A, shape_B = (rank, in_features), (out_features, rank)
    shapes = (shape_A, shape_B, (out_features,), shape_A, shape_B)
    for field, tensor, shape in zip(Factors._fields, factors, shapes, strict=True):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != torch.float32):
            raise AdapterError(
                f"{name}.{field} is {tuple(tensor.shape)} {tensor.dtype}, "
                f"and the layer of {base} needs {shape} torch.float32",
                where=where,
                fix=fix,
            )
