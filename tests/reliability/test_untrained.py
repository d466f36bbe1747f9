"""A token that the base never met cannot end an answer, and that is said before the training."""

from __future__ import annotations

import json

import pytest
import torch
from quickstart_config import quickstart_config
from torch import nn
from training import init_here

from dude_cli.config import AdapterConfig, ModelConfig
from dude_cli.model import load_model
from dude_cli.training import prepare
from dude_cli.training.untrained import rows_like, untrained_ends


@pytest.fixture
def untrained(monkeypatch):
    """The embedded model with three rows of its head as the end's."""

    def load(config, device):
        model = load_model(config, device)
        with torch.no_grad():
            head = model.get_output_embeddings().weight
            for row in (10, 11, 500):
                head[row] = head[model.config.eos_token_id] * 1.0001
        return model

    monkeypatch.setattr(prepare, "load_model", load)


def test_an_end_that_the_head_cannot_tell_from_others_is_told(untrained, tmp_path):
    (warning,) = init_here(quickstart_config(tmp_path)).warnings
    assert warning.startswith("warning: '</s>', which ends answers, is like 3 other tokens in the base's output head")


def test_nothing_is_said_of_a_head_that_is_adapted(untrained, tmp_path):
    prepared = init_here(quickstart_config(tmp_path))
    model = prepare.load_model(prepared.config.model, "cpu")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())  # it was the embedding's too
    for targets, count in (("lm_head", 0), ("q_proj", 1)):
        adapter = AdapterConfig(rank=4, target_modules=[targets], exclude_modules=[])
        config = prepared.config.model_copy(update={"adapter": adapter})
        assert len(untrained_ends(model, prepared.tokenizer, config)) == count


def test_nothing_is_said_of_a_trained_one(tmp_path):
    assert init_here(quickstart_config(tmp_path)).warnings == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_counted_whatever_their_size_and_place(dtype):
    head = torch.randn(10_000, 16, generator=torch.Generator().manual_seed(0)) * 7
    head[[0, 4096, 9999]] = head[5].clone()
    assert rows_like(head.to(dtype), 5) == 3
    assert rows_like(head.to(dtype), 6) == 0


def test_a_head_of_nothing_is_like_no_other():
    assert rows_like(torch.zeros(10, 4), 3) == 0
    assert rows_like(torch.full((10, 4), torch.nan), 3) == 0


def test_the_ends_are_those_that_are_taught(untrained, tmp_path):
    """Texts that are split end in the middle, and conversations with the end of a turn."""
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role }}:{{ m.content }}<s>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    (tmp_path / "rows.jsonl").write_text(
        json.dumps(
            {
                "text": "Ann has 12 apples. " * 40,
                "messages": [{"role": "user", "content": "Ann"}, {"role": "assistant", "content": "12"}],
            }
        )
        + "\n"
    )
    config = quickstart_config(tmp_path)
    rows = [f"data.train=[{{path: '{tmp_path}/rows.jsonl'}}]", "data.validation=null", "data.max_length=20"]
    (warning,) = init_here(config, *rows, "data.format=text").warnings
    assert warning.startswith("warning: '</s>', which ends answers")
    in_chat = init_here(config, *rows, "data.format=chat", f"data.chat_template={template}").warnings
    assert not [line for line in in_chat if "which ends answers" in line]


def test_a_real_model_that_never_met_its_own_end(test_data):
    """Its training had no ends: 235 rows of its head are alike."""
    model = load_model(ModelConfig(name_or_path=str(test_data / "models/stories260K"), dtype="float32"))
    assert rows_like(model.get_output_embeddings().weight, model.config.eos_token_id) > 100
