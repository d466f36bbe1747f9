"""Shares of the ranks, and the check of sampled layers against exact singular values."""

from __future__ import annotations

import json

import pytest
import torch
from command import dude_here
from hypothesis import given
from hypothesis import strategies as st
from quickstart_config import quickstart_config
from tiny_models import tiny_model
from torch import nn

from dude_cli.adapter import AdapterConfig, adapter_layers, patch_model
from dude_cli.training.decompositions import check_decompositions, share_out


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=30), st.integers(1, 5))
def test_no_rank_has_more_than_one_layer_above_its_part(shapes, ranks):
    with torch.device("meta"):
        layers = {str(number): nn.Linear(*shape) for number, shape in enumerate(shapes)}
    owners = share_out(layers, ranks)
    assert list(owners) == list(layers)
    loads = [sum(layers[name].weight.numel() for name in owners if owners[name] == rank) for rank in range(ranks)]
    assert max(loads) <= sum(loads) / ranks + max(layer.weight.numel() for layer in layers.values())


def randomized(**settings: object) -> AdapterConfig:
    return AdapterConfig(rank=3, method="pissa", alpha=12.0, svd={"algorithm": "randomized", **settings})


def test_sampled_layers_are_compared_with_the_exact_sum():
    model = patch_model(tiny_model("llama"), randomized())
    layers = adapter_layers(model)
    checked = check_decompositions(model)
    names = list(layers)
    assert [layer.name for layer in checked] == [names[0], names[len(names) // 2], names[-1]]
    assert all(layer.share == pytest.approx(1, abs=1e-6) for layer in checked)

    layer = layers[names[0]]
    S = torch.linalg.svdvals(layer.base_layer.weight.detach().double())
    with torch.no_grad():
        layer.initial_B[:, 2] = 0  # as if the third had been missed
    assert check_decompositions(model)[0].share == pytest.approx(float(S[:2].sum() / S[:3].sum()), abs=1e-6)


def test_exact_and_random_starts_have_nothing_to_check():
    assert check_decompositions(patch_model(tiny_model("llama"), AdapterConfig(rank=3))) == []
    assert check_decompositions(patch_model(tiny_model("llama"), AdapterConfig(rank=3, method="lora"))) == []


def test_init_reports_the_share_and_another_seed_and_alpha_share_the_decomposition(tmp_path):
    config = quickstart_config(tmp_path, rows="8", max_steps="1")
    randomized = ("adapter.svd.algorithm=randomized", "adapter.svd.iterations=3")
    first = dude_here("init", config, "--json", *randomized)
    assert first.returncode == 0, first.stderr
    checked = json.loads(first.stdout)["checked_decompositions"]
    assert len(checked) == 3
    assert all(0.9 < layer["share"] <= 1 + 1e-6 for layer in checked)
    other = ("seed=7", "adapter.method=pissa", "adapter.alpha=3", f"output_dir={tmp_path}/other")
    again = dude_here("init", config, *randomized, *other)
    assert again.returncode == 0, again.stderr
    assert f"of the largest exact ones, in sampled layers: {checked[0]['name']}" in " ".join(again.stdout.split())
    layers = json.loads(first.stdout)["layers"]
    assert f"{len(layers)} decompositions were in" in again.stderr
