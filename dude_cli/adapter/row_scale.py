"""Scale the rows of the weight where its product already is: one pass over the output forward, one backward.

Row i of the weight is column i of the product (tokens, out): a channel of a batch normalisation in evaluation mode
whose variance is one. torch has that as one kernel for mixed dtypes, computed in float32 and rounded once to the dtype
of the product; in bfloat16 a factor of 1.003 would round to 1. Nothing of the product's size is made but the result.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Batch normalisation has them with float32 factors, and float64 not.
_HALF = (torch.bfloat16, torch.float16)


class RowScale(NamedTuple):
    """g per row and what goes with it; each (out,), float32."""

    g: Tensor
    bias: Tensor  # of the product, not to be scaled; zeros if it has none
    offset: Tensor | None  # (1 - g) bias; None if the product has no bias
    one: Tensor
    zero: Tensor

    @classmethod
    def of(cls, g: Tensor, bias: Tensor | None) -> RowScale:
        zero = torch.zeros_like(g)
        if bias is None:
            return cls(g, zero, None, torch.ones_like(g), zero)
        bias = bias.float()
        return cls(g, bias, (1 - g) * bias, torch.ones_like(g), zero)


def scale_(product: Tensor, scale: RowScale) -> None:
    """product = g (product - bias) + bias, in place; product (tokens, out) of any floating dtype, contiguous.

    A g of one leaves the product as it is, bit for bit, with a bias too.
    """
    if product.device.type == "cpu" and product.dtype in _HALF:
        # Here torch would make a float32 copy of the product for a float32 factor.
        offset = scale.zero if scale.offset is None else scale.offset
        channels, nothing = _as_channels(product), product.new_empty(0, dtype=torch.float32)
        torch.ops.aten.native_batch_norm.out(
            channels, scale.g, offset, scale.zero, scale.one, False, 0.0, 0.0,
            out=channels, save_mean=nothing, save_invstd=nothing,
        )  # fmt: skip
    elif scale.offset is None:
        product.mul_(scale.g)
    else:
        torch.addcmul(scale.offset, product, scale.g, out=product)


def scale_backward(dy: Tensor, y: Tensor, scale: RowScale, buffer: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(g dy, sum over tokens of dy (y - bias)): (tokens, out) in the dtype of `dy` and `y`, and (out,) float32.

    The first may be written to `buffer`, of the same shape and dtype, if there is one.
    """
    if takes_buffer(dy):
        # Three simple passes take less time than batch normalisation's one.
        buffer = torch.empty_like(dy) if buffer is None else buffer
        if scale.offset is None:
            torch.mul(dy, y, out=buffer)
        else:
            torch.sub(y, scale.bias, out=buffer).mul_(dy)
        products = buffer.sum(0)
        return torch.mul(dy, scale.g, out=buffer), products
    if dy.device.type not in ("cpu", "meta") or dy.dtype == torch.float64:
        # Without Triton's kernels; torch.compile makes one of it.
        return (dy * scale.g).to(dy.dtype), (dy * (y - scale.bias)).sum(0).float()
    dz, products, _ = torch.ops.aten.native_batch_norm_backward(
        _as_channels(dy), _as_channels(y), scale.g, scale.bias, scale.one, None, None, False, 0.0, [True, True, False]
    )
    return dz.squeeze(3).squeeze(0).t(), products


def takes_buffer(dy: Tensor) -> bool:
    """Whether `scale_backward` can write to a buffer; on the meta device the memory of a step is estimated."""
    return dy.device.type in ("cpu", "meta") and dy.dtype == torch.float32 and not torch.compiler.is_compiling()


def _as_channels(product: Tensor) -> Tensor:
    """(tokens, out) as a view (1, out, tokens, 1), which is contiguous with the channels last."""
    return product.t().unsqueeze(0).unsqueeze(3)
