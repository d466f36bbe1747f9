"""A model that is cast is the one that transformers loads in that dtype, tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dude_cli.adapter import AdapterConfig, cast_model, merge_adapter, patch_model

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 56, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {
    "n_routed_experts": 4, "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "moe_num_experts": 4,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
KINDS = {
    "llama": SIZES,
    "gemma": SIZES,  # a computed buffer, embed_scale
    "gemma4_text": SIZES,  # buffers of the files, layer_scalar
    "minimax": SIZES | EXPERTS,  # buffers computed by arithmetic in the dtype
    "olmo_hybrid": SIZES,
    "longcat_flash": SIZES | EXPERTS,  # a router kept in float32 beside float16 alone
    "ernie4_5_moe": SIZES | EXPERTS,  # one kept beside bfloat16 too
    "gemma3": {  # a config in a config
        "text_config": SIZES | {"model_type": "gemma3_text"}, "vision_config": VISION, "mm_tokens_per_image": 4,
    },
}  # fmt: skip
CASTS = [
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float16),
    (torch.float16, torch.bfloat16),
]


def loaded(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.fixture(scope="module", params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, saved in each dtype."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **KINDS[request.param]))
    with torch.no_grad():
        for parameter in model.parameters():
            if float(parameter.std(correction=0)) == 0:  # biases of routers begin at zero
                parameter.normal_()
    model.save_pretrained(folder / "first")
    for dtype in {before for before, _ in CASTS}:
        loaded(folder / "first", dtype).save_pretrained(folder / str(dtype))
    return folder


def assert_equal(found: PreTrainedModel, expected: PreTrainedModel) -> None:
    tensors = dict([*found.named_parameters(), *found.named_buffers()])
    wanted = dict([*expected.named_parameters(), *expected.named_buffers()])
    assert tensors.keys() == wanted.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == wanted[name].dtype, name
        assert torch.equal(tensor, wanted[name]), name
    for part in ("text_config", "vision_config"):
        if hasattr(expected.config, part):
            assert getattr(found.config, part).dtype == getattr(expected.config, part).dtype
    assert found.config.dtype == expected.config.dtype


@pytest.mark.parametrize(("before", "after"), CASTS, ids=str)
def test_a_cast_model_is_the_one_that_is_loaded_in_that_dtype(saved, before, after):
    model = loaded(saved / "first", before)
    cast_model(model, before, after)
    assert_equal(model, loaded(saved / str(before), after))


@pytest.mark.parametrize(("before", "after"), CASTS, ids=str)
def test_a_merged_model_is_the_one_that_is_loaded_in_that_dtype(saved, before, after):
    model = patch_model(loaded(saved / "first", before), AdapterConfig(method="lora", rank=2))  # nothing is learned yet
    merge_adapter(model, str(after).removeprefix("torch."))
    assert_equal(model, loaded(saved / str(before), after))


def test_what_somebody_has_put_into_another_dtype_stays_in_it():
    model = tiny_model("llama", torch.bfloat16)
    model.lm_head.float()
    cast_model(model, torch.bfloat16, torch.float16)
    assert model.lm_head.weight.dtype == torch.float32
    assert model.model.norm.weight.dtype == torch.float16


def test_a_parameter_that_only_this_model_has_follows():
    model = tiny_model("llama")
    model.register_parameter("own", nn.Parameter(torch.ones(3)))
    cast_model(model, torch.float32, torch.float16)
    assert model.own.dtype == torch.float16
