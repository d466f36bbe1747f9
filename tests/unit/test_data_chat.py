from __future__ import annotations

from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dude_cli.data.chat import ChatEncoder
from dude_cli.data.encode import TextEncoder
from dude_cli.data.truncation import truncate
from dude_cli.errors import DataError, UsageError

HEAD = "<|im_start|>{{ m.role }}\n"
CHATML = (
    "{% for m in messages %}" + HEAD + "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def marked(block: str, after: str) -> str:
    assistant = "{% generation %}" + block + "{% endgeneration %}" + after
    return (
        "{% for m in messages %}"
        + HEAD
        + "{% if m.role == 'assistant' %}"
        + assistant
        + "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    )


TEMPLATES = {
    "no marks": CHATML,
    "marks with the end of turn": marked("{{ m.content }}<|im_end|>", "\n"),
    "marks with the end of turn and a line break": marked("{{ m.content }}<|im_end|>\n", ""),
    "marks without the end of turn": marked("{{ m.content }}", "<|im_end|>\n"),
}
# No part of a conversation is the beginning of another one.
COUNTING = "{{ messages | length }}\n" + CHATML
CONVERSATION = [
    {"role": "system", "content": "it's fine"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": " there\n"},
    {"role": "user", "content": "How many?"},
    {"role": "assistant", "content": "46"},
]


def encode(tokenizer, conversation=CONVERSATION, *, learn_all=False):
    row = {"messages": conversation}
    return ChatEncoder(TextEncoder(tokenizer)).encode(row, where="row 1", learn_all=learn_all)


def learned_turns(tokenizer, row) -> list[str]:
    turns: list[list[int]] = [[]]
    for token, on in zip(row.ids, row.learned, strict=True):
        if on:
            turns[-1].append(token)
        elif turns[-1]:
            turns.append([])
    return [tokenizer.decode(turn) for turn in turns if turn]


@pytest.mark.parametrize("template", [*TEMPLATES.values(), COUNTING], ids=[*TEMPLATES, "counting"])
def test_the_assistants_turns_are_learned_with_their_end_and_nothing_else(chat_tokenizer, template):
    tokenizer = chat_tokenizer(template)
    row = encode(tokenizer)
    assert learned_turns(tokenizer, row) == [" there\n<|im_end|>", "46<|im_end|>"]
    rendered = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert tokenizer.decode(row.ids) == rendered


contents = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda text: "<|" not in text)


@pytest.fixture(scope="module")
def tokenizers(chat_tokenizer):
    return [chat_tokenizer(template) for template in (*TEMPLATES.values(), COUNTING)]


@settings(max_examples=40, deadline=None)
@given(pairs=st.lists(st.tuples(contents, contents), min_size=1, max_size=3))
def test_learned_text_is_the_contents_for_any_text(tokenizers, pairs):
    messages = []
    for user, assistant in pairs:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    for tokenizer in tokenizers:
        turns = learned_turns(tokenizer, encode(tokenizer, messages))
        assert len(turns) == len(pairs)
        for turn, (_, assistant) in zip(turns, pairs, strict=True):
            assert turn.endswith(assistant + "<|im_end|>")
            assert not turn.removesuffix(assistant + "<|im_end|>").strip()  # a token of the header may reach over


def test_end_of_turn_text_inside_an_answer_is_not_learned_as_an_end(chat_tokenizer):
    tokenizer = chat_tokenizer(CHATML)
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a<|im_end|>b"}]
    row = encode(tokenizer, messages)
    ends = [i for i, (t, on) in enumerate(zip(row.ids, row.learned, strict=True)) if on and t == tokenizer.eos_token_id]
    assert len(ends) == 1
    assert tokenizer.decode(row.ids[ends[0] - 1]) == "b"


@pytest.mark.parametrize("marks", [("", ""), ("{% generation %}", "{% endgeneration %}")], ids=["no marks", "marks"])
@pytest.mark.parametrize("space", ["", "\n", "\n\n", " \n"])
@pytest.mark.parametrize("turns", [1, 2])
def test_the_end_of_a_turn_is_learned_whatever_white_space_follows(turns, space, marks, sentencepiece_chat_tokenizer):
    """With Llama's tokenizer "</s>" and a line break are three tokens, the second of them a space."""
    answer = marks[0] + "{{ m.content }}</s>" + space + marks[1]
    template = (
        "{% for m in messages %}<|{{ m.role }}|>\n"
        "{% if m.role == 'assistant' %}" + answer + "{% else %}{{ m.content }}</s>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    tokenizer = sentencepiece_chat_tokenizer(template)
    question = {"role": "user", "content": "hello"}
    row = encode(tokenizer, [question, {"role": "assistant", "content": "so it is"}] * turns)
    assert learned_turns(tokenizer, row) == ["so it is</s>"] * turns
    assert row.ids.count(tokenizer.eos_token_id) == 2 * turns


def test_template_without_an_end_of_turn_gets_one_eos(chat_tokenizer):
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer = chat_tokenizer(template, eos_token="</s>")
    row = encode(tokenizer)
    assert learned_turns(tokenizer, row)[-1] == " 46\n</s>"
    assert row.ids.count(tokenizer.eos_token_id) == 1
    # And is where an answer ends: not at the line break in front of the next message.
    assert ChatEncoder(TextEncoder(tokenizer)).ends_of_turns() == {tokenizer.eos_token_id}


@pytest.mark.parametrize("marks", [("", ""), ("{% generation %}", "{% endgeneration %}")], ids=["no marks", "marks"])
def test_a_field_without_a_value_is_no_field(marks, chat_tokenizer):
    """A column of messages, as in a parquet file, has each field in all of them if one has it."""
    template = (
        "{% for m in messages %}{{ m.role }}{% if m.name is defined %} ({{ m.name }}){% endif %}: "
        "{% if m.role == 'assistant' %}" + marks[0] + "{{ m.content }}<|im_end|>" + marks[1] + "\n"
        "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = chat_tokenizer(template)
    conversation = [{"role": "user", "content": "hello", "name": "Ann"}, {"role": "assistant", "content": "46"}]
    filled = [{"name": None, "tool_calls": None, **message} for message in conversation]
    assert encode(tokenizer, filled) == encode(tokenizer, conversation)
    assert "None" not in tokenizer.decode(encode(tokenizer, filled).ids)


# How the templates of Llama 3.2 and of gpt-oss ask for the date.
DATED = """{%- if strftime_now is defined %}{%- set today = strftime_now("%d %b %Y") %}{%- else %}never{%- endif %}
{{- today + ", " + strftime_now( '%Y-%m-%d' ) }}
"""


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_the_date_that_a_template_tells_is_that_of_the_moment_it_is_given(chat_tokenizer, template):
    tokenizer = chat_tokenizer(DATED + template)
    encoder = ChatEncoder(TextEncoder(tokenizer), datetime(2026, 3, 1))
    row = encoder.encode({"messages": CONVERSATION}, where="row 1", learn_all=False)
    assert tokenizer.decode(row.ids).startswith("01 Mar 2026, 2026-03-01\n<|im_start|>")
    assert encoder.prompt(CONVERSATION[:1])[0].startswith("01 Mar 2026, 2026-03-01\n<|im_start|>")
    assert "strftime_now" not in encoder.templates.text
    now = datetime.now()
    assert tokenizer.decode(encode(tokenizer).ids).startswith((f"{now:%d %b %Y}", f"{datetime.now():%d %b %Y}"))


def test_bos_of_the_template_stays_when_the_start_is_cut(chat_tokenizer):
    tokenizer = chat_tokenizer("<s>" + CHATML, bos_token="<s>")
    row = encode(tokenizer, CONVERSATION[:3])
    kept = truncate(row, 8)
    assert row.leading == 1
    assert kept.ids[0] == tokenizer.bos_token_id
    assert len(kept.ids) == 8
    assert tokenizer.decode([t for t, on in zip(kept.ids, kept.learned, strict=True) if on]) == " there\n<|im_end|>"


WORDS = "How many is the cat on the mat? "


@settings(max_examples=100, deadline=None)
@given(
    system=st.integers(0, 3),
    lengths=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.booleans()), min_size=1, max_size=4),
    share=st.floats(0.05, 1.1),
    last_is_a_question=st.booleans(),
)
@pytest.mark.parametrize("template", ["<s>" + CHATML, CHATML], ids=["BOS", "no BOS"])
def test_a_long_conversation_keeps_whole_turns(chat_tokenizer, template, system, lengths, share, last_is_a_question):
    tokenizer = chat_tokenizer(template, bos_token="<s>")
    messages = [{"role": "system", "content": WORDS * system}] if system else []
    for question, answer, is_learned in lengths:
        messages.append({"role": "user", "content": f"Q{len(messages)} " + WORDS * question})
        messages.append({"role": "assistant", "content": WORDS * answer, "weight": int(is_learned)})
    if last_is_a_question:
        messages.append({"role": "user", "content": WORDS})
    row = encode(tokenizer, messages)
    learned = [index for index, message in enumerate(messages) if message.get("weight")]
    whole = [len(encode(tokenizer, messages[: index + 1]).ids) - 1 for index in learned]  # the line break is cut
    max_length = max(4, round(share * len(row.ids)))
    kept = truncate(row, max_length)
    assert len(kept.ids) <= max_length
    if len(row.ids) <= max_length or not learned:
        assert kept.lost_turns == 0
    elif whole[0] <= max_length:
        stop = max(length for length in whole if length <= max_length)
        assert kept.ids == row.ids[:stop]
        assert kept.learned == row.learned[:stop]
        assert kept.lost_turns == sum(length > max_length for length in whole)
        assert not kept.is_answer_cut
    else:
        answer = learned_turns(tokenizer, row)[0]
        (found,) = learned_turns(tokenizer, kept) or [""]
        assert answer.startswith(found)
        assert kept.is_answer_cut == (found != answer)
        assert kept.lost_turns == len(learned) - 1


@pytest.mark.parametrize("system", ["it's fine", "How many? Say how many."])
def test_where_the_first_answer_does_not_fit_the_users_words_lose_their_start(chat_tokenizer, system):
    tokenizer = chat_tokenizer("<s>" + CHATML, bos_token="<s>")
    talk = [
        {"role": "system", "content": system},
        {"role": "user", "content": "How many? " * 20},
        {"role": "assistant", "content": "46"},
    ]
    row = encode(tokenizer, talk)
    first, last = row.words
    assert tokenizer.decode(row.ids[first:last]).strip() == ("How many? " * 20).strip()
    for left in (1, 30):
        kept = truncate(row, row.stops[-1] - (last - first) + left)
        assert kept.ids == row.ids[:first] + row.ids[last - left : row.stops[-1]]
        assert (kept.is_start_lost, kept.is_question_lost, kept.is_answer_cut) == (True, False, False)
    # Without room for any of them what is around them goes too, down to BOS, and the answer stays.
    answer = row.stops[-1] - row.context
    tight = truncate(row, answer + 5)
    assert tight.ids == [tokenizer.bos_token_id, *row.ids[row.context - 4 : row.stops[-1]]]
    assert (tight.is_question_lost, tight.is_answer_cut) == (True, False)


def test_the_words_of_the_context_are_those_of_users_and_tools_in_front_of_what_is_learned(chat_tokenizer):
    talk = [
        {"role": "user", "content": "the cat"},
        {"role": "assistant", "content": "the mat", "weight": 0},
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "46"},
        {"role": "user", "content": "pears"},
    ]
    tokenizer = chat_tokenizer(CHATML)
    row = encode(tokenizer, talk)
    found = tokenizer.decode(row.ids[slice(*row.words)])
    assert found.startswith("the cat<|im_end|>")
    assert found.endswith("user\nHow many?")
    told = [{"role": "system", "content": "Say how many, if asked: How many?"}, *talk[2:]]
    row = encode(tokenizer, told)  # the system's message has the words too
    assert tokenizer.decode(row.ids[: row.words[0]]).endswith("<|im_end|>\n<|im_start|>user\n")
    assert encode(tokenizer, talk[:1]).words is None  # nothing is learned
    assert encode(tokenizer, talk[1:2]).words is None  # nothing is said in front of it


def test_a_conversation_that_is_cut_behind_a_turn_ends_as_one_that_is_not(chat_tokenizer):
    """A template without ends of turns: one EOS is learned at the end of each row."""
    tokenizer = chat_tokenizer(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        eos_token="</s>",
    )
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "46"}]
    one, three = encode(tokenizer, talk), encode(tokenizer, talk * 3)
    assert one.ids[-1] == three.ids[-1] == tokenizer.eos_token_id
    kept = truncate(three, len(one.ids))
    assert (kept.ids, kept.learned, kept.lost_turns) == (one.ids, one.learned, 2)
    assert truncate(three, len(one.ids) - 1).lost_turns == 2  # not one is whole then
    two = encode(tokenizer, talk * 2)
    assert truncate(three, len(two.ids) - 1).ids == one.ids  # there would be no room for the second one's EOS
    assert truncate(three, len(three.ids)).ids == three.ids
    assert truncate(three, len(three.ids) - 1).lost_turns == 1


def test_train_on_inputs_learns_every_turn(chat_tokenizer):
    row = encode(chat_tokenizer(CHATML), learn_all=True)
    assert all(row.learned)


def test_conversation_without_an_assistant_has_nothing_to_learn(chat_tokenizer):
    for template in TEMPLATES.values():
        assert not any(encode(chat_tokenizer(template), CONVERSATION[:2]).learned)


def error_of(tokenizer, conversation=CONVERSATION) -> DataError:
    with pytest.raises(DataError) as caught:
        encode(tokenizer, conversation)
    assert caught.value.where
    assert caught.value.fix
    return caught.value


def test_tokenizer_without_a_chat_template(plain_tokenizer, chat_tokenizer):
    several = chat_tokenizer({"one": CHATML, "two": CHATML})
    for tokenizer, what in ((plain_tokenizer, "no chat template"), (several, r"several chat templates \(one, two\)")):
        with pytest.raises(UsageError, match=what) as caught:
            encode(tokenizer)
        assert "`data.chat_template`" in caught.value.fix
    several.chat_template["default"] = TEMPLATES["no marks"]
    assert encode(several) == encode(chat_tokenizer(CHATML))


def test_a_template_that_writes_the_last_turn_otherwise_still_shows_each_turn(chat_tokenizer):
    last_only = (
        "{% for m in messages %}" + HEAD + "{% if loop.last %}thinking {% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = chat_tokenizer(last_only)
    assert learned_turns(tokenizer, encode(tokenizer)) == [" there\n<|im_end|>", "thinking 46<|im_end|>"]


def test_a_template_that_changes_what_is_said_is_refused(chat_tokenizer):
    loud = (
        "{% for m in messages %}" + HEAD + "{{ m.content if loop.last else m.content | upper }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    error = error_of(chat_tokenizer(loud))
    assert "changes what messages say" in error.what
    assert "{% generation %}" in error.fix
    assert error.where == "row 1"


@pytest.mark.parametrize(
    ("number", "whose"), [(0, "the system's message: \"it's fine\""), (1, "the user's message: 'hello'")]
)
def test_a_message_that_the_template_leaves_out_is_refused(number, whose, chat_tokenizer):
    """Mistral's has the system's message in front of the last question alone, and only where no answer follows."""
    without = CHATML.replace(HEAD, "{% if loop.index0 != " + str(number) + " %}" + HEAD, 1)
    without = without.replace("<|im_end|>\n{% endfor %}", "<|im_end|>\n{% endif %}{% endfor %}")
    assert f"leaves out {whose}" in error_of(chat_tokenizer(without)).what


def test_words_in_two_places_do_not_show_where_a_turn_is(chat_tokenizer):
    quoting = (
        "{% for m in messages %}"
        + HEAD
        + "{% if loop.index0 > 1 %}({{ messages[loop.index0 - 2].content }}){% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{{ messages | length }}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert "changes what messages say" in error_of(chat_tokenizer(quoting)).what


def test_what_the_template_raises_is_shown(chat_tokenizer):
    template = "{% if messages[0].role != 'user' %}{{ raise_exception('start with user') }}{% endif %}" + CHATML
    assert "start with user" in error_of(chat_tokenizer(template)).what


@pytest.mark.parametrize("conversation", ["text", [], ["text"], [{"content": "a"}], None])
def test_what_is_not_a_conversation(chat_tokenizer, conversation):
    assert "not a conversation" in error_of(chat_tokenizer(CHATML), conversation).what
