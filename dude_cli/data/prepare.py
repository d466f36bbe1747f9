"""Rows of text to token ids and labels, and which of them each optimizer step takes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from dude_cli.config import DataConfig, DataSource, RowForm
from dude_cli.data.bad_rows import BadRows
from dude_cli.data.batches import EncodedRow, EncodedRows
from dude_cli.data.chat import ChatEncoder
from dude_cli.data.chat_template import DATA_KEYS
from dude_cli.data.encode import Encoded, TextEncoder, format_columns, is_documents, row_texts
from dude_cli.data.order import split_rows
from dude_cli.data.packing import pack
from dude_cli.data.rows import Seen, read_source
from dude_cli.data.table import TokenTable
from dude_cli.data.token_cache import encoded_once, token_key
from dude_cli.errors import DataError

_GLUED_ROWS = 100  # looked at for a border without a space
_CHUNK_ROWS = 1000  # rows given to the tokenizer at once


@dataclass(frozen=True)
class DataReport:
    """What became of a data set's rows.

    `rows` counts the rows to learn from; `rows_without_target` those left out because nothing of them is learned.
    Of `empty_answers` of them it is only the end of an answer, which then has no words.
    A document of more than `max_length` tokens is several rows; `split_documents` counts such.
    `truncated_rows` were longer than `max_length`; of those among `rows`, `cut_answers` lost the end of an answer, with
    its EOS, and `shortened_chats` one or more turns at their end that would be learned, `lost_turns` in all.
    `tokens` and `target_tokens` are over `rows`, after truncation; `longest_row` is in tokens, before it.
    `packed_sequences` is None without packing. `example` is the first row as pieces of text, each with whether it
    is learned.
    """

    rows: int
    tokens: int
    target_tokens: int
    empty_answers: int
    truncated_rows: int
    cut_answers: int
    shortened_chats: int
    lost_turns: int
    rows_without_target: int
    split_documents: int
    longest_row: int
    max_length: int
    packed_sequences: int | None
    example: list[tuple[str, bool]]

    def notes(self) -> list[str]:
        """What a user may not expect and need not change, a line each."""
        found = []
        if self.split_documents:
            found.append(
                f"texts longer than data.max_length ({self.max_length}): {self.split_documents:,}, split into rows of "
                f"at most that length; {self.rows:,} rows in all"
            )
        without_start = self.truncated_rows - self.shortened_chats - self.cut_answers
        if without_start > 0:
            found.append(
                f"rows longer than data.max_length ({self.max_length}): {without_start:,}; they lose the start of "
                "their prompt"
            )
        return found

    def warnings(self) -> list[str]:
        """What a user should know before training on these rows, a line each."""
        found, limit = [], f"data.max_length ({self.max_length}); the longest row has {self.longest_row:,} tokens"
        if self.cut_answers:
            found.append(
                f"{self.cut_answers:,} of {self.rows:,} rows lose their whole prompt and the end of their answer, with "
                f"its EOS, to {limit}"
            )
        if self.shortened_chats:
            found.append(
                f"{self.shortened_chats:,} of {self.rows:,} conversations lose their last messages, with "
                f"{self.lost_turns:,} turns of the assistant's, to {limit}"
            )
        if self.empty_answers:
            found.append(
                f"{self.empty_answers:,} of {self.rows:,} rows have an empty answer: only its end is learned of them"
            )
        return found


@dataclass(frozen=True)
class PreparedData:
    """Encoded training and validation rows; `fingerprint` is a SHA-256 of the training rows as they are encoded.

    `chat_template` is what they went through, in format chat. `revisions` has the commit of each data set from the hub.
    """

    train: EncodedRows
    validation: EncodedRows | None
    train_report: DataReport
    validation_report: DataReport | None
    fingerprint: str
    chat_template: str | None
    revisions: dict[str, str]

    def fingerprints(self) -> dict[str, str]:
        """What tells other rows, or another chat template, under the same names."""
        found = {"data.train": self.fingerprint}
        if self.validation is not None:
            found["data.validation"] = self.validation.fingerprint()
        if self.chat_template is not None:
            found[DATA_KEYS[0]] = hashlib.sha256(self.chat_template.encode()).hexdigest()
        return found

    def warnings(self) -> list[str]:
        """Those of the training rows, then those of the validation rows."""
        reports = {"data.train": self.train_report, "data.validation": self.validation_report}
        found = [f"{name}: {line}" for name, report in reports.items() if report for line in report.warnings()]
        if self.validation is not None:
            shared = self.validation.shared_with(self.train)
            if shared:
                found.append(
                    f"data.validation: {shared:,} of {len(self.validation.row_hashes()):,} rows are in data.train too: "
                    "the evaluation loss does not tell of them what the model makes of new rows"
                )
        return found


def prepare_data(
    config: DataConfig,
    tokenizer: Any,
    seed: int,
    say: Callable[[str], None] = lambda line: None,
    moment: datetime | None = None,
) -> PreparedData:
    """Read, encode and, if asked, pack the rows of a config; `seed` chooses the rows of a held-out share.

    Rows that an earlier run has encoded are taken from the cache; see `data.token_cache`. `say` tells the user so.
    `moment` is the time that a chat template is told, by default now.
    Raises DataError with what to do about it, for every way in which data can be wrong.
    """
    encoder = _RowEncoder(config, tokenizer, moment)
    train_table = encoder.table(config.train, "data.train", say)
    train_rows = validation_rows = np.arange(len(train_table))
    if isinstance(config.validation, float):
        parts = split_rows(int(train_table.sources[-1]) + 1, config.validation, seed)  # a document stays in one of them
        train_rows, validation_rows = (np.flatnonzero(np.isin(train_table.sources, part)) for part in parts)
    train, train_report = encoder.sequences(train_table, train_rows, "data.train")
    validation, validation_report = None, None
    if config.validation is not None:
        table = train_table
        if not isinstance(config.validation, float):
            table = encoder.table(config.validation, "data.validation", say)
            validation_rows = np.arange(len(table))
        validation, validation_report = encoder.sequences(table, validation_rows, "data.validation")
    for name, report in (("data.train", train_report), ("data.validation", validation_report)):
        for note in report.notes() if report is not None else ():
            say(f"{name}: {note}")
    template = None if encoder.chat is None else encoder.chat.template
    return PreparedData(
        train, validation, train_report, validation_report, train.fingerprint(), template, encoder.revisions
    )


@dataclass(frozen=True)
class _Part:
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


class _RowEncoder:
    """Encodes rows by one config and one tokenizer."""

    def __init__(self, config: DataConfig, tokenizer: Any, moment: datetime | None = None) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.revisions: dict[str, str] = {}
        self.text = TextEncoder(tokenizer)
        self.chat = ChatEncoder(self.text, moment) if config.has_chats else None

    def table(self, sources: Sequence[DataSource], name: str, say: Callable[[str], None]) -> TokenTable:
        """Read and encode all rows of `sources`, one after the other; `name` is for messages."""
        seen = Seen()
        parts = [self._part(source, seen) for source in sources]
        self.revisions |= seen.revisions
        for path, unread in seen.unread.items():
            if unread:
                say(f"note: {path}: columns that are not read: {', '.join(unread)}")
        template = None if self.chat is None else self.chat.template
        key = token_key(self.tokenizer, chain.from_iterable(map(_Part.key, parts)), self.config, template)
        table = encoded_once(key, lambda: TokenTable.of(self._encode(parts, name), self.config.max_length), say)
        for part in parts:
            for note in filter(None, [self._other_prompt(part) if part.is_chat else _glued(part)]):
                say(f"note: {name}: {note}")
        return table

    def _part(self, source: DataSource, seen: Seen) -> _Part:
        form = self.config.form(source)
        rows = read_source(source, format_columns(form), seen)
        texts = rows.values if form.format == "chat" else [row_texts(form, row) for row in rows.values]
        return _Part(form, texts, rows.places)

    def _other_prompt(self, part: _Part) -> str | None:
        assert self.chat is not None
        prompt = self.chat.other_prompt(part.rows[0], part.places[0])
        return prompt and (
            f"the chat template asks for an answer with {prompt!r}, and the first row has another text in front of its "
            "answer: asked in the template, the model gets a prompt that it was not trained on; "
            "`data.chat_template_kwargs` or another template can change that"
        )

    def _encode(self, parts: Sequence[_Part], name: str) -> Iterator[Encoded]:
        """Encode rows in chunks that the tokenizer divides among threads of its own.

        On two cores two processes are no faster: they have to start, and to send what they did.
        """
        bad = BadRows()
        for part in parts:
            for start in range(0, len(part.rows), _CHUNK_ROWS):
                chunk = slice(start, start + _CHUNK_ROWS)
                yield from self._encode_chunk(replace(part, rows=part.rows[chunk], places=part.places[chunk]), bad)
        bad.check(sum(len(part.rows) for part in parts), name)

    def _encode_chunk(self, part: _Part, bad: BadRows) -> list[Encoded]:
        """The encoded rows of a part; none once there is a bad one."""
        learn_all = self.config.train_on_inputs
        if not part.is_chat:
            return self.text.encode_pairs(part.rows, learn_all=learn_all, are_documents=is_documents(part.form))
        assert self.chat is not None
        rendered = []
        for row, where in zip(part.rows, part.places, strict=True):
            with bad.collected():
                rendered.append(self.chat.render(row, where))
        return [] if bad.count else self.chat.encode_all(rendered, learn_all=learn_all)

    def sequences(self, table: TokenTable, rows: npt.NDArray[np.int64], name: str) -> tuple[EncodedRows, DataReport]:
        """Take those of `rows` of a table that there is something to learn of, packed if asked; `name` for messages."""
        config = self.config
        kept = rows[table.target_tokens[rows] > 0]
        if not len(kept):
            raise _nothing_to_learn(name, len(rows), config.max_length)
        encoded = EncodedRows(table, kept)
        report = DataReport(
            rows=len(kept),
            tokens=int(encoded.lengths.sum()),
            target_tokens=int(encoded.target_tokens.sum()),
            empty_answers=int(((table.target_tokens[kept] == 1) & ~table.documents[kept]).sum()),
            truncated_rows=int((table.full_lengths[rows] > config.max_length).sum()),
            cut_answers=int(table.cut_answers[kept].sum()),
            shortened_chats=int((table.lost_turns[kept] > 0).sum()),
            lost_turns=int(table.lost_turns[kept].sum()),
            rows_without_target=len(rows) - len(kept),
            split_documents=int((np.unique(table.sources[rows], return_counts=True)[1] > 1).sum()),
            longest_row=int(table.full_lengths[rows].max()),
            max_length=config.max_length,
            packed_sequences=None,
            example=_pieces(self.tokenizer, encoded[0]),
        )
        if not config.packing:
            return encoded, report
        packed = encoded.packed(pack(encoded.lengths.tolist(), config.max_length))
        return packed, replace(report, packed_sequences=len(packed))


def _glued(part: _Part) -> str | None:
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


def _nothing_to_learn(name: str, rows: int, max_length: int) -> DataError:
    return DataError(
        f"none of the {rows} rows has a token to learn",
        where=name,
        fix=f"check that the completions (in chat: the assistant's turns) are not empty, and that max_length "
        f"({max_length}) leaves room for them",
    )


def _pieces(tokenizer: Any, row: EncodedRow) -> list[tuple[str, bool]]:
    """Split a row's text where learning starts and stops; decoding prefixes keeps the spaces between pieces."""
    learned = [label >= 0 for label in row.labels]
    cuts = [index for index in range(1, len(learned)) if learned[index] != learned[index - 1]]
    pieces, before = [], ""
    for start, stop in zip([0, *cuts], [*cuts, len(learned)], strict=True):
        text = tokenizer.decode(row.input_ids[:stop], clean_up_tokenization_spaces=False)
        pieces.append((text[len(before) :], learned[start]))
        before = text
    return pieces
