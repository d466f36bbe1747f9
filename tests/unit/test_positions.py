"""Rows that are longer than the model has positions for."""

from __future__ import annotations

from pathlib import Path

import pytest
from quickstart_config import quickstart_config
from training import init_here, train_here
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dude_cli import quickstart
from dude_cli.errors import DataError

SIZES = {
    "llama": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 56},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2},
    "gptj": {"n_embd": 32, "n_layer": 1, "n_head": 2, "rotary_dim": 16},
    "opt": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 56},
}


def config_on(folder: Path, kind: str, positions: int, **changes: str) -> Path:
    """A config for a random model of that kind with so many positions, and the embedded model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(quickstart.MODEL_DIR)
    sizes = SIZES[kind] | {"max_position_embeddings": positions, "vocab_size": len(tokenizer)}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    config = quickstart_config(folder, rows="16", max_steps="1", **changes)
    text = config.read_text().replace('name_or_path: "embedded:quickstart"', f'name_or_path: "{folder / "model"}"')
    config.write_text(text)
    return config


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "opt"])
def test_a_row_longer_than_the_table_of_positions_is_refused(tmp_path: Path, kind: str) -> None:
    config = config_on(tmp_path, kind, 32)
    with pytest.raises(DataError, match="is made for 32") as error:
        init_here(config)
    assert error.value.where == "data.max_length: 96"
    assert error.value.fix == "set data.max_length to at most 32"
    assert not (tmp_path / "run").exists()
    train_here(config, "data.max_length=32")


def test_where_positions_are_computed_it_is_only_told(tmp_path: Path) -> None:
    said: list[str] = []
    config = config_on(tmp_path, "llama", 32)
    init_here(config, say=said.append)
    assert [line for line in said if "is made for 32" in line and line.startswith("warning: the longest row has")]
    said.clear()
    init_here(config, "data.max_length=32", say=said.append)
    assert not [line for line in said if "is made for" in line]


def test_packed_rows_each_begin_at_the_first_position(tmp_path: Path) -> None:
    config = config_on(tmp_path, "gpt2", 96)
    overrides = ("data.packing=true", "data.max_length=512")
    assert init_here(config, *overrides).data.train.lengths.max() > 96
    train_here(config, *overrides)


def test_the_rows_of_the_validation_count_too(tmp_path: Path) -> None:
    (tmp_path / "short.jsonl").write_text('{"prompt": "one and", "completion": " two"}\n' * 4)
    source = f'data.train=[{{path: "{tmp_path / "short.jsonl"}"}}]'
    with pytest.raises(DataError, match="is made for 32"):
        init_here(config_on(tmp_path, "gpt2", 32), source)
