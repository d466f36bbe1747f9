from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import DTYPES, KINDS, tiny_batch, tiny_model, train_a_little

from dude_cli import files
from dude_cli.adapter import AdapterConfig, load_adapter, patch_model, save_adapter, state
from dude_cli.adapter.state import base_fingerprint
from dude_cli.errors import AdapterError

CONFIG = AdapterConfig(method="dude", rank=4)


@pytest.fixture
def folder(tmp_path):
    model = patch_model(tiny_model("llama"), CONFIG)
    train_a_little(model)
    save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_adapter_gives_the_saved_ones_logits_bit_for_bit(kind, dtype, tmp_path):
    model, ids = patch_model(tiny_model(kind, dtype), CONFIG), tiny_batch()
    train_a_little(model)
    save_adapter(model, tmp_path / "adapter")
    fresh = tiny_model(kind, dtype)
    assert load_adapter(fresh, tmp_path / "adapter") == CONFIG
    with torch.no_grad():
        assert torch.equal(fresh(input_ids=ids).logits, model(input_ids=ids).logits)


def test_saving_replaces_an_adapter_as_a_whole(folder):
    (folder / "old-file").write_text("x")
    save_adapter(patch_model(tiny_model("llama"), CONFIG), folder)
    assert sorted(file.name for file in folder.iterdir()) == ["adapter.safetensors", "adapter_config.json"]
    assert sorted(file.name for file in folder.parent.iterdir()) == ["adapter"]


def test_a_base_in_another_dtype_is_the_same_base(folder):
    load_adapter(tiny_model("llama", torch.bfloat16), folder)


def refused(model, folder, message: str) -> None:
    before = dict(model.named_modules())
    with pytest.raises(AdapterError, match=message):
        load_adapter(model, folder)
    assert dict(model.named_modules()) == before


def test_another_base_model_is_refused(folder):
    refused(tiny_model("llama", seed=1), folder, "whose weights are not those of")


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.1.mlp.down_proj.weight"]
)
def test_a_base_with_one_other_row_anywhere_is_refused(folder, name):
    changed = tiny_model("llama")
    with torch.no_grad():
        changed.get_parameter(name)[7] += 0.5
    refused(changed, folder, "whose weights are not those of")


@pytest.mark.parametrize("kind", KINDS)
def test_a_patched_model_has_its_bases_fingerprint(kind):
    model = tiny_model(kind)
    before = base_fingerprint(model)
    assert base_fingerprint(patch_model(model, CONFIG)) == before
    assert base_fingerprint(tiny_model(kind, torch.bfloat16)) == before


def test_large_parameters_are_fingerprinted_by_rows_of_every_part(monkeypatch):
    monkeypatch.setattr(state, "FINGERPRINT_VALUES", 32 * 8)  # of 96 x 32: every 12th row
    model = tiny_model("llama")
    before = base_fingerprint(model)
    with torch.no_grad():
        model.lm_head.weight[13] += 1
        assert base_fingerprint(model) == before
        model.lm_head.weight[84] += 1
        assert base_fingerprint(model) != before


def test_another_architecture_is_refused(folder):
    refused(tiny_model("gpt2"), folder, "no such linear layer")


def test_a_flipped_byte_is_refused(folder):
    path = folder / "adapter.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    refused(tiny_model("llama"), folder, "is damaged")


def test_a_truncated_file_is_refused(folder):
    path = folder / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(tiny_model("llama"), folder, "is damaged")


def rewrite(folder, change) -> None:
    """Change the tensors and make the checksum fit, as an editing tool would."""
    tensors = load_file(folder / "adapter.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    config["sha256"] = files.sha256(folder / "adapter.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))


NAME = "model.layers.0.mlp.up_proj"


def test_a_missing_tensor_is_refused(folder):
    rewrite(folder, lambda tensors: tensors.pop(f"{NAME}.initial_A"))
    refused(tiny_model("llama"), folder, r"missing \['initial_A'\]")


def test_swapped_layers_of_unequal_shape_are_refused(folder):
    def swap(tensors):
        one, other = f"{NAME}.lora_A", "model.layers.0.mlp.down_proj.lora_A"
        tensors[one], tensors[other] = tensors[other], tensors[one]

    rewrite(folder, swap)
    refused(tiny_model("llama"), folder, r"lora_A is \(4, \d+\)")


def test_half_precision_factors_are_refused(folder):
    def round_off(tensors):
        tensors[f"{NAME}.magnitude"] = tensors[f"{NAME}.magnitude"].half()

    rewrite(folder, round_off)
    refused(tiny_model("llama"), folder, "torch.float16")


def test_a_folder_without_an_adapter_and_a_peft_one_are_refused(tmp_path):
    refused(tiny_model("llama"), tmp_path, "no adapter is here")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused(tiny_model("llama"), tmp_path, "PEFT's format")
    (tmp_path / "adapter_config.json").write_text('{"format_version": 99}')
    refused(tiny_model("llama"), tmp_path, "format 99")
    (tmp_path / "adapter_config.json").write_text("{")
    refused(tiny_model("llama"), tmp_path, "cannot be read")


def test_saving_an_unpatched_model_is_refused(tmp_path):
    with pytest.raises(AdapterError, match="no adapter to save"):
        save_adapter(tiny_model("llama"), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
