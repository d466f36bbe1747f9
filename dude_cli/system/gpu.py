"""Which kind of GPU this machine has."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def gpu_kind() -> torch.device | None:
    """The kind of GPU that is here, without an index. Apple's is none: it has no float64, which norms and SVD need."""
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None or found.type == "mps" else found
