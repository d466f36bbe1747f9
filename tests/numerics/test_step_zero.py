"""A freshly patched model is the base model, bit for bit; so is a trained one with its adapters disabled."""

from __future__ import annotations

import pytest
import torch
from tiny_models import DTYPES, KINDS, VOCABULARY, tiny_batch, tiny_model, train_a_little
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from dude_cli.adapter import AdapterConfig, adapter_layers, disable_adapters, find_targets, patch_model, unpatch_model
from dude_cli.errors import UsageError

METHODS = ("dude", "dora", "pissa", "lora")


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_step_zero_and_disabled_are_the_base_bit_for_bit(method, dtype, kind):
    model, ids = tiny_model(kind, dtype), tiny_batch()
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    base = logits(model, ids)
    patch_model(model, AdapterConfig(method=method, rank=8, alpha=12.0, dropout=0.1), seed=5)
    assert torch.equal(logits(model, ids), base)
    train_a_little(model)
    trained = logits(model, ids)
    assert not torch.equal(trained, base)
    with disable_adapters(model):
        assert torch.equal(logits(model, ids), base)
    assert torch.equal(logits(model, ids), trained)
    unpatch_model(model)
    assert torch.equal(logits(model, ids), base)
    assert all(torch.equal(parameter, weights[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    ("kind", "left_out", "count"),
    [("llama4_text", "feed_forward.router", 7), ("phimoe", "mlp.router", 4), ("falcon", None, 4)],
)
def test_a_linear_layer_with_a_forward_of_its_own_gets_no_adapter_but_falcons(kind, left_out, count):
    """Routers of experts may be linear layers that return more than a product."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 56, "vocab_size": VOCABULARY, "pad_token_id": 0}
    sizes |= {"head_dim": 8} if kind == "llama4_text" else {}
    model, ids = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval(), tiny_batch()
    base = logits(model, ids)
    if left_out is not None:
        assert isinstance(model.get_submodule(f"model.layers.0.{left_out}"), nn.Linear)
        with pytest.raises(UsageError, match="matches no linear layer"):
            find_targets(model, AdapterConfig(rank=2, target_modules=[left_out]))
    patch_model(model, AdapterConfig(rank=2))
    assert len(adapter_layers(model)) == count
    assert torch.equal(logits(model, ids), base)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_step_zero_holds_for_the_real_pretrained_model(test_data, dtype):
    model = AutoModelForCausalLM.from_pretrained(test_data / "models/stories260K", dtype=dtype).eval()
    ids = torch.randint(3, 500, (2, 40), generator=torch.Generator().manual_seed(0))
    base = logits(model, ids)
    patch_model(model, AdapterConfig(method="dude", rank=32))
    assert torch.equal(logits(model, ids), base)


def test_moving_the_model_to_another_dtype_keeps_the_adapter_in_float32():
    model = patch_model(tiny_model("llama"), AdapterConfig(rank=4))
    train_a_little(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model.to(torch.bfloat16)
    after = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model.model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.bfloat16
