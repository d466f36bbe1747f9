"""The output-sized passes of the adapter's product as Triton kernels, for a GPU: each tensor is read and written once.

    forward    y = g (z - bias + h P^T) + bias, over z; the product of rank k stays in registers
    backward   g dy and sum_t dy (y - bias), from one reading of dy and y

The results are those of torch's product and `row_scale.py` within the dtype's rounding: sums are float32, and y is
rounded once, where torch rounds z + h P^T before it is scaled. Triton launches on the current device, whatever tensors
it is given, so theirs is made that. Tested through Triton's interpreter too. Imported only where they are used: see
`product.py`.
"""

# A kernel is written in Triton, not in Python: its arguments are pointers and compile-time numbers.
# mypy: disable-error-code="import-untyped, no-untyped-call, no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dude_cli.adapter.row_scale import RowScale

BLOCK_TOKENS, BLOCK_OUT = 64, 128


@triton.jit
def _add_and_scale(
    z, h, P, g, offset, tokens, out_features, k,
    BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, HAS_OFFSET: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    in_t, in_o = t < tokens, o < out_features
    added = tl.zeros((BLOCK_T, BLOCK_O), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        h_tile = tl.load(h + t.to(tl.int64)[:, None] * k + i[None, :], mask=in_t[:, None] & (i < k)[None, :], other=0.0)
        P_tile = tl.load(P + o[None, :] * k + i[:, None], mask=in_o[None, :] & (i < k)[:, None], other=0.0)
        added += tl.dot(h_tile, P_tile, input_precision="ieee")
    place = z + t.to(tl.int64)[:, None] * out_features + o[None, :]
    inside = in_t[:, None] & in_o[None, :]
    y = tl.load(place, mask=inside, other=0.0).to(tl.float32) + added
    y = y * tl.load(g + o, mask=in_o, other=0.0)[None, :]
    if HAS_OFFSET:
        y += tl.load(offset + o, mask=in_o, other=0.0)[None, :]
    tl.store(place, y.to(z.dtype.element_ty), mask=inside)


@triton.jit
def _scale_and_sum(
    dy, y, g, bias, dz, sums, tokens, out_features, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    in_o = o < out_features
    inside = (t < tokens)[:, None] & in_o[None, :]
    place = t.to(tl.int64)[:, None] * out_features + o[None, :]
    dy_tile = tl.load(dy + place, mask=inside, other=0.0).to(tl.float32)
    scaled = dy_tile * tl.load(g + o, mask=in_o, other=0.0)[None, :]
    tl.store(dz + place, scaled.to(dz.dtype.element_ty), mask=inside)
    centred = tl.load(y + place, mask=inside, other=0.0).to(tl.float32)
    centred -= tl.load(bias + o, mask=in_o, other=0.0)[None, :]
    total = tl.sum(dy_tile * centred, axis=0)
    tl.store(sums + tl.program_id(0) * out_features + o, total, mask=in_o)


def add_and_scale_(z: Tensor, h: Tensor, P: Tensor, scale: RowScale) -> None:
    """z = g (z - bias + h P^T) + bias, in place; z (tokens, out), h (tokens, k) and P (out, k) of one dtype."""
    tokens, out_features = z.shape
    k, offset = h.shape[1], scale.zero if scale.offset is None else scale.offset
    with torch.cuda.device_of(z):
        _add_and_scale[_grid(tokens, out_features)](
            z, h.contiguous(), P, scale.g, offset, tokens, out_features, k,
            BLOCK_T=BLOCK_TOKENS, BLOCK_O=BLOCK_OUT, BLOCK_K=_block_k(k), HAS_OFFSET=scale.offset is not None,
        )  # fmt: skip


def scale_backward(dy: Tensor, y: Tensor, scale: RowScale) -> tuple[Tensor, Tensor]:
    """(g dy, sum over tokens of dy (y - bias)): (tokens, out) in the dtype of `dy`, and (out,) float32."""
    tokens, out_features = dy.shape
    dz = torch.empty_like(dy)
    sums = torch.empty(triton.cdiv(tokens, BLOCK_TOKENS), out_features, device=dy.device)
    with torch.cuda.device_of(dy):
        _scale_and_sum[_grid(tokens, out_features)](
            dy, y, scale.g, scale.bias, dz, sums, tokens, out_features, BLOCK_T=BLOCK_TOKENS, BLOCK_O=BLOCK_OUT
        )
    return dz, sums.sum(dim=0)


def _grid(tokens: int, out_features: int) -> tuple[Any, Any]:
    return triton.cdiv(tokens, BLOCK_TOKENS), triton.cdiv(out_features, BLOCK_OUT)


def _block_k(k: int) -> int:
    """A power of two of at least 16, which `tl.dot` needs."""
    return max(16, min(64, int(triton.next_power_of_2(k))))
