"""A lower precision of matrix products around us reaches nothing that is kept, and is as it was afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from test_adapter_reference import moved_layer
from tiny_models import linear_layer, tiny_model
from torch import Tensor, nn

from dude_cli.adapter import AdapterConfig, autocast, patch_model
from dude_cli.adapter.autocast import full_float32
from dude_cli.adapter.decompose import exact_singular_values, truncated_svd
from dude_cli.config import SvdConfig
from dude_cli.export.from_peft import _reduced_base
from dude_cli.export.low_rank import best_lora

BACKENDS = ("", "cudnn", "cuda.matmul", "mkldnn.matmul")
HAS_NEW_WAY = hasattr(torch.backends.cuda.matmul, "fp32_precision")


def backend(name: str):
    found = torch.backends
    for part in filter(None, name.split(".")):
        found = getattr(found, part)
    return found


def settings() -> list[str]:
    return [backend(name).fp32_precision for name in BACKENDS] if HAS_NEW_WAY else []


@pytest.fixture(autouse=True)
def _as_they_were() -> Iterator[None]:
    """The old way leaves values where there were none, which then follow nothing."""
    yield
    torch.set_float32_matmul_precision("highest")
    if HAS_NEW_WAY:
        for name in BACKENDS:
            backend(name).fp32_precision = "none"


def old_way(precision: str) -> Callable[[ExitStack], object]:
    return lambda stack: torch.set_float32_matmul_precision(precision)


def new_way(name: str, precision: str) -> Callable[[ExitStack], object]:
    return lambda stack: setattr(backend(name), "fp32_precision", precision)


SET: dict[str, Callable[[ExitStack], object]] = {
    "high": old_way("high"),
    "medium": old_way("medium"),
    "autocast": lambda stack: stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16)),
}
if HAS_NEW_WAY:
    SET |= {
        "all tf32": new_way("", "tf32"),
        "cuda tf32": new_way("cuda.matmul", "tf32"),
        "oneDNN bf16": new_way("mkldnn.matmul", "bf16"),
    }


@contextmanager
def low_precision(how: str) -> Iterator[None]:
    with ExitStack() as stack:
        SET[how](stack)
        before = settings()
        yield
        assert settings() == before


def a_layer():
    return moved_layer(linear_layer(256, 192, bias=False), AdapterConfig(rank=16))


def reduced_weight() -> Tensor:
    model = patch_model(tiny_model("llama"), AdapterConfig(method="pissa", rank=8))
    layer = model.model.layers[0].mlp.up_proj
    with torch.no_grad():  # large enough for a product in oneDNN's bfloat16
        layer.base_layer = nn.Linear(192, 256).requires_grad_(False)
        layer.initial_A, layer.initial_B = (torch.randn(size) for size in ((64, 192), (256, 64)))
    with torch.no_grad(), _reduced_base(model):
        return layer.base_layer.weight.clone()


KEPT: dict[str, Callable[[], Tensor]] = {
    "norms": lambda: a_layer().row_norms().norm,
    "randomized": lambda: truncated_svd(weight(), 16, SvdConfig(algorithm="randomized")).U,
    "exact": lambda: truncated_svd(weight(), 16, SvdConfig(algorithm="exact")).U,
    "singular values": lambda: exact_singular_values(weight(), 16),
    "merged": lambda: torch.cat([rows for _, rows in a_layer().adapted_chunks()]),
    "best LoRA": lambda: best_lora(a_layer(), 16, SvdConfig()).factors.lora_B,
    "its error": lambda: torch.tensor(best_lora(a_layer(), 16, SvdConfig()).error, dtype=torch.float64),
    "reduced base": reduced_weight,
}


def weight() -> Tensor:
    return linear_layer(256, 192, bias=False).weight.data


@pytest.mark.parametrize("how", SET)
@pytest.mark.parametrize("what", KEPT)
def test_a_lower_precision_reaches_nothing_that_is_kept(what, how):
    torch.manual_seed(0)
    expected = KEPT[what]()
    torch.manual_seed(0)
    with low_precision(how):
        found = KEPT[what]()
    assert torch.equal(found, expected)


@pytest.mark.skipif(not HAS_NEW_WAY, reason="torch has one way only")
@pytest.mark.parametrize("how", ["all tf32", "high"])
def test_what_followed_another_setting_still_does_afterwards(how):
    """A setting of 'none' reads as what it follows, and must not be written down as that."""
    with low_precision(how), full_float32(torch.device("cpu")):
        assert settings()[2:] == ["ieee", "ieee"]
    if how == "high":
        assert torch.get_float32_matmul_precision() == "high"
        return
    torch.backends.fp32_precision = "ieee"
    assert settings() == ["ieee"] * 4


def test_a_torch_of_one_way_alone_is_set_and_put_back(monkeypatch):
    """As before 2.9."""
    monkeypatch.setattr(autocast, "hasattr", lambda *_: False, raising=False)
    torch.set_float32_matmul_precision("medium")
    with full_float32(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == "highest"
    assert torch.get_float32_matmul_precision() == "medium"
