"""Adapters on a base that bitsandbytes has quantised: the method of a dense base, on the dequantised weight."""

from __future__ import annotations

import pytest
import torch
from quantized_models import LAYERS, QUANTIZATIONS, bitsandbytes, quantized_layer, quantized_model
from test_adapter_reference import METHODS, TOLERANCE, dense_reference, layer_results, moved_layer, relative_error
from tiny_models import tiny_batch, tiny_model, train_a_little
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from dude_cli.adapter import (
    AdapterConfig,
    disable_adapters,
    load_adapter,
    merge_adapter,
    patch_model,
    save_adapter,
    unpatch_model,
)
from dude_cli.adapter import weight as weights
from dude_cli.adapter.layer import AdapterLayer
from dude_cli.adapter.patch import start_factors
from dude_cli.adapter.state import base_fingerprint
from dude_cli.adapter.weight import dequantized, is_quantized, squared_row_norms, weight_chunks, weight_rows
from dude_cli.errors import AdapterError, UsageError

KINDS = ("llama", "qwen2", "gpt2")  # no biases, biases on q k v, Conv1D with biases
CONFIG = AdapterConfig(method="dude", rank=4)
INT8_TOLERANCE = 2e-2  # LLM.int8() rounds each token's activations to 127 steps either way
up_proj = "model.layers.0.mlp.up_proj"


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def dense_weight(layer: nn.Module) -> torch.Tensor:
    return weight_rows(layer, slice(None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_read_is_what_bitsandbytes_multiplies_with(kind, dtype, monkeypatch):
    monkeypatch.setattr(weights, "CHUNK_VALUES", 40 * 7)  # rows in chunks of seven
    layer = quantized_layer(48, 40, kind, bias=False, dtype=dtype).train()  # int8 in training mode: no rounding of x
    product = layer(torch.eye(40, dtype=dtype)).T
    W = dense_weight(layer)
    assert W.dtype == torch.float32
    # int8's scales are float32, and bitsandbytes rounds the product with them to the dtype of x.
    assert torch.allclose(W.to(dtype), product, rtol=1e-6 if dtype == torch.float32 else 2**-8, atol=0)
    assert torch.equal(torch.cat([rows for _, rows in weight_chunks(layer)]), W)
    assert torch.equal(weight_rows(layer, torch.tensor([3, 41])), W[[3, 41]])
    assert torch.equal(squared_row_norms(layer), W.double().square().sum(dim=1).float())


@pytest.mark.parametrize("norm_gradient", ["detached", "exact"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("method", METHODS)
def test_outputs_and_gradients_equal_the_dense_definition(method, kind, bias, norm_gradient):
    base = quantized_layer(48, 40, kind, bias=bias).train()
    layer = moved_layer(base, AdapterConfig(method=method, rank=6, alpha=9.0, norm_gradient=norm_gradient))
    x, grad_y = torch.randn(3, 7, 40), torch.randn(3, 7, 48)
    expected, found = dense_reference(layer, x, grad_y), layer_results(layer, x, grad_y)
    assert set(found) == set(expected)
    for name in expected:
        assert relative_error(found[name], expected[name]) <= TOLERANCE, name


def test_in_evaluation_int8_rounds_activations_and_nothing_else():
    layer = moved_layer(quantized_layer(48, 40, "int8", bias=True).eval(), CONFIG)
    x, grad_y = torch.randn(3, 7, 40), torch.randn(3, 7, 48)
    x[1, 2, 5] = 30.0  # an outlier, over LLM.int8()'s threshold
    expected, found = dense_reference(layer, x, grad_y), layer_results(layer, x, grad_y)
    assert relative_error(found["y"], expected["y"]) <= INT8_TOLERANCE
    assert relative_error(found["x"], expected["x"]) <= TOLERANCE


@pytest.mark.parametrize("kind", LAYERS)
def test_norms_are_exact_where_a_row_shrinks(kind):
    base, config = quantized_layer(64, 96, kind, bias=False), AdapterConfig(method="dude", rank=64)
    layer = AdapterLayer(base, config, start_factors(base, config, seed=0))
    with torch.no_grad():
        layer.lora_B.mul_(0.1)
        P, Q = layer.factors.difference()
        found = layer.squared_norms().sqrt().double()
        expected = (dense_weight(base).double() + P.double() @ Q.double()).norm(dim=1)
    assert float(((found - expected) / expected).abs().max()) <= 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("method", METHODS)
def test_step_zero_and_disabled_are_the_quantised_base_bit_for_bit(method, quantization, dtype, kind, tmp_path):
    model, ids = quantized_model(kind, quantization, tmp_path, dtype), tiny_batch()
    evaluated, trained = logits(model.eval(), ids), logits(model.train(), ids)
    patch_model(model, AdapterConfig(method=method, rank=8, alpha=12.0), seed=5)
    assert torch.equal(logits(model.eval(), ids), evaluated)
    assert torch.equal(logits(model.train(), ids), trained)
    train_a_little(model)
    assert not torch.equal(logits(model, ids), trained)
    with disable_adapters(model):
        assert torch.equal(logits(model.eval(), ids), evaluated)
    assert torch.equal(logits(unpatch_model(model), ids), evaluated)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_loaded_adapter_gives_the_trained_ones_logits_bit_for_bit(quantization, kind, tmp_path):
    model, ids = patch_model(quantized_model(kind, quantization, tmp_path / "base"), CONFIG), tiny_batch()
    train_a_little(model.train())
    save_adapter(model.eval(), tmp_path / "adapter")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    fresh = quantized_model(kind, quantization, tmp_path / "base")
    load_adapter(fresh, tmp_path / "adapter")
    assert torch.equal(logits(fresh, ids), logits(model, ids))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_merging_gives_plain_layers_of_the_adapted_weight(quantization, kind, tmp_path):
    model, ids = patch_model(quantized_model(kind, quantization, tmp_path), CONFIG).train(), tiny_batch()
    train_a_little(model)
    adapted = logits(model, ids)
    evaluated = logits(model.eval(), ids)
    merge_adapter(model)
    assert not any(is_quantized(layer) for layer in model.modules())
    assert relative_error(logits(model, ids), adapted.double()) <= TOLERANCE
    assert relative_error(logits(model, ids), evaluated.double()) <= INT8_TOLERANCE
    # The files of the merged model have the layout of its architecture, which stores a Conv1D as (in, out).
    plain = tiny_model(kind).state_dict()
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {n: t.shape for n, t in plain.items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_merged_model_is_saved_as_a_plain_one_also_where_few_layers_were_targets(quantization, kind, tmp_path):
    target = "c_attn" if kind == "gpt2" else "q_proj"
    model = quantized_model(kind, quantization, tmp_path / "base")
    patch_model(model, AdapterConfig(method="dude", rank=4, target_modules=[target])).train()
    train_a_little(model)
    adapted = logits(model, tiny_batch())
    merge_adapter(model, "float32").save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in (tmp_path / "merged/config.json").read_text()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert relative_error(logits(plain, tiny_batch()), adapted.double()) <= TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_dequantised_layer_is_a_plain_one_with_the_bias(quantization, dtype, tmp_path):
    for kind, cls in (("qwen2", nn.Linear), ("gpt2", Conv1D)):
        model = quantized_model(kind, quantization, tmp_path / kind)
        for layer in [layer for layer in model.modules() if is_quantized(layer)]:
            plain = dequantized(layer, dtype)
            assert type(plain) is cls
            assert torch.equal(dense_weight(plain), dense_weight(layer).to(dtype).float())
            assert (plain.bias is None) == (layer.bias is None)
            assert plain.bias is None or torch.equal(plain.bias, layer.bias.to(dtype))
            assert not any(parameter.requires_grad for parameter in plain.parameters())


def test_the_head_and_what_is_tied_stay_as_they_are(tmp_path):
    for kind in ("llama", "gemma"):
        model = quantized_model(kind, "nf4", tmp_path / kind)
        assert not is_quantized(model.lm_head)
        assert is_quantized(model.get_submodule(up_proj))
        assert patch_model(model, CONFIG).num_parameters() > tiny_model(kind).num_parameters()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_forward_leaves_the_base_as_it_was(quantization, tmp_path):
    """bitsandbytes moves int8's scales in the first one, and on some CPUs would repack 4-bit weights."""
    model, fresh = (quantized_model("llama", quantization, tmp_path) for _ in range(2))
    before = base_fingerprint(model)
    logits(model, tiny_batch())
    assert base_fingerprint(model) == before
    layer, untouched = model.get_submodule(up_proj), fresh.get_submodule(up_proj)
    assert torch.equal(layer.weight, untouched.weight)
    assert torch.equal(dense_weight(layer), dense_weight(untouched))
    patch_model(model, CONFIG)
    assert base_fingerprint(model) == before
    train_a_little(model)
    assert base_fingerprint(model) == before


@pytest.mark.parametrize("kind", LAYERS)
def test_the_fingerprint_notices_one_changed_byte_and_one_changed_scale(kind):
    layer = quantized_layer(48, 40, kind, bias=True)
    before = base_fingerprint(layer)
    layer.weight.data[17] ^= 1
    changed_weight = base_fingerprint(layer)
    scales = layer.weight.SCB if kind == "int8" else layer.weight.quant_state.absmax
    scales.view(torch.uint8)[8] ^= 1  # the last bit of one: bfloat16 would not show it
    assert len({before, changed_weight, base_fingerprint(layer)}) == 3


def test_the_fingerprint_of_a_plain_model_stays_what_it_was():
    """Adapters of plain bases were saved with it before there were quantised ones."""
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4, bias=False))
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) / 7 - number)
    assert base_fingerprint(model) == "08328e7cb0efe4628d31015bb05162ae51172bdbbae83f72289658ed3d2bfaca"


@pytest.mark.parametrize(("made_on", "loaded"), [("nf4", "int8"), ("nf4", None), (None, "int8")])
def test_another_quantisation_is_refused_and_both_are_named(made_on, loaded, tmp_path):
    model = patch_model(quantized_model("llama", made_on, tmp_path / "base"), CONFIG)
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(AdapterError, match="whose weights are not those of") as error:
        load_adapter(quantized_model("llama", loaded, tmp_path / "base"), tmp_path / "adapter")
    assert f"quantization {made_on or 'none'}, the model's {loaded or 'none'}" in error.value.where
    assert f"model.quantization: {made_on or 'null'}, model.dtype: float32" in error.value.fix


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_a_base_that_is_saved_quantised_needs_no_key(quantization, tmp_path):
    model, ids = quantized_model("llama", quantization, tmp_path / "plain"), tiny_batch()
    model.save_pretrained(tmp_path / "saved")
    for key in (None, quantization):
        again = quantized_model("llama", key, tmp_path / "saved")
        assert base_fingerprint(again) == base_fingerprint(model)
        assert torch.equal(logits(patch_model(again, CONFIG), ids), logits(model, ids))
    other = "int8" if quantization == "nf4" else "nf4"
    with pytest.raises(UsageError, match=f"is saved in {quantization} already") as error:
        quantized_model("llama", other, tmp_path / "saved")
    assert error.value.where == f"model.quantization: {other}"


def loaded_without_us(folder):
    """As in a notebook: 64 wide, so that bitsandbytes can repack it."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=config)
    return model.eval()


def one_layer_llama(folder, hidden_size):
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden_size, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=96, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture
def wide_model(tmp_path):
    return one_layer_llama(tmp_path, 64)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_base_does_not_depend_on_the_number_of_threads(quantization, tmp_path):
    """Large enough that torch shares a sum among threads: QLoRA's second quantisation has a mean in it."""
    one_layer_llama(tmp_path, 2048)
    threads, found = torch.get_num_threads(), set()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            found.add(base_fingerprint(quantized_model("llama", quantization, tmp_path)))
    finally:
        torch.set_num_threads(threads)
    assert len(found) == 1


def test_a_patched_model_is_not_repacked(wide_model):
    model = patch_model(loaded_without_us(wide_model), CONFIG)
    before = base_fingerprint(model)
    logits(model, tiny_batch())
    assert base_fingerprint(model) == before


@pytest.mark.skipif(not bitsandbytes.functional.has_avx512bf16(), reason="this CPU has no AVX512-BF16")
def test_a_model_that_was_repacked_before_is_refused(wide_model):
    model = loaded_without_us(wide_model)
    logits(model, tiny_batch())
    with pytest.raises(AdapterError, match="has repacked the 4-bit base"):
        patch_model(model, CONFIG)
