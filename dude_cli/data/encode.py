"""Turn a row of text into token ids and the flags that say which of them are learned.

The prompt and the completion are encoded as one text, because that is what a model is scored on: lm-eval encodes
context and continuation together too. The border is where the encoding of the prompt alone stops agreeing with it:
a token is context when the prompt by itself gives it, and everything from the first token that the completion
changes is learned. So " B" after "Answer: " is learned whole, as lm-eval scores it, and where a token straddles the
border no part of the answer is lost.

The beginning is what the tokenizer puts there by itself (BOS or nothing). The end is exactly one learned EOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dude_cli.config import RowForm
from dude_cli.data.columns import Columns
from dude_cli.data.row_files import Row
from dude_cli.errors import DataError
from dude_cli.template import parse_template, render

# Stanford Alpaca's prompts (Taori et al. 2023), word for word, so that published settings are met.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)

Tokens = Sequence[int]


@dataclass(frozen=True)
class Encoded:
    """A row's token ids, which of them are learned, and how many in front are context that may be cut.

    `leading` tokens (BOS) are never cut; `context` counts the tokens before the first learned one of the answer.
    In a conversation, `words` says from and to which token of the context is what others than the assistant say, behind
    the system's message, `stops` behind how many tokens each learned turn ends, and `closings` which tokens end a row
    that is cut there: none where the turn has an end of its own. It `goes_on` if others say something behind the last
    one that is learned too. A document is split where it is too long, and not cut. An answer without words is empty.
    """

    ids: list[int]
    learned: list[bool]
    leading: int
    context: int
    words: tuple[int, int] | None = None
    stops: tuple[int, ...] = ()
    closings: tuple[tuple[int, ...], ...] = ()
    goes_on: bool = False
    is_document: bool = False
    is_empty: bool = False


def format_columns(form: RowForm) -> Columns:
    """Return the columns that a format and its templates read."""
    if form.format == "alpaca":
        return Columns(("instruction", "output"), ("input",))
    if form.format == "chat":
        return Columns(("messages",), ("tools", "system"), are_texts=False, instead=("prompt", "completion"))
    return Columns(tuple(dict.fromkeys(name for text in _templates(form) for name in parse_template(text))))


def prompt_columns(form: RowForm) -> Columns:
    """Return the columns for rows that are to be answered: those of the answer alone may be absent or null.

    A form without a column in its prompt needs all of its own.
    """
    found = format_columns(form)
    if form.format == "chat":
        return Columns(found.required, (*found.optional, "completion"), are_texts=False, instead=("prompt",))
    needed = parse_template(prompt_template(form))
    if not needed:
        return found
    return Columns(tuple(needed), tuple(name for name in (*found.required, *found.optional) if name not in needed))


def answer_columns(form: RowForm) -> list[str]:
    """Return the columns of the answer alone, in any format but chat."""
    return [name for name in format_columns(form).required if name in prompt_columns(form).optional]


def _templates(form: RowForm) -> tuple[str, str]:
    """The templates of prompt and completion; plain text is a completion without a prompt."""
    if is_documents(form):
        return "", "{text}" if form.completion is None else form.completion
    prompt = "{prompt}" if form.prompt is None else form.prompt
    return prompt, "{completion}" if form.completion is None else form.completion


def is_documents(form: RowForm) -> bool:
    """Whether rows are documents: text without a prompt, of which what is too long is split and not cut."""
    return form.format == "text" and form.prompt is None


def prompt_template(form: RowForm) -> str:
    """The template in front of what is learned, in any format but chat; Alpaca's is the one without an input."""
    return ALPACA_WITHOUT_INPUT if form.format == "alpaca" else _templates(form)[0]


def row_texts(form: RowForm, row: Row) -> tuple[str, str]:
    """Return (prompt, completion) of a row in any format but chat."""
    if form.format == "alpaca":
        template = ALPACA_WITH_INPUT if str(row["input"]) else ALPACA_WITHOUT_INPUT
        return render(template, row), str(row["output"])
    prompt, completion = _templates(form)
    return render(prompt, row), render(completion, row)


class TextEncoder:
    """Encodes texts as the tokenizer does by default, with its own BOS once, and one EOS at the end of a row."""

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no end-of-sequence token, so the model could not learn where an answer ends",
                where=str(getattr(tokenizer, "name_or_path", "")) or None,
                fix="set `eos_token` in the model's tokenizer_config.json to a token of its vocabulary",
            )
        self.tokenizer = tokenizer
        self.eos_id = int(tokenizer.eos_token_id)
        self.leading, self.trailing = self._own_tokens()

    def _own_tokens(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts in front of every text and behind it; found by encoding one with and without it."""
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self.tokenizer("a")["input_ids"]
        for start in range(len(full) - len(bare) + 1):
            stop = start + len(bare)
            if full[start:stop] == bare:
                return list(full[:start]), list(full[stop:])
        return [], []

    def raw(self, texts: Sequence[str], *, special_tokens: bool = False) -> list[list[int]]:
        """Return each text's ids as the tokenizer gives them."""
        if not texts:
            return []
        batch: list[list[int]] = self.tokenizer(
            list(texts),
            add_special_tokens=special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # rows longer than the model's context are cut, counted and reported here
        )["input_ids"]
        return batch

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of what an answer follows: with the tokenizer's own leading tokens once, and no trailing ones.

        An EOS at the end of the text itself stays: it is part of the prompt.
        """
        return [self._trim(ids) for ids in self.raw(texts, special_tokens=True)]

    def _trim(self, ids: list[int]) -> list[int]:
        start, stop = len(self.leading), len(ids) - len(self.trailing)
        if self.trailing and ids[stop:] == self.trailing:
            del ids[stop:]
        if start and ids[start : 2 * start] == self.leading:  # the text begins with BOS itself
            del ids[:start]
        return ids

    def _encode_wholes(self, texts: Sequence[str]) -> list[list[int]]:
        """Return each text's ids as in a prompt, without any EOS at the end."""
        rows = self.encode_prompts(texts)
        for ids in rows:
            while len(ids) > len(self.leading) and ids[-1] == self.eos_id:
                ids.pop()
        return rows

    def encode_pairs(
        self, pairs: Sequence[tuple[str, str]], *, learn_all: bool, are_documents: bool = False
    ) -> list[Encoded]:
        """Return the encoding of (prompt, completion) pairs, the completion and one EOS learned.

        An EOS inside the text is data, not the end of the row, and is not learned.
        """
        wholes = self._encode_wholes([prompt + completion for prompt, completion in pairs])
        prompts = self.encode_prompts([prompt for prompt, _ in pairs])
        rows = [self._finish(whole, prompt, learn_all) for whole, prompt in zip(wholes, prompts, strict=True)]
        if are_documents:
            return [replace(row, is_document=True) for row in rows]
        return [replace(row, is_empty=not text.strip()) for row, (_, text) in zip(rows, pairs, strict=True)]

    def _finish(self, whole: list[int], prompt: list[int], learn_all: bool) -> Encoded:
        leading = len(self.leading)
        context = max(common_prefix(whole, prompt), leading)
        first = leading if learn_all else context
        learned = [False] * first + [True] * (len(whole) - first)
        if self.eos_id in whole:
            learned = [on and token != self.eos_id for on, token in zip(learned, whole, strict=True)]
        return Encoded([*whole, self.eos_id], [*learned, True], leading, context)


def common_prefix(left: Tokens | str, right: Tokens | str) -> int:
    """Return how many tokens, or characters, the two have in common at the start."""
    length = min(len(left), len(right))
    if left[:length] == right[:length]:
        return length
    return next(index for index in range(length) if left[index] != right[index])
