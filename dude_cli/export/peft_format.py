"""The PEFT adapter: the learned difference as a LoRA or DoRA on the untouched base.

With P = [B - B0, B0] (out, 2r) and Q = [A; A - A0] (2r, in) the adapted weight is (m / ||W0 + s P Q||) (W0 + s P Q):
a DoRA of rank 2r with lora_A = Q, lora_B = P, lora_alpha = 2 r s and the same magnitude; PEFT scales by
lora_alpha / (2 r) = s. A random start has P = B and Q = A, and keeps its rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dude_cli.errors import AdapterError, UsageError, is_out_of_memory
from dude_cli.export.peft_files import CONFIG_FILE, PeftLayer, lora_config, write_peft_adapter
from dude_cli.export.probe import check, difference, probe_logits, tolerance
from dude_cli.export.report import ExportReport
from dude_cli.system import files
from dude_cli.training.model_card import peft_card

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from dude_cli.adapter import AdapterConfig, AdapterLayer
    from dude_cli.target import LoadedTarget


def export_peft(loaded: LoadedTarget, out: Path) -> ExportReport:
    """Write the adapter of `loaded` to `out` as a folder that `PeftModel.from_pretrained` puts on the untouched base.

    Exact: nothing is approximated. PEFT itself loads what was written, and its logits are compared on the probe.
    Raises AdapterError, with nothing left at `out`, past the tolerance of the model's dtype, UsageError for layers that
    PEFT cannot load an adapter for.
    """
    from dude_cli.adapter import adapter_layers

    refuse_taken_for_experts(loaded.model)
    layers = {}
    for name, layer in adapter_layers(loaded.model).items():
        layers[name] = peft_layer(name, layer)
    rank = next(iter(layers.values())).lora_A.shape[0]
    config = adapter_lora_config(loaded, layers, alpha=_alpha(loaded.saved.config, rank))
    kind = "DoRA" if config["use_dora"] else "LoRA"
    expected = probe_logits(loaded.model)
    with files.fresh_folder(out) as partial:
        write_peft_adapter(partial, layers, config)
        files.save_tokenizer(loaded.tokenizer, partial)
        found = difference(peft_logits(loaded.model, partial), expected)
        allowed = tolerance(loaded.model, loaded.config.dtype)
        check(found, allowed, "the adapter, loaded by PEFT,")
        title, trusts = f"{kind} of rank {rank}", loaded.config.trust_remote_code
        files.write_text(partial / "README.md", peft_card(loaded.saved, title, str(found), trust_remote_code=trusts))
    return ExportReport("peft", out, loaded.config.dtype, found, allowed, loaded.saved.base_quantization)


def peft_layer(name: str, layer: AdapterLayer) -> PeftLayer:
    """The difference of one layer as PEFT computes with it.

    A row of W0 that is zero stays zero here, where PEFT divides its magnitude by its norm, zero by zero. It gets a
    norm there, and magnitude zero: the same row, whatever its direction. Raises UsageError where nothing gives it one.
    """
    import torch

    P, Q = (factor.detach() for factor in layer.factors.difference())
    if layer.magnitude is None or layer.base_squared_norms is None:
        return PeftLayer(Q, P)
    magnitude, norm = layer.magnitude.detach(), layer.row_norms().norm
    is_zero = (norm == 0) | ((magnitude == 0) & (layer.base_squared_norms == 0))
    if not is_zero.any():
        return PeftLayer(Q, P, magnitude)
    longest = int(Q.norm(dim=1).argmax())
    if not Q[longest].any():
        raise UsageError(
            f"row {int(is_zero.nonzero()[0])} of {name} is zero, and so is A: PEFT's DoRA divides by the row's norm",
            where=f"{name}, {int(is_zero.sum())} rows",
            fix=f"use --format merged or lora, or train without this layer, adapter.exclude_modules: [{name}]",
        )
    direction = torch.zeros_like(P[0])
    direction[longest] = 1
    P = torch.where(is_zero[:, None], direction, P)
    return PeftLayer(Q, P, magnitude.masked_fill(is_zero, 0))


def adapter_lora_config(loaded: LoadedTarget, layers: dict[str, PeftLayer], *, alpha: float) -> dict[str, Any]:
    """PEFT's config for `layers` on the base of `loaded`."""
    from transformers.pytorch_utils import Conv1D

    from dude_cli.adapter import adapter_layers, target_names

    bases = [layer.base_layer for layer in adapter_layers(loaded.model).values()]
    return lora_config(
        layers,
        alpha=alpha,
        targets=target_names(loaded.model, list(layers)),
        is_conv1d=all(isinstance(base, Conv1D) for base in bases),
        base_model=loaded.config.name_or_path,
        revision=loaded.config.revision,
    )


def peft_logits(model: PreTrainedModel, folder: Path, **settings: Any) -> Tensor:
    """The probe's logits of the base of `model` with the adapter of `folder` on it, as PEFT loads and computes it.

    `settings` replace values of its config. Afterwards `model` is as it was.
    Raises UsageError where PEFT cannot compute it, AdapterError where PEFT cannot load it.
    """
    from peft import PeftConfig, PeftModel

    config = PeftConfig.from_pretrained(folder)
    for key, value in settings.items():
        setattr(config, key, value)
    _refuse_int8_dora(model, config.use_dora)
    with base_alone(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wrapped = PeftModel.from_pretrained(model, folder, config=config)
        except (RuntimeError, ValueError, TypeError) as error:
            if is_out_of_memory(error):
                raise
            raise AdapterError(
                f"PEFT cannot load the adapter: {' '.join(str(error).split())[:300]}",
                where=str(folder),
                fix=f"check that {CONFIG_FILE} fits the tensors, and that PEFT takes the layers of this model",
            ) from error
        try:
            return probe_logits(wrapped)
        finally:
            wrapped.unload()


def refuse_taken_for_experts(model: PreTrainedModel) -> None:
    """Raise UsageError for adapted layers that PEFT takes for experts: the dense and shared ones of many MoE models.

    transformers 5 keeps the experts' weights in one parameter. For the adapters of older versions PEFT turns the names
    of their layers into that parameter's, and does so for any layer that is called as they were.
    """
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    from dude_cli.adapter import adapter_layers

    def is_taken(name: str) -> bool:
        config = LoraConfig(target_modules=[name])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # it takes this layer for one of two whose weights are kept together, and misses the other
            return True
        return bool(config.target_parameters)

    taken = [name for name in adapter_layers(model) if is_taken(name)]
    if taken:
        shown = ", ".join(taken[:3]) + (" ..." if len(taken) > 3 else "")
        short = ", ".join(sorted({name.rpartition(".")[2] for name in taken}))
        raise UsageError(
            f"PEFT takes {len(taken)} layers of this model for its experts, and loads no adapter for them: {shown}",
            where=type(model).__name__,
            fix=f"use --format merged, or train without these layers, adapter.exclude_modules: [{short}]",
        )


def _refuse_int8_dora(model: PreTrainedModel, use_dora: bool) -> None:
    """PEFT 0.21 drops an 8-bit layer's scales when it reads its weight for DoRA on a CPU, and leaves it without."""
    from dude_cli.adapter.weight import quantization

    if use_dora and quantization(model) == "int8" and model.device.type == "cpu":
        raise UsageError(
            "PEFT cannot compute DoRA on an int8 base on a CPU, so the adapter cannot be verified",
            where="model.quantization: int8",
            fix="export it on a GPU, or as --format merged or lora",
        )


@contextmanager
def base_alone(model: PreTrainedModel) -> Iterator[None]:
    """Within, the adapter layers are taken out of `model`, for another tool to put its own in their place.

    The base stays frozen.
    """
    from dude_cli.adapter import adapter_layers
    from dude_cli.adapter.recorded import forget_recorded

    layers = adapter_layers(model)
    forget_recorded(model)
    for name, layer in layers.items():
        model.set_submodule(name, layer.base_layer)
    try:
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)


def _alpha(config: AdapterConfig, rank: int) -> float:
    """lora_alpha, with lora_alpha / rank the scaling. A multiple of our alpha where that can be: it is exact then."""
    if config.rank_stabilized:
        return config.scaling * rank
    alpha = config.rank if config.alpha is None else config.alpha
    return alpha * (rank // config.rank)
