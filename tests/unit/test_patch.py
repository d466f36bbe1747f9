from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from tiny_models import tiny_batch, tiny_model, train_a_little
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dude_cli.adapter import (
    AdapterConfig,
    AdapterLayer,
    adapter_layers,
    find_targets,
    load_adapter,
    merge_adapter,
    patch_model,
    save_adapter,
    smaller_than_rank,
    trainable_parameters,
    unpatch_model,
    weight,
)
from dude_cli.adapter.decompose import decompose_layer
from dude_cli.config import ModelConfig
from dude_cli.errors import AdapterError, UsageError
from dude_cli.export.peft_format import base_alone
from dude_cli.model import load_model


def targets(kind: str, **settings) -> list[str]:
    return list(find_targets(tiny_model(kind), AdapterConfig(rank=2, **settings)))


def test_all_linear_takes_every_linear_layer_but_the_head():
    names = targets("llama")
    assert len(names) == 2 * 7
    assert not any("lm_head" in name for name in names)
    assert len(targets("gpt2")) == 2 * 4


def test_an_untied_head_is_a_target_when_it_is_not_excluded():
    assert "lm_head" in targets("llama", exclude_modules=[])


def test_a_tied_head_is_left_alone_and_refused_by_name():
    assert "lm_head" not in targets("gemma", exclude_modules=[])
    with pytest.raises(UsageError, match="shares its weight with the input embedding"):
        targets("gemma", target_modules=["lm_head"], exclude_modules=[])


def one_weight_in_two_layers() -> PreTrainedModel:
    model = tiny_model("llama")
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight = first.weight
    return model


def one_layer_in_two_blocks() -> PreTrainedModel:
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    return model


@pytest.mark.parametrize("make", [one_weight_in_two_layers, one_layer_in_two_blocks])
def test_a_weight_that_two_layers_share_is_left_alone_and_refused_by_name(make, tmp_path):
    """As in Zamba: an adapter on one of them would be merged into both."""
    model = make()
    assert len(find_targets(model, AdapterConfig(rank=2))) == 2 * 7 - 2
    with pytest.raises(UsageError, match="shares its weight with the input embedding or another layer"):
        find_targets(model, AdapterConfig(rank=2, target_modules=["up_proj"]))
    apart = patch_model(tiny_model("llama"), AdapterConfig(rank=2, target_modules=["layers.0.mlp.up_proj"]))
    save_adapter(apart, tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"layers\.0\.mlp\.up_proj, whose weight is .* another layer's too"):
        load_adapter(model, tmp_path / "adapter", allow_other_base=True)


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("q_proj", 2),
        ("mlp.up_proj", 2),
        ("model.layers.1.mlp.up_proj", 1),
        (r".*layers\.0\..*proj", 7),
        ("q|k_proj", 0),
    ],
)
def test_names_suffixes_and_regular_expressions(pattern, count):
    if count:
        assert len(targets("llama", target_modules=pattern)) == count
    else:
        with pytest.raises(UsageError, match="matches no linear layer"):
            targets("llama", target_modules=pattern)


def test_every_pattern_must_match_and_the_error_names_the_nearest():
    with pytest.raises(UsageError, match=r"`qproj` matches no linear layer") as error:
        targets("llama", target_modules=["k_proj", "qproj"])
    assert "q_proj" in (error.value.fix or "")


def test_a_bad_regular_expression_is_explained():
    with pytest.raises(UsageError, match="neither a module's name nor a regular expression"):
        targets("llama", target_modules="(q_proj")


def test_a_bad_exclusion_is_an_error_of_its_own_key():
    with pytest.raises(UsageError, match="neither a module's name") as error:
        targets("llama", exclude_modules=["(q_proj"])
    assert error.value.where == "adapter.exclude_modules"
    with pytest.raises(UsageError, match="`qproj` matches no linear layer") as error:
        targets("llama", exclude_modules=["lm_head", "qproj"])
    assert error.value.where == "adapter.exclude_modules: qproj"
    assert "q_proj" in (error.value.fix or "")


def test_a_layer_that_is_target_and_excluded_is_an_error():
    with pytest.raises(UsageError, match="excluded too"):
        targets("llama", target_modules=["q_proj"], exclude_modules=["q_proj"])


@pytest.mark.parametrize(("rank", "target_modules"), [(17, ["q_proj", "k_proj"]), (33, "all-linear")])
def test_a_rank_above_the_smaller_side_names_the_layer_and_the_largest_rank(rank, target_modules):
    with pytest.raises(UsageError, match=rf"rank {rank} .* model\.layers\.0\.self_attn\.") as error:
        patch_model(tiny_model("llama"), AdapterConfig(rank=rank, target_modules=target_modules))
    assert f"at most {16 if rank == 17 else 32}" in (error.value.fix or "")


def test_all_linear_leaves_out_what_is_smaller_than_the_rank():
    """Such as the gate of one output in Qwen2-MoE, with the default config."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "num_experts": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2_moe", vocab_size=96, **sizes))
    gates = [f"model.layers.{number}.mlp.shared_expert_gate" for number in range(2)]
    config = AdapterConfig()
    assert smaller_than_rank(model, config) == gates
    assert not set(gates) & set(find_targets(model, config))
    patch_model(model, config)
    with pytest.raises(UsageError, match=r"rank 16 .*mlp\.shared_expert_gate, which is 1 x 32"):
        patch_model(unpatch_model(model), AdapterConfig(target_modules=["q_proj", "shared_expert_gate"]))


def test_only_the_adapters_are_trainable_and_in_float32():
    model = patch_model(tiny_model("qwen2", torch.bfloat16), AdapterConfig(method="dude", rank=4))
    trainable = trainable_parameters(model)
    assert len(trainable) == 3 * len(adapter_layers(model))
    assert {name.rpartition(".")[2] for name in trainable} == {"lora_A", "lora_B", "magnitude"}
    assert all(parameter.dtype == torch.float32 for parameter in trainable.values())


def test_the_scaling_is_alpha_over_rank_or_its_root():
    assert AdapterConfig(rank=16).scaling == 1
    assert AdapterConfig(rank=16, alpha=8).scaling == 0.5
    assert AdapterConfig(rank=16, alpha=8, rank_stabilized=True).scaling == 2


def test_patching_twice_is_refused_and_unpatching_gives_the_model_back():
    model = tiny_model("llama")
    before = dict(model.named_modules())
    patch_model(model, AdapterConfig(rank=2))
    with pytest.raises(AdapterError, match="has adapters already"):
        patch_model(model, AdapterConfig(rank=2))
    unpatch_model(model)
    assert dict(model.named_modules()) == before


def test_starts_depend_on_the_seed_and_the_name_alone():
    def start(seed: int, **settings) -> torch.Tensor:
        model = patch_model(tiny_model("llama"), AdapterConfig(method="lora", rank=2, **settings), seed=seed)
        return adapter_layers(model)["model.layers.1.mlp.up_proj"].lora_A

    assert torch.equal(start(1), start(1, target_modules=["up_proj"]))
    assert not torch.equal(start(1), start(2))


def bitnet_model(folder: Path) -> PreTrainedModel:
    """A model whose linear layers round their weights to -1, 0 and 1 in each forward."""
    tiny_model("llama").save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    saved["quantization_config"] = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "online",
    }
    (folder / "config.json").write_text(json.dumps(saved))
    return load_model(ModelConfig(name_or_path=str(folder), dtype="float32"))


def float8_model(_: Path) -> PreTrainedModel:
    model = tiny_model("llama")
    layer = model.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    return model


def offloaded_model(_: Path) -> PreTrainedModel:
    return cpu_offload(tiny_model("llama"), execution_device="cpu")


UNREADABLE = {
    "is quantised by bitnet": (bitnet_model, UsageError),
    "has a weight in torch.float8_e4m3fn": (float8_model, UsageError),
    "is offloaded": (offloaded_model, AdapterError),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_base_whose_weights_are_not_what_it_multiplies_with_is_refused(what, tmp_path):
    make, kind = UNREADABLE[what]
    model = make(tmp_path / "model")
    patched = patch_model(tiny_model("llama"), AdapterConfig(method="lora", rank=2))
    save_adapter(patched, tmp_path / "adapter")
    with pytest.raises(kind, match=f"the base model {what}"):
        find_targets(model, AdapterConfig(rank=2))
    with pytest.raises(kind, match=f"the base model {what}"):
        load_adapter(model, tmp_path / "adapter", allow_other_base=True)
    assert not adapter_layers(model)


def test_a_dequantised_base_is_a_plain_one(tmp_path):
    """transformers dequantises FP8 where there is no GPU for it, and then forgets that it was."""
    model = tiny_model("llama", torch.bfloat16)
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [8, 8], "dequantize": True}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    loaded = load_model(ModelConfig(name_or_path=str(tmp_path), dtype="bfloat16"))
    assert len(find_targets(loaded, AdapterConfig(rank=2))) == 14


@pytest.mark.parametrize("method", ["dude", "dora", "pissa", "lora"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merging_gives_the_patched_models_logits(kind, method):
    model, ids = patch_model(tiny_model(kind), AdapterConfig(method=method, rank=4)), tiny_batch()
    train_a_little(model)
    patched = model(input_ids=ids).logits
    merge_adapter(model)
    merged = model(input_ids=ids).logits
    assert not any(isinstance(module, AdapterLayer) for module in model.modules())
    assert float((merged - patched).abs().max() / patched.abs().max()) <= 1e-5


def test_a_layer_that_the_model_keeps_in_another_dtype_is_merged_in_it():
    model = tiny_model("qwen2", torch.bfloat16)
    layer = model.model.layers[0].self_attn.q_proj.float()
    layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    layer.register_forward_hook(lambda _, inputs, output: output.bfloat16())
    patch_model(model, AdapterConfig(rank=4))
    train_a_little(model)
    adapted = adapter_layers(model)["model.layers.0.self_attn.q_proj"].adapted_chunks()
    expected = torch.cat([rows for _, rows in adapted])
    merge_adapter(model, "float16")
    assert torch.equal(layer.weight, expected)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.float32}
    assert model.model.layers[1].self_attn.q_proj.weight.dtype == torch.float16


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_merging_in_chunks_computes_each_norm_once_and_from_the_base_alone(kind, monkeypatch):
    def merged(chunk_values: int) -> dict[str, torch.Tensor]:
        monkeypatch.setattr(weight, "CHUNK_VALUES", chunk_values)
        model = patch_model(tiny_model(kind), AdapterConfig(method="dude", rank=4))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for layer in adapter_layers(model).values():
                layer.lora_B.add_(0.3 * torch.randn(layer.lora_B.shape, generator=generator))
        calls.clear()
        return merge_adapter(model).state_dict()

    calls: list[AdapterLayer] = []
    ratio = AdapterLayer.magnitude_ratio
    monkeypatch.setattr(AdapterLayer, "magnitude_ratio", lambda layer: calls.append(layer) or ratio(layer))
    whole, chunked = merged(2**24), merged(100)
    assert len(calls) == len(set(calls)) > 0
    for name in whole:
        torch.testing.assert_close(chunked[name], whole[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["dude", "dora"])
@pytest.mark.parametrize("algorithm", ["exact", "randomized"])
def test_the_callers_default_device_changes_no_adapter(method, algorithm):
    config = AdapterConfig(method=method, rank=4, svd={"algorithm": algorithm})
    expected = patch_model(tiny_model("llama"), config)
    model = tiny_model("llama")
    with torch.device("meta"):  # stands for a GPU that is torch's default, with the model elsewhere
        patch_model(model, config)
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.state_dict().items())


def interrupted_at(name: str, error: BaseException):
    """A decomposition that ends with `error` at the layer of that name."""

    def decompose(layer_name, layer, config):
        if layer_name == name:
            raise error
        return decompose_layer(layer_name, layer, config)

    return decompose


@pytest.mark.parametrize(
    "error", [AdapterError("not finite", fix="check"), KeyboardInterrupt()], ids=["error", "Ctrl-C"]
)
def test_a_patch_that_is_interrupted_leaves_the_model_as_it_was(error):
    model = tiny_model("llama")
    model.lm_head.requires_grad_(False)
    before, trainable = dict(model.named_modules()), set(trainable_parameters(model))
    with pytest.raises(type(error)):
        patch_model(model, AdapterConfig(rank=2), decompose=interrupted_at("model.layers.1.mlp.up_proj", error))
    assert dict(model.named_modules()) == before
    assert set(trainable_parameters(model)) == trainable
    patch_model(model, AdapterConfig(rank=2))


@pytest.mark.parametrize("kept", [0, 5])
def test_an_interruption_between_two_layers_takes_the_first_one_off_again(kept, monkeypatch):
    model = tiny_model("llama")
    before, trainable = dict(model.named_modules()), set(trainable_parameters(model))
    put, calls = model.set_submodule, []

    def set_submodule(name, layer):
        calls.append(name)
        if len(calls) == kept + 1:
            raise KeyboardInterrupt
        put(name, layer)

    monkeypatch.setattr(model, "set_submodule", set_submodule)
    with pytest.raises(KeyboardInterrupt):
        patch_model(model, AdapterConfig(method="lora", rank=2))
    assert dict(model.named_modules()) == before
    assert set(trainable_parameters(model)) == trainable


@pytest.mark.parametrize("take_off", [unpatch_model, merge_adapter])
def test_without_its_adapters_a_model_trains_what_it_trained_before(take_off):
    model = tiny_model("llama")
    model.lm_head.requires_grad_(False)
    trainable = set(trainable_parameters(model))
    patch_model(model, AdapterConfig(rank=2))
    with base_alone(model):  # as an export for PEFT does
        assert not trainable_parameters(model)
        unpatch_model(patch_model(model, AdapterConfig(method="lora", rank=2)))
        assert not trainable_parameters(model)
    assert len(trainable_parameters(model)) == 3 * len(adapter_layers(model))
    take_off(model)
    assert set(trainable_parameters(model)) == trainable
