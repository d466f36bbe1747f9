"""The decompositions of all layers of a model: shared out over the ranks, and checked on a few of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dude_cli.config import AdapterConfig
from dude_cli.console import Count
from dude_cli.system.ranks import failing_together

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from transformers import PreTrainedModel

    from dude_cli.adapter.decompose import PrincipalFactors
    from dude_cli.adapter.patch import Decompose

# Layers that are checked against exact singular values, and the longest short side that one of them may have: 4096 x
# 4096 takes seconds on a CPU, twice as wide eight times as long.
CHECKED_LAYERS = 3
CHECKED_UP_TO = 4096


@dataclass(frozen=True)
class CheckedLayer:
    """`share`: the sum of the singular values in the initial factors over that of the r largest of the weight."""

    name: str
    share: float


def decompose_on_all_ranks(
    model: PreTrainedModel, config: AdapterConfig, accelerator: Accelerator, decompose: Decompose, on_layer: Count
) -> dict[str, PrincipalFactors]:
    """The decomposition of each target layer, on the main rank; the others return nothing.

    Each layer is decomposed by one rank, and none depends on another, so the bytes are those of a single rank with as
    many threads. `on_layer` counts the layers of this rank. An error of one rank is raised on all.
    """
    from dude_cli.adapter import check_ranks, find_targets

    targets = find_targets(model, config)
    check_ranks(targets, config.rank)
    owners = share_out(targets, accelerator.num_processes)
    own = [name for name, owner in owners.items() if owner == accelerator.process_index]
    found: dict[str, PrincipalFactors] = {}
    with failing_together(accelerator):
        for number, name in enumerate(own, start=1):
            found[name] = decompose(name, targets[name], config)
            on_layer(number, len(own))
    return _gather(found, targets, owners, config.rank, accelerator) if accelerator.num_processes > 1 else found


def share_out(targets: Mapping[str, nn.Module], count: int) -> dict[str, int]:
    """Which rank decomposes which layer: the largest first, each to the rank that has least to do by then."""
    from dude_cli.adapter.weight import weight_shape

    def work(name: str) -> int:
        out_features, in_features = weight_shape(targets[name])
        return out_features * in_features

    loads, owners = [0] * count, dict.fromkeys(targets, 0)
    for name in sorted(targets, key=work, reverse=True):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += work(name)
    return owners


def check_decompositions(model: PreTrainedModel) -> list[CheckedLayer]:
    """Of the layers that were decomposed at random, compare up to three with their exact singular values.

    The first, the middle and the last of those with a short side of up to CHECKED_UP_TO, which takes seconds on a CPU.
    """
    from dude_cli.adapter import adapter_layers
    from dude_cli.adapter.decompose import exact_singular_values, is_exact
    from dude_cli.adapter.weight import dense_weight, weight_shape

    layers = {
        name: layer
        for name, layer in adapter_layers(model).items()
        if layer.initial_A is not None
        and not is_exact(weight_shape(layer.base_layer), layer.rank, layer.config.svd)
        and min(weight_shape(layer.base_layer)) <= CHECKED_UP_TO
    }
    names = list(layers)
    chosen = names if len(names) <= CHECKED_LAYERS else [names[0], names[len(names) // 2], names[-1]]
    checked = []
    for name in chosen:
        layer = layers[name]
        assert layer.initial_A is not None
        assert layer.initial_B is not None
        S = layer.scaling * layer.initial_B.double().norm(dim=0) * layer.initial_A.double().norm(dim=1)
        exact = exact_singular_values(dense_weight(layer.base_layer), layer.rank).sum()
        checked.append(CheckedLayer(name, float(S.sum() / exact) if exact > 0 else 1.0))
    return checked


def _gather(
    found: dict[str, PrincipalFactors],
    targets: Mapping[str, nn.Module],
    owners: Mapping[str, int],
    rank: int,
    accelerator: Accelerator,
) -> dict[str, PrincipalFactors]:
    """Send what this rank has found to the main one, which has all of it afterwards, in the model's order."""
    import torch
    from torch import distributed

    from dude_cli.adapter.decompose import PrincipalFactors
    from dude_cli.adapter.weight import weight_shape

    device = accelerator.device
    gathered = {}
    for name, layer in targets.items():
        out_features, in_features = weight_shape(layer)
        if accelerator.process_index == owners[name] != 0:
            for factor in found.pop(name):
                distributed.send(factor.to(device), dst=0)
        elif accelerator.is_main_process and owners[name] != 0:
            A = torch.empty(rank, in_features, device=device)
            B = torch.empty(out_features, rank, device=device)
            for factor in (A, B):
                distributed.recv(factor, src=owners[name])
            gathered[name] = PrincipalFactors(A, B)
        elif accelerator.is_main_process:
            gathered[name] = found.pop(name)
    return gathered
