"""How far a training has moved a layer from its base: DoRA's analysis of magnitude and direction.

DoRA (arXiv 2402.09353, section 3.2) writes a weight as magnitude times direction, and measures over its k vectors

    delta M = sum_i | ||W'_i|| - ||W0_i|| | / k        delta D = sum_i (1 - cos(W'_i, W0_i)) / k

where W' is the trained weight. The vectors are the output rows here, as the magnitudes are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dude_cli.adapter.layer import AdapterLayer
from dude_cli.adapter.patch import adapter_layers
from dude_cli.adapter.weight import is_whole, weight_chunks


@dataclass(frozen=True)
class LayerMovement:
    """One layer, W' against W0.

    `magnitude_change` is delta M, in the weight's own unit; `relative_magnitude_change` is delta M over the mean of
    ||W0_i||; `direction_change` is delta D, from 0 to 2, over the rows that have a direction in both; `relative_change`
    is ||W' - W0||_F / ||W0||_F. `gain` is g = m / ||V||, 1 for a method without a magnitude. `energy_captured` is the
    share of ||W0||_F^2 in the initial factors, None for a random start.
    """

    name: str
    out_features: int
    in_features: int
    rank: int
    trainable_parameters: int
    energy_captured: float | None
    magnitude_change: float
    relative_magnitude_change: float
    direction_change: float
    relative_change: float
    mean_gain_change: float  # mean of |g - 1|
    lowest_gain: float
    highest_gain: float


def movements(model: nn.Module) -> list[LayerMovement]:
    """Every adapter layer's movement, in the model's order; those of sharded weights left out."""
    layers = adapter_layers(model)
    return [layer_movement(name, layer) for name, layer in layers.items() if is_whole(layer.base_layer)]


@torch.no_grad()
def layer_movement(name: str, layer: AdapterLayer) -> LayerMovement:
    """The movement of one layer, from dense rows in float64: 1 - cos of a small turn has no digits in float32."""
    P, Q = (factor.double() for factor in layer.factors.difference())
    norms0, norms, cosines, gains, squared_change = [], [], [], [], 0.0
    for rows, chunk in weight_chunks(layer.base_layer):
        W0 = chunk.double()
        V = W0 + layer.scaling * P[rows] @ Q
        norm0, norm_V = W0.norm(dim=1), V.norm(dim=1)
        m = norm_V if layer.magnitude is None else layer.magnitude[rows].double()
        gain = _divided(m, norm_V)
        squared_change += float((gain[:, None] * V - W0).square().sum())
        norms0.append(norm0)
        norms.append(gain.abs() * norm_V)
        gains.append(gain[norm_V > 0])
        has_direction = (norm0 > 0) & (norm_V > 0)
        # A negative magnitude turns the row around.
        cosine = (W0 * V).sum(dim=1) / (norm0 * norm_V) * torch.where(gain < 0, -1.0, 1.0)
        cosines.append(cosine[has_direction])
    norm0, norm, cosine, gain = (torch.cat(parts) for parts in (norms0, norms, cosines, gains))
    change = float((norm - norm0).abs().mean())
    squared0 = float(norm0.square().sum())
    return LayerMovement(
        name=name,
        out_features=layer.lora_B.shape[0],
        in_features=layer.lora_A.shape[1],
        rank=layer.rank,
        trainable_parameters=sum(p.numel() for p in layer.parameters() if p.requires_grad),
        energy_captured=layer.energy_captured(),
        magnitude_change=change,
        relative_magnitude_change=change / float(norm0.mean()) if squared0 > 0 else 0.0,
        direction_change=float((1 - cosine).mean()) if len(cosine) else 0.0,
        relative_change=(squared_change / squared0) ** 0.5 if squared0 > 0 else 0.0,
        mean_gain_change=float((gain - 1).abs().mean()) if len(gain) else 0.0,
        lowest_gain=float(gain.min()) if len(gain) else 1.0,
        highest_gain=float(gain.max()) if len(gain) else 1.0,
    )


def _divided(m: Tensor, norm: Tensor) -> Tensor:
    """m / norm, 0 where the norm is 0, as the layer has it."""
    return torch.where(norm > 0, m / torch.where(norm > 0, norm, 1.0), 0.0)
