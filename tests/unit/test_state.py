from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import DTYPES, KINDS, tiny_batch, tiny_model, train_a_little
from torch import nn

from dude_cli.adapter import (
    AdapterConfig,
    load_adapter,
    merge_adapter,
    patch_model,
    read_adapter_config,
    save_adapter,
    state,
)
from dude_cli.adapter.factors import Factors
from dude_cli.adapter.folder import adapter_sha256, digest
from dude_cli.adapter.state import adapter_tensors, base_fingerprint
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


TENSORS, SETTINGS = "adapter.safetensors", "adapter_config.json"
NAME, OTHER = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize("position", [-5, -20_000, 20_000])
def test_a_flipped_byte_is_refused_and_the_layer_named(folder, position):
    path = folder / TENSORS
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    refused(tiny_model("llama"), folder, r"is damaged: the tensors of model\.layers\.\d\.\w+\.\w+ are not those")


@pytest.mark.parametrize("kept", [-100, 2_000, 20, 0])
def test_a_truncated_file_is_refused(folder, kept):
    path = folder / TENSORS
    path.write_bytes(path.read_bytes()[:kept])
    refused(tiny_model("llama"), folder, "is cut off")


def rewrite(folder, change) -> None:
    tensors = load_file(folder / TENSORS)
    change(tensors)
    save_file(tensors, folder / TENSORS)


def sign(folder) -> None:
    """Make the digests fit the tensors, as nothing but a program that knows the format would."""
    config, tensors = json.loads((folder / SETTINGS).read_text()), load_file(folder / TENSORS)
    for name in config["layers"]:
        own = {field: tensors[f"{name}.{field}"] for field in Factors._fields if f"{name}.{field}" in tensors}
        config["layers"][name] = digest(Factors(**own))
    config["sha256"] = adapter_sha256(config["adapter"], config["layers"])
    (folder / SETTINGS).write_text(json.dumps(config))


@pytest.mark.parametrize("field", ["lora_A", "magnitude", "initial_A"])
def test_a_missing_tensor_is_refused(folder, field):
    rewrite(folder, lambda tensors: tensors.pop(f"{NAME}.{field}"))
    refused(tiny_model("llama"), folder, rf"{NAME} .* missing \['{field}'\]")


def test_a_layer_that_is_missing_or_too_many_is_refused(folder):
    def drop_layer(tensors):
        for key in [key for key in tensors if key.startswith(NAME)]:
            tensors[key.replace(NAME, "model.layers.7.mlp.up_proj")] = tensors.pop(key)

    rewrite(folder, drop_layer)
    refused(tiny_model("llama"), folder, rf"{NAME} .* missing \['initial_A', .*'magnitude'\]")
    rewrite(folder, lambda tensors: tensors.update({f"{NAME}.{field}": torch.ones(1) for field in Factors._fields}))
    refused(tiny_model("llama"), folder, r"model\.layers\.7\.mlp\.up_proj .* unexpected \['initial_A'")


def swap(one, other, tensors):
    for field in Factors._fields:
        first, second = f"{one}.{field}", f"{other}.{field}"
        tensors[first], tensors[second] = tensors[second], tensors[first]


def test_swapped_layers_of_equal_shape_are_refused(folder):
    rewrite(folder, partial(swap, NAME, OTHER))
    refused(tiny_model("llama"), folder, f"layers are swapped: {NAME} has the tensors of {OTHER}")


def test_swapped_layers_of_unequal_shape_are_refused(folder):
    rewrite(folder, partial(swap, NAME, "model.layers.0.mlp.down_proj"))
    refused(tiny_model("llama"), folder, "layers are swapped")
    sign(folder)
    refused(tiny_model("llama"), folder, r"lora_A is \(4, \d+\)")


def test_half_precision_factors_are_refused(folder):
    def round_off(tensors):
        tensors[f"{NAME}.magnitude"] = tensors[f"{NAME}.magnitude"].half()

    rewrite(folder, round_off)
    refused(tiny_model("llama"), folder, "is damaged")
    sign(folder)
    refused(tiny_model("llama"), folder, "torch.float16")


@pytest.mark.parametrize(("key", "value"), [("alpha", 8.0), ("method", "pissa"), ("rank_stabilized", True)])
def test_settings_that_were_changed_afterwards_are_refused(folder, key, value):
    config = json.loads((folder / SETTINGS).read_text())
    config["adapter"][key] = value
    (folder / SETTINGS).write_text(json.dumps(config))
    refused(tiny_model("llama"), folder, "was changed after it was saved")


def test_the_name_of_the_base_may_be_changed(folder):
    config = json.loads((folder / SETTINGS).read_text())
    config["base_model"]["name_or_path"] = "another/place"
    (folder / SETTINGS).write_text(json.dumps(config))
    load_adapter(tiny_model("llama"), folder)


def test_the_hash_of_an_adapter_is_that_of_what_it_computes(tmp_path):
    def hash_of(**settings):
        save_adapter(patch_model(tiny_model("llama"), AdapterConfig(rank=4, **settings)), tmp_path / "adapter")
        return read_adapter_config(tmp_path / "adapter").sha256

    assert hash_of(method="lora") == hash_of(method="lora")
    assert len({hash_of(method="lora"), hash_of(method="dude"), hash_of(method="lora", alpha=8.0)}) == 3


def test_another_base_of_the_same_shapes_is_taken_when_that_is_meant(folder):
    other = tiny_model("llama", seed=1)
    load_adapter(other, folder, allow_other_base=True)
    found, saved = adapter_tensors(other), load_file(folder / TENSORS)
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in found)
    refused_shape = tiny_model("gpt2")
    with pytest.raises(AdapterError, match="no such linear layer"):
        load_adapter(refused_shape, folder, allow_other_base=True)


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


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)])
def test_an_empty_parameter_is_part_of_the_base(shape):
    model, named = tiny_model("llama"), tiny_model("llama")
    for name, changed in (("one", model), ("other", named)):
        changed.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    assert len({base_fingerprint(model), base_fingerprint(named), base_fingerprint(tiny_model("llama"))}) == 3


def test_the_dtype_of_the_base_is_not_an_adapters(tmp_path):
    """Where the first layer of a model is a target, as in BLT, its first parameter is the adapter's, in float32."""
    model = tiny_model("llama", torch.bfloat16)
    first = nn.ModuleDict({"first": model.model.layers[0].mlp.up_proj})
    model._modules = {"first": first, **model._modules}
    model.model.layers[0].mlp.up_proj = copy.deepcopy(first["first"])
    patch_model(model, CONFIG)
    assert next(model.parameters()).dtype == torch.float32
    save_adapter(model, tmp_path / "adapter")
    assert read_adapter_config(tmp_path / "adapter").base_dtype == "bfloat16"
    assert {parameter.dtype for parameter in merge_adapter(model, "bfloat16").parameters()} == {torch.bfloat16}
