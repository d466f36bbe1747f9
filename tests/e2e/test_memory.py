"""The forecast against what a training takes, on a model that is not tiny."""

from __future__ import annotations

import json

import pytest
from command import dude, dude_here
from quickstart_config import quickstart_config
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dude_cli import quickstart

# Of the resident set: kernels have scratch space.
TOLERANCE = 0.25
# glibc then gives back what is freed at once. By itself it keeps blocks of up to 32 MiB, as all of this model's are.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """A random Llama of 35 million parameters with the embedded tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(quickstart.MODEL_DIR)
    sizes = {"hidden_size": 640, "intermediate_size": 1760, "num_hidden_layers": 6, "num_attention_heads": 10}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model("llama", vocab_size=4096, **sizes, **special)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("checkpointing", ["true", "false"])
def test_the_forecast_is_within_a_quarter_of_what_is_measured(checkpointing, model_folder, tmp_path):
    config = quickstart_config(tmp_path, max_steps="2", global_batch_size="16", per_device_batch_size="16")
    quick = ["data.validation=null", "adapter.svd={algorithm: randomized, iterations: 2}"]
    changes = [*quick, f"model.name_or_path={model_folder}", f"train.gradient_checkpointing={checkpointing}"]
    estimated = dude_here("init", config, *changes, "--estimate", "--json")
    assert estimated.returncode == 0, estimated.stderr
    trained = dude("train", config, *changes, "--json", **GIVE_BACK)
    assert trained.returncode == 0, trained.stderr
    memory = json.loads(trained.stdout)["memory"]
    assert memory["predicted_training_bytes"] == json.loads(estimated.stdout)["training"]["total"]
    assert memory["measured_training_bytes"] == pytest.approx(memory["predicted_training_bytes"], rel=TOLERANCE)
