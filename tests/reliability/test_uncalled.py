"""A target layer that the model does not call is refused by name: its adapter would stay as it is.

One that `all-linear` leaves out is named too.
"""

from __future__ import annotations

import pytest
import torch
from forked import Ranks
from quickstart_config import quickstart_config
from safetensors.torch import load_file
from tiny_models import tiny_batch
from torch.nn import functional as F
from training import init_here, train_here
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaMLP

from dude_cli import quickstart
from dude_cli.adapter import AdapterConfig, find_targets
from dude_cli.errors import UsageError
from dude_cli.training.uncalled import refusing_uncalled

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 56}


def save_model(folder, kind, **sizes):
    """A random model of the given sizes beside the embedded model's tokenizer, as overrides of a config."""
    tokenizer = AutoTokenizer.from_pretrained(quickstart.MODEL_DIR)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=len(tokenizer), **sizes))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return f"model.name_or_path={folder}", "model.attn_implementation=eager"


def save_mamba(folder):
    """A model that multiplies with the weight of `dt_proj` itself."""
    return save_model(folder, "mamba", hidden_size=32, num_hidden_layers=2, state_size=4, time_step_rank=4)


def test_the_layers_that_are_smaller_than_the_rank_are_named_once(tmp_path):
    model = save_model(tmp_path / "llama", "llama", num_key_value_heads=1, **SIZES)
    said = []
    init_here(quickstart_config(tmp_path), *model, "adapter.rank=10", say=said.append)
    assert said.count("2 layers smaller than rank 10 get no adapter: k_proj, v_proj") == 1
    assert not [line for line in said if "no forecast" in line]
    said.clear()
    init_here(quickstart_config(tmp_path), *model, "adapter.rank=8", say=said.append)
    assert not [line for line in said if "get no adapter" in line]


def test_a_layer_that_the_model_does_not_call_is_refused_before_anything_is_decomposed(tmp_path):
    model, config = save_mamba(tmp_path / "mamba"), quickstart_config(tmp_path, max_steps="2")
    with pytest.raises(UsageError, match=r"2 of 8 target layers are not called by the model") as error:
        init_here(config, *model)
    assert error.value.where == (
        "adapter.target_modules: backbone.layers.0.mixer.dt_proj, backbone.layers.1.mixer.dt_proj"
    )
    assert error.value.fix == "add to adapter.exclude_modules: dt_proj"
    assert not (tmp_path / "run/initial").exists()

    train_here(config, *model, "adapter.exclude_modules=[lm_head, dt_proj]")
    before, after = (
        load_file(tmp_path / "run" / name / "adapter.safetensors") for name in ("initial/adapter", "adapter")
    )
    assert not any(torch.equal(before[name], after[name]) for name in before if ".initial_" not in name)


def test_a_tower_that_no_text_reaches_is_named_as_a_whole():
    text = SIZES | {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96}
    config = AutoConfig.for_model(
        "gemma3",
        text_config=text,
        vision_config=SIZES | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=90,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    targets = find_targets(model, AdapterConfig(rank=2))
    with pytest.raises(UsageError, match="are not called") as error, refusing_uncalled(targets):
        model(input_ids=tiny_batch(1))
    assert error.value.fix == "add to adapter.exclude_modules: model.vision_tower.*"
    rest = find_targets(model, AdapterConfig(rank=2, exclude_modules=["lm_head", "model.vision_tower.*"]))
    with refusing_uncalled(rest):
        model(input_ids=tiny_batch(1))
    assert len(rest) == 7
    assert not any(layer._forward_hooks for layer in targets.values())


def test_an_expert_that_a_row_does_not_take_is_no_reason_to_stop():
    layers = {name: torch.nn.Linear(4, 4) for name in ("mlp.experts.0.up_proj", "mlp.experts.1.up_proj", "mlp.gate")}
    with refusing_uncalled(layers):
        layers["mlp.gate"](layers["mlp.experts.1.up_proj"](torch.zeros(1, 4)))
    with pytest.raises(UsageError, match="1 of 3"), refusing_uncalled(layers):
        layers["mlp.experts.1.up_proj"](torch.zeros(1, 4))


class ReadsWeights:
    """In training the weight of a layer is read and the layer not called, as Mamba's fused kernels do on a GPU."""

    def arm(self) -> None:
        forward = LlamaMLP.forward

        def fused(mlp, x):
            if not mlp.training:
                return forward(mlp, x)
            return mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * F.linear(x, mlp.up_proj.weight))

        LlamaMLP.forward = fused


def test_a_layer_that_is_called_in_evaluation_alone_is_refused_in_the_first_step_on_all_ranks(tmp_path):
    config = quickstart_config(tmp_path, max_steps="2", per_device_batch_size="2")
    ranks = Ranks(["train", config], tmp_path, 2, {0: ReadsWeights(), 1: ReadsWeights()})
    assert ranks.wait() == [2, 2], ranks.said()
    for log in ranks.logs:
        assert "target layers got no gradient in training" in log.read_text()
        assert "add to adapter.exclude_modules: up_proj" in log.read_text()
    without = "adapter.exclude_modules=[lm_head, up_proj]"
    ranks = Ranks(["train", config, without], tmp_path, 2, {0: ReadsWeights(), 1: ReadsWeights()})
    assert ranks.wait() == [0, 0], ranks.said()
