"""A model that writes over the output of a target layer is trained all the same."""

from __future__ import annotations

import pytest
import torch
from quickstart_config import quickstart_config
from test_uncalled import save_model
from training import train_here

from dude_cli.training.metrics import read_metrics
from dude_cli.training.overwritten import finding_overwritten

FALCON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_dropout": 0.1}


@pytest.mark.parametrize("has_checkpointing", ["false", "true"])
def test_a_model_that_adds_to_a_layers_output_in_place(tmp_path, monkeypatch, has_checkpointing):
    model = save_model(tmp_path / "falcon", "falcon", **FALCON)
    settings = (*model, f"train.gradient_checkpointing={has_checkpointing}", "train.learning_rate=1e-2")
    norms = []
    for form in ("", "plain"):
        monkeypatch.setenv("DUDE_LAYER", form)
        run = tmp_path / f"run{form}"
        train_here(quickstart_config(tmp_path, max_steps="3"), *settings, f"output_dir={run}")
        norms.append([record["grad_norm"] for record in read_metrics(run) if "grad_norm" in record])
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


def test_the_layers_are_found_and_left_without_hooks():
    layers = {name: torch.nn.Linear(4, 4) for name in ("written", "read", "last")}
    with torch.no_grad(), finding_overwritten(layers) as found:
        for name, layer in layers.items():
            y = layer(torch.zeros(1, 4))
            if name != "read":
                y += 1
    assert found == {"written", "last"}
    assert not any(layer._forward_hooks for layer in layers.values())
