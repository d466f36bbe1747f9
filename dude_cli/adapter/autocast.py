"""Products in the dtype and the precision of their factors, whatever is set around them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Within, there is no autocast on `device`. The meta device, where a forecast runs, knows none."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    off: AbstractContextManager[None] = torch.autocast(device.type, enabled=False)
    return off


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """Within, float32 products are float32: no autocast, no TF32 on a GPU, no bfloat16 in oneDNN."""
    with without_autocast(device), _precise_products():
        yield


@contextmanager
def _precise_products() -> Iterator[None]:
    """Within, matrix products have no lower precision, whichever of torch's two ways has set one.

    The older way, `torch.set_float32_matmul_precision`, sets what the newer one does too, and raises an error once the
    newer one was used, so it is used only where it is alone, before torch 2.9.
    """
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        legacy = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(legacy)
        return
    backends: Any = torch.backends
    # Each with what it follows while it says "none" itself, which cannot be read: on a GPU, and in oneDNN.
    products = ((backends.cuda.matmul, backends.cudnn), (backends.mkldnn.matmul, backends.mkldnn))
    before = ["none" if of.fp32_precision == own.fp32_precision else own.fp32_precision for own, of in products]
    for own, _ in products:
        own.fp32_precision = "ieee"
    try:
        yield
    finally:
        for (own, _), precision in zip(products, before, strict=True):
            own.fp32_precision = precision


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer multiplies `x`: autocast's, or its own."""
    device_type = x.device.type
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return x.dtype
