"""The adapter's product as one autograd Function: LoRA's work and memory, with a magnitude.

z = x W0^T + bias is computed here if the base layer is that product and nothing else, or is what a call of it gave
(quantised, hooked, ...). With the factors P = s [B - B0, B0] (out, 2r) and Q = [A; A - A0] (2r, in),
and g = m / ||V|| per output row,

    h = x Q^T,   y = g (z - bias + h P^T) + bias

and backwards, for a given dy,

    dz = g dy,   u = dz P,   dx = dz W0 + u Q,   dB = s dz^T h[:, :r],   dA = (u[:, :r] + u[:, r:])^T x,
    dm_i = sum_t dy_ti (y_ti - bias_i) / m_i

because s dz B = u[:, :r] + u[:, r:]: the frozen half of the factors costs nothing in the weight gradients. A random
start has P = s B, Q = A and no second half. What is kept for the backward pass is x, h[:, :r] and, with a magnitude, y.
y is the output with its bias, because at the start it has to be the base's own bit for bit: beside a large bias,
y - bias, and dm with it, have the rounding of the bias.
"""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from dude_cli.adapter import row_scale
from dude_cli.adapter.autocast import without_autocast
from dude_cli.adapter.row_scale import RowScale
from dude_cli.adapter.widened import is_slow, times

# Neither Triton's kernels nor a recorded CUDA graph, to look for a mistake.
TORCH_ALONE = os.environ.get("DUDE_LAYER") == "torch"
HAS_KERNELS = not TORCH_ALONE and importlib.util.find_spec("triton") is not None


class Scratch:
    """Memory for the float32 dz of one layer after another, on a CPU.

    There a new tensor of a few megabytes is paged in by the operating system each time, which takes several times as
    long as writing it; a GPU's allocator keeps its blocks. Freed by the next forward pass, which needs the space.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def like(self, tensor: Tensor) -> Tensor:
        """Of the shape and dtype of `tensor`, with any values, until the next call."""
        if self._buffer is None or self._buffer.numel() < tensor.numel():
            self._buffer = None  # before the larger one is made
            self._buffer = torch.empty_like(tensor).view(-1)
        return self._buffer[: tensor.numel()].view_as(tensor)

    def free(self) -> None:
        self._buffer = None


class StepTensors(NamedTuple):
    """What the product needs and only an optimizer step changes, without gradient; k is 2r, or r for a random start."""

    P: Tensor  # (out, k), scaling included, in the product's dtype
    Q: Tensor  # (k, in), in the product's dtype
    scaling: float
    scale: RowScale | None = None  # None without a magnitude
    inverse_gain: Tensor | None = None  # (out,) float32; 0 where the gain is: a zero row of W0 stays one
    scratch: Scratch | None = None


class FrozenLinear(NamedTuple):
    """A frozen weight (out, in) and its bias, in the product's dtype."""

    weight: Tensor
    bias: Tensor | None


class AdaptedProduct(torch.autograd.Function):
    """y (tokens, out) of the head of this module; see `adapted_product`."""

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor | FrozenLinear,
        x: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        gain: Tensor | None,
        step: StepTensors,
        in_place: bool,
    ) -> Tensor:
        if step.scratch is not None:
            step.scratch.free()
        with without_autocast(x.device):
            if isinstance(base, FrozenLinear):
                y, weight = F.linear(x, base.weight, base.bias), base.weight
            else:
                y, weight = base if in_place else base.clone(memory_format=torch.contiguous_format), None
            h = x @ step.Q.T
            _add_and_scale_(y, h, step)
        if y is base:
            ctx.mark_dirty(y)
        rank = lora_A.shape[0]
        # Of h the backward pass needs the trained half alone.
        h = h if h.shape[1] == rank else h[:, :rank].clone()
        ctx.step = step
        # What is kept is the output itself; `mark_dirty` counts as a write too.
        ctx.version = None if torch.compiler.is_compiling() or y.is_inference() else y._version + (y is base)
        ctx.save_for_backward(x, h, None if step.scale is None else y, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        step: StepTensors = ctx.step
        x, h, y, weight = ctx.saved_tensors
        rank = h.shape[1]
        dz, d_gain = dy, None
        if step.scale is not None:
            _check_as_kept(y, ctx.version)
            dz, d_gain = _scale_backward(dy.contiguous(), y, step, is_only_here=weight is not None)
        dx = None
        with without_autocast(x.device):
            u = times(dz, step.P)
            dB = _float32_product(dz.T, h)
            dA = _float32_product((u if u.shape[1] == rank else u[:, :rank] + u[:, rank:]).T, x)
            if ctx.needs_input_grad[1]:
                Q = step.Q.to(u.dtype)
                dx = (u @ Q if weight is None else times(dz, weight).addmm_(u, Q)).to(x.dtype)
        if step.scaling != 1.0:
            dB.mul_(step.scaling)
        return dz if ctx.needs_input_grad[0] else None, dx, dA, dB, d_gain, None, None


def adapted_product(
    base: Tensor | FrozenLinear,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gain: Tensor | None,
    step: StepTensors,
    *,
    in_place: bool = False,
) -> Tensor:
    """y = g (z - bias + x Q^T P^T) + bias, with gradients of z or x W0^T, x, A, B and the gain.

    `base` is z (tokens, out), or what z is to be computed from; x (tokens, in) and it have the dtype of P and Q. `step`
    holds the values of `lora_A`, `lora_B` and `gain`. The gain is what g is proportional to: the magnitude if the norm
    is a constant, g itself if it is not. `in_place` writes y over z: for a z that nobody else keeps.
    """
    y: Tensor = AdaptedProduct.apply(base, x, lora_A, lora_B, gain, step, in_place)  # type: ignore[no-untyped-call]
    return y


def _add_and_scale_(z: Tensor, h: Tensor, step: StepTensors) -> None:
    kernels = _kernels(z.device.type)
    if step.scale is not None and kernels is not None:
        kernels.add_and_scale_(z, h, step.P, step.scale)
        return
    z.addmm_(h, step.P.T)
    if step.scale is not None:
        row_scale.scale_(z, step.scale)


def _scale_backward(dy: Tensor, y: Tensor, step: StepTensors, is_only_here: bool) -> tuple[Tensor, Tensor]:
    """dz and the gain's gradient; `is_only_here` says that nobody gets dz after this backward pass."""
    assert step.scale is not None
    assert step.inverse_gain is not None
    kernels = _kernels(dy.device.type)
    if kernels is not None:
        dz, products = kernels.scale_backward(dy, y, step.scale)
    else:
        buffer = step.scratch.like(dy) if step.scratch and is_only_here and row_scale.takes_buffer(dy) else None
        dz, products = row_scale.scale_backward(dy, y, step.scale, buffer)
    return dz, products.mul_(step.inverse_gain)  # y - bias is proportional to the gain


def _check_as_kept(y: Tensor, version: int | None) -> None:
    """Raise RuntimeError if the output was written over: autograd does not look where it is computed anew."""
    if version is not None and y._version > version:
        raise RuntimeError(
            "the model writes over the output of an adapter layer, which the magnitude's gradient needs: "
            "set `returns_copy` of that AdapterLayer"
        )


def _float32_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32: the sums of a half-precision product on a GPU, on most CPUs the rounded product."""
    if left.device.type == "cuda" and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    if is_slow(right):
        return left.float() @ right.float()
    return (left @ right).float()


def _kernels(device_type: str) -> ModuleType | None:
    """The Triton kernels, where the product is on a GPU; torch.compile fuses by itself."""
    if device_type != "cuda" or not HAS_KERNELS or torch.compiler.is_compiling():
        return None
    from dude_cli.adapter import kernels

    return kernels
