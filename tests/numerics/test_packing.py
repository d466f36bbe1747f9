"""Packed rows must give what the same rows give alone: logits, loss and gradients, in every kind of model."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dude_cli.data.batches import EncodedRows, collate
from dude_cli.data.encode import Encoded
from dude_cli.data.packing import check_packing
from dude_cli.data.table import TokenTable
from dude_cli.errors import DataError

VOCABULARY = 61
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
}
KINDS = {
    "llama": LLAMA,
    "qwen2": LLAMA,
    "mistral": {**LLAMA, "sliding_window": 4},
    "gemma": {**LLAMA, "head_dim": 8},
    "gemma3_text": {**LLAMA, "head_dim": 8, "sliding_window": 4},
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": VOCABULARY,
        "n_positions": 32,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
}
LENGTHS = [5, 9, 1, 7, 3, 11]
GROUPS = [[0, 1, 2], [3], [4, 5]]


def build_model(kind: str, attention: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **KINDS[kind]), attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # sharp attention: a leak would show
    return model.double().eval()


def build_rows(seed: int = 0) -> EncodedRows:
    generator = np.random.default_rng(seed)
    rows = [
        Encoded(generator.integers(3, VOCABULARY, n).tolist(), (generator.random(n) < 0.7).tolist(), 0, 0)
        for n in LENGTHS
    ]
    return EncodedRows(TokenTable.of(rows, max(LENGTHS)), np.arange(len(rows)))


def loss_and_gradients(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> tuple[float, torch.Tensor]:
    """The summed loss of the target tokens, and its gradients."""
    model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for batch in batches:
        labels = batch.pop("labels")
        logits = model(**batch, use_cache=False).logits
        flat = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        total = total + torch.nn.functional.cross_entropy(*flat, ignore_index=-100, reduction="sum")
    total.backward()
    return total.item(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("flatten", [False, True], ids=["rows", "flattened"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_loss_and_gradients_are_those_of_the_rows_alone(kind, attention, flatten):
    model, rows = build_model(kind, attention), build_rows()
    packed = rows.packed(GROUPS)
    alone = loss_and_gradients(model, [collate([row], 0) for row in rows if len(row) > 1])
    together = loss_and_gradients(model, [collate(list(packed), 0, flatten=flatten)])
    padded = loss_and_gradients(model, [collate(list(rows), 0)])
    for loss, gradients in (together, padded):
        assert loss == pytest.approx(alone[0], rel=1e-5)
        assert (gradients - alone[1]).norm() <= 1e-5 * alone[1].norm()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_changing_one_packed_row_leaves_the_others_logits_as_they_are(kind, attention):
    model, rows = build_model(kind, attention), build_rows()
    batch = collate(list(rows.packed(GROUPS)), 0)
    del batch["labels"]
    with torch.no_grad():
        before = model(**batch, use_cache=False).logits
        for sequence, group in enumerate(GROUPS):
            borders = np.cumsum([0, *(LENGTHS[row] for row in group)])
            for start, stop in itertools.pairwise(borders):
                changed = {**batch, "input_ids": batch["input_ids"].clone()}
                changed["input_ids"][sequence, start:stop] = 1
                after = model(**changed, use_cache=False).logits
                same = torch.ones(before.shape[:2], dtype=torch.bool)
                same[sequence, start:stop] = False
                assert torch.equal(after[same], before[same])
                assert not torch.equal(after, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_passes_for_models_that_keep_rows_apart(kind, dtype):
    model = build_model(kind, "sdpa").to(dtype).train()
    check_packing(model)
    check_packing(model, flatten=True)
    assert model.training


LEAKING = {
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": VOCABULARY,
        "word_embed_proj_dim": 32,
    },
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY},
}


@pytest.mark.parametrize("kind", LEAKING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_check_refuses_models_that_ignore_restarting_positions(kind, dtype):
    config = AutoConfig.for_model(kind, **LEAKING[kind])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype)
    with pytest.raises(DataError, match="lets packed rows see each other") as caught:
        check_packing(model)
    assert "packing: false" in caught.value.fix
