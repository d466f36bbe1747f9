"""Small real tokenizers, one of each way in which beginnings and ends are handled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = [
    "Question: The cat sat on the mat with 12 apples and 34 pears. How many in total?\nAnswer: 12 + 34 = 46\n#### 46",
    "user assistant system hello there, it's fine — naïve café.\n\n",
] * 5
SPECIAL_TOKENS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def build_tokenizer(template: str | None, **special: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE; `template` is what it puts around a text, offsets leave out white space as in GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIAL_TOKENS)
    tokenizer.train_from_iterator(TEXT, trainer)
    steps = [processors.ByteLevel(trim_offsets=True)]
    if template is not None:
        ids = [(token, tokenizer.token_to_id(token)) for token in SPECIAL_TOKENS]
        steps.append(processors.TemplateProcessing(single=template, special_tokens=ids))
    tokenizer.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


TOKENIZERS = {
    "nothing added": lambda: build_tokenizer(None, eos_token="</s>"),
    "pad is eos": lambda: build_tokenizer(None, eos_token="</s>", pad_token="</s>"),
    "bos added": lambda: build_tokenizer("<s> $A", bos_token="<s>", eos_token="</s>", pad_token="</s>"),
    "bos and eos added": lambda: build_tokenizer("<s> $A </s>", bos_token="<s>", eos_token="</s>"),
    "bos is eos": lambda: build_tokenizer("</s> $A", bos_token="</s>", eos_token="</s>"),
}


@pytest.fixture(scope="session", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="session")
def plain_tokenizer() -> PreTrainedTokenizerFast:
    return TOKENIZERS["nothing added"]()


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    return TOKENIZERS["bos added"]()


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return build_tokenizer


@pytest.fixture(scope="session")
def sentencepiece_chat_tokenizer() -> Callable[[str], PreTrainedTokenizerFast]:
    """Llama's way: a space in front of each text between special tokens, and bytes for what is not in the vocabulary.

    So a line break after a special token is two tokens, "▁" and "<0x0A>".
    """

    def build(template: str) -> PreTrainedTokenizerFast:
        special = ["<unk>", "<s>", "</s>"]
        tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *map(chr, range(ord("!"), 127))]
        vocabulary = {token: index for index, token in enumerate(tokens)}
        tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        tokenizer.decoder = decoders.Sequence(spaces)
        tokenizer.add_special_tokens(special)
        built = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
        built.chat_template = template
        return built

    return build


@pytest.fixture(scope="session")
def chat_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    def build(template: str, **special: str) -> PreTrainedTokenizerFast:
        tokenizer = build_tokenizer(None, **{"eos_token": "<|im_end|>", **special})
        tokenizer.chat_template = template
        return tokenizer

    return build
