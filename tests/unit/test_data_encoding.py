from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dude_cli.config import DataConfig, DataSource, RowForm
from dude_cli.data.encode import Encoded, TextEncoder, format_columns, row_texts
from dude_cli.data.truncation import split, truncate
from dude_cli.errors import DataError

PIECES = ["The cat", " sat", "\n", " ", "12", "é", "😀", "</s>", "<s>", "Answer:", "</s></s>"]
texts = st.one_of(
    st.text(max_size=40),
    st.lists(st.sampled_from(PIECES), max_size=8).map("".join),
)


def form(**fields: object) -> RowForm:
    source = DataSource(path="rows.jsonl")
    return DataConfig(train=[source], **fields).form(source)


def encode(tokenizer, prompt: str, completion: str, *, learn_all: bool = False) -> Encoded:
    return TextEncoder(tokenizer).encode_pairs([(prompt, completion)], learn_all=learn_all)[0]


@settings(max_examples=200, deadline=None)
@given(prompt=texts, completion=texts)
def test_exactly_one_eos_is_learned_and_it_is_the_last_token(tokenizer, prompt, completion):
    for learn_all in (False, True):
        row = encode(tokenizer, prompt, completion, learn_all=learn_all)
        learned = [token for token, on in zip(row.ids, row.learned, strict=True) if on]
        assert learned.count(tokenizer.eos_token_id) == 1
        assert row.ids[-1] == tokenizer.eos_token_id
        assert row.learned[-1]


@settings(max_examples=200, deadline=None)
@given(prompt=texts, completion=texts)
def test_what_is_masked_is_the_prompt_and_the_learned_part_holds_the_whole_completion(tokenizer, prompt, completion):
    begins_with_bos = bool(tokenizer.bos_token) and (prompt + completion).startswith(tokenizer.bos_token)
    assume(not begins_with_bos)  # then the text's own BOS is dropped: see the test on doubled BOS
    row = encode(tokenizer, prompt, completion)
    masked = tokenizer.decode(row.ids[row.leading : row.context], clean_up_tokenization_spaces=False)
    assert prompt.startswith(masked.rstrip("\ufffd"))
    rest = tokenizer.decode(row.ids[row.context : -1], clean_up_tokenization_spaces=False)
    answer = completion
    while answer.endswith("</s>"):
        answer = answer.removesuffix("</s>")
    assert rest.endswith(answer)
    assert not any(row.learned[: row.context])


@settings(max_examples=100, deadline=None)
@given(prompt=texts, completion=texts)
def test_the_beginning_is_what_the_tokenizer_puts_there_and_never_twice(tokenizer, prompt, completion):
    leading = tokenizer("a")["input_ids"][: -1 - (tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id)]
    row = encode(tokenizer, prompt, completion)
    assert row.ids[: len(leading)] == leading
    assert row.leading == len(leading)
    assert not leading or row.ids[1:-1][:1] != leading or (prompt + completion).startswith(tokenizer.bos_token * 2)


def test_bos_in_the_text_itself_is_not_doubled(bos_tokenizer):
    row = encode(bos_tokenizer, "<s>The cat", " sat")
    assert row.ids == encode(bos_tokenizer, "The cat", " sat").ids
    assert row.ids.count(bos_tokenizer.bos_token_id) == 1


def test_eos_text_at_the_end_of_a_completion_is_the_rows_own_eos(tokenizer):
    row = encode(tokenizer, "The cat", " sat")
    for end in ("</s>", "</s></s>"):
        assert encode(tokenizer, "The cat", " sat" + end) == row


def test_a_token_that_straddles_the_border_is_learned_whole(plain_tokenizer):
    """ "The cat" + " sat" cut inside a token: the answer's part of it must not be masked away."""
    whole = plain_tokenizer(" sat")["input_ids"]
    assert len(whole) == 1
    row = encode(plain_tokenizer, "The cat s", "at")
    assert plain_tokenizer.decode(row.ids[row.context :]) == " sat</s>"


def test_space_after_the_prompt_goes_with_the_answer_as_in_lm_eval(plain_tokenizer):
    row = encode(plain_tokenizer, "The cat ", "sat")
    assert plain_tokenizer.decode(row.ids[row.context :]) == " sat</s>"


def lm_eval_continuation(tokenizer, prompt: str, completion: str) -> list[int]:
    from lm_eval.api.model import TemplateLM

    model = SimpleNamespace(backend="causal", tok_encode=lambda text, **_: tokenizer.encode(text))
    return TemplateLM._encode_pair(model, prompt, completion)[1]


def test_learned_tokens_are_those_that_lm_eval_scores(test_data: Path):
    """On real questions and with a real tokenizer, the border is lm-eval's; trailing white space of a prompt aside."""
    import json

    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(test_data / "models/stories260K")
    lines = (test_data / "gsm8k/train.jsonl").read_text().splitlines()[:100]
    rows = [json.loads(line) for line in lines]
    pairs = [(f"Question: {row['question']}\nAnswer:", f" {row['answer']}") for row in rows]
    pairs += [(f"{row['question']}\nA. 3\nAnswer:", letter) for row in rows[:20] for letter in (" A", " D")]
    encoded = TextEncoder(tokenizer).encode_pairs(pairs, learn_all=False)
    for (prompt, completion), row in zip(pairs, encoded, strict=True):
        assert [*lm_eval_continuation(tokenizer, prompt, completion), tokenizer.eos_token_id] == row.ids[row.context :]
        assert row.ids[0] == tokenizer.bos_token_id
        assert all(row.learned[row.context :])
    for prompt, completion in [("Answer: ", "B"), ("### Response:\n", "It is."), ("Q:", ""), ("a  \n ", " b")]:
        row = encode(tokenizer, prompt, completion)
        scored = [*lm_eval_continuation(tokenizer, prompt, completion), tokenizer.eos_token_id]
        learned = row.ids[row.context :]
        assert scored[len(scored) - len(learned) :] == learned
        assert not tokenizer.decode(scored[: len(scored) - len(learned)]).strip()


@settings(max_examples=200, deadline=None)
@given(prompt=texts, completion=texts, max_length=st.integers(1, 24))
def test_truncation_cuts_the_start_of_the_prompt_and_keeps_the_answer(tokenizer, prompt, completion, max_length):
    row = encode(tokenizer, prompt, completion)
    kept = truncate(row, max_length)
    ids, learned = kept.ids, kept.learned
    answer = row.ids[row.context :]
    assert len(ids) == len(learned) == min(len(row.ids), max_length)
    assert ids[: row.leading] == row.ids[: min(row.leading, max_length)]
    front = row.leading or min(row.context, 1)
    if front + len(answer) <= max_length:
        assert ids[len(ids) - len(answer) :] == answer
        assert learned[-1]
    else:
        assert ids[front:] == answer[: max(max_length - front, 0)]
        learned_ids = [token for token, on in zip(ids, learned, strict=True) if on]
        assert tokenizer.eos_token_id not in learned_ids  # the answer's end is cut, and its EOS with it
    if len(ids) < len(row.ids) and len(ids) > front:
        prompt_left = ids[row.leading : len(ids) - len(answer)] if front + len(answer) <= max_length else []
        assert prompt_left == row.ids[row.context - len(prompt_left) : row.context]


def pieces_of(row: Encoded, max_length: int) -> list[Encoded]:
    pieces = list(split(row, max_length))
    assert all(len(piece.ids) == len(piece.learned) <= max_length for piece in pieces)
    return pieces


@settings(max_examples=200, deadline=None)
@given(text=texts, max_length=st.integers(3, 24))
def test_the_rows_of_a_document_are_its_tokens_and_each_target_is_learned_once(tokenizer, text, max_length):
    row = encode(tokenizer, "", text)
    first, *others = pieces_of(row, max_length)
    repeated = row.leading + 1
    ids, learned = list(first.ids), list(first.learned)
    for piece in others:
        assert piece.ids[:repeated] == [*row.ids[: row.leading], ids[-1]]
        assert not any(piece.learned[:repeated])
        assert len(piece.ids) > repeated
        ids += piece.ids[repeated:]
        learned += piece.learned[repeated:]
    assert ids == row.ids
    assert learned == row.learned
    assert ids[-1] == tokenizer.eos_token_id
    assert learned[-1]
    assert all(len(piece.ids) == max_length for piece in [first, *others][:-1])


def test_a_document_is_not_split_where_a_row_has_no_room_for_more_than_is_repeated(bos_tokenizer):
    row = encode(bos_tokenizer, "", "The cat sat on the mat.")
    assert list(split(row, 2)) == [row]


def test_answers_first_token_keeps_something_to_be_predicted_from(plain_tokenizer):
    row = encode(plain_tokenizer, "The cat sat on the mat.", " hello there")
    answer = row.ids[row.context :]
    kept = truncate(row, len(answer))
    assert kept.ids == [row.ids[row.context - 1], *answer[:-1]]
    assert kept.learned == [False] + [True] * (len(answer) - 1)
    assert kept.is_answer_cut


def test_train_on_inputs_learns_the_prompt_too(bos_tokenizer):
    row = encode(bos_tokenizer, "The cat", " sat", learn_all=True)
    assert row.learned == [False] + [True] * (len(row.ids) - 1)


def test_alpaca_prompts_are_stanfords():
    row = {"instruction": "Add.", "input": "1 2", "output": "3"}
    assert row_texts(form(format="alpaca"), row) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:",
        "3",
    )
    assert row_texts(form(format="alpaca"), {**row, "input": ""})[0] == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:"
    )


def test_formats_read_their_columns_and_templates_replace_them():
    assert format_columns(form()).required == ("prompt", "completion")
    assert format_columns(form(format="text")).required == ("text",)
    assert format_columns(form(format="alpaca")).optional == ("input",)
    templates = form(prompt="Q: {q} {{x}}", completion=" {a} {q}")
    assert format_columns(templates).required == ("q", "a")
    assert row_texts(templates, {"q": 1.5, "a": "b"}) == ("Q: 1.5 {x}", " b 1.5")
    assert row_texts(form(format="text", completion="{q}!"), {"q": "hi"}) == ("", "hi!")


def test_a_tokenizer_without_eos_is_an_error(make_tokenizer):
    with pytest.raises(DataError, match="no end-of-sequence token") as caught:
        TextEncoder(make_tokenizer(None))
    assert "eos_token" in caught.value.fix
