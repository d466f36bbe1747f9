"""What only a GPU can show: the layer on the Triton kernels, whole trainings, their ends and beginnings, real OOM.

Without a GPU these are skipped; the same code is tested on a CPU elsewhere, the kernels through Triton's interpreter.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command import dude, dude_here
from packaging.version import Version
from quickstart_config import quickstart_config
from test_adapter_reference import (
    METHODS,
    dense_reference,
    layer_results,
    moved_layer,
    norm_error,
    relative_error,
    shrunk_layer,
)
from tiny_models import KINDS, linear_layer, tiny_batch, tiny_model
from training import StopAfter, train_here

from dude_cli.adapter import (
    AdapterConfig,
    adapter_layers,
    constant_adapters,
    disable_adapters,
    patch_model,
    product,
    recorded,
    unpatch_model,
)
from dude_cli.errors import ResourceError, StoppedError
from dude_cli.training import plan
from dude_cli.training.metrics import read_metrics

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

# Relative error of the whole layer: sums of a few hundred float32 terms; a rounding to the dtype, and those on the way.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
RESULT = "adapter/adapter.safetensors"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_outputs_and_gradients_equal_the_dense_definition(method, bias, dtype):
    layer = moved_layer(linear_layer(272, 336, bias=bias, dtype=dtype), AdapterConfig(method=method, rank=24)).cuda()
    x, grad_y = (torch.randn(3, 70, width, device="cuda").to(dtype) for width in (336, 272))
    assert product._kernels("cuda") is not None
    expected, found = dense_reference(layer, x, grad_y), layer_results(layer, x, grad_y)
    assert set(found) == set(expected)
    for name in expected:
        assert relative_error(found[name], expected[name]) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("width", [96, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["dude", "dora"])
def test_norms_are_exact(method, dtype, width):
    """Also with TF32 allowed, and where the factors have moved as far as a long training moves them."""
    torch.set_float32_matmul_precision("high")
    try:
        layer = moved_layer(linear_layer(512, width, bias=False, dtype=dtype), AdapterConfig(method=method, rank=32))
        layer.cuda()
        assert norm_error(layer) <= 1e-6
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(("shrink", "tolerance"), [(0.1, 1e-6), (1e-3, 1e-4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_are_exact_where_a_row_shrinks(dtype, shrink, tolerance):
    assert norm_error(shrunk_layer(linear_layer(64, 96, bias=False, dtype=dtype).cuda(), shrink)) <= tolerance


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_step_zero_and_disabled_are_the_base_bit_for_bit(method, dtype, kind):
    model, ids = tiny_model(kind, dtype).cuda(), tiny_batch().cuda()

    def logits():
        with torch.no_grad():
            return model(input_ids=ids).logits

    base = logits()
    patch_model(model, AdapterConfig(method=method, rank=8, alpha=12.0), seed=5)
    assert torch.equal(logits(), base)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=True)
    with constant_adapters(model):
        model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert not torch.equal(logits(), base)
    with disable_adapters(model):
        assert torch.equal(logits(), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["torch.compile", "without Triton"])
@pytest.mark.parametrize("method", METHODS)
def test_without_the_kernels_it_gives_the_same(method, way, dtype, monkeypatch):
    layer = moved_layer(linear_layer(256, 128, bias=True, dtype=dtype), AdapterConfig(method=method, rank=8)).cuda()
    x, grad_y = torch.randn(64, 128, device="cuda").to(dtype), torch.randn(64, 256, device="cuda").to(dtype)
    expected = dense_reference(layer, x, grad_y)
    if way == "torch.compile":
        if layer.magnitude is not None and Version(torch.__version__) < Version("2.13"):
            pytest.skip("torch 2.11 fails inside of Dynamo; torch 2.13 compiles it, tested on a CPU")
        layer.compile()
    else:
        monkeypatch.setattr(product, "HAS_KERNELS", False)
    with constant_adapters(layer):
        found = layer_results(layer, x, grad_y)
    for name in expected:
        assert relative_error(found[name], expected[name]) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("change", ["none", "a row cancels", "a magnitude is zero", "both", "moved", "another adapter"])
@pytest.mark.parametrize("method", METHODS)
def test_what_a_step_changes_is_replayed_as_it_is_now(method, change):
    """The third time on the tensors come from a CUDA graph; outside of the scope nothing is held."""
    model, ids = tiny_model("llama", torch.bfloat16).cuda(), tiny_batch().cuda()
    patch_model(model, AdapterConfig(method=method, rank=32, target_modules=["q_proj"]))  # of full rank
    for step in range(4):
        if step == 3:
            model = changed(model, change)
        trained = [p for p in model.parameters() if p.requires_grad]
        outside = model(input_ids=ids, labels=ids).loss
        expected = torch.autograd.grad(outside, trained)
        with constant_adapters(model):
            loss = model(input_ids=ids, labels=ids).loss
            found = torch.autograd.grad(loss, trained)
            again = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, trained)
            held = [layer.row_norms().norm for layer in adapter_layers(model).values() if layer.magnitude is not None]
            assert not any(norm.requires_grad for norm in held)
        assert torch.equal(loss, outside)
        assert all(map(torch.equal, found, expected))
        assert all(map(torch.equal, again, expected))
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(0.02 * torch.randn_like(parameter))
    assert change != "none" or recorded._known[model].recorded is not None


def changed(model, change):
    layer = next(iter(adapter_layers(model).values()))
    with torch.no_grad():
        if change in ("a row cancels", "both") and layer.initial_A is not None:
            layer.lora_B.copy_(layer.initial_B)
            layer.lora_A.copy_(layer.initial_A)
            layer.lora_B[3] *= 1e-3
        if change in ("a magnitude is zero", "both") and layer.magnitude is not None:
            layer.magnitude[3] = 0
        if change == "moved":
            model.cpu().cuda()
        elif change == "another adapter":
            unpatch_model(model)
            patch_model(model, AdapterConfig(method=layer.config.method, rank=4, target_modules=["q_proj"]))
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_an_interrupted_run_ends_in_the_same_bytes(dtype, tmp_path):
    whole = quickstart_config(tmp_path / "whole", dtype=dtype)
    train_here(whole)
    assert losses(tmp_path / "whole/run")[-1] < losses(tmp_path / "whole/run")[0]
    parted = quickstart_config(tmp_path / "parted", dtype=dtype)
    with pytest.raises(StoppedError):
        train_here(parted, stop=StopAfter(6))
    train_here(parted)
    assert losses(tmp_path / "parted/run") == losses(tmp_path / "whole/run")
    assert (tmp_path / "parted/run" / RESULT).read_bytes() == (tmp_path / "whole/run" / RESULT).read_bytes()


def test_gpu_and_cpu_learn_alike(tmp_path):
    """float32: the same losses within what 12 steps make of other roundings."""
    train_here(quickstart_config(tmp_path / "gpu"))
    environment = json.loads((tmp_path / "gpu/run/environment.json").read_text(encoding="utf-8"))
    assert environment["device"].startswith("cuda")
    done = dude_here_on_the_cpu(quickstart_config(tmp_path / "cpu"))
    assert done == 0
    assert losses(tmp_path / "gpu/run") == pytest.approx(losses(tmp_path / "cpu/run"), rel=1e-3)


def test_real_want_of_memory_halves_an_automatic_batch(tmp_path, monkeypatch):
    """The limit is torch's own for this process; the losses are those of a run that fits."""
    sizes = {"rows": "512", "global_batch_size": "512", "max_steps": "2"}
    train_here(quickstart_config(tmp_path / "fits", per_device_batch_size="32", **sizes))
    monkeypatch.setattr(plan, "AUTO_BATCH_TOKENS", 2**20)  # all rows at once
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    train_here(quickstart_config(tmp_path / "whole", per_device_batch_size="auto", **sizes))
    whole = torch.cuda.max_memory_allocated() / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.6 * whole)
    try:
        with pytest.raises(ResourceError, match="out of memory with 512 rows per forward at step 1"):
            train_here(quickstart_config(tmp_path / "fixed", per_device_batch_size="512", **sizes))
        train_here(quickstart_config(tmp_path / "limited", per_device_batch_size="auto", **sizes))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert losses(tmp_path / "limited/run") == pytest.approx(losses(tmp_path / "fits/run"), rel=1e-5)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_is_trained_and_the_run_loads_again(quantization, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = quickstart_config(tmp_path / "quantised", dtype="bfloat16")
    train_here(config, f"model.quantization={quantization}", "train.learning_rate=2e-3")
    run = tmp_path / "quantised/run"
    assert losses(run)[-1] < losses(run)[0]
    exported = dude_here("export", run, tmp_path / "merged", "--format", "merged")
    assert exported.returncode == 0, exported.stderr
    scored = dude_here("eval", run, "--task", "quickstart_choices", "--limit", "4")
    assert scored.returncode == 0, scored.stderr


@pytest.mark.parametrize("form", ["merged", "peft", "lora"])
def test_a_run_is_exported_within_the_tolerance(form, tmp_path):
    train_here(quickstart_config(tmp_path / "run", dtype="bfloat16"))
    done = dude_here("export", tmp_path / "run/run", tmp_path / form, "--format", form)
    assert done.returncode == 0, done.stderr


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run_dir) if "loss" in record]


def dude_here_on_the_cpu(config: Path) -> int:
    return dude("train", config, "--quiet", CUDA_VISIBLE_DEVICES="").returncode
