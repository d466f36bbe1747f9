"""A user's text becomes the prompt that the training rows had: the same tokens in front of the answer."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from test_data_chat import CHATML, CONVERSATION, HEAD, TEMPLATES

from dude_cli.config import DataConfig, DataSource
from dude_cli.data import prompt_form
from dude_cli.data.bad_rows import BadRows
from dude_cli.data.encode import ALPACA_WITHOUT_INPUT, Encoded, row_texts
from dude_cli.data.row_encoder import Part, RowEncoder
from dude_cli.errors import DataError

TEXT = "The cat has 12 pears, it's fine?"
# The rows of each format whose prompt is the user's text, put into the training's form.
FORMS = {
    "column": ({}, {"prompt": TEXT, "completion": " 46"}),
    "template": (
        {"prompt": "Question: {question}\nAnswer:", "completion": " {answer}"},
        {"question": TEXT, "answer": "46"},
    ),
    "template that ends in EOS": (
        {"prompt": "{question}</s>", "completion": " {answer}</s>"},
        {"question": TEXT, "answer": "46"},
    ),
    "alpaca": ({"format": "alpaca"}, {"instruction": TEXT, "input": "", "output": " 46"}),
}


def config(**fields: object) -> DataConfig:
    return DataConfig(train=[DataSource(path="rows.jsonl")], **fields)


def trained(tokenizer, data: DataConfig, row: dict[str, object]) -> Encoded:
    """The row as the training encodes it."""
    form = data.form(data.train[0])
    part = Part(form, [row if form.format == "chat" else row_texts(form, row)], ["row 1"])
    (encoded,) = RowEncoder(data, tokenizer).encode(part, BadRows())
    return encoded


def trained_context(tokenizer, data: DataConfig, row: dict[str, object]) -> list[int]:
    """The tokens in front of the answer."""
    encoded = trained(tokenizer, data, row)
    return encoded.ids[: encoded.learned.index(True)]


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("name", FORMS)
def test_the_prompts_tokens_are_those_of_the_training(name, tokenizer):
    fields, row = FORMS[name]
    data = config(**fields)
    prompt = prompt_form(tokenizer, data, raw=False).prompt(asked(TEXT))
    assert prompt.ids == trained_context(tokenizer, data, row)
    assert TEXT in prompt.text


@pytest.mark.parametrize("turns", [2, 4])
@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_a_chat_prompts_tokens_are_those_of_the_training(template, turns, chat_tokenizer):
    tokenizer = chat_tokenizer(template)
    conversation = CONVERSATION[:turns]
    row = {"messages": [*conversation, {"role": "assistant", "content": "46"}], "tools": ""}
    prompt = prompt_form(tokenizer, config(format="chat"), raw=False).prompt(conversation)
    encoded = trained(tokenizer, config(format="chat"), row)
    last_turn = max(i for i, on in enumerate(encoded.learned) if on and not encoded.learned[i - 1])
    assert prompt.ids == encoded.ids[:last_turn]
    assert prompt.text.endswith("assistant\n")


def test_a_header_inside_the_generation_block_is_part_of_the_prompt(chat_tokenizer):
    block = "{% generation %}" + HEAD + "{{ m.content }}<|im_end|>{% endgeneration %}\n"
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}" + block + "{% else %}"
        + HEAD + "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )  # fmt: skip
    prompt = prompt_form(chat_tokenizer(template), None, raw=False).prompt(asked("hello"))
    assert prompt.text.endswith("<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("eos", ["<|im_end|>", "</s>"])
def test_an_answer_stops_where_the_training_ends_a_turn(eos, chat_tokenizer):
    tokenizer = chat_tokenizer(CHATML, eos_token=eos)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", eos])
    for saved, more in ((None, set()), (7, {7}), ([7, 8], {7, 8})):
        model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=saved))
        assert prompt_form(tokenizer, None, raw=False).stop_ids(model) == {*ends, *more}
        assert prompt_form(tokenizer, None, raw=True).stop_ids(model) == {tokenizer.eos_token_id, *more}


def test_which_form_is_used_and_what_is_said_of_it(plain_tokenizer, chat_tokenizer):
    chat = chat_tokenizer(CHATML)
    two = {"prompt": "{context}\n{question}", "completion": "{answer}"}
    cases = [
        (chat, None, False, "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "chat template"),
        (chat, None, True, "hi", "as it is"),
        (plain_tokenizer, None, False, "hi", "no chat template"),
        (chat, config(), False, "hi", "as the training's column prompt"),
        (chat, config(format="text"), False, "hi", "have no column"),
        (chat, config(format="alpaca"), False, ALPACA_WITHOUT_INPUT.replace("{instruction}", "hi"), "Alpaca's"),
        (chat, config(**two), False, "hi", '2 columns: "{context}\\n{question}"'),
        (chat, config(prompt="Q: {q}\nA:", completion="{a}"), False, "Q: hi\nA:", 'template, "Q: {q}\\nA:"'),
    ]
    for tokenizer, data, raw, text, said in cases:
        form = prompt_form(tokenizer, data, raw=raw)
        assert form.prompt(asked("hi")).text == text
        assert said in form.description


def test_braces_in_the_text_stay(plain_tokenizer):
    form = prompt_form(plain_tokenizer, config(prompt="Q: {q}", completion="{a}"), raw=False)
    assert form.prompt(asked("{q} {{x}} {text}")).text == "Q: {q} {{x}} {text}"


def test_what_a_chat_template_refuses_is_a_data_error(chat_tokenizer):
    form = prompt_form(chat_tokenizer("{{ raise_exception('no') }}" + CHATML), None, raw=False)
    with pytest.raises(DataError, match="refuses the conversation: no"):
        form.prompt(asked("hi"))


def test_the_form_of_validation_rows_is_not_asked_in(chat_tokenizer):
    talks = DataSource(path="talks.jsonl", format="chat")
    pairs = DataSource(path="rows.jsonl", prompt="Q: {q}", completion=" {a}")
    tokenizer = chat_tokenizer(CHATML)
    assert prompt_form(tokenizer, DataConfig(train=[pairs], validation=[talks]), raw=False).template == "Q: {q}"
    assert prompt_form(tokenizer, DataConfig(train=[pairs, talks]), raw=False).chat is not None
