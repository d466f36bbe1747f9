"""The layer against a dense float64 reference: outputs and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tiny_models import linear_layer
from torch import Tensor, nn

from dude_cli.adapter.factors import Factors
from dude_cli.adapter.layer import AdapterLayer
from dude_cli.adapter.patch import constant_adapters, start_factors
from dude_cli.adapter.weight import weight_rows
from dude_cli.config import AdapterConfig

METHODS = ("dude", "dora", "pissa", "lora")
TOLERANCE = 1e-5  # relative, of float32 with sums of up to a few hundred terms


def dense_reference(
    layer: AdapterLayer, x: Tensor, grad_y: Tensor, norm_gradient: str | None = None
) -> dict[str, Tensor]:
    """The method's definition in float64, with W' built densely; gradients by autograd."""
    norm_gradient = norm_gradient or layer.config.norm_gradient
    W0 = weight_rows(layer.base_layer, slice(None)).double()
    names = [name for name in ("lora_A", "lora_B", "magnitude") if getattr(layer, name) is not None]
    leaves = {name: getattr(layer, name).detach().double().requires_grad_() for name in names}
    x = x.detach().double().requires_grad_()
    V = W0 + layer.scaling * leaves["lora_B"] @ leaves["lora_A"]
    if layer.initial_A is not None:
        V = V - layer.scaling * layer.initial_B.double() @ layer.initial_A.double()
    weight = V
    if "magnitude" in leaves:
        norm = V.norm(dim=1)
        if norm_gradient == "detached":
            norm = norm.detach()
        weight = (leaves["magnitude"] / norm)[:, None] * V
    y = x @ weight.T
    if layer.bias is not None:
        y = y + layer.bias.double()
    y.backward(grad_y.double())
    return {"y": y.detach(), "x": x.grad} | {name: leaf.grad for name, leaf in leaves.items()}


def layer_results(layer: AdapterLayer, x: Tensor, grad_y: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(grad_y)
    grads = {name: parameter.grad for name, parameter in layer.named_parameters() if parameter.grad is not None}
    return {"y": y.detach(), "x": x.grad} | grads


def moved_layer(base: nn.Module, config: AdapterConfig, distance: float = 0.3) -> AdapterLayer:
    """A layer whose factors and magnitudes have left their start."""
    torch.manual_seed(3)
    layer = AdapterLayer(base, config, start_factors(base, config, seed=0))
    with torch.no_grad():
        for parameter in (layer.lora_A, layer.lora_B):
            parameter.add_(torch.randn_like(parameter) * distance * parameter.abs().mean().clamp(min=0.1))
        if layer.magnitude is not None:
            layer.magnitude.mul_(1 + distance * torch.randn_like(layer.magnitude))
    return layer


def shrunk_layer(base: nn.Module, shrink: float) -> AdapterLayer:
    """At full rank, so that V is `shrink` W0."""
    config = AdapterConfig(method="dude", rank=min(base.weight.shape))
    layer = AdapterLayer(base, config, start_factors(base, config, seed=0))
    with torch.no_grad():
        layer.lora_B.mul_(shrink)
    return layer


@torch.no_grad()
def norm_error(layer: AdapterLayer) -> float:
    """The largest relative error of a row norm, beside the dense one in float64."""
    P, Q = layer.factors.difference()
    V = weight_rows(layer.base_layer, slice(None)).double() + layer.scaling * P.double() @ Q.double()
    expected = V.norm(dim=1)
    return float(((layer.row_norms().norm.double() - expected) / expected).abs().max())


def relative_error(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference).norm() / reference.norm().clamp(min=1e-30))


@pytest.mark.parametrize("norm_gradient", ["detached", "exact"])
@pytest.mark.parametrize(("bias", "conv1d"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("method", METHODS)
def test_outputs_and_gradients_equal_the_dense_definition(method, bias, conv1d, norm_gradient):
    base = linear_layer(48, 40, bias=bias, conv1d=conv1d)
    config = AdapterConfig(method=method, rank=6, alpha=9.0, norm_gradient=norm_gradient)
    layer = moved_layer(base, config)
    x, grad_y = torch.randn(3, 7, 40), torch.randn(3, 7, 48)
    expected = dense_reference(layer, x, grad_y)
    found = layer_results(layer, x, grad_y)
    assert set(found) == set(expected)
    for name in expected:
        assert relative_error(found[name], expected[name]) <= TOLERANCE, name


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(METHODS),
    st.integers(1, 24),
    st.integers(1, 24),
    st.floats(0.0, 1.0),
    st.sampled_from(["detached", "exact"]),
    st.booleans(),
)
@example("dude", 7, 1, 0.0, "exact", False)
@example("dude", 6, 1, 0.0, "detached", False)  # a row of 1e-3 beside a bias of 2.4
def test_any_shape_and_rank_equals_the_dense_definition(method, out, width, share, norm_gradient, rank_stabilized):
    rank = max(1, round(share * min(out, width)))
    config = AdapterConfig(method=method, rank=rank, norm_gradient=norm_gradient, rank_stabilized=rank_stabilized)
    layer = moved_layer(linear_layer(out, width, bias=True), config)
    x, grad_y = torch.randn(5, width), torch.randn(5, out)
    expected, found = dense_reference(layer, x, grad_y), layer_results(layer, x, grad_y)
    # With an exact norm a gradient can be nothing but cancellation (one input): its terms have the detached one's size.
    terms = dense_reference(layer, x, grad_y, "detached")
    for name in expected:
        scale = max(float(expected[name].norm()), float(terms[name].norm()), float(grad_y.norm() * x.norm()) * 1e-2)
        allowed = 2 * TOLERANCE * scale
        if name == "magnitude":
            # What is kept is y with its bias, so y - bias has the rounding of a bias that may be far larger.
            rounding = torch.finfo(torch.float32).eps * grad_y.abs().sum(0) * (layer.bias / layer.magnitude).abs()
            allowed += float(rounding.norm())
        assert float((found[name].double() - expected[name]).norm()) <= allowed, name


def test_full_rank_works():
    layer = moved_layer(linear_layer(16, 24, bias=False), AdapterConfig(rank=16))
    x, grad_y = torch.randn(4, 24), torch.randn(4, 16)
    expected, found = dense_reference(layer, x, grad_y), layer_results(layer, x, grad_y)
    assert all(relative_error(found[name], expected[name]) <= TOLERANCE for name in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shrink", "tolerance"), [(1.0, 1e-6), (0.1, 1e-6), (1e-3, 1e-4)])
def test_norms_are_exact_also_where_a_row_shrinks(dtype, shrink, tolerance):
    assert norm_error(shrunk_layer(linear_layer(64, 96, bias=False, dtype=dtype), shrink)) <= tolerance


@pytest.mark.parametrize("norm_gradient", ["detached", "exact"])
@pytest.mark.parametrize("method", ["dude", "dora"])
def test_a_zero_row_stays_zero_and_has_zero_gradients(method, norm_gradient):
    base = linear_layer(12, 10, bias=True)
    base.weight.data[4] = 0
    layer = AdapterLayer(base, *_config_and_factors(base, method, norm_gradient))
    x = torch.randn(5, 10)
    found = layer_results(layer, x, torch.randn(5, 12))
    assert torch.equal(found["y"], base(x))
    assert all(torch.isfinite(value).all() for value in found.values())
    assert float(found["magnitude"][4]) == 0
    assert torch.equal(found["lora_B"][4], torch.zeros(layer.rank))


@pytest.mark.parametrize("norm_gradient", ["detached", "exact"])
def test_a_magnitude_of_zero_gives_finite_results(norm_gradient):
    layer = moved_layer(linear_layer(12, 10, bias=True), AdapterConfig(rank=4, norm_gradient=norm_gradient))
    with torch.no_grad():
        layer.magnitude[3] = 0.0
    x, grad_y = torch.randn(5, 10), torch.randn(5, 12)
    found, expected = layer_results(layer, x, grad_y), dense_reference(layer, x, grad_y)
    for name in expected:
        assert torch.isfinite(found[name]).all()
        assert relative_error(found[name], expected[name]) <= TOLERANCE
    assert float(found["magnitude"][3]) != 0  # it can come back


@pytest.mark.parametrize("method", METHODS)
def test_the_learned_difference_keeps_float32_under_a_bfloat16_base(method):
    """A, B and m move by less than bfloat16 can tell; the magnitude ratio must still be exact."""
    base = linear_layer(32, 24, bias=False, dtype=torch.bfloat16)
    layer = moved_layer(base, AdapterConfig(method=method, rank=4), distance=1e-4)
    assert all(parameter.dtype == torch.float32 for parameter in layer.parameters() if parameter.requires_grad)
    P, Q = layer.factors.difference()
    V = weight_rows(base, slice(None)).double() + layer.scaling * P.double() @ Q.double()
    if layer.magnitude is not None:
        expected = layer.magnitude.double() / V.norm(dim=1)
        assert relative_error(layer.magnitude_ratio(), expected) <= 1e-6
        assert relative_error(layer.magnitude_ratio() - 1, expected - 1) <= 1e-2
    adapted = torch.cat([rows for _, rows in layer.adapted_chunks()])
    assert relative_error(adapted, dense_weight(layer, V)) <= 1e-6


def dense_weight(layer: AdapterLayer, V: Tensor) -> Tensor:
    return V if layer.magnitude is None else (layer.magnitude.double() / V.norm(dim=1))[:, None] * V


def test_dropout_acts_on_the_learned_difference_alone():
    base = linear_layer(20, 16, bias=True)
    config = AdapterConfig(method="dude", rank=4, dropout=0.5)
    layer = AdapterLayer(base, config, start_factors(base, config, seed=0)).train()
    x = torch.randn(6, 16)
    assert torch.equal(layer(x), base(x))  # nothing is learned yet, so there is nothing to drop
    moved = moved_layer(base, config).train()
    assert not torch.equal(moved(x), moved(x))
    assert torch.equal(moved.eval()(x), moved.eval()(x))


@pytest.mark.parametrize("method", METHODS)
def test_autocast_gives_the_bfloat16_rounding_of_the_float32_result(method):
    layer = moved_layer(linear_layer(40, 32, bias=True), AdapterConfig(method=method, rank=4))
    x = torch.randn(9, 32)
    expected = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16
    assert relative_error(found, expected.double()) <= 2e-2


@pytest.mark.parametrize("norm_gradient", ["detached", "exact"])
def test_constant_adapters_changes_no_result(norm_gradient):
    layer = moved_layer(linear_layer(24, 20, bias=True), AdapterConfig(rank=4, norm_gradient=norm_gradient))
    x, grad_y = torch.randn(5, 20), torch.randn(5, 24)
    expected = layer_results(layer, x, grad_y)
    with constant_adapters(layer):
        for _ in range(2):
            found = layer_results(layer, x, grad_y)
            assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_constant_adapters_ends_with_its_scope_and_may_be_nested():
    layer = moved_layer(linear_layer(24, 20, bias=True), AdapterConfig(rank=4))
    x = torch.randn(5, 20)
    with constant_adapters(layer):
        with constant_adapters(layer):
            before = layer(x)
        with torch.no_grad():
            layer.lora_B.data.mul_(3)
        still_held = layer.magnitude_ratio()
    after = layer.magnitude_ratio()
    assert not torch.equal(still_held, after)
    assert not torch.equal(before, layer(x))


CHANGES = {
    "in place": lambda p: p.add_(0.5),
    "data": lambda p: p.data.mul_(1.5),
    "new data": lambda p: setattr(p, "data", p.data * 1.5),
}


@pytest.mark.parametrize(("change", "name"), itertools.product(CHANGES, ["lora_A", "lora_B", "magnitude"]))
def test_outside_the_scope_no_change_of_a_tensor_goes_unseen(change, name):
    layer = moved_layer(linear_layer(24, 20, bias=True), AdapterConfig(rank=4))
    x, grad_y = torch.randn(5, 20), torch.randn(5, 24)
    layer(x)
    with torch.no_grad():
        CHANGES[change](getattr(layer, name))
    expected = dense_reference(layer, x, grad_y)
    assert relative_error(layer_results(layer, x, grad_y)["y"], expected["y"]) <= TOLERANCE


def _config_and_factors(base: nn.Module, method: str, norm_gradient: str) -> tuple[AdapterConfig, Factors]:
    config = AdapterConfig(method=method, rank=4, norm_gradient=norm_gradient)
    return config, start_factors(base, config, seed=0)
