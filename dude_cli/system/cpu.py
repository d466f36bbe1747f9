"""How fast this CPU multiplies in half precision: many have no instructions for it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# A product of this size takes a millisecond in float32, and fifty in bfloat16 where there are no instructions for it.
TOKENS, FEATURES = 32, 512


def product_slowdown(dtype: torch.dtype) -> float:
    """How many times as long as in float32 a linear layer's two products with its weight take here, in `dtype`.

    x W^T and dy W, each timed once after a first one that is not.
    """
    import torch

    return _product_seconds(dtype) / _product_seconds(torch.float32)


def _product_seconds(dtype: torch.dtype) -> float:
    import torch

    x = torch.zeros(TOKENS, FEATURES, dtype=dtype)
    weight = torch.zeros(FEATURES, FEATURES, dtype=dtype)
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        (x @ weight.T) @ weight
        seconds = time.perf_counter() - started
    return seconds
