"""The row norms ||V|| without building V = W0 + s P Q, from its factors P (out, k) and Q (k, in).

    ||V_i||^2 = ||W0_i||^2 + s P_i . (2 Q W0_i + s Q Q^T P_i)

P Q is the difference to W0, so nothing is left of the sum at the start. With a start A0, B0 there is
Q = [A; A - A0], and Q W0_i = [A0 W0_i + D W0_i; D W0_i] for D = A - A0: W0 A0^T never changes and is kept, so D alone
meets the weight. All of it is float32, whatever the base is stored in: a bfloat16 product is 2e-3 to 27 times off once
a row shrinks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dude_cli.adapter.autocast import full_float32
from dude_cli.adapter.weight import dense_weight, squared_row_norms, weight_chunks, weight_rows, weight_shape

# Below this share of the base's squared norm the factored sum has lost digits to cancellation.
CANCELLATION = 0.25


def base_product(base_layer: nn.Module, factor: Tensor) -> Tensor:
    """W0 factor^T (out, k) of a factor (k, in), float32, differentiable in the factor."""
    product: Tensor = _BaseProduct.apply(factor, base_layer)  # type: ignore[no-untyped-call]
    return product


class FrozenProducts(NamedTuple):
    """What the norms need of the tensors that never change, float32."""

    squared: Tensor  # ||W0_i||^2, (out,)
    initial: Tensor | None = None  # W0 A0^T, (out, r); None for a random start


def frozen_products(base_layer: nn.Module, initial_A: Tensor | None) -> FrozenProducts:
    """Read the weight once, in chunks; ||W0_i||^2 is summed in float64 and rounded once."""
    squared = squared_row_norms(base_layer)
    if initial_A is None:
        return FrozenProducts(squared)
    with full_float32(initial_A.device), torch.no_grad():
        return FrozenProducts(squared, base_product(base_layer, initial_A))


def factored_squared_norms(
    base_layer: nn.Module, P: Tensor, Q: Tensor, scaling: float, frozen: FrozenProducts
) -> Tensor:
    """||V_i||^2 by the formula of this module's head, (out,), float32, differentiable in P and Q.

    To be called within `full_float32`. A row that is small beside W0_i has lost digits: see `is_cancelled`.
    """
    if frozen.initial is None:
        cross = base_product(base_layer, Q)
    else:
        moved = base_product(base_layer, Q[frozen.initial.shape[1] :])
        cross = torch.cat([frozen.initial + moved, moved], dim=1)
    change = torch.addmm(cross, P, Q @ Q.T, beta=2, alpha=scaling)
    return frozen.squared + scaling * (P * change).sum(dim=1)


def is_cancelled(squared: Tensor, base_squared: Tensor) -> Tensor:
    """Which rows (out,) must be summed densely."""
    return squared < CANCELLATION * base_squared


def dense_squared_norms(base_layer: nn.Module, P: Tensor, Q: Tensor, scaling: float, rows: Tensor) -> Tensor:
    """||W0_i + s P_i Q||^2 of the given rows, summed in float64, rounded to float32; differentiable in P and Q."""
    V = weight_rows(base_layer, rows).double() + scaling * P[rows].double() @ Q.double()
    return V.square().sum(dim=1).float()


def bfloat16_parts(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three bfloat16 tensors whose sum is `values`, float32: 8 + 8 + 8 of its 24 bits."""
    high = values.to(torch.bfloat16)
    rest = values - high
    middle = rest.to(torch.bfloat16)
    return high, middle, (rest - middle).to(torch.bfloat16)


class _BaseProduct(torch.autograd.Function):
    """W0 Q^T, (out, k), in float32, without a float32 copy of W0.

    On a GPU a bfloat16 W0 meets the three parts of Q in one product of its own dtype with float32 sums, which reads it
    once: as exact, in a fifth of the memory traffic. Elsewhere both passes read it in row chunks.
    """

    @staticmethod
    def forward(ctx: Any, Q: Tensor, base_layer: nn.Module) -> Tensor:
        ctx.base_layer = base_layer
        weight = dense_weight(base_layer)
        if weight.dtype == torch.float32:
            return weight @ Q.T
        if weight.device.type == "cuda" and weight.dtype == torch.bfloat16:
            products = torch.mm(weight, torch.cat(bfloat16_parts(Q)).T, out_dtype=torch.float32)
            return products.view(len(weight), 3, len(Q)).sum(dim=1)
        product = torch.empty(weight_shape(base_layer)[0], len(Q), device=Q.device)
        for rows, chunk in weight_chunks(base_layer, weight):
            torch.mm(chunk, Q.T, out=product[rows])
        return product

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        terms = (grad[rows].T @ chunk for rows, chunk in weight_chunks(ctx.base_layer))
        total = next(terms)
        for term in terms:
            total = total + term
        return total, None
