"""Half-precision products on a CPU without instructions for them, whichever CPU this is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_adapter_reference import METHODS, dense_reference, layer_results, moved_layer, relative_error
from tiny_models import linear_layer

from dude_cli.adapter import AdapterConfig, widened

HALF = (torch.bfloat16, torch.float16)


@given(
    st.integers(1, 5), st.integers(1, 40), st.integers(1, 6), st.integers(1, 60), st.sampled_from(HALF),
    st.sampled_from([torch.float32, None]), st.integers(0, 2**31),
)  # fmt: skip
def test_a_widened_product_has_float32_sums_whatever_the_chunks(tokens, n, k, chunk_values, dtype, left_dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(tokens, n, generator=generator).to(left_dtype or dtype)
    right = torch.randn(n, k, generator=generator).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(widened, "CPU_IS_SLOW", True)
        patch.setattr(widened, "CHUNK_VALUES", chunk_values)
        found = widened.times(left, right)
    assert found.dtype == torch.float32
    bound = n * 2**-23 * (left.double().abs() @ right.double().abs())
    assert ((found - left.double() @ right.double()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("bias", "conv1d"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_no_further_from_float64_than_without_it(method, bias, conv1d, dtype, monkeypatch):
    outputs, errors = {}, {}
    for is_slow in (True, False):
        monkeypatch.setattr(widened, "CPU_IS_SLOW", is_slow)
        monkeypatch.setattr(widened, "CHUNK_VALUES", 7 * 40)  # seven rows of 48
        torch.manual_seed(0)
        base = linear_layer(48, 40, bias=bias, conv1d=conv1d, dtype=dtype)
        layer = moved_layer(base, AdapterConfig(method=method, rank=6, alpha=9.0))
        x, grad_y = torch.randn(3, 7, 40).to(dtype), torch.randn(3, 7, 48).to(dtype)
        found = layer_results(layer, x, grad_y)
        assert found["y"].dtype == found["x"].dtype == dtype
        outputs[is_slow] = found["y"]
        expected = dense_reference(layer, x, grad_y)
        errors[is_slow] = {name: relative_error(found[name], expected[name]) for name in found}
    assert torch.equal(outputs[True], outputs[False])
    for name, error in errors[True].items():
        assert error <= 1.1 * errors[False][name] + 1e-6, name
