"""Conversations in two parts, as TRL's are: the messages of a prompt, and those of the completion that is learned."""

from __future__ import annotations

import json

import datasets
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_chat_templates import CALLING, FOLDER, NAMES, ONE, PARTS_ONLY, SYSTEM, TOOL, TWIN, TWO, template_of, turns_of
from test_chat_templates import encode as encode_by  # noqa: F401 - a fixture
from test_data_chat import CHATML, CONVERSATION, COUNTING, TEMPLATES, encode, learned_turns
from test_data_messages import sharegpt
from trl.data_utils import apply_chat_template, common_prefix_length

from dude_cli.config import DataConfig, DataSource
from dude_cli.data import PreparedData, prepare_data, prompt_form
from dude_cli.data.chat import ChatEncoder
from dude_cli.data.encode import TextEncoder
from dude_cli.errors import DataError

PROMPT, COMPLETION = CONVERSATION[:4], CONVERSATION[4:]


def encode_parts(tokenizer, prompt, completion, *, learn_all=False, **columns):
    row = {"prompt": prompt, "completion": completion} | columns
    return ChatEncoder(TextEncoder(tokenizer)).encode(row, where="rows.jsonl:3", learn_all=learn_all)


def error_of(tokenizer, prompt, completion) -> DataError:
    with pytest.raises(DataError) as caught:
        encode_parts(tokenizer, prompt, completion)
    assert caught.value.where == "rows.jsonl:3"
    return caught.value


@pytest.fixture(scope="module")
def tokenizers(chat_tokenizer):
    return [chat_tokenizer(template) for template in (*TEMPLATES.values(), COUNTING)]


contents = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda text: "<|" not in text)
roles = st.sampled_from(["user", "assistant", "tool"])
conversations = st.lists(st.tuples(roles, contents, st.booleans()), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(talk=conversations, share=st.floats(0, 1), has_system=st.booleans())
def test_it_is_the_conversation_whose_prompt_has_the_weight_zero(tokenizers, talk, share, has_system):
    """Text, mask, borders and what a cut may take: all of it."""
    messages = [{"role": "system", "content": "it's fine"}] * has_system
    messages += [{"role": role, "content": text, "weight": int(on)} for role, text, on in talk]
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    assume(answers)
    border = min(round(share * len(messages)), answers[-1])
    prompt, completion = messages[:border], messages[border:]
    context = [message | {"weight": 0} for message in prompt]
    for tokenizer in tokenizers:
        assert encode_parts(tokenizer, prompt, completion) == encode(tokenizer, [*context, *completion])
        whole = encode(tokenizer, messages, learn_all=True)
        assert encode_parts(tokenizer, prompt, completion, learn_all=True) == whole


@settings(max_examples=40, deadline=None)
@given(pairs=st.lists(st.tuples(contents, contents), min_size=1, max_size=4), share=st.floats(0, 1))
def test_the_completions_answers_are_learned_and_nothing_else(tokenizers, pairs, share):
    messages = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    border = min(round(share * len(messages)), len(messages) - 1)
    prompt, completion = messages[:border], messages[border:]
    answers = [message["content"] for message in completion if message["role"] == "assistant"]
    for tokenizer in tokenizers:
        turns = learned_turns(tokenizer, encode_parts(tokenizer, prompt, completion))
        assert len(turns) == len(answers)
        for turn, answer in zip(turns, answers, strict=True):
            assert turn.endswith(answer + "<|im_end|>")
            assert not turn.removesuffix(answer + "<|im_end|>").strip()  # a token of the header may reach over


# Its template ends no turn, so that the last one has an EOS in addition.
NO_END = {"glm4moe"}


def trls_cases():
    for name in NAMES:
        if name not in PARTS_ONLY:
            yield name, "after an answer", TWO[:3], TWO[3:], None
        if name not in {*PARTS_ONLY, "gemma"}:
            yield name, "after a system's message", SYSTEM[:4], SYSTEM[4:], None
        if "tool_calls" in template_of(name) and "tools" in template_of(name):
            yield name, "after a call", CALLING[:5], CALLING[5:], [TOOL]


@pytest.mark.parametrize(
    ("name", "prompt", "completion", "tools"),
    [pytest.param(name, *parts, id=f"{name}, {what}") for name, what, *parts in trls_cases()],
)
def test_of_one_answer_it_is_what_trl_learns(encode_by, name, prompt, completion, tools):  # noqa: F811
    template = template_of(name)
    tokenizer, _ = encode_by(template, TWO)
    row = encode_parts(tokenizer, prompt, completion, tools=tools)
    theirs = apply_chat_template({"prompt": prompt, "completion": completion}, tokenizer, tools=tools)
    (ours,) = turns_of(tokenizer, row)
    end = tokenizer.eos_token if name in NO_END else ""
    assert tokenizer.decode(row.ids) == theirs["prompt"] + theirs["completion"] + end
    assert ours.strip() == theirs["completion"].strip() + end


# Their twins mark an answer in several pieces.
PIECES = {"diffusion_gemma", "phi3", "phi3_5"}
TWINS = [name for name in NAMES if (FOLDER / f"{name}{TWIN}.jinja").is_file() and name not in PARTS_ONLY]


@pytest.mark.parametrize("name", TWINS)
def test_of_several_answers_it_is_what_trl_learns_with_assistant_only_loss(encode_by, name):  # noqa: F811
    """But for the prompt of the first answer: where a twin marks a part of it, that is learned as in other chats."""
    prompt, completion = TWO[:3], [TWO[3], *ONE]
    tokenizer, _ = encode_by(template_of(name + TWIN), TWO)
    if name in PIECES:
        assert "does not show which of them are not learned" in error_of(tokenizer, prompt, completion).what
        return
    row = encode_parts(tokenizer, prompt, completion)
    asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    head = tokenizer.apply_chat_template(prompt, return_dict=True)["input_ids"]
    whole = tokenizer.apply_chat_template([*prompt, *completion], return_dict=True, return_assistant_tokens_mask=True)
    assert row.ids == whole["input_ids"]
    start = common_prefix_length(asked, row.ids)
    assert not any(row.learned[: common_prefix_length(head, row.ids)])
    ours, theirs = row.learned[start:], whole["assistant_masks"][start:]
    other = [token for token, on, also in zip(row.ids[start:], ours, theirs, strict=True) if on != bool(also)]
    assert not tokenizer.decode(other).strip()  # white space behind the end of a turn


@pytest.mark.parametrize("learn_all", [False, True])
def test_a_message_of_weight_zero_in_the_completion_is_not_learned(chat_tokenizer, learn_all):
    tokenizer = chat_tokenizer(CHATML)
    completion = [CONVERSATION[2] | {"weight": 0}, *CONVERSATION[3:]]
    row = encode_parts(tokenizer, CONVERSATION[:2], completion, learn_all=learn_all)
    turns = learned_turns(tokenizer, row)
    assert not any("there" in turn for turn in turns)
    assert "46<|im_end|>" in turns[-1]
    assert any("hello" in turn for turn in turns) is learn_all


def test_tools_a_column_of_the_system_sharegpts_fields_and_json_are_those_of_other_chats(chat_tokenizer):
    tokenizer = chat_tokenizer("{{ tools | tojson }}\n" + CHATML)
    expected = encode_parts(tokenizer, PROMPT, COMPLETION, tools=[TOOL])
    (answer,) = learned_turns(tokenizer, expected)
    assert answer == "46<|im_end|>"
    system = PROMPT[0]["content"]
    for prompt, completion in (
        (PROMPT[1:], COMPLETION),
        (sharegpt(PROMPT[1:]), sharegpt(COMPLETION)),
        (json.dumps(PROMPT[1:]), json.dumps(COMPLETION)),
    ):
        assert encode_parts(tokenizer, prompt, completion, tools=json.dumps([TOOL]), system=system) == expected


def test_a_prompt_may_be_empty_and_a_completion_not(chat_tokenizer):
    tokenizer = chat_tokenizer(CHATML)
    assert encode_parts(tokenizer, [], CONVERSATION) == encode(tokenizer)
    assert "`completion` is not a conversation: []" in error_of(tokenizer, CONVERSATION, []).what


@pytest.mark.parametrize("train_on_inputs", [False, True])
def test_a_completion_in_which_the_assistant_says_nothing_is_a_bad_row(prepare, train_on_inputs):
    wrong = [{"prompt": PROMPT, "completion": [{"role": role, "content": "46"}]} for role in ("user", "tool")]
    with pytest.raises(DataError) as error:
        prepare([ROW, *wrong], train_on_inputs=train_on_inputs)
    first, *lines = error.value.what.splitlines()
    assert "2 of 3 rows cannot be used" in first
    assert [line.partition(": ")[2] for line in lines] == ["`completion` has no message of the assistant's"] * 2
    assert error.value.fix == 'give what is to be learned the role "assistant"'
    weightless = [COMPLETION[0] | {"weight": 0}, *COMPLETION[1:]]
    prepare([ROW, {"prompt": PROMPT, "completion": weightless}], train_on_inputs=train_on_inputs)


@pytest.mark.parametrize(
    ("prompt", "completion", "what", "fix"),
    [
        (
            "How many?",
            COMPLETION,
            "`prompt` is not a conversation: How many?",
            "data.format: prompt_completion if both",
        ),
        (PROMPT, " 46", "`completion` is not a conversation:  46", '[{"role": "assistant", "content": "..."}], or set'),
        (["hello"], COMPLETION, "`prompt` is not a conversation: ['hello']", '[{"role": "user", "content": "..."}]'),
        ([*PROMPT, {"role": "critic", "content": ""}], COMPLETION, "message 5 of `prompt` has the role 'critic'", ""),
        (PROMPT, [{"role": "assistant", "content": None}], "message 1 of `completion` has no content", "fill in"),
    ],
)
def test_what_cannot_be_a_part_is_named(chat_tokenizer, prompt, completion, what, fix):
    error = error_of(chat_tokenizer(CHATML), prompt, completion)
    assert error.what.startswith(what)
    assert fix in error.fix


# --- from files -------------------------------------------------------------------------------------------------

ROW = {"prompt": PROMPT, "completion": COMPLETION}


@pytest.fixture
def prepare(tmp_path, chat_tokenizer, monkeypatch):
    monkeypatch.setenv("DUDE_CACHE_DIR", str(tmp_path / "cache"))

    def run(rows: list[dict], *, suffix=".jsonl", said=None, **fields: object) -> PreparedData:
        path = tmp_path / f"rows{suffix}"
        names = {name: None for row in rows for name in row}
        if suffix == ".parquet":
            datasets.Dataset.from_list([names | row for row in rows]).to_parquet(path)
        elif suffix == "":
            datasets.Dataset.from_list([names | row for row in rows]).save_to_disk(path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = DataConfig(**{"train": [DataSource(path=str(path))], "format": "chat", **fields})
        return prepare_data(config, chat_tokenizer(CHATML), 0, (said if said is not None else []).append)

    return run


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ""])
def test_rows_of_either_form_are_read_each_as_it_is(prepare, suffix):
    """An Arrow table has each column in every row, and each field in every message."""
    named = [{**PROMPT[0], "name": "Ann"}, *PROMPT[1:]]
    rows = [ROW, {"messages": CONVERSATION}, {"prompt": named, "completion": COMPLETION, "id": 7}]
    said: list[str] = []
    first, whole, other = prepare(rows, suffix=suffix, said=said).train
    assert first.input_ids == whole.input_ids == other.input_ids
    assert first.labels == other.labels != whole.labels
    notes = [line for line in said if "not read" in line]
    assert ["id" in note for note in notes] == [True]
    assert not any("prompt" in note for note in notes)


def test_a_prompt_beside_messages_is_not_read_and_that_is_told(prepare):
    said: list[str] = []
    rows = [{"prompt": "hello", "messages": CONVERSATION}]
    assert list(prepare(rows, said=said).train) == list(prepare([{"messages": CONVERSATION}]).train)
    assert any(line.endswith("columns that are not read: prompt") for line in said)


def test_the_shown_example_and_the_lost_turns_are_of_the_completion(prepare):
    report = prepare([ROW]).train_report
    (context, is_learned), (answer, _), *_ = report.example
    assert not is_learned
    assert "there" in context
    assert answer == "46<|im_end|>"
    rows = [{"prompt": PROMPT[:4], "completion": [*COMPLETION, *CONVERSATION[1:3] * 3]}]
    report = prepare(rows, max_length=prepare([ROW]).train_report.longest_row).train_report
    assert (report.shortened_chats, report.lost_turns, report.cut_answers) == (1, 3, 0)


def test_it_is_encoded_anew_where_another_part_is_learned_and_known_as_the_same_text(prepare, tmp_path):
    said: list[str] = []
    split = prepare([ROW], said=said)
    other = prepare([{"prompt": PROMPT[:2], "completion": CONVERSATION[2:]}], said=said)
    assert not any("encoded before" in line for line in said)
    assert split.fingerprint != other.fingerprint
    prepare([ROW], said=said)
    assert any("encoded before" in line for line in said)
    assert prepare([ROW], train_on_inputs=True).fingerprint != split.fingerprint
    path = tmp_path / "validation.jsonl"
    path.write_text(json.dumps({"messages": CONVERSATION}) + "\n")
    (warning,) = prepare([ROW], validation=[DataSource(path=str(path))]).warnings()
    assert warning.startswith("data.validation: 1 of 1 rows are in data.train too")


def test_a_prompt_is_asked_as_the_rows_have_it(prepare, chat_tokenizer):
    (row,) = prepare([ROW]).train
    config = DataConfig(train=[DataSource(path="rows.jsonl")], format="chat")
    asked = prompt_form(chat_tokenizer(CHATML), config, raw=False).prompt(PROMPT)
    learned = [label >= 0 for label in row.labels]
    assert asked.ids == row.input_ids[: learned.index(True)]


def test_lists_of_messages_in_the_format_of_texts_are_told_their_own(prepare):
    with pytest.raises(DataError) as caught:
        prepare([ROW], format="prompt_completion")
    assert caught.value.what == "column 'prompt' is a list, not text"
    assert caught.value.fix.startswith("set data.format: chat, ")


def test_a_part_that_is_not_there_is_named(prepare):
    with pytest.raises(DataError) as caught:
        prepare([ROW, {"prompt": PROMPT, "completion": None}])
    assert caught.value.what == "column 'completion' has no value (null)"
    with pytest.raises(DataError) as caught:
        prepare([{"prompt": PROMPT, "chosen": COMPLETION, "rejected": COMPLETION}])
    assert caught.value.what.startswith("no column 'messages' or 'conversations'; the columns are: prompt, chosen")
    assert "`prompt` and `completion`" in caught.value.fix
