"""How fast this CPU multiplies in half precision: many have no instructions for it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# A product of this size takes a millisecond in float32, and ten in bfloat16 where there are no instructions for it.
TOKENS, FEATURES = 32, 512
REPEATS = 3


def product_slowdown(dtype: torch.dtype) -> float:
    """How many times as long as in float32 a layer's two products with its frozen weight take here, in `dtype`.

    x W^T and dy W, as the adapter's layer computes them, the quickest of a few after a first one.
    """
    import torch

    return _product_seconds(dtype) / _product_seconds(torch.float32)


def _product_seconds(dtype: torch.dtype) -> float:
    import torch

    from dude_cli.adapter.widened import times

    x = torch.zeros(TOKENS, FEATURES, dtype=dtype)
    weight = torch.zeros(FEATURES, FEATURES, dtype=dtype)

    def seconds() -> float:
        started = time.perf_counter()
        times(x @ weight.T, weight)
        return time.perf_counter() - started

    return min([seconds() for _ in range(1 + REPEATS)][1:])
