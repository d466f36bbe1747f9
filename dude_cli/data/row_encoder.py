"""The rows of data sets, read and encoded: each in the form of its data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import chain
from typing import Any

from dude_cli.config import DataConfig, DataSource, RowForm
from dude_cli.data.bad_rows import BadRows
from dude_cli.data.chat import ChatEncoder
from dude_cli.data.encode import Encoded, TextEncoder, format_columns, is_documents, row_texts
from dude_cli.data.rows import Seen, read_source
from dude_cli.data.table import TokenTable
from dude_cli.data.token_cache import encoded_once, token_key

_GLUED_ROWS = 100  # looked at for a border without a space
_CHUNK_ROWS = 1000  # rows given to the tokenizer at once


@dataclass(frozen=True)
class Part:
    """The rows of one data set, as they are encoded: pairs of prompt and completion, or conversations."""

    form: RowForm
    rows: list[Any]
    places: list[str]

    @property
    def is_chat(self) -> bool:
        return self.form.format == "chat"

    def key(self) -> Iterator[Any]:
        """What its encoding depends on."""
        yield self.is_chat, is_documents(self.form)
        yield from self.rows


class RowEncoder:
    """Encodes rows by one config and one tokenizer."""

    def __init__(self, config: DataConfig, tokenizer: Any, moment: datetime | None = None) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.revisions: dict[str, str] = {}
        self.text = TextEncoder(tokenizer)
        self.chat = ChatEncoder(self.text, moment) if config.has_chats else None

    def table(self, sources: Sequence[DataSource], name: str, say: Callable[[str], None]) -> TokenTable:
        """Read and encode all rows of `sources`, one after the other; `name` is for messages."""
        seen = Seen()
        parts = [self.part(source, seen) for source in sources]
        self.revisions |= seen.revisions
        for note in seen.notes():
            say(note)
        template = None if self.chat is None else self.chat.templates.text
        key = token_key(self.tokenizer, chain.from_iterable(map(Part.key, parts)), self.config, template)
        table = encoded_once(key, lambda: TokenTable.of(self._all_rows(parts, name), self.config.max_length), say)
        for part in parts:
            for note in filter(None, [self._other_prompt(part) if part.is_chat else _glued(part)]):
                say(f"note: {name}: {note}")
        return table

    def part(self, source: DataSource, seen: Seen) -> Part:
        """Read the rows of one data set, as texts in its form."""
        form = self.config.form(source)
        rows = read_source(source, format_columns(form), seen)
        texts = rows.values if form.format == "chat" else [row_texts(form, row) for row in rows.values]
        return Part(form, texts, rows.places)

    def _other_prompt(self, part: Part) -> str | None:
        assert self.chat is not None
        prompt = self.chat.other_prompt(part.rows[0], part.places[0])
        return prompt and (
            f"the chat template asks for an answer with {prompt!r}, and the first row has another text in front of its "
            "answer: asked in the template, the model gets a prompt that it was not trained on; "
            "`data.chat_template_kwargs` or another template can change that"
        )

    def _all_rows(self, parts: Sequence[Part], name: str) -> Iterator[Encoded]:
        """Encode rows in chunks that the tokenizer divides among threads of its own.

        On two cores two processes are no faster: they have to start, and to send what they did.
        """
        bad = BadRows()
        for part in parts:
            for start in range(0, len(part.rows), _CHUNK_ROWS):
                chunk = slice(start, start + _CHUNK_ROWS)
                yield from self.encode(replace(part, rows=part.rows[chunk], places=part.places[chunk]), bad)
        bad.check(sum(len(part.rows) for part in parts), name)

    def encode(self, part: Part, bad: BadRows) -> list[Encoded]:
        """The encoded rows of a part; none once there is a bad one."""
        learn_all = self.config.train_on_inputs
        if not part.is_chat:
            return self.text.encode_pairs(part.rows, learn_all=learn_all, are_documents=is_documents(part.form))
        assert self.chat is not None
        rendered = []
        for row, where in zip(part.rows, part.places, strict=True):
            with bad.collected():
                rendered.append(self.chat.render(row, where, learn_all=learn_all))
        return [] if bad.count else self.chat.encode_all(rendered)


def _glued(part: Part) -> str | None:
    """What to say where the last words of prompts go on in the completions; scripts without spaces aside."""
    for prompt, completion in part.rows[:_GLUED_ROWS]:
        border = prompt[-1:] + completion[:1]
        if len(border) < 2 or not border.isascii() or not border.isalnum():
            return None
    prompt, completion = part.rows[0]
    return (
        f"prompt and completion meet in a word, as {(prompt[-10:] + completion[:10])!r}: begin the completion with a "
        "space or a line break"
    )
