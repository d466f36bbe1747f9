"""PEFT folders that cannot be imported exactly are refused, each for its own reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from dude_cli.adapter import adapter_layers
from dude_cli.errors import AdapterError
from dude_cli.export import import_peft
from dude_cli.export.peft_files import PeftLayer, lora_config, read_peft_adapter, write_peft_adapter

LAYERS = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    layers = {name: PeftLayer(torch.randn(4, 32), torch.randn(56, 4), torch.rand(56)) for name in LAYERS}
    config = lora_config(layers, alpha=8.0, targets=["up_proj"], is_conv1d=False, base_model="base", revision=None)
    write_peft_adapter(tmp_path, layers, config)
    return tmp_path


def change_config(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def refused(folder: Path, *parts: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(AdapterError) as error:
        import_peft(model, folder)
    for part in (*parts, "where:", "fix:"):
        assert part in str(error.value), str(error.value)
    assert not adapter_layers(model)


def test_what_is_written_is_read(folder):
    adapter = read_peft_adapter(folder)
    assert tuple(adapter.layers) == LAYERS
    assert adapter.config["lora_alpha"] == 8
    assert isinstance(adapter.config["lora_alpha"], int)
    assert adapter.layers[LAYERS[0]].magnitude is not None
    keys = set(load_file(folder / "adapter_model.safetensors"))
    assert f"base_model.model.{LAYERS[0]}.lora_A.weight" in keys
    assert f"base_model.model.{LAYERS[0]}.lora_magnitude_vector" in keys
    import_peft(tiny_model("llama"), folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bias", "lora_only"),
        ("lora_bias", True),
        ("layer_replication", [[0, 2], [1, 2]]),
        ("use_qalora", True),
        ("trainable_token_indices", [1, 2]),
        ("init_lora_weights", "loftq"),
        ("a_setting_of_the_future", {"x": 1}),
    ],
)
def test_settings_that_compute_something_else(folder, key, value):
    change_config(folder, **{key: value})
    refused(folder, f"{key} is {value!r}")


@pytest.mark.parametrize("key", ["lora_bias", "use_qalora", "a_setting_of_the_future"])
def test_the_same_settings_switched_off_are_no_obstacle(folder, key):
    change_config(folder, **{key: None})
    import_peft(tiny_model("llama"), folder)


@pytest.mark.parametrize("alpha", [0, -4, "4", None, float("inf"), 1e300, 1e-300, pytest.param(10**400, id="huge")])
@pytest.mark.parametrize("key", ["lora_alpha", "alpha_pattern"])
def test_an_alpha_that_is_no_scaling(folder, key, alpha):
    change_config(folder, **{key: alpha if key == "lora_alpha" else {"up_proj": alpha}})
    refused(folder, str(folder / "adapter_config.json"), key, repr(alpha))


def test_layers_whose_scalings_are_those_of_no_alpha(folder):
    """Each alpha is one there can be; brought to the largest rank, they are of one that there cannot."""
    change_tensors(folder, lambda tensors: tensors.update(narrowed(tensors)))
    change_config(folder, lora_alpha=1e6, rank_pattern={"layers.0.mlp.up_proj": 1})
    refused(folder, "an alpha of 4e+06 at rank 4", str(folder / "adapter_config.json"))


def narrowed(tensors):
    """The tensors of the first layer, at rank 1."""
    first = {name: tensor for name, tensor in tensors.items() if ".layers.0." in name}
    return {
        name: tensor[:1].contiguous() if "lora_A" in name else tensor[:, :1].contiguous()
        for name, tensor in first.items()
        if "lora_A" in name or "lora_B" in name
    }


@pytest.mark.parametrize("dropout", [1.0, -0.1, "a", None, True])
def test_a_dropout_that_is_none(folder, dropout):
    change_config(folder, lora_dropout=dropout)
    refused(folder, f"lora_dropout is {dropout!r}")


@pytest.mark.parametrize("patterns", [[1], "up_proj", {"(": 3}])
def test_patterns_that_name_no_layers(folder, patterns):
    change_config(folder, alpha_pattern=patterns)
    refused(folder, f"alpha_pattern is {patterns!r}", "regular expressions")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_that_are_not_finite(folder, value):
    change_tensors(folder, lambda tensors: tensors[f"base_model.model.{LAYERS[1]}.lora_B.weight"].fill_(value))
    refused(folder, f"lora_B of {LAYERS[1]} has infinite or NaN values")


def test_the_weight_of_a_layer_without_an_adapter(folder):
    key = "base_model.model.model.layers.9.mlp.up_proj.base_layer.weight"
    change_tensors(folder, lambda tensors: tensors.update({key: torch.ones(2, 2)}))
    refused(folder, "1 tensors are of no LoRA layer", "layers.9.mlp.up_proj.base_layer")


def test_tensors_of_no_lora_layer(folder):
    change_tensors(folder, lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(2, 2)}))
    refused(folder, "1 tensors are of no LoRA layer", "lm_head.weight", "modules_to_save")


def test_magnitudes_that_a_conversion_dropped(folder):
    change_tensors(folder, lambda tensors: tensors.pop(f"base_model.model.{LAYERS[1]}.lora_magnitude_vector"))
    refused(folder, LAYERS[1], "use_dora: true wants ['lora_A', 'lora_B', 'magnitude']")


def test_magnitudes_that_are_not_used(folder):
    change_config(folder, use_dora=False)
    refused(folder, "use_dora: false wants ['lora_A', 'lora_B']")


def test_a_layer_that_the_base_has_not(folder):
    name = f"base_model.model.{LAYERS[1]}"

    def move(tensors):
        for key in [key for key in tensors if key.startswith(name)]:
            tensors[key.replace("layers.1", "layers.9")] = tensors.pop(key)

    change_tensors(folder, move)
    refused(folder, "model.layers.9.mlp.up_proj", "no such linear layer")


def test_a_layer_of_another_shape(folder):
    key = f"base_model.model.{LAYERS[1]}.lora_A.weight"
    change_tensors(folder, lambda tensors: tensors.update({key: torch.ones(4, 31)}))
    refused(folder, "lora_A is (4, 31)", "needs (4, 32)")


def test_a_file_that_is_cut_off(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    refused(folder, "is cut off or damaged")


def test_a_pickle_is_never_read(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused(folder, "adapter_model.bin is a pickle, which is never read")


def test_an_initial_adapter_of_another_training(folder, tmp_path_factory):
    change_config(folder, init_lora_weights="pissa_niter_4")
    initial = tmp_path_factory.mktemp("initial")
    for file in folder.iterdir():
        (initial / file.name).write_bytes(file.read_bytes())
    import_peft(tiny_model("llama"), folder, initial=initial)
    change_config(initial, lora_alpha=9)
    with pytest.raises(AdapterError, match="lora_alpha differ"):
        import_peft(tiny_model("llama"), folder, initial=initial)
    change_config(initial, lora_alpha=8)
    change_tensors(initial, lambda tensors: tensors.pop(f"base_model.model.{LAYERS[1]}.lora_magnitude_vector"))
    with pytest.raises(AdapterError, match="use_dora: true wants"):
        import_peft(tiny_model("llama"), folder, initial=initial)


def test_an_initial_adapter_for_a_quantised_base(folder, tmp_path_factory):
    """PEFT subtracts a start from what a packed weight stands for, and packs the rest again: nothing restores that."""
    from quantized_models import quantized_model  # skips the test where bitsandbytes is not installed

    change_config(folder, init_lora_weights="olora")
    model = quantized_model("llama", "nf4", tmp_path_factory.mktemp("base"))
    for initial in (folder, None):
        with pytest.raises(AdapterError, match="subtracted from a quantised base") as error:
            import_peft(model, folder, initial=initial)
        assert ("--initial" in str(error.value)) == (initial is not None)
    assert not adapter_layers(model)
