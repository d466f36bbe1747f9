"""A tokenizer with a chat template `tool_use` beside the default one, as Command R's and Hermes 2 Pro's have."""

from __future__ import annotations

import hashlib
import json

import pytest
from test_chat_templates import CALLING, TOOL
from test_data_chat import CHATML, CONVERSATION, learned_turns
from test_data_messages import TOOL_TEMPLATES

from dude_cli.config import DataConfig, DataSource
from dude_cli.data import PreparedData, prepare_data, prompt_form, set_chat_template
from dude_cli.data.chat import ChatEncoder
from dude_cli.data.encode import TextEncoder
from dude_cli.errors import DataError, UsageError
from dude_cli.evaluation import chat_template

DEFAULT = CHATML.replace("<|im_start|>", "<|im_start|>plain ")
MARKED = DEFAULT.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}")


@pytest.fixture
def make(chat_tokenizer):
    def build(tool_use: str = TOOL_TEMPLATES["no marks"], default: str = DEFAULT):
        return chat_tokenizer({"default": default, "tool_use": tool_use, "rag": "{{ rag }}"})

    return build


def encode(tokenizer, messages, **columns):
    row = {"messages": messages} | columns
    return ChatEncoder(TextEncoder(tokenizer)).encode(row, where="row 1", learn_all=False)


@pytest.mark.parametrize("default", [DEFAULT, MARKED], ids=["default without marks", "default with marks"])
@pytest.mark.parametrize("tool_use", TOOL_TEMPLATES.values(), ids=TOOL_TEMPLATES.keys())
def test_rows_with_tools_go_through_it_and_others_do_not_as_in_transformers(make, tool_use, default):
    tokenizer = make(tool_use, default)
    for tools in ([TOOL], json.dumps([TOOL])):
        row = encode(tokenizer, CALLING, tools=tools)
        assert tokenizer.decode(row.ids) == tokenizer.apply_chat_template(CALLING, tools=[TOOL], tokenize=False)
        call = '<call>{"name": "weather", "arguments": {"city": "Bern"}}</call><|im_end|>'
        assert learned_turns(tokenizer, row) == [call, "Ten yards.<|im_end|>", "Two miles.<|im_end|>"]
    for nothing in (None, "", "[]", []):
        row = encode(tokenizer, CONVERSATION[3:], tools=nothing)
        assert tokenizer.decode(row.ids) == tokenizer.apply_chat_template(CONVERSATION[3:], tokenize=False)
        assert [turn.strip() for turn in learned_turns(tokenizer, row)][-1:] == ["46<|im_end|>"]


def test_whether_it_has_a_place_for_tools_and_which_roles_it_knows_are_its_own(make):
    with pytest.raises(DataError, match="no place for them"):
        encode(make(CHATML, default=TOOL_TEMPLATES["no marks"]), CALLING, tools=[TOOL])
    named = TOOL_TEMPLATES["no marks"].replace("{{ m.role }}", "{{ 'tool' if m.role == 'ipython' else m.role }}")
    talk = [{"role": "user", "content": "hello"}, {"role": "ipython", "content": "rain"}]
    encode(make(named), talk, tools=[TOOL])
    with pytest.raises(DataError, match="has the role 'ipython'"):
        encode(make(named), talk)


def test_another_prompt_than_the_rows_is_looked_for_in_it(make):
    asks = TOOL_TEMPLATES["no marks"].replace("assistant\n{% endif", "assistant\n<think>{% endif")
    encoder = ChatEncoder(TextEncoder(make(asks)))
    talk = CONVERSATION[3:]
    assert encoder.other_prompt({"messages": talk}, "row 1") is None
    assert encoder.other_prompt({"messages": talk, "tools": [TOOL]}, "row 1") == "<|im_start|>assistant\n<think>"


def test_a_prompt_and_a_question_of_an_evaluation_have_no_tools(make):
    tokenizer = make()
    config = DataConfig(train=[DataSource(path="rows.jsonl")], format="chat")
    prompt = prompt_form(tokenizer, config, raw=False).prompt([{"role": "user", "content": "hello"}])
    assert prompt.text.startswith("<|im_start|>plain user\n")
    assert chat_template(tokenizer) == DEFAULT


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    monkeypatch.setenv("DUDE_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": CALLING, "tools": [TOOL]}) + "\n")
    config = DataConfig(train=[DataSource(path=str(tmp_path / "rows.jsonl"))], format="chat")

    def run(tokenizer) -> PreparedData:
        return prepare_data(config, tokenizer, 0)

    return run


def test_another_one_makes_other_rows_and_another_fingerprint(prepare, make, chat_tokenizer):
    first, other = make(), make(TOOL_TEMPLATES["no marks"].replace("<call>", "<calling>"))
    assert list(prepare(first).train) == list(prepare(make()).train) != list(prepare(other).train)
    found = [prepare(tokenizer).fingerprints()["data.chat_template"] for tokenizer in (first, other)]
    assert found[0] != found[1]
    # With one template it is that template's digest, as it was in runs that were begun before there were two.
    single = chat_tokenizer(TOOL_TEMPLATES["no marks"])
    digest = hashlib.sha256(single.chat_template.encode()).hexdigest()
    assert prepare(single).fingerprints()["data.chat_template"] == digest


def test_each_template_gets_the_values_that_it_asks_for_and_all_are_saved(make, tmp_path):
    tokenizer = make("{{ mood }}{{ tone }}" + TOOL_TEMPLATES["no marks"], "{{ tone }}" + DEFAULT)
    before = dict(tokenizer.chat_template)
    set_chat_template(tokenizer, None, {"mood": "good"})
    set_chat_template(tokenizer, None, {"tone": "low"})
    assert tokenizer.chat_template["rag"] == before["rag"]
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again.chat_template == tokenizer.chat_template
    assert again.decode(encode(again, CALLING, tools=[TOOL]).ids).startswith("goodlow[{")
    assert again.decode(encode(again, CONVERSATION[3:]).ids).startswith("low<|im_start|>plain")
    with pytest.raises(UsageError, match="`moood` is nothing that the chat template asks for") as caught:
        set_chat_template(again, None, {"moood": 1})
    assert caught.value.fix == "did you mean `mood`?"


def test_a_file_takes_the_place_of_all(make, tmp_path):
    (tmp_path / "own.jinja").write_text(TOOL_TEMPLATES["no marks"])
    tokenizer = make("{{ tools }}")
    set_chat_template(tokenizer, str(tmp_path / "own.jinja"), {})
    assert "<call>" in tokenizer.decode(encode(tokenizer, CALLING, tools=[TOOL]).ids)
