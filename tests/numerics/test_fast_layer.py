"""The layer's autograd Function against its plain form, and what it must not do: be stale, or keep too much."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_adapter_reference import METHODS, TOLERANCE, dense_reference, layer_results, moved_layer, relative_error
from tiny_models import linear_layer, tiny_batch, tiny_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dude_cli.adapter import AdapterConfig, adapter_layers, constant_adapters, patch_model, trainable_parameters
from dude_cli.adapter.layer import AdapterLayer
from dude_cli.adapter.norm import bfloat16_parts, frozen_products
from dude_cli.adapter.patch import start_factors
from dude_cli.adapter.row_scale import RowScale, scale_, scale_backward

# Relative error of one rounding to the dtype, times a small number for the roundings on the way.
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-5}

torch.manual_seed(0)  # of the inputs that are parameters of a test


@pytest.fixture(autouse=True)
def equal_inputs() -> None:
    """Each run has the same ones: an element close to zero may be off by more than its share of the tolerance."""
    torch.manual_seed(0)


def plain_results(layer: AdapterLayer, x: Tensor, grad_y: Tensor) -> dict[str, Tensor]:
    layer.is_plain = True
    try:
        return layer_results(layer, x, grad_y)
    finally:
        layer.is_plain = False


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("bias", "conv1d"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("method", METHODS)
def test_it_gives_what_the_plain_form_gives(method, bias, conv1d, dtype):
    base = linear_layer(48, 40, bias=bias, conv1d=conv1d, dtype=dtype)
    layer = moved_layer(base, AdapterConfig(method=method, rank=6, alpha=9.0))
    x, grad_y = torch.randn(3, 7, 40).to(dtype), torch.randn(3, 7, 48).to(dtype)
    expected, found = plain_results(layer, x, grad_y), layer_results(layer, x, grad_y)
    assert set(found) == set(expected)
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        assert relative_error(found[name], expected[name].double()) <= ROUNDING[dtype], name


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(40),
        torch.randn(1, 40),
        torch.randn(0, 40),
        torch.randn(2, 1, 3, 40),
        torch.randn(5, 40, 3).transpose(1, 2),
        torch.randn(1, 40).expand(6, 40),
    ],
    ids=["one vector", "one token", "no token", "four axes", "transposed", "expanded"],
)
@pytest.mark.parametrize("bias", [False, True])
def test_any_layout_of_the_input_works(x, bias):
    layer = moved_layer(linear_layer(48, 40, bias=bias), AdapterConfig(rank=6))
    grad_y = torch.randn(48).expand(*x.shape[:-1], 48)
    expected, found = plain_results(layer, x, grad_y), layer_results(layer, x, grad_y)
    assert all(found[name].shape == expected[name].shape for name in expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 70), st.integers(1, 70), st.booleans(), st.sampled_from(list(ROUNDING)), st.integers(0, 2**31))
def test_scaling_rows_is_one_rounding_of_the_float64_result(tokens, out, has_bias, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    product, dy = (torch.randn(tokens, out, generator=generator).to(dtype) for _ in range(2))
    g = torch.randn(out, generator=generator)
    bias = torch.randn(out, generator=generator) if has_bias else None
    scale, y = RowScale.of(g, bias), product.clone()
    scale_(y, scale)
    centre = torch.zeros(out).double() if bias is None else bias.double()
    expected = g.double() * (product.double() - centre) + centre
    u = torch.finfo(dtype).eps
    assert ((y.double() - expected).abs() <= u * expected.abs() + 1e-6 * (1 + g.double().abs())).all()
    dz, products = scale_backward(dy, y, scale)
    assert torch.equal(dz, (dy.to(torch.promote_types(dtype, torch.float32)) * g).to(dtype))
    assert products.dtype == torch.float32
    terms = dy.double() * (y.double() - centre)
    assert ((products.double() - terms.sum(0)).abs() <= 1e-5 * terms.abs().sum(0) + 1e-30).all()


@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_ratio_of_one_leaves_the_product_as_it_is(dtype):
    product = torch.randn(9, 33).to(dtype)
    for bias in (None, torch.randn(33) * 100):
        y = product.clone()
        scale_(y, RowScale.of(torch.ones(33), bias))
        assert torch.equal(y, product)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_changes_no_result(method):
    layer = moved_layer(linear_layer(24, 20, bias=True), AdapterConfig(method=method, rank=4))
    x, grad_y = torch.randn(5, 20), torch.randn(5, 24)
    expected = layer_results(layer, x, grad_y)
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with constant_adapters(layer):
        checkpoint(layer, x, use_reentrant=False).backward(grad_y)
    assert torch.equal(x.grad, expected["x"])
    assert all(torch.equal(parameter.grad, expected[name]) for name, parameter in trainable_parameters(layer).items())


def brings_its_weight_in_a_forward(base: nn.Linear) -> None:
    """As accelerate's offloading does."""
    weight, base.weight.data = base.weight.data, torch.zeros(24, 20)
    base.forward = lambda x: nn.functional.linear(x, weight, base.bias)


def halves_its_input(base: nn.Linear) -> None:
    base.weight.data *= 2
    base.register_forward_pre_hook(lambda module, args: (args[0] / 2,))


def doubles_its_output(base: nn.Linear) -> None:
    base.weight.data /= 2
    base.bias.data /= 2
    base.register_forward_hook(lambda module, args, output: output * 2)


@pytest.mark.parametrize("change", [brings_its_weight_in_a_forward, halves_its_input, doubles_its_output])
def test_a_base_layer_that_is_more_than_a_product_is_called(change):
    base = linear_layer(24, 20, bias=True)
    # A layer without a norm, which would see the other weight.
    layer = moved_layer(base, AdapterConfig(method="lora", rank=4))
    x, grad_y = torch.randn(5, 20), torch.randn(5, 24)
    expected = layer_results(layer, x, grad_y)
    change(base)
    found = layer_results(layer, x, grad_y)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("has_bias", [False, True])
def test_at_the_start_it_is_the_base_for_a_strided_input_too(has_bias, dtype):
    base = linear_layer(48, 40, bias=has_bias, dtype=dtype)
    config = AdapterConfig(rank=6)
    layer = AdapterLayer(base, config, start_factors(base, config, seed=0))
    x = torch.randn(5, 40, 7).to(dtype).transpose(1, 2)
    assert torch.equal(layer(x), base(x))


@pytest.mark.parametrize("has_checkpointing", [False, True])
def test_a_model_may_write_over_the_output_of_a_layer_that_returns_a_copy(has_checkpointing):
    layer = moved_layer(linear_layer(24, 20, bias=False), AdapterConfig(rank=4))
    x = torch.randn(5, 20)

    def model(x: Tensor) -> Tensor:
        y = layer(x)
        y += 1.0
        return torch.tanh(y)

    def gradient() -> Tensor:
        layer.magnitude.grad = None
        (checkpoint(model, x, use_reentrant=False) if has_checkpointing else model(x)).sum().backward()
        return layer.magnitude.grad

    with pytest.raises(RuntimeError, match=r"writes over|inplace operation"):
        gradient()
    layer.returns_copy = True
    found = gradient()
    layer.is_plain = True
    torch.testing.assert_close(found, gradient(), rtol=1e-5, atol=1e-6)


def test_a_copy_made_within_the_scope_holds_nothing():
    model = nn.Sequential(moved_layer(linear_layer(24, 20, bias=False), AdapterConfig(rank=4)))
    x = torch.randn(5, 20)
    with constant_adapters(model):
        model(x)
        copied = copy.deepcopy(model)
    for layers in (model, copied):
        layers[0].magnitude.data.mul_(2)
    assert torch.equal(copied(x), model(x))


@pytest.mark.parametrize(("name", "method"), [("weight", "lora"), ("bias", "lora"), ("bias", "dude")])
def test_a_base_layer_that_is_trained_too_gets_its_gradient(name, method):
    layer = moved_layer(linear_layer(24, 20, bias=True), AdapterConfig(method=method, rank=4))
    trained = getattr(layer.base_layer, name).requires_grad_()
    x, grad_y = torch.randn(5, 20), torch.randn(5, 24)
    layer(x).backward(grad_y)
    expected = grad_y.T @ x if name == "weight" else grad_y.sum(0)
    torch.testing.assert_close(trained.grad, expected)


def test_what_a_hook_keeps_of_the_base_layer_stays_as_it_was():
    layer = moved_layer(linear_layer(24, 20, bias=False), AdapterConfig(rank=4))
    x, kept = torch.randn(5, 20), []
    expected = layer(x)
    layer.base_layer.register_forward_hook(lambda module, args, output: kept.append(output))
    assert torch.equal(layer(x), expected)
    assert torch.equal(kept[0], layer.base_layer(x))


def three_layers() -> nn.Sequential:
    """Adapted layers whose backward passes need the same memory again, and then more."""
    sizes = ((48, 20), (24, 48), (24, 24))
    return nn.Sequential(*(moved_layer(linear_layer(*size, bias=True), AdapterConfig(rank=4)) for size in sizes))


@pytest.mark.parametrize("order", ["forward", "twice forward"])
def test_layers_that_share_a_scope_change_no_result(order):
    model, x = three_layers(), torch.randn(5, 20, requires_grad=True)
    wanted = [x, *trainable_parameters(model).values()]
    expected = torch.autograd.grad(model(x).square().sum(), wanted)
    with constant_adapters(model):
        y = model(x)
        if order == "twice forward":  # two micro-batches whose backward passes come later
            model(2 * x)
        found = torch.autograd.grad(y.square().sum(), wanted)
    assert all(map(torch.equal, found, expected))


def test_what_is_kept_of_a_gradient_within_the_scope_stays_as_it_was():
    """A base layer that is called gets its output's gradient, which a hook may keep."""
    model, x, kept = three_layers(), torch.randn(5, 20), []
    model[2].base_layer.register_forward_hook(lambda module, args, z: z.register_hook(kept.append) and None)
    for scope in (nullcontext(), constant_adapters(model)):
        with scope:
            model(x).square().sum().backward()
    assert torch.equal(kept[0], kept[1])


# --- never stale ------------------------------------------------------------------------------------------------


def reloaded(layer: AdapterLayer) -> None:
    state = copy.deepcopy(layer.state_dict())
    for name in ("lora_A", "lora_B", "magnitude"):
        state[name].mul_(1.5)
    layer.load_state_dict(state)


def stepped(optimizer: type[torch.optim.Optimizer], **options: object) -> Callable[[AdapterLayer], None]:
    def step(layer: AdapterLayer) -> None:
        for parameter in trainable_parameters(layer).values():
            parameter.grad = torch.randn_like(parameter)
        optimizer(trainable_parameters(layer).values(), lr=0.1, **options).step()

    return step


def moved_away_and_back(layer: AdapterLayer) -> None:
    """What `.to(device)` does to a parameter: new data under the same name."""
    layer._apply(lambda tensor: tensor * 1.5 if tensor.is_floating_point() and tensor.ndim else tensor)
    layer.base_layer.weight.data /= 1.5
    layer.base_squared_norms, layer.initial_product = frozen_products(layer.base_layer, layer.initial_A)


SEEN_CHANGES: dict[str, Callable[[AdapterLayer], None]] = {
    "AdamW": stepped(torch.optim.AdamW),
    "fused AdamW": stepped(torch.optim.AdamW, fused=True),
    "foreach SGD": stepped(torch.optim.SGD, foreach=True),
    "fused SGD": stepped(torch.optim.SGD, fused=True),
    "load_state_dict": reloaded,
    "set_factors": lambda layer: layer.set_factors(
        layer.factors._replace(**{f: getattr(layer, f).detach() * 1.5 for f in ("lora_A", "lora_B", "initial_A")})
    ),
    "moved": moved_away_and_back,
}
UNSEEN_CHANGES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda parameter: parameter.add_(0.5),
    "data": lambda parameter: parameter.data.mul_(1.5),
    "new data": lambda parameter: setattr(parameter, "data", parameter.data * 1.5),
}


@pytest.mark.parametrize("is_first", [False, True])
@pytest.mark.parametrize("change", SEEN_CHANGES)
def test_within_the_scope_these_changes_are_seen(change, is_first):
    """After a forward pass, and before the first: the norms' factors are there from the scope's start on."""
    layer = moved_layer(linear_layer(24, 20, bias=False), AdapterConfig(rank=4))
    x, grad_y = torch.randn(5, 20), torch.randn(5, 24)
    before = layer(x)
    with constant_adapters(layer):
        if not is_first:
            layer(x)
        SEEN_CHANGES[change](layer)
        expected, found = dense_reference(layer, x, grad_y), layer_results(layer, x, grad_y)
    assert not torch.equal(found["y"], before)
    for name in expected:
        assert relative_error(found[name], expected[name]) <= TOLERANCE, name


@pytest.mark.parametrize("change", [*SEEN_CHANGES, *UNSEEN_CHANGES])
def test_after_the_scope_every_change_is_seen(change):
    layer = moved_layer(linear_layer(24, 20, bias=False), AdapterConfig(rank=4))
    x, grad_y = torch.randn(5, 20), torch.randn(5, 24)
    with constant_adapters(layer):
        before = layer(x)
        if change in SEEN_CHANGES:
            SEEN_CHANGES[change](layer)
        else:
            with torch.no_grad():
                for parameter in trainable_parameters(layer).values():
                    UNSEEN_CHANGES[change](parameter)
    expected, found = dense_reference(layer, x, grad_y), layer_results(layer, x, grad_y)
    assert not torch.equal(found["y"], before)
    for name in expected:
        assert relative_error(found[name], expected[name]) <= TOLERANCE, name


def test_within_the_scope_each_dtype_has_factors_of_its_own():
    """Under autocast the product is bfloat16, without it float32; the scope may see both."""
    layer = moved_layer(linear_layer(24, 20, bias=True), AdapterConfig(rank=4))
    x, grad_y = torch.randn(5, 20), torch.randn(5, 24)
    expected = layer_results(layer, x, grad_y)
    with constant_adapters(layer):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rounded = layer_results(layer, x, grad_y.bfloat16())
        found = layer_results(layer, x, grad_y)
    assert rounded["y"].dtype == torch.bfloat16
    for name in expected:
        assert torch.equal(found[name], expected[name])
        assert relative_error(rounded[name], expected[name].double()) <= 3e-2


def test_with_an_exact_norm_an_evaluation_within_the_scope_changes_no_gradient():
    layer = moved_layer(linear_layer(24, 20, bias=True), AdapterConfig(rank=4, norm_gradient="exact"))
    x, grad_y = torch.randn(5, 20), torch.randn(5, 24)
    expected = layer_results(layer, x, grad_y)
    with constant_adapters(layer):
        with torch.no_grad():
            layer(x)
        found = layer_results(layer, x, grad_y)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_other_adapters_put_on_within_the_scope_are_used():
    ids = tiny_batch()
    base = patch_model(tiny_model("llama"), AdapterConfig(rank=4))
    expected = patch_model(tiny_model("llama"), AdapterConfig(rank=2))
    with constant_adapters(base), torch.no_grad():
        base(input_ids=ids)
        for name, layer in adapter_layers(expected).items():
            layer.lora_B.mul_(1.5)
            base.set_submodule(name, layer)
        assert torch.equal(base(input_ids=ids).logits, expected(input_ids=ids).logits)


def moved_tensors(layer: AdapterLayer, *names: str) -> dict[str, Tensor]:
    """Tensors of the layer's state by name, other than the layer's own."""
    state, generator = layer.state_dict(), torch.Generator().manual_seed(3)
    return {name: state[name] + 0.3 * torch.randn(state[name].shape, generator=generator) for name in names}


@pytest.mark.parametrize(
    "names", [("initial_A",), ("base_layer.weight",), ("initial_A", "base_layer.weight"), ("initial_A", "lora_A")]
)
def test_norms_follow_a_start_and_a_base_that_are_loaded_alone(names):
    layer = moved_layer(linear_layer(24, 20, bias=True), AdapterConfig(rank=4))
    layer.load_state_dict(moved_tensors(layer, *names), strict=False)
    P, Q = layer.factors.difference()
    V = layer.weight.double() + layer.scaling * (P.double() @ Q.double())
    torch.testing.assert_close(layer.row_norms().norm, V.norm(dim=1).float(), rtol=1e-5, atol=1e-6)


def test_a_whole_state_is_loaded_without_a_look_at_the_base(monkeypatch):
    """Its weight may be sharded, and what is computed from it is in the state."""
    layer = moved_layer(linear_layer(24, 20, bias=True), AdapterConfig(rank=4))
    other = AdapterLayer(linear_layer(24, 20, bias=True), AdapterConfig(rank=4), layer.factors)
    monkeypatch.setattr("dude_cli.adapter.layer.frozen_products", lambda *_: pytest.fail("the base is read"))
    other.load_state_dict(layer.state_dict())
    own = {name: tensor for name, tensor in layer.state_dict().items() if name.startswith("lora")}
    other.load_state_dict(own, strict=False)
    assert torch.equal(other.row_norms().norm, layer.row_norms().norm)


# --- once a step ------------------------------------------------------------------------------------------------


@pytest.fixture
def norm_calls(monkeypatch) -> list[AdapterLayer]:
    calls: list[AdapterLayer] = []
    norms = AdapterLayer.factored_squared_norms
    monkeypatch.setattr(AdapterLayer, "factored_squared_norms", lambda *args: calls.append(args[0]) or norms(*args))
    return calls


@pytest.mark.parametrize("has_checkpointing", [False, True])
def test_norms_and_rounded_factors_are_made_once_a_step(norm_calls, has_checkpointing):
    model = patch_model(tiny_model("llama"), AdapterConfig(rank=4)).train()
    if has_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layers, ids = list(adapter_layers(model).values()), tiny_batch()
    with constant_adapters(model):
        made = []
        for _ in range(3):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            made.append([id(step) for layer in layers for step in layer._held_step.values()])
    assert len(norm_calls) == len(layers)
    assert made[0] == made[2]
    assert len(made[0]) == len(layers)
    assert all(not layer._held_step and layer._held_norms is None for layer in layers)


def test_one_wait_for_the_device_tells_which_rows_of_all_layers_to_redo(monkeypatch):
    model = patch_model(tiny_model("llama"), AdapterConfig(rank=4))
    waits = []
    tolist = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: waits.append(1) or tolist(tensor))
    monkeypatch.setattr(Tensor, "nonzero", lambda *args: pytest.fail("no row cancels here"))
    with constant_adapters(model):
        assert len(waits) == 1


# --- what is kept -----------------------------------------------------------------------------------------------


def saved_bytes(layer: nn.Module, x: Tensor, *, without: tuple[Tensor, ...] = ()) -> int:
    """Bytes of the distinct storages that the graph of `layer(x)` holds, parameters, constants and x left out."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (x, *layer.parameters(), *without)}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    del y
    return sum(found.values())


@pytest.mark.parametrize(
    ("method", "expected"), [("lora", 50 * 4), ("pissa", 50 * 4), ("dora", 50 * (4 + 64)), ("dude", 50 * (4 + 64))]
)
def test_kept_for_the_backward_pass_are_the_trained_half_and_the_output(method, expected):
    """x (which the layers beside it keep too), h (tokens, r), and with a magnitude y (tokens, out)."""
    layer = moved_layer(linear_layer(64, 32, bias=False), AdapterConfig(method=method, rank=4))
    x = torch.randn(50, 32, requires_grad=True)
    with constant_adapters(layer):
        layer(x)
        assert saved_bytes(layer, x) == 4 * expected


# --- torch.compile ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "norm_gradient"), [(m, "detached") for m in METHODS] + [("dude", "exact")])
def test_torch_compile_finds_no_graph_break_within_the_scope(method, norm_gradient):
    layer = moved_layer(
        linear_layer(24, 20, bias=True), AdapterConfig(method=method, rank=4, norm_gradient=norm_gradient)
    )
    x, grad_y = torch.randn(5, 20), torch.randn(5, 24)
    expected = layer_results(layer, x, grad_y)
    torch._dynamo.reset()
    is_whole = norm_gradient == "detached"  # an exact norm looks for rows to redo in each forward
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=is_whole)
    with constant_adapters(layer):
        for _ in range(2):
            layer.zero_grad()
            leaf = x.clone().requires_grad_()
            y = compiled(leaf)
            y.backward(grad_y)
            found = {"y": y.detach(), "x": leaf.grad} | {n: p.grad for n, p in trainable_parameters(layer).items()}
            for name in expected:
                assert relative_error(found[name], expected[name].double()) <= TOLERANCE, name


@given(
    st.lists(
        st.floats(-(2.0**100), 2.0**100, width=32).filter(lambda x: x == 0 or abs(x) > 2.0**-90),
        min_size=1,
        max_size=50,
    )
)
def test_three_bfloat16_parts_are_the_float32_value(values):
    parts = bfloat16_parts(torch.tensor(values))
    assert {part.dtype for part in parts} == {torch.bfloat16}
    assert sum(part.double() for part in parts).tolist() == torch.tensor(values).double().tolist()
