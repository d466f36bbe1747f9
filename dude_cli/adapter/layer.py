"""The adapter layer: one class for `lora`, `dora`, `pissa` and `dude`.

Let W0 (out, in) be the frozen weight, A (r, in), B (out, r) the trained factors with start A0, B0, s the scaling and
m (out,) the magnitude. The adapted weight of DuDe is, per output row i,

    W'_i = m_i V_i / ||V_i||,   V = (W0 - s B0 A0) + s B A                                       (arXiv 2505.14367)

`dora` is the same with a random A0 and B0 = 0 (arXiv 2402.09353); `pissa` (arXiv 2404.02948) and `lora`
(arXiv 2106.09685) are W' = V. The base layer is only ever called, never changed: V - W0 is computed as one product

    V - W0 = s (B A - B0 A0) = s P Q,   P = [B - B0, B0] (out, 2r),   Q = [A; A - A0] (2r, in)

which is exactly zero at the start in floating point too, so a freshly patched model is the base model bit for bit.
With a random start the halves with B0 vanish and P = B, Q = A.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dude_cli.adapter.autocast import without_autocast
from dude_cli.adapter.weight import squared_row_norms, stored_weight, weight_chunks, weight_rows, weight_shape
from dude_cli.config import AdapterConfig

# Below this share of the base's squared norm the factored sum has lost digits to cancellation.
CANCELLATION = 0.25


class Factors(NamedTuple):
    """The trained tensors of one layer and, for an SVD start, where they started. Float32."""

    lora_A: Tensor  # (r, in)
    lora_B: Tensor  # (out, r)
    magnitude: Tensor | None = None  # (out,); None for lora and pissa
    initial_A: Tensor | None = None  # (r, in); None for a random start
    initial_B: Tensor | None = None  # (out, r)

    def to(self, device: torch.device) -> Factors:
        return Factors._make(None if tensor is None else tensor.to(device) for tensor in self)


class AdapterLayer(nn.Module):
    """A frozen linear layer with an adapter on it; y has the shape and the dtype of the base layer's output.

    `magnitude` in `factors` may be None for `dude` and `dora`: it then starts at ||W0_i||.
    """

    base_layer: nn.Module
    magnitude: nn.Parameter | None
    initial_A: Tensor | None
    initial_B: Tensor | None
    base_squared_norms: Tensor | None

    def __init__(self, base_layer: nn.Module, config: AdapterConfig, factors: Factors) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.config = config
        self.scaling = config.scaling
        self.enabled = True
        self.holds_norms = False
        self._held_norms: Tensor | None = None
        self.lora_A = nn.Parameter(factors.lora_A)
        self.lora_B = nn.Parameter(factors.lora_B)
        self.register_buffer("initial_A", factors.initial_A)
        self.register_buffer("initial_B", factors.initial_B)
        self.register_buffer("base_squared_norms", None)
        self.magnitude = None
        if config.has_magnitude:
            self.base_squared_norms = squared_row_norms(base_layer)
            start = self.base_squared_norms.sqrt() if factors.magnitude is None else factors.magnitude
            self.magnitude = nn.Parameter(start.clone())
        self.train(base_layer.training)  # a model in evaluation mode stays in it, dropout too

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.base_layer(x)
        if not self.enabled:
            return z
        P, Q = self.difference_factors()
        h = F.linear(F.dropout(x, self.config.dropout, self.training), Q.to(x.dtype))
        difference = F.linear(h, (self.scaling * P).to(h.dtype))
        if self.magnitude is None:
            return z + difference.to(z.dtype)
        g = self.magnitude_ratio(P, Q)
        # Added and scaled in float32: in bfloat16 a g of 1.003 would round to 1.
        difference = difference.to(torch.float32)
        bias = self.bias
        y = g * (z + difference) if bias is None else z + (g - 1) * (z - bias) + g * difference
        return y.to(z.dtype)

    def difference_factors(self) -> tuple[Tensor, Tensor]:
        """P (out, 2r) and Q (2r, in) with V - W0 = s P Q; (out, r) and (r, in) for a random start. Differentiable."""
        if self.initial_A is None or self.initial_B is None:
            return self.lora_B, self.lora_A
        P = torch.cat([self.lora_B - self.initial_B, self.initial_B], dim=1)
        Q = torch.cat([self.lora_A, self.lora_A - self.initial_A], dim=0)
        return P, Q

    def magnitude_ratio(self, P: Tensor, Q: Tensor) -> Tensor:
        """g = m / ||V|| per output row, (out,), float32; 0 for a row of norm 0.

        The norm is a constant of the backward pass (DoRA, section 4.3) unless `norm_gradient` is exact. Inside
        `constant_adapters` it is computed once.
        """
        assert self.magnitude is not None
        if self.config.norm_gradient == "exact" and torch.is_grad_enabled():
            squared = self.squared_norms(P, Q)
        else:
            with torch.no_grad():
                squared = self._held_norms if self._held_norms is not None else self.squared_norms(P, Q)
            if self.holds_norms:
                self._held_norms = squared
        is_positive = squared > 0
        norm = torch.where(is_positive, squared, 1.0).sqrt()
        return torch.where(is_positive, self.magnitude / norm, 0.0)

    def squared_norms(self, P: Tensor, Q: Tensor) -> Tensor:
        """||W0_i + s P_i Q||^2 per output row, (out,), float32, differentiable, without building W.

        ||W0_i||^2 + 2 s P_i . (Q W0_i) + s^2 P_i (Q Q^T) P_i^T; rows that cancel are summed densely in float64.
        """
        assert self.base_squared_norms is not None
        s = self.scaling
        with without_autocast(P.device):
            cross: Tensor = _BaseProduct.apply(Q, self.base_layer)  # type: ignore[no-untyped-call]
            squared = self.base_squared_norms + 2 * s * (P * cross).sum(dim=1)
            squared = squared + s * s * ((P @ (Q @ Q.T)) * P).sum(dim=1)
            rows = (squared < CANCELLATION * self.base_squared_norms).nonzero().squeeze(1)
            if len(rows) > 0:
                V = weight_rows(self.base_layer, rows).double() + s * P[rows].double() @ Q.double()
                squared = squared.index_copy(0, rows, V.square().sum(dim=1).float())
        return squared

    @torch.no_grad()
    def change_chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """W' - W0 (out, in) as (row range, rows, rows of W0), float32 without gradient.

        (g - 1) W0 + g s P Q: what is learned keeps its digits, however small it is beside W0. The norms are computed
        before the first chunk, so W0 may be overwritten chunk by chunk.
        """
        P, Q = self.difference_factors()
        g = None if self.magnitude is None else self.magnitude_ratio(P, Q)[:, None]
        for rows, W0 in weight_chunks(self.base_layer):
            difference = self.scaling * (P[rows] @ Q)
            yield rows, difference if g is None else (g[rows] - 1) * W0 + g[rows] * difference, W0

    def adapted_chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """W' (out, in) as (row range, rows), float32 without gradient: what this layer computes, as a dense weight."""
        for rows, change, W0 in self.change_chunks():
            yield rows, W0 + change

    def energy_captured(self) -> float | None:
        """sum of S_r^2 / ||W0||_F^2: the share of the weight that the initial factors hold; None for a random start.

        The factors hold the singular values: S_k = s ||B0 column k|| ||A0 row k||.
        """
        if self.initial_A is None or self.initial_B is None:
            return None
        squared = self.base_squared_norms
        if squared is None:
            squared = squared_row_norms(self.base_layer)
        S = self.scaling * self.initial_B.double().norm(dim=0) * self.initial_A.double().norm(dim=1)
        total = float(squared.double().sum())
        return float(S.square().sum()) / total if total > 0 else 1.0

    def hold_norms(self, held: bool) -> None:
        """Start or stop to reuse the norm of the first forward; for `constant_adapters`."""
        self.holds_norms = held
        self._held_norms = None

    @property
    def factors(self) -> Factors:
        """The layer's own tensors, not copies."""
        return Factors(self.lora_A, self.lora_B, self.magnitude, self.initial_A, self.initial_B)

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    @property
    def weight(self) -> Tensor:
        """The base layer's weight: some models look at its dtype or device."""
        return stored_weight(self.base_layer)

    @property
    def bias(self) -> Tensor | None:
        bias = self.base_layer.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def extra_repr(self) -> str:
        out_features, in_features = weight_shape(self.base_layer)
        sizes = f"out={out_features}, in={in_features}, rank={self.rank}"
        return f"method={self.config.method}, {sizes}, scaling={self.scaling}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterLayer:
        """Move with the model, but keep float32: `model.to(torch.bfloat16)` would round the learned magnitudes."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        if recurse:
            self.base_layer._apply(fn)  # type: ignore[no-untyped-call]
        self._held_norms = None
        super()._apply(moved, recurse=False)  # type: ignore[no-untyped-call]
        return self


class _BaseProduct(torch.autograd.Function):
    """W0 Q^T, (out, k), in float32, reading W0 in row chunks in both passes so that no float32 copy of it is kept."""

    @staticmethod
    def forward(ctx: Any, Q: Tensor, base_layer: nn.Module) -> Tensor:
        ctx.base_layer = base_layer
        return torch.cat([chunk @ Q.T for _, chunk in weight_chunks(base_layer)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        terms = (grad[rows].T @ chunk for rows, chunk in weight_chunks(ctx.base_layer))
        total = next(terms)
        for term in terms:
            total = total + term
        return total, None
