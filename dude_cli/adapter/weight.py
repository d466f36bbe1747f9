"""The one place that reads a base layer's weight, for the SVD, the row norms and the merge.

Everything here speaks the orientation of `torch.nn.Linear`: a weight is (out, in), whatever the layer stores.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

# Float32 values that one chunk of rows may hold: 64 MiB, small beside any layer that needs chunks.
CHUNK_VALUES = 16 * 2**20


def is_linear(module: nn.Module) -> bool:
    """Whether an adapter can sit on `module`: an `nn.Linear`, or GPT-2's `Conv1D`, which stores (in, out)."""
    return isinstance(module, nn.Linear | Conv1D)


def weight_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer."""
    out_features, in_features = in_stored_orientation(layer, stored_weight(layer)).shape
    return out_features, in_features


def weight_rows(layer: nn.Module, rows: slice | Tensor) -> Tensor:
    """Rows of the (out, in) weight, float32, without gradient. A float32 `Linear` gives a view: do not write to it."""
    return in_stored_orientation(layer, stored_weight(layer).detach())[rows].to(torch.float32)


def weight_chunks(layer: nn.Module) -> Iterator[tuple[slice, Tensor]]:
    """The whole weight as (row range, float32 rows), in chunks of bounded memory."""
    out_features, in_features = weight_shape(layer)
    step = max(1, CHUNK_VALUES // in_features)
    for start in range(0, out_features, step):
        rows = slice(start, min(start + step, out_features))
        yield rows, weight_rows(layer, rows)


def in_stored_orientation(layer: nn.Module, W: Tensor) -> Tensor:
    """A (out, in) weight as the layer stores it: a `Conv1D` transposed. Its own inverse; a view."""
    return W.T if isinstance(layer, Conv1D) else W


def squared_row_norms(layer: nn.Module) -> Tensor:
    """||W0_i||^2 of each output row, (out,), summed in float64 and rounded once to float32."""
    parts = [chunk.to(torch.float64).square().sum(dim=1) for _, chunk in weight_chunks(layer)]
    return torch.cat(parts).to(torch.float32)


def stored_weight(layer: nn.Module) -> Tensor:
    """The weight as the layer stores it, in its own dtype and orientation."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight
