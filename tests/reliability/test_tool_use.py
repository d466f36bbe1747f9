"""A training on rows with tools, with a tokenizer that has a chat template of its own for these."""

from __future__ import annotations

import json
import shutil

import pytest
from quickstart_config import quickstart_config
from training import init_here, train_here
from transformers import AutoTokenizer

from dude_cli import quickstart
from dude_cli.errors import UsageError

DEFAULT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
TOOL_USE = "{{ tools | length }}\n" + DEFAULT
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.fixture
def model(tmp_path):
    """The embedded model with two templates, which a test may write anew."""
    shutil.copytree(quickstart.MODEL_DIR, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(quickstart.MODEL_DIR)

    def write(tool_use: str) -> str:
        tokenizer.chat_template = {"default": DEFAULT, "tool_use": tool_use}
        tokenizer.save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return write


def test_the_adapter_has_both_templates_and_a_run_goes_on_with_the_same_ones_alone(model, tmp_path):
    row = {"messages": [{"role": "user", "content": "Ann"}, {"role": "assistant", "content": "12"}], "tools": [TOOL]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    chat = [f"data.train=[{{path: '{tmp_path}/rows.jsonl'}}]", "data.validation=null", "data.format=chat"]
    chat += [f"model.name_or_path={model(TOOL_USE)}"]
    config = quickstart_config(tmp_path, max_steps="1", extra="  save_steps: 1")
    train_here(config, *chat)
    saved = AutoTokenizer.from_pretrained(tmp_path / "run/adapter")
    assert saved.chat_template == {"default": DEFAULT, "tool_use": TOOL_USE}
    said: list[str] = []
    init_here(config, *chat, f"adapter.init_from={tmp_path}/run", f"output_dir={tmp_path}/second", say=said.append)
    assert not any("another chat template" in line for line in said)
    model("{{ tools | length }} tools\n" + DEFAULT)
    with pytest.raises(UsageError) as caught:
        train_here(config, *chat, "train.max_steps=2")
    assert "data.chat_template (another text)" in str(caught.value)
