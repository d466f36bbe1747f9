"""How far a layer has moved, against the merged weight and DoRA's definitions written out."""

from __future__ import annotations

import pytest
import torch
from tiny_models import linear_layer, tiny_model
from torch import nn
from torch.nn import functional as F

from dude_cli.adapter import AdapterConfig, AdapterLayer, layer_movement, movements, patch_model
from dude_cli.adapter.patch import start_factors
from dude_cli.adapter.weight import weight_rows


def moved_layer(base: nn.Module, method: str, size: float = 0.3) -> AdapterLayer:
    """A layer whose tensors are away from their start."""
    config = AdapterConfig(method=method, rank=4, alpha=8)
    layer = AdapterLayer(base, config, start_factors(base, config, seed=0))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in (p for p in layer.parameters() if p.requires_grad):
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return layer


@pytest.mark.parametrize("conv1d", [False, True])
@pytest.mark.parametrize("method", ["dude", "dora", "pissa", "lora"])
def test_it_is_the_change_of_the_merged_weight(method: str, conv1d: bool) -> None:
    base = linear_layer(24, 16, bias=True, conv1d=conv1d)
    layer = moved_layer(base, method)
    W0 = weight_rows(base, slice(None)).double()
    W = torch.cat([rows for _, rows in layer.adapted_chunks()]).double()

    movement = layer_movement("layer", layer)

    change = (W.norm(dim=1) - W0.norm(dim=1)).abs().mean()
    assert movement.magnitude_change == pytest.approx(float(change), rel=1e-5)
    assert movement.relative_magnitude_change == pytest.approx(float(change / W0.norm(dim=1).mean()), rel=1e-5)
    assert movement.direction_change == pytest.approx(float((1 - F.cosine_similarity(W, W0)).mean()), rel=1e-5)
    assert movement.relative_change == pytest.approx(float((W - W0).norm() / W0.norm()), rel=1e-5)
    if layer.magnitude is None:
        assert (movement.mean_gain_change, movement.lowest_gain, movement.highest_gain) == (0.0, 1.0, 1.0)
    else:
        g = layer.magnitude_ratio()
        assert movement.mean_gain_change == pytest.approx(float((g - 1).abs().mean()), rel=1e-4)
        assert (movement.lowest_gain, movement.highest_gain) == pytest.approx(
            (float(g.min()), float(g.max())), rel=1e-5
        )
    assert movement.energy_captured == layer.energy_captured()


def test_a_small_turn_keeps_its_digits() -> None:
    """1 - cos of a turn by t is t^2 / 2: in float32 it would be 0 for this one."""
    base = nn.Linear(2, 1, bias=False).requires_grad_(False)
    base.weight.copy_(torch.tensor([[1.0, 0.0]]))
    config = AdapterConfig(method="lora", rank=1, alpha=1)
    layer = AdapterLayer(base, config, start_factors(base, config, seed=0))
    with torch.no_grad():
        layer.lora_A.copy_(torch.tensor([[0.0, 1e-5]]))
        layer.lora_B.fill_(1.0)
    assert layer_movement("layer", layer).direction_change == pytest.approx(5e-11, rel=1e-4)


def test_a_row_that_turns_around_and_rows_of_zeros() -> None:
    base = linear_layer(4, 8, bias=False)
    with torch.no_grad():
        base.weight[0] = 0.0
    config = AdapterConfig(method="dude", rank=2)
    layer = AdapterLayer(base, config, start_factors(base, config, seed=0))
    assert layer_movement("layer", layer).direction_change == pytest.approx(0.0, abs=1e-12)
    with torch.no_grad():
        layer.magnitude.neg_()
    movement = layer_movement("layer", layer)
    assert movement.direction_change == pytest.approx(2.0)
    assert movement.magnitude_change == pytest.approx(0.0, abs=1e-6)


def test_a_new_adapter_has_not_moved_and_every_layer_is_there() -> None:
    model = patch_model(tiny_model("llama"), AdapterConfig(method="dude", rank=4))
    found = movements(model)
    assert [layer.name for layer in found][:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]
    assert len(found) == 14
    for layer in found:
        assert layer.relative_change < 1e-6
        assert layer.direction_change < 1e-12
        assert layer.trainable_parameters == 4 * (layer.in_features + layer.out_features) + layer.out_features
