"""The Triton kernels give what torch gives: on a GPU, else through Triton's interpreter (see `conftest.py`).

The interpreter cuts bfloat16 off where a GPU rounds it, and multiplies bfloat16 as integers: the product is tested in
float32 and float16, the passes in bfloat16 within two roundings.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from test_adapter_reference import METHODS, dense_reference, layer_results, moved_layer, relative_error
from tiny_models import linear_layer
from torch import Tensor

from dude_cli.adapter import AdapterConfig, product, row_scale
from dude_cli.adapter.row_scale import RowScale

kernels = pytest.importorskip("dude_cli.adapter.kernels", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 5, 2), (64, 128, 32), (70, 130, 6), (130, 257, 70)]  # tokens, out, k; in blocks of 64, 128 and up to 64


def row_scale_of(out: int, *, bias: bool) -> RowScale:
    g = torch.rand(out, device=DEVICE) + 0.5
    return RowScale.of(g, torch.randn(out, device=DEVICE) if bias else None)


def random(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns, device=DEVICE).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("tokens", "out", "k"), SHAPES)
def test_the_forward_pass_is_the_float64_result_rounded(tokens, out, k, bias, dtype, tolerance):
    torch.manual_seed(0)
    z, h, P = random(tokens, out, dtype), random(tokens, k, dtype), random(out, k, dtype)
    scale, y = row_scale_of(out, bias=bias), z.clone()
    kernels.add_and_scale_(y, h, P, scale)
    expected = scale.g.double() * (z.double() + h.double() @ P.double().T - scale.bias) + scale.bias
    assert relative_error(y, expected) <= tolerance


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 0.0), (torch.float16, 0.0), (torch.bfloat16, 2 * 2.0**-8)]
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("tokens", "out", "k"), SHAPES)
def test_the_backward_pass_is_torchs(tokens, out, k, bias, dtype, tolerance):
    torch.manual_seed(0)
    dy, y = random(tokens, out, dtype), random(tokens, out, dtype)
    scale = row_scale_of(out, bias=bias)
    (dz, products), (dz_torch, products_torch) = (
        passes.scale_backward(dy, y, scale) for passes in (kernels, row_scale)
    )
    torch.testing.assert_close(dz, dz_torch, rtol=tolerance, atol=0.0)
    scale_of_sum = (dy.double() * (y.double() - scale.bias)).abs().sum(0)
    assert ((products - products_torch).abs() <= 1e-6 * scale_of_sum).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_the_layer_on_kernels_equals_the_dense_definition(method, bias, monkeypatch):
    used: list[Tensor] = []
    forward = kernels.add_and_scale_
    monkeypatch.setattr(kernels, "add_and_scale_", lambda *args: used.append(args[0]) or forward(*args))
    monkeypatch.setattr(product, "_kernels", lambda device_type: kernels)
    base = linear_layer(48, 40, bias=bias)
    layer = moved_layer(base, AdapterConfig(method=method, rank=6, alpha=9.0)).to(DEVICE)
    x, grad_y = torch.randn(3, 7, 40, device=DEVICE), torch.randn(3, 7, 48, device=DEVICE)
    expected, found = dense_reference(layer, x, grad_y), layer_results(layer, x, grad_y)
    assert bool(used) == (layer.magnitude is not None)
    for name in expected:
        assert relative_error(found[name], expected[name]) <= 1e-5, name


def test_they_are_launched_on_the_device_of_their_tensors(monkeypatch):
    """Triton takes the current one. With a model on several GPUs that is another one for most of its layers."""
    current: list[Tensor] = []
    launches: list[bool] = []

    @contextmanager
    def device_of(tensor):
        current.append(tensor)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda first, *_, **__: launches.append(current[-1] is first)

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for name in ("_add_and_scale", "_scale_and_sum"):
        monkeypatch.setattr(kernels, name, Kernel())
    z, h, P = (random(*size, torch.float32) for size in ((5, 8), (5, 2), (8, 2)))
    kernels.add_and_scale_(z, h, P, row_scale_of(8, bias=True))
    kernels.scale_backward(z, z, row_scale_of(8, bias=True))
    assert launches == [True, True]


def test_a_cpu_does_not_ask_for_them():
    assert product._kernels("cpu") is None
