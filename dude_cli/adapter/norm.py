"""The row norms ||W0 + s (B A - B0 A0)|| without building that weight.

With D = A - A0 and E = B - B0 the difference is s (E A0 + B D), and of row i

    ||V_i||^2 = ||W0_i||^2 + 2 s [E_i . (A0 W0_i) + B_i . (D W0_i)] + s^2 ||E_i A0 + B_i D||^2

where the last term needs the (r, r) products A0 A0^T, A0 D^T and D D^T alone. W0 A0^T and A0 A0^T never change and are
kept, so D alone meets the weight. A random start has A0 = B0 = 0: D = A and no E. All of it is float32, whatever the
base is stored in: a bfloat16 product is 2e-3 to 27 times off once a row shrinks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dude_cli.adapter.autocast import full_float32
from dude_cli.adapter.factors import Factors
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
    initial_gram: Tensor | None = None  # A0 A0^T, (r, r)


def frozen_products(base_layer: nn.Module, initial_A: Tensor | None) -> FrozenProducts:
    """Read the weight once, in chunks; ||W0_i||^2 is summed in float64 and rounded once."""
    squared = squared_row_norms(base_layer)
    if initial_A is None:
        return FrozenProducts(squared)
    with full_float32(initial_A.device), torch.no_grad():
        return FrozenProducts(squared, base_product(base_layer, initial_A), initial_A @ initial_A.T)


def factored_squared_norms(base_layer: nn.Module, factors: Factors, scaling: float, frozen: FrozenProducts) -> Tensor:
    """||V_i||^2 by the formula of this module's head, (out,), float32, differentiable in A and B.

    A row that is small beside W0_i has lost digits: see `is_cancelled`.
    """
    A, B, A0, B0 = factors.lora_A, factors.lora_B, factors.initial_A, factors.initial_B
    with full_float32(A.device):
        if A0 is None or B0 is None or frozen.initial is None or frozen.initial_gram is None:
            cross = B * base_product(base_layer, A)
            quadratic = B * (B @ (A @ A.T))
        else:
            D, E = A - A0, B - B0
            cross = E * frozen.initial + B * base_product(base_layer, D)
            grams = torch.cat([A0, D]) @ D.T  # A0 D^T and D D^T
            quadratic = E * (E @ frozen.initial_gram + 2 * (B @ grams[: len(D)].T)) + B * (B @ grams[len(D) :])
    return frozen.squared + (2 * scaling * cross + scaling**2 * quadratic).sum(dim=1)


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
    once: as exact, in a fifth of the memory traffic. Elsewhere both passes read W0 in row chunks.
    """

    @staticmethod
    def forward(ctx: Any, Q: Tensor, base_layer: nn.Module) -> Tensor:
        ctx.base_layer = base_layer
        weight = dense_weight(base_layer)
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
