"""How much memory a training will take at most, by part, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dude_cli.adapter import Factors, constant_adapters, find_targets, patch_with_factors
from dude_cli.adapter.patch import check_ranks, tied_layers
from dude_cli.adapter.weight import is_linear, stored_weight, weight_shape
from dude_cli.config import Config, Quantization
from dude_cli.errors import UsageError
from dude_cli.model import load_shape
from dude_cli.training.live_bytes import LiveBytes, counted
from dude_cli.training.loss import SummedLoss
from dude_cli.training.sharding import blocks_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What decomposing a layer may hold beside the model: float32 copies of that layer.
DECOMPOSITION_COPIES = 3
NF4_BLOCK = 64  # bitsandbytes: one float32 scale for so many weights


@dataclass(frozen=True)
class Batch:
    """What one device has in a forward: `rows` of `length` tokens, and how many such forwards make a step."""

    rows: int
    length: int
    gradient_accumulation_steps: int
    world_size: int = 1


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device at the moment of the most, by part, while the adapter is made and while it is trained.

    Not in it: the scratch space inside of kernels, what the allocator keeps beside, and on a GPU the CUDA context.
    """

    batch: Batch
    init: dict[str, int]
    training: dict[str, int]

    @property
    def phases(self) -> dict[str, dict[str, int]]:
        return {"init": self.init, "training": self.training}

    @property
    def training_bytes(self) -> int:
        return sum(self.training.values())

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda phase: sum(self.phases[phase].values()))

    @property
    def peak_bytes(self) -> int:
        return sum(self.phases[self.peak_phase].values())

    def report(self) -> dict[str, Any]:
        """The forecast as `--json` prints it: bytes by part in each phase, their sums, and the phase with the most."""
        phases = {name: parts | {"total": sum(parts.values())} for name, parts in self.phases.items()}
        return {"batch": asdict(self.batch), **phases, "peak_phase": self.peak_phase, "peak_bytes": self.peak_bytes}


def estimate_memory(config: Config, batch: Batch) -> MemoryEstimate:
    """The forecast for a config, from the model's own config alone: its weights are neither read nor downloaded.

    The model is made on the meta device and patched there, and one optimizer step's forward and backward passes run
    on it (`live_bytes`). Raises UsageError for a model that cannot be made or run so, with what to do.
    """
    model, quantization = load_shape(config.model)
    _refuse_experts(model, config)
    base = _storage_bytes(model) - _saved_by_quantization(model, quantization)
    targets = find_targets(model, config.adapter)
    check_ranks(targets, config.adapter.rank)
    before = _storage_bytes(model)
    factors = {name: _factors(layer, config) for name, layer in targets.items()}
    try:
        with counted(model) as live:
            patch_with_factors(model, config.adapter, factors)
        norms = live.peak.total() - live.now.total()
        fixed = {"base weights": base, "adapter": _storage_bytes(model) - before}
        init = fixed | _init_parts(model, config, targets, norms, batch.length)
        training = fixed | _training_parts(model, config, batch, quantization)
        if config.train.distributed == "fsdp" and batch.world_size > 1:
            training |= _sharded_parts(model, base, batch.world_size)
    except Exception as error:  # the code of any architecture: what it does on the meta device is not ours to know
        raise UsageError(
            f"the memory of {type(model).__name__} cannot be predicted: {type(error).__name__}: {error}",
            where=f"model.name_or_path: {config.model.name_or_path}",
            fix="train without a forecast; per_device_batch_size: auto halves the batch when memory runs out",
        ) from error
    if quantization is not None:
        weights = map(stored_weight, _quantized_layers(model))
        training["dequantized weight"] = max(weight.numel() * weight.element_size() for weight in weights)
    return MemoryEstimate(batch, init, training)


def _factors(layer: nn.Module, config: Config) -> Factors:
    out_features, in_features = weight_shape(layer)
    rank = config.adapter.rank
    A, B = torch.empty(rank, in_features, device="meta"), torch.empty(out_features, rank, device="meta")
    if not config.adapter.has_svd_init:
        return Factors(A, B)
    return Factors(A, B, initial_A=torch.empty_like(A), initial_B=torch.empty_like(B))


def _init_parts(
    model: PreTrainedModel, config: Config, targets: dict[str, nn.Module], norms: int, length: int
) -> dict[str, int]:
    """The larger of what a layer's decomposition or norms hold, and the check of one row's logits at step 0."""
    decomposition = norms
    if config.adapter.has_svd_init and config.adapter.init_from is None:
        largest = max(stored_weight(layer).numel() for layer in targets.values())
        decomposition = max(norms, DECOMPOSITION_COPIES * largest * 4)
    ids = torch.zeros(1, length, dtype=torch.int64, device="meta")
    with torch.no_grad(), counted(model) as live:
        logits = model(input_ids=ids, use_cache=False).logits
    check = live.peak.total() + logits.numel() * logits.element_size()  # beside the base's logits
    name, size = max([("decomposition", decomposition), ("check at step 0", check)], key=lambda part: part[1])
    return {name: size}


def _training_parts(
    model: PreTrainedModel, config: Config, batch: Batch, quantization: Quantization | None
) -> dict[str, int]:
    """What a step holds beside base and adapter, at the moment of the most of its forward and backward passes."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainable_bytes = sum(parameter.numel() * parameter.element_size() for parameter in trainable)
    if config.train.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if quantization == "int8":
        _keep_inputs(_quantized_layers(model))
    model.train()
    with counted(model, all_is=not config.data.packing) as live:
        held = _run_step(model, batch, trainable, live, packed=config.data.packing)
    peak = live.peak
    held = min(held, peak["activations"])
    parts = {
        "held in a step": held,
        "gradients": peak["gradients"],
        "optimizer": 2 * trainable_bytes,  # AdamW's two moments
        "activations": peak["activations"] - held,
        "loss": peak["loss"],
    }
    return parts | ({"gradient buckets": trainable_bytes} if batch.world_size > 1 else {})


def _sharded_parts(model: PreTrainedModel, base: int, world_size: int) -> dict[str, int]:
    """The base's weights on one of the ranks that share them, and those that are whole at the moment of the most.

    Those are what is around the blocks, and two blocks: the next one is gathered while one is used.
    """

    def frozen_bytes(module: nn.Module) -> int:
        frozen = {parameter for parameter in module.parameters() if not parameter.requires_grad}
        return sum(parameter.numel() * parameter.element_size() for parameter in frozen)

    blocks = [frozen_bytes(block) for block in blocks_of(model)]
    around = frozen_bytes(model) - sum(blocks)
    return {"base weights": -(-base // world_size), "gathered weights": around + 2 * max(blocks)}


def _run_step(
    model: PreTrainedModel, batch: Batch, trainable: list[nn.Parameter], live: LiveBytes, *, packed: bool
) -> int:
    """Forward and backward of a step's fullest micro-batch; returns the bytes that the step holds until its end."""

    def accumulated(parameter: Tensor) -> None:
        assert parameter.grad is not None
        live.move(parameter.grad, "gradients")

    def loss_begins(_: nn.Module, __: Any, output: Any) -> None:
        live.category = "loss"
        output.last_hidden_state.register_hook(loss_ends)

    def loss_ends(_: Tensor) -> None:
        live.category = "activations"

    summed_loss = SummedLoss(model)
    hooks = [parameter.register_post_accumulate_grad_hook(accumulated) for parameter in trainable]  # type: ignore[no-untyped-call]
    hooks.append(model.base_model.register_forward_hook(loss_begins))
    shape = (batch.rows, batch.length)
    inputs = {"input_ids": torch.zeros(shape, dtype=torch.int64, device="meta")}
    if packed:
        inputs["position_ids"] = torch.zeros(shape, dtype=torch.int64, device="meta")
    # At most, every token but a row's first is a target.
    positions = torch.zeros(batch.rows * (batch.length - 1), dtype=torch.int64, device="meta")
    live.peak.clear()
    if batch.gradient_accumulation_steps > 1:  # from the second micro-batch on, the gradients of the first are there
        for parameter in trainable:
            parameter.grad = torch.empty_like(parameter)
            accumulated(parameter)
    with constant_adapters(model):
        summed_loss(inputs | {"target_positions": positions, "target_ids": positions}).backward()
        held = live.now["activations"]
    for hook in hooks:
        hook.remove()
    return held


def _storage_bytes(model: nn.Module) -> int:
    storages = {tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())}
    return sum(storage.nbytes() for storage in storages)


def _quantized_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that bitsandbytes would quantise: transformers leaves out the head and what is tied."""
    linear = [module for module in model.modules() if is_linear(module)]
    plain = tied_layers(model) | {model.get_output_embeddings()}
    return [layer for layer in linear if layer not in plain]


def _saved_by_quantization(model: PreTrainedModel, quantization: Quantization | None) -> int:
    """Bytes that the base is smaller by: nf4 has 4 bits and a share of a scale for each weight, int8 one byte."""
    if quantization is None:
        return 0
    saved = 0
    for layer in _quantized_layers(model):
        weight, out_features = stored_weight(layer), weight_shape(layer)[0]
        count = weight.numel()
        small = count // 2 + 4 * -(-count // NF4_BLOCK) if quantization == "nf4" else count + 4 * out_features
        saved += count * weight.element_size() - small
    return saved


class _KeepsInput(torch.autograd.Function):
    """bitsandbytes' int8 product keeps its input on the graph's node, where checkpointing does not see it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = x
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def _keep_inputs(layers: Iterable[nn.Module]) -> None:
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, inputs: (_KeepsInput.apply(*inputs),))  # type: ignore[no-untyped-call]


def _refuse_experts(model: PreTrainedModel, config: Config) -> None:
    """Which expert a token goes to is a value, and there are none."""
    text = model.config.get_text_config()
    if any(getattr(text, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        raise UsageError(
            f"the memory of {type(model).__name__} cannot be predicted: it depends on which experts its tokens take",
            where=f"model.name_or_path: {config.model.name_or_path}",
            fix="train without a forecast",
        )
