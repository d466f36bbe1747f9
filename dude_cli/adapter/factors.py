"""The tensors of one layer's adapter."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """The trained tensors of one layer and, for an SVD start, where they started. Float32."""

    lora_A: Tensor  # (r, in)
    lora_B: Tensor  # (out, r)
    magnitude: Tensor | None = None  # (out,); None for lora and pissa
    initial_A: Tensor | None = None  # (r, in); None for a random start
    initial_B: Tensor | None = None  # (out, r)

    def to(self, device: torch.device) -> Factors:
        return Factors._make(None if tensor is None else tensor.to(device) for tensor in self)

    def difference(self) -> tuple[Tensor, Tensor]:
        """P (out, 2r) and Q (2r, in) with V - W0 = s P Q; (out, r) and (r, in) for a random start. Differentiable.

        P = [B - B0, B0] and Q = [A; A - A0]: exactly zero at the start, in floating point too.
        """
        if self.initial_A is None or self.initial_B is None:
            return self.lora_B, self.lora_A
        P = torch.cat([self.lora_B - self.initial_B, self.initial_B], dim=1)
        return P, torch.cat([self.lora_A, self.lora_A - self.initial_A])
