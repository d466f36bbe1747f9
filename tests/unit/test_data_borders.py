"""The border that is found in a part of a text is the one that its whole beginning shows."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from dude_cli import quickstart
from dude_cli.data.borders import BorderedText, BorderEncoder
from dude_cli.data.encode import TextEncoder, common_prefix

TOKENS = ("<|im_start|>", "<|im_end|>", "</s>", "<s>")
PIECES = st.sampled_from(
    [*TOKENS, "<|im_start|>user\n", "<|", "im_end|>", " ", "\n", "\n\n", "the", "The cat", "é", "x"]
)
TEXTS = st.lists(PIECES, max_size=12).map("".join)
ROWS = st.lists(st.tuples(TEXTS, st.lists(st.floats(0, 1), max_size=6)), max_size=4)


def byte_level(make_tokenizer, **settings):
    tokenizer = make_tokenizer(None, eos_token="</s>")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**settings)
    return tokenizer


def with_token(make_tokenizer, text, **properties):
    tokenizer = make_tokenizer(None, eos_token="</s>")
    tokenizer.add_tokens([AddedToken(text, **properties)])
    return tokenizer


def metaspace(sentencepiece, scheme):
    tokenizer = sentencepiece("")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\t", " ")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    return tokenizer


def lower_case(make_tokenizer):
    tokenizer = with_token(make_tokenizer, "the", normalized=True)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    return tokenizer


TOKENIZERS = {
    "GPT-2's": lambda byte, sentence: byte_level(byte, add_prefix_space=False),
    "a space in front of each part": lambda byte, sentence: byte_level(byte, add_prefix_space=True),
    "Llama's": lambda byte, sentence: sentence(""),
    "a space in front of the first part": lambda byte, sentence: metaspace(sentence, "first"),
    "a space in front of all parts": lambda byte, sentence: metaspace(sentence, "always"),
    "takes the space behind it": lambda byte, sentence: with_token(byte, "<|", rstrip=True, normalized=False),
    "takes the space in front of it": lambda byte, sentence: with_token(byte, "im_end|>", lstrip=True),
    "begins as another": lambda byte, sentence: with_token(byte, "<|im_start|>user", normalized=False),
    "is looked for in normalised text": lambda byte, sentence: lower_case(byte),
    "has to be a word": lambda byte, sentence: with_token(byte, "the", single_word=True, normalized=False),
    "the quickstart's": lambda byte, sentence: AutoTokenizer.from_pretrained(quickstart.MODEL_DIR),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def encoder(request, make_tokenizer, sentencepiece_chat_tokenizer):
    return TextEncoder(TOKENIZERS[request.param](make_tokenizer, sentencepiece_chat_tokenizer))


def by_beginnings(encoder, row):
    """What `BorderEncoder` computes, from the whole beginning of the text."""
    ids, *prefixes = encoder.raw([row.text, *(row.text[:border] for border in row.borders)])
    return ids, [common_prefix(ids, prefix) for prefix in prefixes]


@settings(max_examples=300, deadline=None)
@given(rows=ROWS)
def test_it_is_the_one_of_the_whole_beginning(encoder, rows):
    bordered = [BorderedText(text, sorted(round(len(text) * share) for share in shares)) for text, shares in rows]
    assert BorderEncoder(encoder).encode(bordered) == [by_beginnings(encoder, row) for row in bordered]


def test_special_tokens_that_are_taken_for_text_divide_none(make_tokenizer):
    encoder = TextEncoder(make_tokenizer(None, eos_token="</s>"))
    encoder.tokenizer.split_special_tokens = True
    row = BorderedText("<s>The cat</s> the<|im_end|>", [3, 10, 12, 25])
    assert BorderEncoder(encoder).encode([row]) == [by_beginnings(encoder, row)]


def test_only_the_part_behind_the_last_added_token_is_encoded(make_tokenizer, monkeypatch):
    encoder = TextEncoder(make_tokenizer(None, eos_token="</s>"))
    turn = "<|im_start|>user\nThe cat<|im_end|>\n"
    row = BorderedText(turn * 50, [len(turn) * count for count in range(1, 51)])
    encoded: list[str] = []
    raw = encoder.raw
    monkeypatch.setattr(encoder, "raw", lambda texts: (encoded.extend(texts), raw(texts))[1])
    found = BorderEncoder(encoder).encode([row])
    assert encoded == [row.text, *["<|im_end|>\n"] * 50]
    monkeypatch.undo()
    assert found == [by_beginnings(encoder, row)]


def test_a_real_tokenizer(test_data):
    encoder = TextEncoder(AutoTokenizer.from_pretrained(test_data / "models/stories260K"))
    text = "<s>One day, a cat</s>\n went home.</s> The end\n</s>"
    row = BorderedText(text, list(range(len(text) + 1)))
    assert BorderEncoder(encoder).encode([row]) == [by_beginnings(encoder, row)]
