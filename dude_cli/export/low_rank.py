"""The best plain LoRA of a given rank, for servers that refuse or ignore magnitudes.

For each layer the singular value decomposition of the learned change dW = W' - W0, cut to rank N, is the closest
matrix of that rank (Eckart and Young 1936): lora_B = U sqrt(S), lora_A = sqrt(S) V^T, lora_alpha = N. It is computed as
`adapter.svd: auto` would: by a randomised algorithm for large layers, exactly for `max_error`. A magnitude
scales whole rows, so the change of DuDe and DoRA has full rank: what N leaves out is measured and reported.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from dude_cli.config import AdapterConfig, SvdConfig
from dude_cli.errors import UsageError
from dude_cli.export.peft_files import PeftLayer, write_peft_adapter
from dude_cli.export.peft_format import adapter_lora_config, base_alone, peft_logits, refuse_taken_for_experts
from dude_cli.export.probe import check, difference, probe_logits, tolerance
from dude_cli.export.report import ExportReport, LowRankError
from dude_cli.system import files
from dude_cli.training.model_card import peft_card

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from dude_cli.adapter import AdapterLayer, Factors
    from dude_cli.target import LoadedTarget


class _Lora(NamedTuple):
    factors: Factors
    error: float  # ||dW - s B A||_F / ||dW||_F


def export_lora(
    loaded: LoadedTarget,
    out: Path,
    *,
    rank: int | None = None,
    max_error: float | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> ExportReport:
    """Write the best LoRA of `rank`, or of the lowest rank whose error is at most `max_error` in every layer, to `out`.

    With neither, the rank is that of the adapter's own difference, 2 r for an SVD start: without a magnitude that is
    exact. The report has the error by layer and in the logits. PEFT loads what was written, and its logits are
    compared with those of the same LoRA in memory. Raises UsageError for a rank above every layer's and for layers that
    PEFT cannot load an adapter for, AdapterError, with nothing left at `out`, past the tolerance of the model's dtype.
    """
    from dude_cli.adapter import adapter_layers
    from dude_cli.adapter.decompose import errors_of

    refuse_taken_for_experts(loaded.model)
    layers = adapter_layers(loaded.model)
    svd = SvdConfig()
    if max_error is not None:
        svd = SvdConfig(algorithm="exact")
        rank = lowest_rank(loaded.model, max_error, say)
    elif rank is None:
        rank = min(_largest_rank(layers), next(iter(layers.values())).factors.difference()[1].shape[0])
    _check_rank(layers, rank)
    say(f"approximating {len(layers)} layers by rank {rank}")
    found = {}
    for name, layer in layers.items():
        with errors_of(name):
            found[name] = best_lora(layer, rank, svd)
    factors = {name: lora.factors for name, lora in found.items()}
    trained = probe_logits(loaded.model)
    in_memory = _lora_logits(loaded.model, factors, rank)
    errors = LowRankError(rank, {name: lora.error for name, lora in found.items()}, difference(in_memory, trained))
    peft_layers = {name: PeftLayer(given.lora_A, given.lora_B) for name, given in factors.items()}
    with files.fresh_folder(out) as partial:
        write_peft_adapter(partial, peft_layers, adapter_lora_config(loaded, peft_layers, alpha=rank))
        files.save_tokenizer(loaded.tokenizer, partial)
        loss = difference(peft_logits(loaded.model, partial), in_memory)
        allowed = tolerance(loaded.model, loaded.config.dtype)
        check(loss, allowed, "the LoRA, loaded by PEFT,")
        title, trusts = f"the best LoRA of rank {rank}", loaded.config.trust_remote_code
        card = peft_card(loaded.saved, title, _summary(errors), trust_remote_code=trusts)
        files.write_text(partial / "README.md", card)
    return ExportReport("lora", out, loaded.config.dtype, loss, allowed, loaded.saved.base_quantization, errors)


def best_lora(layer: AdapterLayer, rank: int, svd: SvdConfig) -> _Lora:
    """The closest LoRA of `rank` to the learned change of one layer, scaling 1; zeros fill a rank that it has not."""
    import torch
    from torch.nn import functional as F

    from dude_cli.adapter import Factors
    from dude_cli.adapter.autocast import full_float32
    from dude_cli.adapter.decompose import principal_factors

    change = learned_change(layer)
    own_rank = min(rank, *change.shape)
    A, B = principal_factors(change, own_rank, svd)
    size = float(torch.linalg.vector_norm(change, dtype=torch.float64))
    with full_float32(change.device):
        left_out = float(torch.linalg.vector_norm(change - B @ A, dtype=torch.float64))
    missing = rank - own_rank
    padded = Factors(F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing)))
    return _Lora(padded, left_out / size if size > 0 else 0.0)


def learned_change(layer: AdapterLayer) -> Tensor:
    """dW = W' - W0 of one layer, (out, in), float32, on the layer's device."""
    import torch

    return torch.cat([change for _, change, _ in layer.change_chunks()])


def lowest_rank(model: PreTrainedModel, max_error: float, say: Callable[[str], None]) -> int:
    """The lowest N with ||dW - dW_N||_F <= max_error ||dW||_F in every layer, from all singular values of each."""
    from torch.nn import functional as F

    from dude_cli.adapter import adapter_layers
    from dude_cli.adapter.decompose import errors_of, exact_singular_values

    layers, lowest = adapter_layers(model), 1
    for number, (name, layer) in enumerate(layers.items(), start=1):
        if number == 1 or number % 32 == 0:
            say(f"singular values of layer {number}/{len(layers)}: {name}")
        change = learned_change(layer)
        with errors_of(name):
            squares = exact_singular_values(change, min(change.shape)).square()
        # left_out[k]: what rank k leaves out, summed from the smallest on, so that it keeps its digits.
        left_out = F.pad(squares.flip(0).cumsum(0).flip(0), (0, 1))
        lowest = max(lowest, int((left_out > max_error**2 * left_out[0]).sum()))
    return lowest


def _lora_logits(model: PreTrainedModel, factors: dict[str, Factors], rank: int) -> Tensor:
    from dude_cli.adapter import patch_with_factors, unpatch_model

    with base_alone(model):
        patch_with_factors(model, AdapterConfig(method="lora", rank=rank), factors)
        try:
            return probe_logits(model)
        finally:
            unpatch_model(model)


def _largest_rank(layers: dict[str, AdapterLayer]) -> int:
    return max(min(layer.lora_B.shape[0], layer.lora_A.shape[1]) for layer in layers.values())


def _check_rank(layers: dict[str, AdapterLayer], rank: int) -> None:
    largest = _largest_rank(layers)
    if rank > largest:
        raise UsageError(
            f"rank {rank} is more than any layer has: at rank {largest} nothing is left out",
            where=f"--rank {rank}",
            fix=f"use a rank of at most {largest}",
        )


def _summary(errors: LowRankError) -> str:
    worst = errors.worst_layer
    return f"left out: {errors.by_layer[worst]:.2%} of the learned change in the worst layer, {worst}; {errors.logits}"
