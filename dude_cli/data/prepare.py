"""Rows of text to token ids and labels, and which of them each optimizer step takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dude_cli.config import DataConfig, DataSource
from dude_cli.data.batches import EncodedRow, EncodedRows
from dude_cli.data.chat import ChatEncoder
from dude_cli.data.encode import Encoded, TextEncoder, format_columns, is_answer_cut, row_texts, truncate
from dude_cli.data.order import split_rows
from dude_cli.data.packing import pack
from dude_cli.data.row_files import Row
from dude_cli.data.rows import read_sources
from dude_cli.errors import DataError

_CHUNK_ROWS = 1000  # rows given to the tokenizer at once


@dataclass(frozen=True)
class DataReport:
    """What became of a data set's rows.

    `rows` counts the rows to learn from; `rows_without_target` those left out because nothing of them is learned.
    `truncated_rows` were longer than `max_length`; of those among `rows`, `cut_answers` lost the end of what is
    learned, with its EOS.
    `tokens` and `target_tokens` are over `rows`, after truncation; `longest_row` is in tokens, before it.
    `packed_sequences` is None without packing. `example` is the first row as pieces of text, each with whether it
    is learned.
    """

    rows: int
    tokens: int
    target_tokens: int
    truncated_rows: int
    cut_answers: int
    rows_without_target: int
    longest_row: int
    max_length: int
    packed_sequences: int | None
    example: list[tuple[str, bool]]

    def warnings(self) -> list[str]:
        """What a user should know before training on these rows, a line each."""
        if not self.cut_answers:
            return []
        return [
            f"{self.cut_answers:,} of {self.rows:,} rows lose the end of their answer, and its EOS, to "
            f"data.max_length ({self.max_length}); the longest row has {self.longest_row:,} tokens"
        ]


@dataclass(frozen=True)
class PreparedData:
    """Encoded training and validation rows; `fingerprint` is a SHA-256 of the training rows as they are encoded."""

    train: EncodedRows
    validation: EncodedRows | None
    train_report: DataReport
    validation_report: DataReport | None
    fingerprint: str

    def warnings(self) -> list[str]:
        """Those of the training rows, then those of the validation rows."""
        reports = {"data.train": self.train_report, "data.validation": self.validation_report}
        return [f"warning: {name}: {line}" for name, report in reports.items() if report for line in report.warnings()]


def prepare_data(config: DataConfig, tokenizer: Any, seed: int) -> PreparedData:
    """Read, encode and, if asked, pack the rows of a config; `seed` chooses the rows of a held-out share.

    Raises DataError with what to do about it, for every way in which data can be wrong.
    """
    encode = _RowEncoder(config, tokenizer)
    train_rows = _read(config, config.train)
    train_indices = validation_indices = np.arange(len(train_rows))
    if isinstance(config.validation, float):
        train_indices, validation_indices = split_rows(len(train_rows), config.validation, seed)
    train, train_report = encode.rows([train_rows[index] for index in train_indices], train_indices, "data.train")
    validation, validation_report = None, None
    if config.validation is not None:
        rows = train_rows if isinstance(config.validation, float) else _read(config, config.validation)
        indices = validation_indices if isinstance(config.validation, float) else np.arange(len(rows))
        validation, validation_report = encode.rows([rows[i] for i in indices], indices, "data.validation")
    return PreparedData(train, validation, train_report, validation_report, train.fingerprint())


def _read(config: DataConfig, sources: Sequence[DataSource]) -> list[Row]:
    return read_sources(sources, format_columns(config))


class _RowEncoder:
    """Encodes rows by one config and one tokenizer."""

    def __init__(self, config: DataConfig, tokenizer: Any) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.text = TextEncoder(tokenizer)
        self.chat = ChatEncoder(self.text) if config.format == "chat" else None

    def rows(self, rows: Sequence[Row], indices: npt.NDArray[np.int64], name: str) -> tuple[EncodedRows, DataReport]:
        """Encode `rows`, whose places in the data read are `indices`; `name` is for messages."""
        config = self.config
        kept: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]] = []
        sources: list[int] = []
        truncated = cut_answers = without_target = longest = 0
        for index, row in zip(indices, self._encode(rows, indices, name), strict=True):
            longest = max(longest, len(row.ids))
            truncated += len(row.ids) > config.max_length
            ids, learned = truncate(row, config.max_length)
            if any(learned[1:]):
                kept.append((np.asarray(ids, np.int32), np.asarray(learned, np.bool_)))
                sources.append(int(index))
                cut_answers += is_answer_cut(row, config.max_length)
            else:
                without_target += 1
        if not kept:
            raise _nothing_to_learn(name, without_target, config.max_length)
        encoded = EncodedRows(kept, sources)
        report = DataReport(
            rows=len(kept),
            tokens=int(encoded.lengths.sum()),
            target_tokens=int(encoded.target_tokens.sum()),
            truncated_rows=truncated,
            cut_answers=cut_answers,
            rows_without_target=without_target,
            longest_row=longest,
            max_length=config.max_length,
            packed_sequences=None,
            example=_pieces(self.tokenizer, encoded[0]),
        )
        if not config.packing:
            return encoded, report
        packed = encoded.packed(pack(encoded.lengths.tolist(), config.max_length))
        return packed, replace(report, packed_sequences=len(packed))

    def _encode(self, rows: Sequence[Row], indices: npt.NDArray[np.int64], name: str) -> Iterator[Encoded]:
        learn_all = self.config.train_on_inputs
        if self.chat is not None:
            for index, row in zip(indices, rows, strict=True):
                where = f"{name}, row {index + 1}, column messages"
                yield self.chat.encode(row["messages"], where=where, learn_all=learn_all)
            return
        for start in range(0, len(rows), _CHUNK_ROWS):
            pairs = [row_texts(self.config, row) for row in rows[start : start + _CHUNK_ROWS]]
            yield from self.text.encode_pairs(pairs, learn_all=learn_all)


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
