"""Import PEFT's LoRA, DoRA and PiSSA adapters.

PEFT's plain adapters are a difference to the base, as `lora` and `dora` are here. Its PiSSA start (and OLoRA, CorDA,
LoRA-GA) instead subtracts s B0 A0 from the base weights and does not save B0 and A0: such an adapter is a difference
to a base that exists nowhere on disk. They are read from the initial adapter, if that was saved before the training;
an exact PiSSA start is computed again, a randomised one cannot be.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dude_cli.config import QUANTIZATIONS, AdapterConfig, DType, ModelConfig
from dude_cli.errors import AdapterError, UsageError
from dude_cli.export.importable import (
    PEFT_ALPHA,
    PLAIN_STARTS,
    SUBTRACTED_STARTS,
    check_base_weights,
    check_common_alpha,
    check_numbers,
    refuse_unsupported,
)
from dude_cli.export.peft_files import CONFIG_FILE, PeftAdapter, PeftLayer, read_peft_adapter, read_peft_config
from dude_cli.export.peft_format import peft_logits
from dude_cli.export.probe import check, difference, probe_logits, tolerance
from dude_cli.export.report import ImportReport
from dude_cli.model import hub_commit, saved_dtype
from dude_cli.system import files
from dude_cli.training.model_card import imported_card

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from dude_cli.adapter import Factors


def import_peft(model: PreTrainedModel, folder: Path, *, initial: Path | None = None) -> AdapterConfig:
    """Patch `model`, the base, with the adapter of PEFT's `folder`, in place; the method is the one of the four it is.

    `initial` is the folder of the adapter before its training, for a start that was subtracted from the base. Ranks
    and scalings that differ by layer become one: B takes up the factor, zeros fill the rank.
    Raises AdapterError, before the model is touched, for what cannot be imported exactly.
    """
    from dude_cli.adapter import check_factors, patch_with_factors

    adapter = read_peft_adapter(folder)
    refuse_unsupported(adapter)
    check_numbers(adapter)
    given = {name: _factors(layer, None, layer.lora_A.shape[0], 1.0) for name, layer in adapter.layers.items()}
    check_factors(model, given, str(folder))
    check_base_weights(model, adapter)
    start = _subtracted_start(model, adapter, initial)
    config = _adapter_config(model, adapter, has_start=start is not None)
    factors = {
        name: _factors(layer, None if start is None else start[name], config.rank, _fold(adapter, name, config.scaling))
        for name, layer in adapter.layers.items()
    }
    patch_with_factors(model, config, factors)
    return config


def import_to(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: ModelConfig,
    folder: Path,
    out: Path,
    *,
    initial: Path | None = None,
) -> ImportReport:
    """Import the adapter of PEFT's `folder`, compare it with PEFT's own logits on the probe, and save it to `out`.

    `config` says where `model` is from. The comparison takes the memory of the target layers once more if the start
    was subtracted from the base. Raises AdapterError, with nothing at `out`, past the tolerance of the model's dtype.
    """
    from dude_cli.adapter import save_adapter

    adapter = import_peft(model, folder, initial=initial)
    ours = probe_logits(model)
    if adapter.has_svd_init and initial is None:
        # PEFT computes its start again when it loads. Given ours instead, it would agree with whatever ours is.
        with _kept_base(model):
            theirs = peft_logits(model, folder)
    else:
        with _reduced_base(model):
            theirs = peft_logits(model, folder, init_lora_weights=True)
    found, allowed = difference(ours, theirs), tolerance(model, config.dtype)
    check(found, allowed, "the imported adapter, beside PEFT's,")
    commit = hub_commit(config)
    card = imported_card(config, adapter, folder.name, str(found), commit=commit)
    with files.fresh_folder(out) as partial:
        save_adapter(model, partial, base_revision=commit, tokenizer=tokenizer, model_card=card)
    return ImportReport(out, adapter.method, adapter.rank, config.dtype, found, allowed)


@contextmanager
def _reduced_base(model: PreTrainedModel) -> Iterator[None]:
    """Within, the base weights are W0 - s B0 A0, as PEFT holds them after a start that it subtracts."""
    from dude_cli.adapter import adapter_layers
    from dude_cli.adapter.autocast import full_float32
    from dude_cli.adapter.weight import in_stored_orientation, stored_weight, weight_rows

    kept = {}
    for layer in adapter_layers(model).values():
        if layer.initial_A is not None and layer.initial_B is not None:
            weight = kept[layer.base_layer] = stored_weight(layer.base_layer).data
            with full_float32(weight.device):
                start = layer.scaling * layer.initial_B @ layer.initial_A
            reduced = weight_rows(layer.base_layer, slice(None)) - start
            stored_weight(layer.base_layer).data = in_stored_orientation(layer.base_layer, reduced).to(weight.dtype)
    try:
        yield
    finally:
        for base_layer, weight in kept.items():
            stored_weight(base_layer).data = weight


@contextmanager
def _kept_base(model: PreTrainedModel) -> Iterator[None]:
    """Within, PEFT may replace the base weights of the adapted layers, as its PiSSA start does; then they are back."""
    from dude_cli.adapter import adapter_layers
    from dude_cli.adapter.weight import stored_weight

    weights = [stored_weight(layer.base_layer) for layer in adapter_layers(model).values()]
    kept = [weight.data for weight in weights]
    try:
        yield
    finally:
        for weight, data in zip(weights, kept, strict=True):
            weight.data = data


def peft_base(folder: Path, base_model: str | None, dtype: DType | None, quantized: str | None) -> ModelConfig:
    """The base of PEFT's adapter in `folder`, or `base_model`, in `dtype`, or as its files were saved.

    `quantized` is how it was when the adapter was trained. Raises AdapterError for a folder that is no adapter of
    PEFT's and one that names no base, UsageError for an unknown quantisation.
    """
    config = read_peft_config(folder)
    name = base_model or config.get("base_model_name_or_path")
    if not name:
        raise AdapterError(
            "the adapter names no base model",
            where=f"{folder / CONFIG_FILE}: base_model_name_or_path",
            fix="give it: --base-model NAME",
        )
    found = next((known for known in QUANTIZATIONS if known == quantized), None)
    if quantized != found:
        known = ", ".join(QUANTIZATIONS)
        raise UsageError(f"unknown quantisation {quantized}", where="--quantization", fix=f"use one of {known}")
    base = ModelConfig(name_or_path=name, revision=None if base_model else config.get("revision"), quantization=found)
    return base.model_copy(update={"dtype": dtype or saved_dtype(base)})


def _subtracted_start(
    model: PreTrainedModel, adapter: PeftAdapter, initial: Path | None
) -> dict[str, PeftLayer] | None:
    """B0 and A0 by layer, with s B0 A0 what the base was reduced by; None for a start that left it as it is."""
    from dude_cli.adapter.weight import quantization

    start = str(adapter.config.get("init_lora_weights", True))
    if initial is None and not start.startswith(SUBTRACTED_STARTS):
        return None
    if initial is not None:
        _refuse_kept_base(adapter, initial)
    if quantization(model) is not None:
        # PEFT quantises what is left of the base anew: another rounding, which the two factors do not have.
        raise AdapterError(
            f"an adapter with the start {start} cannot be restored if that was subtracted from a quantised base",
            where=f"{adapter.folder / CONFIG_FILE}: init_lora_weights"
            + ("" if initial is None else f"; --initial {initial}"),
            fix="import adapters whose start leaves the base as it is, such as PEFT's default, with no initial one",
        )
    if initial is not None:
        return _read_initial(adapter, initial)
    if start == "pissa":
        return {name: _exact_pissa(model, adapter, name) for name in adapter.layers}
    raise AdapterError(
        f"an adapter with the start {start} cannot be restored from itself: its initial factors were subtracted from "
        "the base, are not in the folder and cannot be computed again",
        where=f"{adapter.folder / CONFIG_FILE}: init_lora_weights",
        fix="give the adapter as it was saved before the training: --initial FOLDER",
    )


def _refuse_kept_base(adapter: PeftAdapter, initial: Path) -> None:
    """Raise UsageError if the start of `adapter` left the base as it is: then `initial` is no part of what it computes.

    True, PEFT's default, does not tell: PEFT's own example writes it into both adapters of a PiSSA training.
    """
    configs = (adapter.config, read_peft_config(initial))
    starts = [start for config in configs if (start := config.get("init_lora_weights", True)) is not True]
    if starts and starts[0] in PLAIN_STARTS:
        raise UsageError(
            f"the start {starts[0]!r} was not subtracted from the base, so the initial adapter is not needed",
            where=f"--initial {initial}; init_lora_weights in {adapter.folder / CONFIG_FILE}",
            fix="leave --initial out",
        )


def _read_initial(adapter: PeftAdapter, initial: Path) -> dict[str, PeftLayer]:
    found = read_peft_adapter(initial)
    same = all(
        name in found.layers and found.layers[name].lora_A.shape == layer.lora_A.shape
        for name, layer in adapter.layers.items()
    )
    differing = [key for key in ("lora_alpha", "use_rslora") if found.config.get(key) != adapter.config.get(key)]
    if not same or differing:
        raise AdapterError(
            "this is not the initial adapter of the one to import: "
            + (f"{', '.join(differing)} differ" if differing else "their layers or ranks differ"),
            where=f"{initial}, {adapter.folder}",
            fix="give the folder that was saved before this adapter was trained",
        )
    return {name: found.layers[name] for name in adapter.layers}


def _exact_pissa(model: PreTrainedModel, adapter: PeftAdapter, name: str) -> PeftLayer:
    """PEFT's `pissa` start computed again; each singular vector pair with the sign that it was trained from.

    By torch's own decomposition, which is PEFT's: where singular values are equal or close, any other finds another
    start, and what PEFT subtracted from the base is this one.
    """
    import torch

    from dude_cli.adapter.decompose import check_finite, errors_of
    from dude_cli.adapter.weight import dense_weight

    layer, W = adapter.layers[name], dense_weight(model.get_submodule(name))
    rank = layer.lora_A.shape[0]
    with errors_of(name):
        check_finite(W)
    U, S, Vh = torch.linalg.svd(W.float(), full_matrices=False)
    root = (S[:rank] / _own_scaling(adapter, name)).sqrt()
    A0, B0 = (root[:, None] * Vh[:rank]).cpu(), (U[:, :rank] * root).cpu()
    sign = torch.where((A0 * layer.lora_A).sum(dim=1) < 0, -1.0, 1.0)
    return PeftLayer(A0 * sign[:, None], B0 * sign)


def _adapter_config(model: PreTrainedModel, adapter: PeftAdapter, *, has_start: bool) -> AdapterConfig:
    from dude_cli.adapter import target_names

    config, use_dora = adapter.config, bool(adapter.config.get("use_dora"))
    ranks = {layer.lora_A.shape[0] for layer in adapter.layers.values()}
    scalings = {_own_scaling(adapter, name) for name in adapter.layers}
    rank = max(ranks)
    is_uniform = len(ranks) == len(scalings) == 1 and not config.get("alpha_pattern")
    alpha = float(config.get("lora_alpha", PEFT_ALPHA)) if is_uniform else max(scalings) * rank
    check_common_alpha(adapter, alpha, rank)
    return AdapterConfig(
        method=("dude" if use_dora else "pissa") if has_start else ("dora" if use_dora else "lora"),
        rank=rank,
        alpha=alpha,
        rank_stabilized=is_uniform and bool(config.get("use_rslora")),
        target_modules=target_names(model, list(adapter.layers)),
        exclude_modules=[],
        dropout=float(config.get("lora_dropout", 0.0)),
    )


def _factors(layer: PeftLayer, start: PeftLayer | None, rank: int, fold: float) -> Factors:
    """One layer's factors, with B scaled by `fold` and both padded with zeros to `rank`."""
    from torch.nn import functional as F

    from dude_cli.adapter import Factors

    missing = rank - layer.lora_A.shape[0]

    def wide(A: Tensor) -> Tensor:
        return F.pad(A, (0, 0, 0, missing))

    def tall(B: Tensor) -> Tensor:
        return F.pad(B * fold, (0, missing))

    initial = (None, None) if start is None else (wide(start.lora_A), tall(start.lora_B))
    return Factors(wide(layer.lora_A), tall(layer.lora_B), layer.magnitude, *initial)


def _fold(adapter: PeftAdapter, name: str, scaling: float) -> float:
    own = _own_scaling(adapter, name)
    return 1.0 if own == scaling else own / scaling


def _own_scaling(adapter: PeftAdapter, name: str) -> float:
    """PEFT's scaling of one layer: alpha / r, or alpha / sqrt(r), with the alpha that a pattern may give it."""
    config, rank = adapter.config, adapter.layers[name].lora_A.shape[0]
    # As `peft.utils.get_pattern_key` looks a layer up.
    patterns: dict[str, Any] = config.get("alpha_pattern") or {}
    matching = (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
    alpha = next(matching, config.get("lora_alpha", PEFT_ALPHA))
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))
