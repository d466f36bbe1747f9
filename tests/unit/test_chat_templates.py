"""The chat templates of published models, which TRL ships, some with a twin that marks the assistant's text.

TRL is read for these files alone.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from dude_cli.config import DataConfig
from dude_cli.data import prepare_data, set_chat_template
from dude_cli.data.chat import ChatEncoder
from dude_cli.data.encode import TextEncoder
from dude_cli.data.truncation import truncate
from dude_cli.errors import DataError

FOLDER = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
TWIN = "_training"
NAMES = sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith(TWIN))
TAG = r"</?[|｜]?[A-Za-z▁_]+[|｜]?>"
# They take a picture too, and want a text in parts.
PARTS_ONLY = {"idefics3", "llava_next", "smolvlm"}
# It refuses a system's message.
NO_SYSTEM = {"gemma"}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "tells it",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "where"}}},
    },
}
ONE = [user("How deep?"), assistant("Ten yards.")]
TWO = [*ONE, user("How wide?"), assistant("Two miles.")]
SYSTEM = [{"role": "system", "content": "Be brief."}, *TWO]
CALLING = [
    user("How deep?"),
    assistant("", tool_calls=[CALL]),
    {"role": "tool", "content": "rain"},
    assistant("Ten yards."),
    user("How wide?"),
    assistant("Two miles."),
]
ANSWERS = ["Ten yards.", "Two miles."]


def template_of(name):
    return (FOLDER / f"{name}.jinja").read_text()


@pytest.fixture(scope="module")
def encode(make_tokenizer):
    """Encode a conversation by a template; all its tags are tokens of their own, those of control are special."""

    def encode(template, messages, tools=None, tags_are_tokens=True):
        tokenizer = make_tokenizer(None, eos_token="</s>", bos_token="<s>")
        tags = sorted(set(re.findall(TAG, template)) - {"</s>", "<s>"})
        control = [tag for tag in tags if "|" in tag or "｜" in tag or tag.endswith("_of_turn>")]
        if tags_are_tokens:
            tokenizer.add_tokens([tag for tag in tags if tag not in control])
        tokenizer.add_tokens(control, special_tokens=True)
        tokenizer.chat_template = template
        row = {"messages": messages} | ({} if tools is None else {"tools": tools})
        return tokenizer, ChatEncoder(TextEncoder(tokenizer)).encode(row, where="row 1", learn_all=False)

    return encode


def turns_of(tokenizer, row):
    """The learned tokens, each stretch of them decoded."""
    turns, before = [], False
    for token, on in zip(row.ids, row.learned, strict=True):
        if on and not before:
            turns.append([])
        if on:
            turns[-1].append(token)
        before = on
    return [tokenizer.decode(turn) for turn in turns]


def cases():
    for name in NAMES:
        if name in PARTS_ONLY:
            continue
        yield name, "one turn", ONE, None
        yield name, "two turns", TWO, None
        if name not in NO_SYSTEM:
            yield name, "system", SYSTEM, None
        if re.search(r"\btools\b", template_of(name)) and "tool_calls" in template_of(name):
            yield name, "a call", CALLING, [TOOL]


@pytest.mark.parametrize(
    ("name", "messages", "tools"),
    [pytest.param(name, messages, tools, id=f"{name}, {what}") for name, what, messages, tools in cases()],
)
def test_each_answer_is_learned_up_to_the_end_of_its_turn_and_nothing_of_the_others(encode, name, messages, tools):
    tokenizer, row = encode(template_of(name), messages, tools)
    turns = turns_of(tokenizer, row)
    answers = [message for message in messages if message["role"] == "assistant"]
    assert len(turns) == len(answers)
    for turn, answer in zip(turns, answers, strict=True):
        said = answer["content"] or "Bern"
        assert said in turn
        assert not any(other in turn for other in ("deep", "wide", "brief", "rain"))
        behind = turn.rpartition(said)[2]
        if answer["content"]:
            assert re.fullmatch(rf"\s*({TAG}\s*)+", behind), f"{behind!r} is no end of a turn"
        else:
            assert re.search(rf"{TAG}\s*\Z", behind), f"{behind!r} has no end of a turn"


@pytest.mark.parametrize(
    ("name", "messages", "tools"),
    [
        pytest.param(name, messages, tools, id=f"{name}, {what}")
        for name, what, messages, tools in cases()
        # The generation prompt behind a tool's answer is empty there, and the text has a new turn's head.
        if (FOLDER / f"{name}{TWIN}.jinja").is_file() and (name, what) != ("diffusion_gemma", "a call")
    ],
)
def test_it_is_what_the_marks_of_the_training_twin_say_but_for_the_prompt_of_the_answer(encode, name, messages, tools):
    tokenizer, ours = encode(template_of(name), messages, tools)
    _, theirs = encode(template_of(name + TWIN), messages, tools)
    if ours.ids != theirs.ids:
        pytest.skip("the twin writes another text")
    more = [
        index for index, (mine, other) in enumerate(zip(ours.learned, theirs.learned, strict=True)) if mine != other
    ]
    # Phi-3's twin marks the end of the text by itself, and so not the line break in front of it.
    assert not any(ours.learned[index] and tokenizer.decode(ours.ids[index]).strip() for index in more)
    more = [index for index in more if not ours.learned[index]]
    # What the twin marks beyond ours is in the generation prompt: the model is given it.
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True, tools=tools)
    for index in more:
        assert tokenizer.decode(ours.ids[index]) in prompt
    assert not set(ANSWERS) & {tokenizer.decode(ours.ids[index]) for index in more}


@pytest.mark.parametrize("name", sorted(set(NAMES) - PARTS_ONLY - {"deepseek_r1_distill", "deepseekv3"}))
def test_thoughts_inside_of_an_answer_are_there_once(encode, name):
    """Where the prompt for the answer begins them, they are learned from there on."""
    thinking = [user("How deep?"), assistant("<think>\nIt is a lake.\n</think>\n\nTen yards.")]
    tokenizer, row = encode(template_of(name), thinking)
    assert tokenizer.decode(row.ids).count("It is a lake.") == 1
    assert "It is a lake." in turns_of(tokenizer, row)[0]


@pytest.mark.parametrize("name", sorted(set(NAMES) - PARTS_ONLY))
def test_a_conversation_that_is_cut_behind_a_turn_ends_once(encode, name):
    """GLM's template ends a turn with the first token of the next one, and the last turn not at all."""
    tokenizer, row = encode(template_of(name), [*TWO, *ONE])
    assert len(row.stops) == 3
    for number, stop in enumerate(row.stops[:-1], start=1):
        cut = truncate(row, stop + 1)
        assert turns_of(tokenizer, cut) == turns_of(tokenizer, row)[:number]
        assert cut.learned[-1]


def test_a_token_that_the_tokenizer_does_not_have_is_named(make_tokenizer):
    """Llama 3's template puts BOS in front of a text, which fails without one; others write nothing in its place."""
    tokenizer = make_tokenizer(None, eos_token="</s>")
    tokenizer.chat_template = template_of("llama3")
    encoder = ChatEncoder(TextEncoder(tokenizer))
    row = {"messages": ONE}
    for use in (lambda: encoder.encode(row, where="row 1", learn_all=False), lambda: encoder.prompt(ONE[:1])):
        with pytest.raises(DataError) as caught:
            use()
        assert caught.value.what == "the chat template asks for `bos_token`, which the tokenizer does not have"
        assert "tokenizer_config.json" in caught.value.fix
        assert "data.chat_template" in caught.value.fix
    tokenizer.bos_token = "<s>"
    encoder.encode(row, where="row 1", learn_all=False)


# They write what the assistant says beside a call behind the tool's answer.
WORDS_BEHIND = {"diffusion_gemma", "gemma4", "gemma4_v3", "gemma4_v4", "gemma4_v5"}
# They leave it out.
NO_WORDS = {"gptoss", "llama3_1", "llama3_2", "muse_glimmer"}


@pytest.mark.parametrize("name", sorted({name for name, what, *_ in cases() if what == "a call"}))
def test_words_beside_a_call_are_learned_in_its_turn(encode, name):
    messages = [CALLING[0], assistant("Let me look.", tool_calls=[CALL]), *CALLING[2:]]
    if name in WORDS_BEHIND:
        with pytest.raises(DataError, match="changes what messages say"):
            encode(template_of(name), messages, [TOOL])
        return
    tokenizer, row = encode(template_of(name), messages, [TOOL])
    first, *others = turns_of(tokenizer, row)
    assert ("Let me look." in first) == (name not in NO_WORDS)
    assert "Bern" in first
    assert "rain" not in first
    assert len(others) == 2


def test_words_beside_the_last_call_are_not_left_out(encode):
    with pytest.raises(DataError, match="leaves out a part of the last answer"):
        encode(template_of("llama3_1"), [CALLING[0], assistant("Let me look.", tool_calls=[CALL])], [TOOL])


@pytest.mark.parametrize("name", ["llama3_1", "phi3", "qwen2_5", "qwen3"])
def test_of_an_answer_that_opens_the_conversation_the_words_are_learned(encode, name):
    """And not what a template puts in front of it, such as a system's message of its own."""
    tokenizer, row = encode(template_of(name), [assistant("Ask me."), *ONE])
    first, second = turns_of(tokenizer, row)
    assert first.lstrip().startswith("Ask me.<|")  # where a token of the header reaches over, it is learned too
    assert "Ten yards." in second


@pytest.mark.parametrize(
    ("name", "ends"), [("phi3", {"<|end|>", "</s>"}), ("gptoss", {"<|end|>", "<|return|>"}), ("qwen3", {"<|im_end|>"})]
)
def test_an_answer_may_end_as_any_turn_does(encode, name, ends):
    tokenizer, _ = encode(template_of(name), ONE)
    found = ChatEncoder(TextEncoder(tokenizer)).ends_of_turns()
    assert {tokenizer.decode(token) for token in found} == ends


def test_each_of_several_calls_of_one_tool_has_to_be_there(encode):
    calls = [CALL, {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}]
    messages = [CALLING[0], assistant("", tool_calls=calls), *CALLING[2:]]
    with pytest.raises(DataError, match="leaves the call of 'weather' out"):
        encode(template_of("gptoss"), messages, [TOOL])
    tokenizer, row = encode(template_of("qwen3"), messages, [TOOL])
    assert "Rome" in turns_of(tokenizer, row)[0]


@pytest.mark.parametrize("name", sorted(PARTS_ONLY - {"llava_next"}))
def test_a_template_that_does_not_write_text_is_refused(encode, name):
    with pytest.raises(DataError, match="leaves out the user's message"):
        encode(template_of(name), ONE)


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "deepseekv3"])
def test_a_template_that_drops_the_thoughts_of_the_last_answer_is_refused(encode, name):
    with pytest.raises(DataError, match="leaves out a part of the last answer") as caught:
        encode(template_of(name), [user("How deep?"), assistant("<think>\nlong\n</think>\n\nTen yards.")])
    assert "data.chat_template" in caught.value.fix


def test_thoughts_in_a_field_that_a_template_does_not_read_are_not_dropped_in_silence(encode):
    thinking = [user("How deep?"), assistant("Ten yards.", reasoning_content="It is a lake.")]
    with pytest.raises(DataError, match="`reasoning_content`"):
        encode(template_of("llama3"), thinking)
    tokenizer, row = encode(template_of("qwen3"), thinking)
    assert "It is a lake." in tokenizer.decode(row.ids)


@pytest.mark.parametrize("is_inside", [False, True], ids=["in a field", "inside of the answer"])
def test_the_thoughts_of_earlier_answers_may_be_left_out(encode, is_inside):
    def thought(thoughts, text):
        return (
            assistant(f"<think>\n{thoughts}\n</think>\n\n{text}") if is_inside else assistant(text, thinking=thoughts)
        )

    thinking = [
        *(user("How deep?"), thought("It is a lake.", "Ten yards.")),
        *(user("How wide?"), thought("It has two ends.", "Two miles.")),
    ]
    tokenizer, row = encode(template_of("qwen3"), thinking)
    assert turns_of(tokenizer, row) == [
        "Ten yards.<|im_end|>",
        "<think>\nIt has two ends.\n</think>\n\nTwo miles.<|im_end|>",
    ]


def test_a_tag_is_learned_whole_where_it_is_several_tokens(encode):
    """The prompt ends in `<think>`, and `<t` is all that it has in common with the call."""
    tokenizer, row = encode(template_of("qwen3_5_think"), CALLING, [TOOL], tags_are_tokens=False)
    assert turns_of(tokenizer, row)[0].startswith("<tool_call>")


def calling(arguments, **fields):
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [CALLING[0], assistant("", tool_calls=[call], **fields), *CALLING[2:]]


@pytest.mark.parametrize("arguments", [{"days": 3}, {"days": [3]}, {}, {"city": {"name": "Bern"}}], ids=repr)
def test_a_call_is_learned_to_its_end_whatever_its_arguments_end_with(encode, arguments):
    tokenizer, row = encode(template_of("qwen3"), calling(arguments), [TOOL])
    assert turns_of(tokenizer, row)[0].endswith(f"{json.dumps(arguments)}}}\n</tool_call><|im_end|>")


def test_the_thoughts_in_front_of_a_call_may_be_left_out_too(encode):
    """GPT-OSS's template takes a call with thoughts or with content, and refuses both."""
    tokenizer, row = encode(template_of("gptoss"), calling({"city": "Bern"}, thinking="It is far."), [TOOL])
    ends = [turn.rpartition("<")[2] for turn in turns_of(tokenizer, row)]
    assert ends == ["|call|>", "|end|>", "|return|>"]


ASKS_WITH_THOUGHTS = {name for name in NAMES if name.startswith(("deepseek", "nemotron"))}


@pytest.mark.parametrize("name", sorted(set(NAMES) - PARTS_ONLY))
def test_a_prompt_that_the_rows_do_not_have_is_known(encode, name):
    tokenizer, _ = encode(template_of(name), ONE)
    encoder = ChatEncoder(TextEncoder(tokenizer))
    prompt = encoder.other_prompt({"messages": TWO}, "row 1")
    assert (prompt is not None) == (name in ASKS_WITH_THOUGHTS)
    assert prompt is None or prompt.endswith("<think>\n")
    assert encoder.other_prompt({"messages": [TWO[0]]}, "row 1") is None
    assert encoder.other_prompt({"messages": [*TWO, TWO[0]]}, "row 1") == prompt


def test_a_value_makes_the_prompt_that_of_the_rows(encode):
    tokenizer, _ = encode(template_of("nemotron_3_nano"), ONE)
    set_chat_template(tokenizer, None, {"enable_thinking": False}, lambda note: None)
    assert ChatEncoder(TextEncoder(tokenizer)).other_prompt({"messages": TWO}, "row 1") is None


def test_a_history_that_is_written_otherwise_is_no_other_prompt(encode):
    """GPT-OSS's template leaves the thoughts in front of a call out once there is an answer."""
    tokenizer, _ = encode(template_of("gptoss"), ONE)
    row = {"messages": calling({"city": "Bern"}, thinking="It is far.")[:4], "tools": [TOOL]}
    assert ChatEncoder(TextEncoder(tokenizer)).other_prompt(row, "row 1") is None


def test_a_template_that_takes_no_part_of_a_row_has_no_other_prompt(encode):
    closed = "{% if messages[-1].role != 'assistant' %}{{ raise_exception('no answer') }}{% endif %}"
    answer = "{% generation %}{{ m.content }}</s>{% endgeneration %}"
    tokenizer, _ = encode(closed + "{% for m in messages %}" + answer + "{% endfor %}", ONE)
    assert ChatEncoder(TextEncoder(tokenizer)).other_prompt({"messages": ONE}, "row 1") is None


def test_the_user_is_told_of_a_prompt_that_the_rows_do_not_have(encode, tmp_path):
    tokenizer, _ = encode(template_of("deepseek_r1_distill"), ONE)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": TWO}) + "\n")
    config = DataConfig.model_validate({"train": [{"path": str(tmp_path / "rows.jsonl")}], "format": "chat"})
    said: list[str] = []
    prepare_data(config, tokenizer, seed=0, say=said.append)
    assert any("asks for an answer with '<｜Assistant｜><think>\\n'" in line for line in said)


USING = Path(__file__).parents[2] / "docs/using.md"


@pytest.fixture(params=["byte-level", "sentencepiece"])
def base_tokenizer(request, make_tokenizer, sentencepiece_chat_tokenizer):
    """One without a chat template, as base models have."""
    if request.param == "byte-level":
        return make_tokenizer("<s> $A", bos_token="<s>", eos_token="</s>")
    return sentencepiece_chat_tokenizer(None)


def test_the_template_of_the_documentation_fits_any_tokenizer(base_tokenizer, tmp_path):
    (text,) = re.findall(r"```jinja\n(.*?)```", USING.read_text(), re.DOTALL)
    (tmp_path / "chat.jinja").write_text(text)
    notes: list[str] = []
    set_chat_template(base_tokenizer, str(tmp_path / "chat.jinja"), {}, notes.append)
    assert not notes
    encoder = ChatEncoder(TextEncoder(base_tokenizer))
    row = encoder.encode({"messages": SYSTEM}, where="row 1", learn_all=False)
    assert turns_of(base_tokenizer, row) == ["Ten yards.</s>", "Two miles.</s>"]
    prompt, ids = encoder.prompt(SYSTEM[:-1])
    said = ["system\nBe brief.", "user\nHow deep?", "assistant\nTen yards.</s>", "user\nHow wide?", "assistant\n"]
    assert prompt == "<s>### " + "\n\n### ".join(said)
    assert row.ids[0] == base_tokenizer.bos_token_id
    assert row.ids[: len(ids)] == ids
