"""The adapter layer: one class for `lora`, `dora`, `pissa` and `dude`.

Let W0 (out, in) be the frozen weight, A (r, in), B (out, r) the trained factors with start A0, B0, s the scaling and
m (out,) the magnitude. The adapted weight of DuDe is, per output row i,

    W'_i = m_i V_i / ||V_i||,   V = (W0 - s B0 A0) + s B A                                       (arXiv 2505.14367)

`dora` is the same with a random A0 and B0 = 0 (arXiv 2402.09353); `pissa` (arXiv 2404.02948) and `lora`
(arXiv 2106.09685) are W' = V. The base layer is called or read, never changed: V - W0 is computed as one product

    V - W0 = s (B A - B0 A0) = s P Q,   P = [B - B0, B0] (out, 2r),   Q = [A; A - A0] (2r, in)

which is exactly zero at the start in floating point too, so a freshly patched model is the base model bit for bit.
With a random start the halves with B0 vanish and P = B, Q = A.

The layer computes that through `product.py`. Its plain form, a few lines of autograd, is what that is tested against,
and can be switched on to look for a mistake: DUDE_LAYER=plain.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dude_cli.adapter.autocast import full_float32, product_dtype
from dude_cli.adapter.factors import Factors
from dude_cli.adapter.norm import (
    FrozenProducts,
    dense_squared_norms,
    factored_squared_norms,
    frozen_products,
    is_cancelled,
)
from dude_cli.adapter.product import FrozenLinear, Scratch, StepTensors, adapted_product
from dude_cli.adapter.row_scale import RowScale
from dude_cli.adapter.weight import (
    is_only_a_product,
    squared_row_norms,
    stored_weight,
    weight_chunks,
    weight_shape,
)
from dude_cli.config import AdapterConfig


class RowNorms(NamedTuple):
    """||V|| of the rows of one layer, without gradient."""

    norm: Tensor  # (out,), float32
    has_zero_magnitude: bool  # of a row that is not zero itself


class AdapterLayer(nn.Module):
    """A frozen linear layer with an adapter on it; y has the shape and the dtype of the base layer's output.

    `magnitude` in `factors` may be None for `dude` and `dora`: it then starts at ||W0_i||.
    """

    base_layer: nn.Module
    magnitude: nn.Parameter | None
    initial_A: Tensor | None
    initial_B: Tensor | None
    base_squared_norms: Tensor | None  # this and the next: see FrozenProducts
    initial_product: Tensor | None

    def __init__(self, base_layer: nn.Module, config: AdapterConfig, factors: Factors) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.config = config
        self.scaling = config.scaling
        self.enabled = True
        self.is_plain = os.environ.get("DUDE_LAYER") == "plain"
        self.trained_before: frozenset[str] = frozenset()  # the model's trainable parameters, for `unpatch_model`
        self.returns_copy = False  # for a model that writes over the output, which the backward pass needs
        self.is_held = False
        self._held_norms: RowNorms | None = None
        self._held_difference: tuple[Tensor, Tensor] | None = None
        self._scratch: Scratch | None = None
        self._held_step: dict[tuple[torch.dtype, bool], StepTensors] = {}
        self.lora_A = nn.Parameter(factors.lora_A)
        self.lora_B = nn.Parameter(factors.lora_B)
        self.register_buffer("initial_A", factors.initial_A)
        self.register_buffer("initial_B", factors.initial_B)
        self.register_buffer("base_squared_norms", None)
        self.register_buffer("initial_product", None)
        self._frozen_is_stale = False
        self.register_load_state_dict_post_hook(_compute_frozen_anew)  # type: ignore[no-untyped-call]
        self.magnitude = None
        if config.has_magnitude:
            self.base_squared_norms, self.initial_product = frozen_products(base_layer, factors.initial_A)
            start = self.base_squared_norms.sqrt() if factors.magnitude is None else factors.magnitude
            self.magnitude = nn.Parameter(start.clone())
        self.train(base_layer.training)  # a model in evaluation mode stays in it, dropout too

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return self.base_layer(x)  # type: ignore[no-any-return]
        norms = None if self.magnitude is None else self.row_norms()
        if self.is_plain or (norms is not None and (norms.has_zero_magnitude or self._trains_bias())):
            return self.plain_forward(x)
        # What y - bias is proportional to and the gradient goes through: m, or g where the norm has a gradient too.
        gain = self.magnitude_ratio() if self._differentiates_norm() else self.magnitude
        dtype = product_dtype(x)
        # torch may round the product of a strided x of three axes otherwise than that of its rows.
        linear = self._frozen_linear(dtype) if x.is_contiguous() else None
        if linear is not None:
            rows = x.reshape(-1, x.shape[-1]).to(dtype)
            step = self._step_tensors(dtype, norms, gain)
            y = adapted_product(linear, rows, self.lora_A, self.lora_B, gain, step)
        else:
            # Of (tokens, in) no linear layer returns a view.
            z: Tensor = self.base_layer(x.view(-1, x.shape[-1]) if x.is_contiguous() else x)
            z = z.reshape(-1, z.shape[-1])
            rows = F.dropout(x, self.config.dropout, self.training).reshape(-1, x.shape[-1]).to(z.dtype)
            step = self._step_tensors(z.dtype, norms, gain)
            in_place = self._may_overwrite(z)
            y = adapted_product(z, rows, self.lora_A, self.lora_B, gain, step, in_place=in_place)
        y = y.view(*x.shape[:-1], y.shape[-1])
        return y.clone() if self.returns_copy else y

    def plain_forward(self, x: Tensor) -> Tensor:
        """The same y and the same gradients in plain autograd, with more work and memory."""
        z: Tensor = self.base_layer(x)
        P, Q = self.factors.difference()
        h = F.linear(F.dropout(x, self.config.dropout, self.training), Q.to(x.dtype))
        difference = F.linear(h, (self.scaling * P).to(h.dtype))
        if self.magnitude is None:
            return z + difference.to(z.dtype)
        g = self.magnitude_ratio()
        # Added and scaled in float32: in bfloat16 a g of 1.003 would round to 1.
        difference = difference.to(torch.float32)
        bias = self.bias
        y = g * (z + difference) if bias is None else z + (g - 1) * (z - bias) + g * difference
        return y.to(z.dtype)

    def magnitude_ratio(self) -> Tensor:
        """g = m / ||V|| per output row, (out,), float32; 0 for a row of norm 0.

        The norm is a constant of the backward pass (DoRA, section 4.3) unless `norm_gradient` is exact. Inside
        `constant_adapters` it is computed once.
        """
        if self._differentiates_norm():
            squared = self.squared_norms()
            return self._ratio(torch.where(squared > 0, squared, 1.0).sqrt() * (squared > 0))
        return self._ratio(self.row_norms().norm)

    def squared_norms(self) -> Tensor:
        """||V_i||^2 per output row, (out,), float32, differentiable; see `norm.py`. Rows that cancel are redone."""
        P, Q = self.factors.difference()
        with full_float32(P.device):
            return self.without_cancellation(self.factored_squared_norms(P, Q), P, Q)

    def factored_squared_norms(self, P: Tensor, Q: Tensor) -> Tensor:
        """||V_i||^2 before the rows that cancel are redone; to be called within `full_float32`."""
        assert self.base_squared_norms is not None
        frozen = FrozenProducts(self.base_squared_norms, self.initial_product)
        return factored_squared_norms(self.base_layer, P, Q, self.scaling, frozen)

    def norm_checks(self, squared: Tensor) -> Tensor:
        """(2,) booleans on the device: whether a row of `squared` cancels, and whether one has a magnitude of zero."""
        assert self.base_squared_norms is not None
        assert self.magnitude is not None
        has_zero = ((self.magnitude == 0) & (self.base_squared_norms > 0)).any()
        return torch.stack([is_cancelled(squared, self.base_squared_norms).any(), has_zero])

    def without_cancellation(self, squared: Tensor, P: Tensor, Q: Tensor) -> Tensor:
        """`squared` with the rows that cancel summed densely."""
        assert self.base_squared_norms is not None
        rows = is_cancelled(squared, self.base_squared_norms).nonzero().squeeze(1)
        if len(rows) == 0:
            return squared
        return squared.index_copy(0, rows, dense_squared_norms(self.base_layer, P, Q, self.scaling, rows))

    def row_norms(self) -> RowNorms:
        """||V_i|| without gradient: what is held, or computed now, and then held if the layer's norms are."""
        if self._held_norms is not None:
            return self._held_norms
        norms: RowNorms = compute_row_norms([self])[0]
        if self.is_held:
            self._held_norms = norms
        return norms

    @torch.no_grad()
    def difference(self) -> tuple[Tensor, Tensor]:
        """P and Q without gradient. A float32 layer holds them from the norms on, for the step tensors, which are them.

        Those of another dtype are copies, beside which these would take twice as much again.
        """
        found = self._held_difference or self.factors.difference()
        if self.is_held and self.weight.dtype == found[0].dtype:
            self._held_difference = found
        return found

    @torch.no_grad()
    def change_chunks(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """W' - W0 (out, in) as (row range, rows, rows of W0), float32 without gradient.

        (g - 1) W0 + g s P Q: what is learned keeps its digits, however small it is beside W0. The norms are computed
        before the first chunk, so W0 may be overwritten chunk by chunk.
        """
        P, Q = self.factors.difference()
        g = None if self.magnitude is None else self.magnitude_ratio()[:, None]
        for rows, W0 in weight_chunks(self.base_layer):
            with full_float32(P.device):
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

    @torch.no_grad()
    def step_tensors(
        self, dtype: torch.dtype, P: Tensor, Q: Tensor, norm: Tensor | None, gain: Tensor | None
    ) -> StepTensors:
        """What the product in `dtype` needs of P and Q, the norm and the gain; the last two None without m."""
        P = P if self.scaling == 1 else self.scaling * P
        step = StepTensors(P.to(dtype), Q.to(dtype), self.scaling, scratch=self._scratch)
        if norm is None or gain is None:
            return step
        scale = RowScale.of(self._ratio(norm), self.bias)
        return step._replace(scale=scale, inverse_gain=torch.where(gain == 0, 0.0, 1 / gain))

    def hold(
        self, norms: RowNorms | None = None, step: StepTensors | None = None, scratch: Scratch | None = None
    ) -> None:
        """Reuse `norms` and `step`, or those of the next forward, until `release`; A, B and m stay as they are."""
        self.is_held = True
        self._held_norms = norms
        self._scratch = scratch
        if step is not None:
            self._held_step[step.P.dtype, True] = step

    def forget(self) -> None:
        """Compute what is held anew in the next forward: A, B or m have changed."""
        self._held_norms = None
        self._held_difference = None
        self._held_step.clear()

    def release(self) -> None:
        """Hold nothing any more."""
        self.is_held = False
        self._scratch = None
        self.forget()

    @torch.no_grad()
    def set_factors(self, factors: Factors) -> None:
        """Copy `factors`, of the same shapes, into the layer's tensors."""
        before, after = self.initial_A, factors.initial_A
        # The same start needs no look at the base, whose weight may be sharded by now.
        is_new_start = before is not None and after is not None and not torch.equal(before, after.to(before.device))
        for name, tensor in factors._asdict().items():
            if tensor is not None:
                getattr(self, name).copy_(tensor)
        if self.magnitude is not None and is_new_start:
            _, self.initial_product = frozen_products(self.base_layer, self.initial_A)
        self.forget()

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

    @torch.no_grad()
    def _step_tensors(self, dtype: torch.dtype, norms: RowNorms | None, gain: Tensor | None) -> StepTensors:
        key = (dtype, gain is self.magnitude)
        held = self._held_step.get(key)
        if held is not None:
            return held
        P, Q = self.difference()
        self._held_difference = None
        step = self.step_tensors(dtype, P, Q, None if norms is None else norms.norm, gain)
        if self.is_held:
            self._held_step[key] = step
        return step

    def _trains_bias(self) -> bool:
        return self.bias is not None and self.bias.requires_grad

    def _differentiates_norm(self) -> bool:
        return self.magnitude is not None and self.config.norm_gradient == "exact" and torch.is_grad_enabled()

    def _ratio(self, norm: Tensor) -> Tensor:
        assert self.magnitude is not None
        is_positive = norm > 0
        return torch.where(is_positive, self.magnitude / torch.where(is_positive, norm, 1.0), 0.0)

    def _frozen_linear(self, dtype: torch.dtype) -> FrozenLinear | None:
        """The base layer as a product in `dtype`; None if it must be called, or sees another input than the adapter."""
        base = self.base_layer
        has_dropout = self.training and self.config.dropout > 0
        if has_dropout or not is_only_a_product(base) or self.weight.dtype != dtype:
            return None
        return FrozenLinear(self.weight, self.bias)

    def _may_overwrite(self, z: Tensor) -> bool:
        """Whether y may take the place of z: nobody has it but us."""
        # A hook may keep what the base layer gave it; torch.compile sees to memory itself.
        if torch.compiler.is_compiling() or self.base_layer._forward_hooks:
            return False
        return not z._is_view() and z.is_contiguous()

    def __getstate__(self) -> dict[str, Any]:
        """A copy made within a scope does not end with it, so it holds nothing."""
        nothing = dict.fromkeys(("_held_norms", "_held_difference", "_scratch"))
        return self.__dict__ | nothing | {"is_held": False, "_held_step": {}}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterLayer:
        """Move with the model, but keep float32: `model.to(torch.bfloat16)` would round the learned magnitudes."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        if recurse:
            self.base_layer._apply(fn)  # type: ignore[no-untyped-call]
        self.forget()
        super()._apply(moved, recurse=False)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # What is computed from W0 and A0 comes along, or is computed anew once W0 is loaded: after this layer's own.
        read = {f"{prefix}{name}" for name in ("initial_A", "base_layer.weight")} & state_dict.keys()
        frozen = ("base_squared_norms", "initial_product")
        computed = {f"{prefix}{name}" for name in frozen if getattr(self, name) is not None}
        self._frozen_is_stale = bool(read) and not computed <= state_dict.keys()
        self.forget()


def _compute_frozen_anew(layer: AdapterLayer, _: object) -> None:
    """After `load_state_dict` has given `layer` another W0 or A0 without what is computed from them."""
    if layer._frozen_is_stale:
        layer.base_squared_norms, layer.initial_product = frozen_products(layer.base_layer, layer.initial_A)
        layer._frozen_is_stale = False


@torch.compiler.disable  # type: ignore[untyped-decorator]  # what must be redone is read from the device
@torch.no_grad()
def compute_row_norms(layers: Sequence[AdapterLayer]) -> list[RowNorms]:
    """The row norms of layers with a magnitude, with one wait for the device for all of them."""
    if not layers:
        return []
    with full_float32(layers[0].lora_A.device):
        squared = [layer.factored_squared_norms(*layer.difference()) for layer in layers]
    checks = [layer.norm_checks(values).to(squared[0].device) for layer, values in zip(layers, squared, strict=True)]
    result = []
    for layer, values, (cancels, has_zero) in zip(layers, squared, torch.stack(checks).tolist(), strict=True):
        exact = layer.without_cancellation(values, *layer.difference()) if cancels else values
        result.append(RowNorms(exact.clamp(min=0).sqrt(), has_zero))
    return result
