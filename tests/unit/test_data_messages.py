"""The layouts in which users have conversations: ShareGPT's, and that of OpenAI's fine-tuning files."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_chat import CHATML, CONVERSATION, TEMPLATES, encode, learned_turns
from transformers import AutoTokenizer

from dude_cli import quickstart
from dude_cli.config import DataConfig, DataSource
from dude_cli.data import prepare_data
from dude_cli.data.chat import ChatEncoder
from dude_cli.data.encode import TextEncoder
from dude_cli.errors import DataError

# Calls are written as Qwen 2.5's template does: the arguments through `tojson`, which puts quotes around JSON as text.
CALLS = (
    "{%- for call in m.tool_calls or [] %}<call>"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</call>{%- endfor %}'
)
TOOL_TEMPLATES = {
    "no marks": "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    + CHATML.replace("{{ m.content }}", "{{ m.content }}" + CALLS),
    "marks": "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    + TEMPLATES["marks with the end of turn"].replace("{{ m.content }}<", "{{ m.content }}" + CALLS + "<"),
}
QUESTION = {"role": "user", "content": "hello"}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def encode_row(tokenizer, messages, **columns):
    row = {"messages": messages} | columns
    return ChatEncoder(TextEncoder(tokenizer)).encode(row, where="rows.jsonl:3", learn_all=False)


def error_of(tokenizer, messages, **columns) -> DataError:
    with pytest.raises(DataError) as caught:
        encode_row(tokenizer, messages, **columns)
    assert caught.value.where == "rows.jsonl:3"
    assert caught.value.fix
    return caught.value


def sharegpt(messages: list[dict]) -> list[dict]:
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names.get(m["role"], m["role"]), "value": m["content"]} for m in messages]


contents = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)


@settings(max_examples=25, deadline=None)
@given(texts=st.lists(contents, min_size=1, max_size=5))
def test_sharegpts_layout_is_the_same_conversation(chat_tokenizer, texts):
    roles = ["system", "user", "assistant", "tool", "assistant"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    for template in TEMPLATES.values():
        tokenizer = chat_tokenizer(template)
        assert encode(tokenizer, sharegpt(messages)) == encode(tokenizer, messages)


@pytest.mark.parametrize("model", ["stories260K", "quickstart"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_file_of_sharegpts_with_a_real_tokenizer(test_data, tmp_path, model, suffix):
    import datasets

    tokenizer = AutoTokenizer.from_pretrained(
        quickstart.MODEL_DIR if model == "quickstart" else test_data / "models" / model
    )
    tokenizer.chat_template = CHATML.replace("<|im_end|>", tokenizer.eos_token)
    rows = [{"id": "a", "conversations": sharegpt(CONVERSATION)}, {"id": "b", "conversations": sharegpt(CONVERSATION)}]
    rows[1]["conversations"][2]["weight"] = 0
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole, half = prepare_data(DataConfig(train=[DataSource(path=str(path))], format="chat"), tokenizer, 0).train
    assert half.input_ids == whole.input_ids
    learned = [tokenizer.decode([label for label in row.labels if label >= 0]) for row in (whole, half)]
    eos = tokenizer.eos_token
    assert [text.lstrip() for text in learned] == [f"there\n{eos}46{eos}", f"46{eos}"]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_the_systems_message_may_stand_in_a_column_of_its_own(chat_tokenizer, template):
    tokenizer, rest = chat_tokenizer(template), CONVERSATION[1:]
    assert CONVERSATION[0]["role"] == "system"
    assert encode_row(tokenizer, sharegpt(rest), system=CONVERSATION[0]["content"]) == encode(tokenizer, CONVERSATION)
    again = {"system": CONVERSATION[0]["content"]}
    assert encode_row(tokenizer, CONVERSATION, **again) == encode(tokenizer, CONVERSATION)
    for nothing in ("", None):
        assert encode_row(tokenizer, rest, system=nothing) == encode(tokenizer, rest)


@pytest.mark.parametrize(("system", "first"), [("be brief", "system"), ("be brief", "developer"), ([1], "user")])
def test_a_column_system_that_cannot_be_its_message_is_refused(chat_tokenizer, system, first):
    messages = [{"role": first, "content": "hello"}, QUESTION]
    error = error_of(chat_tokenizer(CHATML), messages, system=system)
    assert error.what.startswith("column 'system' ")


def test_the_column_system_is_read_from_a_file(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(quickstart.MODEL_DIR)
    tokenizer.chat_template = CHATML
    rows = [{"conversations": sharegpt(CONVERSATION[1:]), "system": text} for text in ("it's fine", None)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = prepare_data(DataConfig(train=[DataSource(path=str(path))], format="chat"), tokenizer, 0).train
    assert ["it's fine" in tokenizer.decode(row.input_ids) for row in found] == [True, False]


@pytest.mark.parametrize("learn_all", [False, True])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_a_message_of_weight_zero_is_not_learned(chat_tokenizer, template, learn_all):
    tokenizer = chat_tokenizer(template)
    messages = [m | {"weight": 1 if m["content"] == "46" else 0} for m in CONVERSATION]
    row, usual = encode(tokenizer, messages, learn_all=learn_all), encode(tokenizer, learn_all=learn_all)
    assert row.ids == usual.ids
    lost = [i for i, on in enumerate(usual.learned) if on and not row.learned[i]]
    assert tokenizer.decode([row.ids[i] for i in lost]) == " there\n<|im_end|>"
    assert "46<|im_end|>" in learned_turns(tokenizer, row)[-1]
    none = encode(tokenizer, [m | {"weight": 0} for m in CONVERSATION], learn_all=learn_all)
    assert none.ids == usual.ids
    assert any(none.learned) is learn_all


def test_an_eos_that_is_added_to_a_turn_of_weight_zero_is_not_learned(chat_tokenizer):
    tokenizer = chat_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", eos_token="</s>")
    assert not any(encode(tokenizer, [QUESTION, {"role": "assistant", "content": "46", "weight": 0}]).learned)


def test_a_weight_is_told_where_the_template_shows_other_turns(chat_tokenizer):
    template = TEMPLATES["marks with the end of turn"].replace("m.role == 'assistant'", "m.role == 'assistant' and 0")
    silent = {"role": "assistant", "content": "46", "weight": 0}
    assert "0 turns of 1 messages" in error_of(chat_tokenizer(template), [QUESTION, silent]).what
    assert not any(encode(chat_tokenizer(template), [QUESTION, silent | {"weight": 1}]).learned)


def test_content_in_parts_is_one_text(chat_tokenizer):
    tokenizer = chat_tokenizer(CHATML)
    parts = [{"type": "text", "text": "he"}, {"type": "text", "text": "llo", "image_url": None}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "46"}]}
    assert encode(tokenizer, [{"role": "user", "content": parts}, answer]) == encode(
        tokenizer, [QUESTION, answer | {"content": "46"}]
    )


@pytest.mark.parametrize("template", TOOL_TEMPLATES.values(), ids=TOOL_TEMPLATES.keys())
def test_calls_of_tools_are_learned_with_their_arguments_as_objects(chat_tokenizer, template):
    tokenizer = chat_tokenizer(template)
    messages = [QUESTION, CALLING, {"role": "tool", "content": "46", "tool_call_id": "1"}, CONVERSATION[-1]]
    for tools in (TOOLS, json.dumps(TOOLS)):
        row = encode_row(tokenizer, messages, tools=tools)
        call = '<call>{"name": "weather", "arguments": {"city": "Rome"}}</call><|im_end|>'
        assert learned_turns(tokenizer, row) == [call, "46<|im_end|>"]
        assert tokenizer.decode(row.ids).startswith(json.dumps(TOOLS))
    flat = [
        QUESTION,
        {"role": "assistant", "tool_calls": [{"function": CALL["function"] | {"arguments": {"city": "Rome"}}}]},
    ]
    assert encode(tokenizer, flat) == encode(tokenizer, messages[:2])


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_calls_that_the_template_does_not_write_are_refused(chat_tokenizer, template):
    error = error_of(chat_tokenizer(template), [QUESTION, CALLING])
    assert error.what == "the chat template leaves the call of 'weather' out of the assistant's turn"


def test_a_call_outside_of_the_generation_block_is_refused(chat_tokenizer):
    template = TEMPLATES["marks with the end of turn"].replace("{% endgeneration %}", "{% endgeneration %}" + CALLS)
    assert "out of the assistant's turn" in error_of(chat_tokenizer(template), [QUESTION, CALLING]).what


def test_tools_that_the_template_has_no_place_for_are_refused(chat_tokenizer):
    error = error_of(chat_tokenizer(CHATML), [QUESTION, CONVERSATION[-1]], tools=TOOLS)
    assert error.what == "column 'tools' has tools, and the chat template has no place for them"
    talk = [QUESTION, CONVERSATION[-1]]
    assert encode(chat_tokenizer(CHATML), talk) == encode_row(chat_tokenizer(CHATML), talk, tools="")


def calling(**fields: object) -> dict:
    return {"role": "assistant", "tool_calls": [{"function": CALL["function"] | fields}]}


@pytest.mark.parametrize(
    ("message", "what"),
    [
        ({"role": "asistant", "content": "46"}, "message 2 has the role 'asistant'"),
        ({"from": "function_call", "value": "46"}, "message 2 has the role 'function_call'"),
        ({"role": "assistant", "content": None}, "message 2 has no content"),
        ({"role": "assistant", "tool_calls": []}, "message 2 has no content"),
        ({"role": "assistant", "content": {"text": "46"}}, "message 2 has an object as content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "a part that is no text: 'image_url'"),
        ({"role": "user", "content": ["46"]}, "a part that is no text: '46'"),
        ({"role": "assistant", "content": "46", "weight": 0.5}, "message 2 has the weight 0.5"),
        ({"role": "assistant", "content": "46", "weight": [0]}, "message 2 has the weight [0]"),
        ({"role": "assistant", "tool_calls": ["weather"]}, "`tool_calls` that are no list of objects"),
        ({"role": "assistant", "content": "46", "tool_calls": "weather"}, "`tool_calls` that are no list of objects"),
        ({"role": "assistant", "tool_calls": [{"function": {"function": CALL["function"]}}]}, "call without a name"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "a tool call without a name"),
        (calling(arguments="{city"), "has arguments of 'weather' that are not JSON: {city"),
        (calling(arguments="[1]"), "has arguments of 'weather' that are no object"),
    ],
)
def test_what_cannot_be_a_message_is_named(chat_tokenizer, message, what):
    assert what in error_of(chat_tokenizer(TOOL_TEMPLATES["no marks"]), [QUESTION, message]).what


@pytest.mark.parametrize(("tools", "what"), [("[", "is not JSON"), ({"a": 1}, "no list"), (["a"], "no list")])
def test_what_cannot_be_tools_is_named(chat_tokenizer, tools, what):
    error = error_of(chat_tokenizer(TOOL_TEMPLATES["no marks"]), [QUESTION, CONVERSATION[-1]], tools=tools)
    assert error.what.startswith("column 'tools' ")
    assert what in error.what


def test_the_roles_are_named_and_those_of_the_template_are_taken(chat_tokenizer):
    unknown = [QUESTION, {"role": "critic", "content": "no"}]
    fix = error_of(chat_tokenizer(CHATML), unknown).fix
    assert fix == "use a role that the chat template names, or: human, gpt, system, developer, user, assistant, tool"
    named = CHATML.replace("{{ m.role }}", "{{ 'judge' if m.role == 'critic' else m.role }}")
    tokenizer = chat_tokenizer(named)
    assert tokenizer.decode(encode(tokenizer, unknown).ids).endswith("<|im_start|>judge\nno<|im_end|>\n")


@pytest.mark.parametrize("content", [42, 4.5, True])
def test_content_that_is_no_text_is_refused(content, chat_tokenizer):
    """Qwen3's template writes nothing for it, Llama 3's what Python does."""
    error = error_of(chat_tokenizer(CHATML), [QUESTION, {"role": "assistant", "content": content}])
    assert f"message 2 has content that is no text: {content}" in error.what


def test_messages_may_be_json_as_a_table_has_them(chat_tokenizer):
    tokenizer = chat_tokenizer(CHATML)
    assert encode(tokenizer, json.dumps(CONVERSATION)) == encode(tokenizer, CONVERSATION)
    assert "not a conversation: [{" in error_of(tokenizer, "[{").what
