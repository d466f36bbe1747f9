"""The Python in a model card: valid, and of the base that the adapter was trained on."""

from __future__ import annotations

import ast
import re
from typing import Any

import pytest

from dude_cli import quickstart
from dude_cli.adapter import SavedAdapter
from dude_cli.config import AdapterConfig, Config, ModelConfig
from dude_cli.training.model_card import imported_card, merged_card, model_card, peft_card

COMMIT = "c" * 40
SUMMARY = dict.fromkeys(
    ("steps", "kept_step", "loss", "first_eval_loss", "last_eval_loss", "lowest_eval_loss", "kept_eval_loss"), 1
)


def saved_adapter(name: str, commit: str | None, quantization: str | None) -> SavedAdapter:
    return SavedAdapter(AdapterConfig(), name, commit, "bfloat16", quantization, "", {}, "")


def cards(name: str, commit: str | None, quantization: Any, *, trusts: bool) -> dict[str, str]:
    """The card of each kind."""
    model = ModelConfig(name_or_path=name, quantization=quantization, trust_remote_code=trusts)
    config = Config.model_validate({"model": model, "data": {"train": [{"path": "rows.jsonl"}]}})
    saved = saved_adapter(name, commit, quantization)
    return {
        "trained": model_card(config, SUMMARY, commit=commit),
        "imported": imported_card(model, AdapterConfig(), "peft", "", commit=commit),
        "peft": peft_card(saved, "LoRA", "", trust_remote_code=trusts),
        "merged": merged_card(saved, "bfloat16", "", trust_remote_code=trusts),
    }


def given(card: str) -> dict[str, Any]:
    """The constant keyword arguments of all calls in the snippet, which has to be Python."""
    tree = ast.parse(card.split("```python\n")[1].split("```")[0])
    keywords = [word for node in ast.walk(tree) if isinstance(node, ast.Call) for word in node.keywords]
    return {str(word.arg): word.value.value for word in keywords if isinstance(word.value, ast.Constant)}


def test_text_in_a_card_is_no_markup():
    """A pipe in a regular expression, or in a path, would begin another cell."""
    targets = [r"layers\.(0|1)\..*_proj", "up_proj"]
    data = {"train": [{"path": "rows|*new*.jsonl"}]}
    adapter = AdapterConfig(target_modules=targets, init_from="runs/a|b")
    config = Config.model_validate({"model": {"name_or_path": "my|<b>"}, "data": data, "adapter": adapter})
    saved = saved_adapter("my|<b>", None, None)
    found = {
        "trained": model_card(config, SUMMARY, "0" * 64),
        "imported": imported_card(config.model, adapter, "a|b", "1|2", commit=None),
        "peft": peft_card(saved, "LoRA", "1|2", trust_remote_code=False),
        "merged": merged_card(saved, "bfloat16", "1|2", trust_remote_code=False),
    }
    for kind, card in found.items():
        rows = [line for line in card.splitlines() if line.startswith("|")]
        assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows), kind
        (heading,) = [line for line in card.splitlines() if line.startswith("# ")]
        assert r"my\|\<b>" in heading, kind
    assert r"| target modules | layers\\.(0\|1)\\..\*\_proj, up\_proj |" in found["trained"]


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
@pytest.mark.parametrize("name", ["owner/name", 'a "model"\\folder'])
def test_the_snippet_loads_the_commit_and_the_code_that_were_trained_on(name, quantization):
    for kind, card in cards(name, COMMIT, quantization, trusts=True).items():
        found = given(card)
        assert found["trust_remote_code"] is True, kind
        assert found.get("revision") == (None if kind == "merged" else COMMIT), kind
    for kind, card in cards(name, None, quantization, trusts=False).items():
        assert not {"revision", "trust_remote_code"} & given(card).keys(), kind


def test_the_embedded_model_is_named_as_the_program_that_loads_it_knows_it():
    for kind, card in cards(quickstart.NAME, None, None, trusts=False).items():
        given(card)
        assert (f'from_pretrained("{quickstart.NAME}"' in card) is False, kind
    assert given(cards(quickstart.NAME, None, "nf4", trusts=False)["trained"])["name_or_path"] == quickstart.NAME
