"""The prompts of rows that are to be answered: those of the training in each form, with an answer or without."""

from __future__ import annotations

import json
from datetime import datetime

import pytest
from test_data_chat import CHATML, CONVERSATION, TEMPLATES
from test_prompt import config, trained, trained_context

from dude_cli.config import DataConfig, DataSource
from dude_cli.data.encode import ALPACA_WITH_INPUT
from dude_cli.data.row_prompts import RowPrompt, row_prompts
from dude_cli.errors import DataError

TWO = {"prompt": "{context}\nQ: {question}\nA:", "completion": " {answer}"}
TEXT = "The cat has 12 pears."
# A training's form, a row of it, and the row's answer in the words of the training.
FORMS = {
    "column": ({}, {"prompt": TEXT, "completion": " 46"}, " 46"),
    "two columns": (TWO, {"context": TEXT, "question": "How many?", "answer": "46"}, " 46"),
    "a number": (TWO, {"context": TEXT, "question": "How many?", "answer": 0}, " 0"),
    "alpaca": ({"format": "alpaca"}, {"instruction": TEXT, "input": "", "output": "46"}, "46"),
    "alpaca with input": ({"format": "alpaca"}, {"instruction": "Count.", "input": TEXT, "output": "46"}, "46"),
}
TOOLS = "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}"
CALLS = CHATML.replace("{{ m.content }}", "{{ m.content or '' }}{{ m.tool_calls | tojson if m.tool_calls else '' }}")
THINKING = CHATML.replace(
    "{{ m.content }}", "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m.content }}"
)


@pytest.fixture
def source(tmp_path):
    def write(*rows: dict[str, object], **form: str) -> DataSource:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return DataSource(path=str(tmp_path / "rows.jsonl"), **form)

    return write


def prompts(source: DataSource, data: DataConfig | None, tokenizer, said: list[str] | None = None) -> list[RowPrompt]:
    return row_prompts(source, data, tokenizer, say=[].append if said is None else said.append)[1]


@pytest.mark.parametrize("name", FORMS)
def test_the_prompts_tokens_are_those_of_the_training(name, tokenizer, source):
    fields, row, expected = FORMS[name]
    (found,) = prompts(source(row), config(**fields), tokenizer)
    assert found.prompt.ids == trained_context(tokenizer, config(**fields), row)
    assert found.expected == expected
    assert TEXT in found.prompt.text
    assert found.place.endswith("rows.jsonl:1")


@pytest.mark.parametrize("name", FORMS)
def test_rows_need_no_answer(name, plain_tokenizer, source):
    """The column may be missing in some rows or all, null, or empty as in a CSV file."""
    fields, row, expected = FORMS[name]
    *needed, answer = row
    bare = {column: row[column] for column in needed}
    rows = [row, bare, {**bare, answer: None}, {**bare, answer: " "}]
    found = prompts(source(*rows), config(**fields), plain_tokenizer)
    assert [each.expected for each in found] == [expected, None, None, None]
    assert {each.prompt.text for each in found} == {found[0].prompt.text}
    assert prompts(source(bare), config(**fields), plain_tokenizer)[0].prompt == found[0].prompt
    if name != "alpaca with input":
        wrong = {column: text for column, text in row.items() if column != needed[0]}
        with pytest.raises(DataError, match=f"the rows of the training have .*'{needed[0]}'"):
            prompts(source(wrong), config(**fields), plain_tokenizer)


def test_prompts_that_the_training_would_have_cut_are_whole_and_counted(plain_tokenizer, source):
    rows = source(*[{"prompt": "x" * length, "completion": "y"} for length in (39, 40, 41, 90)])
    said: list[str] = []
    found = prompts(rows, config(max_length=40), plain_tokenizer, said)
    assert [len(row.prompt.ids) for row in found] == [39, 40, 41, 90]
    longer = "2 of 4 prompts are longer than data.max_length (40)"
    assert said == [f"note: {longer}, to which the training cut its rows: they are sent whole"]
    for data in (config(max_length=90), None):
        prompts(rows, data, plain_tokenizer, said)
    assert len(said) == 1


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_of_a_chat_the_last_answer_is_left_out_and_the_earlier_ones_stay(template, chat_tokenizer, source):
    tokenizer, chats = chat_tokenizer(template), config(format="chat")
    answered, open_ = prompts(source({"messages": CONVERSATION}, {"messages": CONVERSATION[:-1]}), chats, tokenizer)
    encoded = trained(tokenizer, chats, {"messages": CONVERSATION, "tools": ""})
    last_turn = max(i for i, on in enumerate(encoded.learned) if on and not encoded.learned[i - 1])
    assert answered.prompt.ids == encoded.ids[:last_turn]
    assert " there" in answered.prompt.text
    assert open_.prompt == answered.prompt
    assert (answered.expected, open_.expected) == ("46", None)


@pytest.mark.parametrize("answer", [{}, {"completion": None}, {"completion": CONVERSATION[-1:]}])
def test_a_chat_in_two_parts_is_asked_by_its_prompt(answer, chat_tokenizer, source):
    """The answer may be missing, as in TRL's data sets of prompts alone."""
    tokenizer, messages = chat_tokenizer(CHATML), CONVERSATION
    (whole,) = prompts(source({"messages": messages}), config(format="chat"), tokenizer)
    (found,) = prompts(source({"prompt": messages[:-1]} | answer), config(format="chat"), tokenizer)
    assert messages[-1]["role"] == "assistant"
    assert found.prompt == whole.prompt
    assert found.expected == (whole.expected if answer.get("completion") else None)
    (asked,) = prompts(source({"prompt": messages[:-1]}), None, tokenizer)
    assert asked.prompt == whole.prompt


def test_a_chats_system_and_tools_are_part_of_its_prompt(chat_tokenizer, source):
    row = {
        "conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "46"}],
        "system": "Be brief.",
    }
    tools = [{"type": "function", "function": {"name": "count", "parameters": {}}}]
    (found,) = prompts(source(row | {"tools": json.dumps(tools)}), config(format="chat"), chat_tokenizer(TOOLS + CALLS))
    assert found.prompt.text.startswith('tools: [{"type": "function"')
    assert "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello<|im_end|>" in found.prompt.text


def test_an_expected_answer_is_what_the_template_writes(chat_tokenizer, source):
    """So a model that has learned it word for word equals it, thoughts and calls included."""
    (found,) = prompts(source({"messages": CONVERSATION}), config(format="chat"), chat_tokenizer(THINKING))
    assert found.expected == "<think>\n\n</think>\n\n46"
    call = {"function": {"name": "count", "arguments": '{"what": "pears"}'}}
    row = {"messages": [*CONVERSATION[:-1], {"role": "assistant", "tool_calls": [call]}]}
    (found,) = prompts(source(row), config(format="chat"), chat_tokenizer(CALLS))
    assert found.expected is not None
    assert json.loads(found.expected) == [{"function": {"name": "count", "arguments": {"what": "pears"}}}]
    asks_otherwise = CHATML.replace("assistant\n{%", "assistant\n<think>{%")
    (found,) = prompts(source({"messages": CONVERSATION}), config(format="chat"), chat_tokenizer(asks_otherwise))
    assert found.prompt.text.endswith("<think>")
    assert found.expected == "46"


def test_chats_that_cannot_be_asked_are_named_all_at_once(chat_tokenizer, source):
    alone = {"messages": [{"role": "assistant", "content": "46"}]}
    no_place = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    with pytest.raises(DataError) as error:
        prompts(
            source({"messages": CONVERSATION}, alone, {"messages": 3}), config(format="chat"), chat_tokenizer(no_place)
        )
    assert "3 of 3 rows cannot be used" in error.value.what
    assert "rows.jsonl:1: the chat template leaves out the system's message" in error.value.what
    assert "rows.jsonl:2: the conversation is an answer alone" in error.value.what
    assert "rows.jsonl:3: `messages` is not a conversation" in error.value.what


def test_a_template_is_told_the_time_that_is_given(chat_tokenizer, source):
    tokenizer = chat_tokenizer("{{ strftime_now('%Y-%m-%d') }}\n" + CHATML)
    rows, moment = source({"messages": CONVERSATION}), datetime(2024, 5, 17)
    _, (found,) = row_prompts(rows, None, tokenizer, say=print, moment=moment)
    assert found.prompt.text.startswith("2024-05-17\n")


def test_without_a_training_the_columns_say_what_rows_are(plain_tokenizer, chat_tokenizer, source):
    said: list[str] = []
    cases = [
        ({"messages": CONVERSATION}, chat_tokenizer(CHATML), "chat template"),
        ({"prompt": "hi", "id": 3}, chat_tokenizer(CHATML), '"{prompt}"'),
        ({"instruction": "hi", "input": "there"}, plain_tokenizer, "Alpaca's template"),
    ]
    for row, tokenizer, description in cases:
        form, (found,) = row_prompts(source(row), None, tokenizer, say=said.append)
        assert description in form.description
    assert found.prompt.text == ALPACA_WITH_INPUT.format(instruction="hi", input="there")
    assert [line.partition("rows.jsonl")[2] or line for line in said] == [
        ": columns that are not read: id",
        "note: these prompts are not put into the tokenizer's chat template; rows of `messages` would be",
    ]
    said = "the columns are 'question', 'answer'; rows have 'messages', or lists of messages in 'prompt', or"
    with pytest.raises(DataError, match=said) as error:
        prompts(source({"question": TEXT, "answer": "46"}), None, plain_tokenizer)
    assert "{path: FILE, prompt: ..., completion: ...}" in str(error.value.fix)
    own = source({"question": TEXT}, prompt="Q: {question}", completion=" {answer}")
    assert prompts(own, None, plain_tokenizer)[0].prompt.text == f"Q: {TEXT}"


def test_of_a_training_on_several_forms_it_is_that_of_the_columns(chat_tokenizer, source):
    talks = DataSource(path="talks.jsonl", format="chat")
    pairs = DataSource(path="rows.jsonl", prompt="Q: {q}", completion=" {a}")
    data, tokenizer = DataConfig(train=[talks, pairs]), chat_tokenizer(CHATML)
    assert prompts(source({"q": "hi"}), data, tokenizer)[0].prompt.text == "Q: hi"
    assert "<|im_start|>" in prompts(source({"messages": CONVERSATION}), data, tokenizer)[0].prompt.text


def test_the_form_is_that_of_the_columns_of_all_rows(plain_tokenizer, source):
    """A row without the column is named as any other such row, whichever it is."""
    for rows in ([{"id": 1}, {"prompt": "hi"}], [{"prompt": "hi"}, {"id": 1}]):
        with pytest.raises(DataError, match="column 'prompt' has no value") as error:
            prompts(source(*rows), config(), plain_tokenizer)
        assert error.value.where.endswith(f"rows.jsonl:{rows.index({'id': 1}) + 1}")


def test_text_without_a_prompt_has_nothing_to_answer(plain_tokenizer, source):
    for data, row in ((config(format="text"), {"text": "hi"}), (config(prompt="", completion="{b}"), {"b": "hi"})):
        with pytest.raises(DataError, match="nothing to answer") as error:
            prompts(source(row), data, plain_tokenizer)
        assert "--raw" in str(error.value.fix)
    with pytest.raises(DataError, match="nothing to answer"):
        prompts(source({"text": "hi"}), None, plain_tokenizer)
