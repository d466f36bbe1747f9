"""Put adapters on a model's linear layers, and take them off again."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel

from dude_cli.adapter.casting import Cast
from dude_cli.adapter.decompose import PrincipalFactors, decompose_layer
from dude_cli.adapter.factors import Factors
from dude_cli.adapter.layer import AdapterLayer, compute_row_norms
from dude_cli.adapter.product import Scratch
from dude_cli.adapter.recorded import forget_recorded, recorded_step
from dude_cli.adapter.weight import (
    check_readable,
    dequantized,
    in_stored_orientation,
    is_linear,
    is_quantized,
    is_whole,
    keep_packing,
    stored_weight,
    weight_shape,
)
from dude_cli.config import AdapterConfig, DType
from dude_cli.errors import AdapterError, UsageError, nearest

Decompose = Callable[[str, nn.Module, AdapterConfig], PrincipalFactors]  # of a layer: its name, itself


def patch_model(
    model: PreTrainedModel,
    config: AdapterConfig,
    *,
    seed: int = 0,
    decompose: Decompose = decompose_layer,
) -> PreTrainedModel:
    """Freeze `model` and put an adapter on each target layer, in place; only the adapters' tensors are trainable.

    Random starts depend on `seed` and the layer's name, an SVD start on the layer's weight alone. `decompose` says how
    to come by that: `DecompositionCache(folder).decompose` keeps it there; as it is, nothing is written to disk.
    Raises UsageError for a pattern without a layer, a rank too large and a base whose weights cannot be read (see
    `check_readable`); AdapterError if `model` is patched already or offloaded.
    """
    _refuse_patched(model)
    if config.init_from is not None:
        raise UsageError(
            "patch_model makes a new adapter", where="init_from", fix="load_adapter(model, folder) continues from one"
        )
    targets = find_targets(model, config)
    check_ranks(targets, config.rank)
    layers = {}
    for name, layer in targets.items():
        factors = start_factors(layer, config, seed_for(seed, name), name=name, decompose=decompose)
        layers[name] = AdapterLayer(layer, config, factors)
    return put_adapters(model, layers)


def patch_with_factors(model: PreTrainedModel, config: AdapterConfig, factors: dict[str, Factors]) -> PreTrainedModel:
    """Freeze `model` and put the given factors on the layers they name, in place; for a loaded adapter."""
    _refuse_patched(model)
    layers = {}
    for name, given in factors.items():
        layer = model.get_submodule(name)
        layers[name] = AdapterLayer(layer, config, given.to(stored_weight(layer).device))
    return put_adapters(model, layers)


def put_adapters(model: PreTrainedModel, layers: Mapping[str, AdapterLayer]) -> PreTrainedModel:
    """Freeze `model` and put `layers`, made of its own, in their places: all of them, or none after an exception."""
    trained = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    try:
        keep_packing(model)
        model.requires_grad_(False)
        for name, layer in layers.items():
            layer.trained_before = trained
            model.set_submodule(name, layer)
    except BaseException:
        _take_off(model, layers, trained)
        raise
    return model


def unpatch_model(model: PreTrainedModel) -> PreTrainedModel:
    """Put the base layers back, in place, and drop the adapters: what was trainable before them is so again.

    The base weights were never changed.
    """
    layers = adapter_layers(model)
    if layers:
        _take_off(model, layers, next(iter(layers.values())).trained_before)
        forget_recorded(model)
    return model


def merge_adapter(model: PreTrainedModel, dtype: DType | None = None) -> PreTrainedModel:
    """Write W' = (m / ||V||) V, computed in float32, into each base layer's weight and unpatch: a plain model.

    In place, layer by layer: this is the one function that changes the base. The result is as transformers loads
    it in `dtype`, else in the dtype that the model has (see `casting.py`). No layer is quantised any more.
    """
    before = base_dtype(model)
    after = before if dtype is None else getattr(torch, dtype)
    cast = Cast(model, before, after)
    with torch.no_grad():
        for name, layer in adapter_layers(model).items():
            quantized = is_quantized(layer.base_layer)
            _merge_layer(layer, after if quantized else cast.dtype(f"{name}.weight", layer.weight))
        unpatch_model(model)
        _dequantize(model, after)
    cast.apply(model)
    return model


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Within, the model is its base, bit for bit."""
    layers = list(adapter_layers(model).values())
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


@contextmanager
def constant_adapters(model: nn.Module) -> Iterator[None]:
    """A promise that A, B and m do not change within, so that norms and rounded factors are made once.

    For the micro-batches between two optimizer steps, for an evaluation and for generation. The norms are computed
    here, with one wait for the device; on a GPU, from the second time on, as one CUDA graph (`recorded.py`). Those of a
    sharded weight are computed by its first forward within. May be nested. A step of a torch optimizer,
    `load_state_dict` and `.to()` within end what is held so far; a write to `parameter.data` cannot be seen and breaks
    the promise. The backward pass of a forward within belongs within too: the next scope may write what it needs anew.
    """
    layers = [layer for layer in adapter_layers(model).values() if not layer.is_held]
    with_norms = [layer for layer in layers if layer.magnitude is not None and is_whole(layer.base_layer)]
    scratch = Scratch()
    for layer in layers:
        layer.hold(scratch=scratch)
    try:
        recorded = recorded_step(model, layers)
        if recorded is None:
            for layer, norms in zip(with_norms, compute_row_norms(with_norms), strict=True):
                layer.hold(norms, scratch=scratch)
        else:
            for layer, (held_norms, step) in zip(layers, recorded.replay(layers), strict=True):
                layer.hold(held_norms, step)
        with _forgetting_after_each_step(layers):
            yield
    finally:
        for layer in layers:
            layer.release()


@contextmanager
def _forgetting_after_each_step(layers: list[AdapterLayer]) -> Iterator[None]:
    """Within, a step of any torch optimizer, a fused one included, ends what the layers hold so far."""

    def forget(*_: object) -> None:
        for layer in layers:
            layer.forget()

    handle = register_optimizer_step_post_hook(forget)
    try:
        yield
    finally:
        handle.remove()


def adapter_layers(model: nn.Module) -> dict[str, AdapterLayer]:
    """The adapter layers of `model` by name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLayer)}


def base_dtype(model: PreTrainedModel) -> torch.dtype:
    """The dtype of the base of `model`: of its first parameter that is a number and not an adapter's."""
    own = {parameter for layer in adapter_layers(model).values() for parameter in layer.parameters(recurse=False)}
    found: torch.dtype = next(p.dtype for p in model.parameters() if p.is_floating_point() and p not in own)
    return found


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' A, B and magnitudes by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def find_targets(model: PreTrainedModel, config: AdapterConfig) -> dict[str, nn.Module]:
    """The linear layers that `target_modules` names and `exclude_modules` does not, in the model's order.

    A pattern matches a layer whose name is equal to it or ends in `.` and it, or, as a regular expression, the whole
    name. A layer that shares its weight with the input embedding or another layer is left alone: adapting one would
    untie them, and what is merged into one would be in both. `all-linear` also leaves out those that are smaller than
    the rank, such as a gate of one output, unless all are.
    Raises as `patch_model` does.
    """
    check_readable(model)
    linear = {name: module for name, module in model.named_modules() if is_linear(module)}
    _check_patterns(config, list(linear))
    shared = tied_layers(model)
    tied = {name for name, module in linear.items() if module in shared}
    excluded = {name for name in linear if any(_matches(pattern, name) for pattern in config.exclude_modules)}
    candidates = {name: module for name, module in linear.items() if name not in tied | excluded}
    if config.target_modules == "all-linear":
        if not candidates:
            raise UsageError(
                f"{type(model).__name__} has no linear layer for an adapter",
                where="adapter.target_modules: all-linear",
                fix="check adapter.exclude_modules; supported are torch.nn.Linear and transformers' Conv1D",
            )
        wide = {name: layer for name, layer in candidates.items() if config.rank <= min(weight_shape(layer))}
        if not wide:
            check_ranks(candidates, config.rank)
        return wide
    patterns = _target_patterns(config)
    for pattern in patterns:
        if not any(_matches(pattern, name) for name in candidates):
            raise _no_such_layer(pattern, list(linear), tied, excluded)
    return {name: module for name, module in candidates.items() if any(_matches(pattern, name) for pattern in patterns)}


def smaller_than_rank(model: PreTrainedModel, config: AdapterConfig) -> list[str]:
    """The layers of the plain `model` that `all-linear` leaves out because they are smaller than the rank."""
    if config.target_modules != "all-linear":
        return []
    found = find_targets(model, config)
    return [name for name in find_targets(model, config.model_copy(update={"rank": 1})) if name not in found]


def target_names(model: PreTrainedModel, layers: Collection[str]) -> list[str]:
    """The shortest `target_modules` that stands for `layers`: `q_proj`, not 32 paths that end in it. Sorted.

    The last parts of the names if no other module of the base has them, else the names themselves. PEFT looks for them
    among all modules, and refuses one that is no linear layer, such as a block that is called `0` as a layer is.
    """
    names = {name.removesuffix(".base_layer") for name, _ in model.named_modules()}
    short = sorted({name.rpartition(".")[2] for name in layers})
    matched = {name for name in names if name.rpartition(".")[2] in short}
    return short if matched == set(layers) else sorted(layers)


def start_factors(
    layer: nn.Module, config: AdapterConfig, seed: int, *, name: str = "", decompose: Decompose = decompose_layer
) -> Factors:
    """The start of one layer's factors, float32, on the layer's device: its SVD, or A Kaiming-uniform and B zero.

    An SVD start is A0 = sqrt(S_r / s) V_r^T, B0 = U_r sqrt(S_r / s). The seed is of a random start.
    """
    device = stored_weight(layer).device
    if config.has_svd_init:
        A, B = decompose(name, layer, config).scaled(config.scaling).to(device)
        return Factors(A, B, initial_A=A.clone(), initial_B=B.clone())
    out_features, in_features = weight_shape(layer)
    # LoRA's start: nn.Linear's own, kaiming_uniform_(a=sqrt(5)), is uniform within 1 / sqrt(in).
    bound = 1 / math.sqrt(in_features)
    generator = torch.Generator().manual_seed(seed)
    A = torch.empty(config.rank, in_features, device="cpu").uniform_(-bound, bound, generator=generator)
    return Factors(A, torch.zeros(out_features, config.rank, device="cpu")).to(device)


def seed_for(seed: int, name: str) -> int:
    """A seed of its own for each layer, so that the result does not depend on which layers come before it."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def _matches(pattern: str, name: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}") or re.fullmatch(pattern, name) is not None


def _target_patterns(config: AdapterConfig) -> list[str]:
    return [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules


def _check_patterns(config: AdapterConfig, linear: list[str]) -> None:
    """Refuse what is no regular expression, and an exclusion that excludes nothing; the default one may."""
    patterns = {"target_modules": _target_patterns(config), "exclude_modules": config.exclude_modules}
    for key, pattern in [(key, pattern) for key, given in patterns.items() for pattern in given]:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError(
                f"`{pattern}` is neither a module's name nor a regular expression: {error}",
                where=f"adapter.{key}",
                fix="write a name such as q_proj, or a valid regular expression such as .*mlp\\.(up|down)_proj",
            ) from None
    for pattern in config.exclude_modules:
        if pattern != "lm_head" and not any(_matches(pattern, name) for name in linear):
            raise _matches_nothing(pattern, linear, f"adapter.exclude_modules: {pattern}")


def tied_layers(model: PreTrainedModel) -> set[nn.Module]:
    """The linear layers whose weight is elsewhere too: in the input embedding, in another layer, in another block."""
    embedding = getattr(model.get_input_embeddings(), "weight", None)
    places = [module for _, module in model.named_modules(remove_duplicate=False) if is_linear(module)]
    counts = Counter(map(stored_weight, places))
    return {layer for layer in places if layer.weight is embedding or counts[stored_weight(layer)] > 1}


def _no_such_layer(pattern: str, linear: list[str], tied: set[str], excluded: set[str]) -> UsageError:
    matching = [name for name in linear if _matches(pattern, name)]
    where = f"adapter.target_modules: {pattern}"
    if any(name in tied for name in matching):
        return UsageError(
            f"`{matching[0]}` shares its weight with the input embedding or another layer and cannot have an adapter "
            "of its own",
            where=where,
            fix="take it out of adapter.target_modules",
        )
    if any(name in excluded for name in matching):
        return UsageError(
            f"`{matching[0]}` is a target and excluded too",
            where=where,
            fix="take it out of adapter.exclude_modules or of adapter.target_modules",
        )
    return _matches_nothing(pattern, linear, where)


def _matches_nothing(pattern: str, linear: list[str], where: str) -> UsageError:
    short_names = sorted({name.rpartition(".")[2] for name in linear})
    parts = [part.strip() for part in pattern.split(",")]
    if len(parts) > 1 and set(parts) <= set(short_names):
        return UsageError(f"`{pattern}` is one name", where=where, fix=f"write a list: [{', '.join(parts)}]")
    close = nearest(pattern, short_names) or short_names[:12]
    return UsageError(
        f"`{pattern}` matches no linear layer of the model", where=where, fix=f"nearest names: {', '.join(close)}"
    )


def check_ranks(targets: dict[str, nn.Module], rank: int) -> None:
    """Raise UsageError unless each layer has the rank."""
    for name, layer in targets.items():
        out_features, in_features = weight_shape(layer)
        if rank > min(out_features, in_features):
            raise UsageError(
                f"rank {rank} is larger than the smaller side of {name}, which is {out_features} x {in_features}",
                where="adapter.rank",
                fix=f"use a rank of at most {min(out_features, in_features)}, or exclude the layer",
            )


def _take_off(model: PreTrainedModel, layers: Mapping[str, AdapterLayer], trained: Collection[str]) -> None:
    """Put the base layers of `layers` back and let the parameters that `trained` names be trainable, no others."""
    for name, layer in layers.items():
        model.set_submodule(name, layer.base_layer)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def _refuse_patched(model: nn.Module) -> None:
    if adapter_layers(model):
        raise AdapterError("the model has adapters already", fix="call unpatch_model first, or load the model anew")


def _merge_layer(layer: AdapterLayer, dtype: torch.dtype) -> None:
    base = layer.base_layer
    plain = dequantized(base, dtype) if is_quantized(base) else base
    weight = stored_weight(plain)
    merged = weight if weight.dtype == dtype else torch.empty_like(weight, dtype=dtype)
    out_in = in_stored_orientation(plain, merged)
    for rows, values in layer.adapted_chunks():
        out_in[rows] = values.to(dtype)
    plain.weight = nn.Parameter(merged, requires_grad=False)
    layer.base_layer = plain


def _dequantize(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Make plain layers of the quantised ones, which were no targets, and a plain model for transformers."""
    for name, layer in [(name, layer) for name, layer in model.named_modules() if is_quantized(layer)]:
        model.set_submodule(name, dequantized(layer, dtype))
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
