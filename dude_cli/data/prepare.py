"""Rows of text to token ids and labels, and which of them each optimizer step takes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from dude_cli.config import DataConfig
from dude_cli.data.batches import EncodedRow, EncodedRows
from dude_cli.data.chat_template import TEMPLATE_KEY
from dude_cli.data.order import split_rows
from dude_cli.data.packing import pack
from dude_cli.data.report import DataReport
from dude_cli.data.row_encoder import RowEncoder
from dude_cli.data.table import TokenTable
from dude_cli.errors import DataError


@dataclass(frozen=True)
class PreparedData:
    """Encoded training and validation rows; `fingerprint` is a SHA-256 of the training rows as they are encoded.

    `chat_template` is what they went through, in format chat (`Templates.text`). `revisions` has the commit of each
    data set from the hub.
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
            found[TEMPLATE_KEY] = hashlib.sha256(self.chat_template.encode()).hexdigest()
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
    train_name: str = "data.train",
) -> PreparedData:
    """Read, encode and, if asked, pack the rows of a config; `seed` chooses the rows of a held-out share.

    Rows that an earlier run has encoded are taken from the cache; see `data.token_cache`. `say` tells the user so.
    `moment` is the time that a chat template is told, by default now; messages call `config.train` by `train_name`.
    Raises DataError with what to do about it, for every way in which data can be wrong.
    """
    encoder = RowEncoder(config, tokenizer, moment)
    train_table = encoder.table(config.train, train_name, say)
    train_rows = validation_rows = np.arange(len(train_table))
    if isinstance(config.validation, float):
        parts = split_rows(int(train_table.sources[-1]) + 1, config.validation, seed)  # a document stays in one of them
        train_rows, validation_rows = (np.flatnonzero(np.isin(train_table.sources, part)) for part in parts)
    train, train_report = _sequences(config, tokenizer, train_table, train_rows, train_name)
    validation, validation_report = None, None
    if config.validation is not None:
        table = train_table
        if not isinstance(config.validation, float):
            table = encoder.table(config.validation, "data.validation", say)
            validation_rows = np.arange(len(table))
        validation, validation_report = _sequences(config, tokenizer, table, validation_rows, "data.validation")
    for name, report in ((train_name, train_report), ("data.validation", validation_report)):
        for note in report.notes() if report is not None else ():
            say(f"{name}: {note}")
    template = None if encoder.chat is None else encoder.chat.templates.text
    return PreparedData(
        train, validation, train_report, validation_report, train.fingerprint(), template, encoder.revisions
    )


def _sequences(
    config: DataConfig, tokenizer: Any, table: TokenTable, rows: npt.NDArray[np.int64], name: str
) -> tuple[EncodedRows, DataReport]:
    """Take those of `rows` of a table that there is something to learn of, packed if asked; `name` for messages."""
    kept = rows[table.target_tokens[rows] > 0]
    if not len(kept):
        raise _nothing_to_learn(name, len(rows), config.max_length)
    encoded = EncodedRows(table, kept)
    report = DataReport(
        rows=len(kept),
        tokens=int(encoded.lengths.sum()),
        target_tokens=int(encoded.target_tokens.sum()),
        empty_answers=int(table.empty_answers[kept].sum()),
        truncated_rows=int((table.full_lengths[rows] > config.max_length).sum()),
        lost_starts=int((table.lost_starts & ~table.lost_questions & ~table.cut_answers)[kept].sum()),
        lost_questions=int((table.lost_questions & ~table.cut_answers)[kept].sum()),
        cut_answers=int(table.cut_answers[kept].sum()),
        shortened_chats=int(table.lost_ends[kept].sum()),
        lost_turns=int(table.lost_turns[kept].sum()),
        rows_without_target=len(rows) - len(kept),
        split_documents=int((np.unique(table.sources[rows], return_counts=True)[1] > 1).sum()),
        longest_row=int(table.full_lengths[rows].max()),
        max_length=config.max_length,
        packed_sequences=None,
        example=learned_pieces(tokenizer, encoded[0]),
    )
    if not config.packing:
        return encoded, report
    packed = encoded.packed(pack(encoded.lengths.tolist(), config.max_length))
    return packed, replace(report, packed_sequences=len(packed))


def _nothing_to_learn(name: str, rows: int, max_length: int) -> DataError:
    return DataError(
        f"none of the {rows} rows has a token to learn",
        where=name,
        fix=f"check that the completions (in chat: the assistant's turns) are not empty, and that max_length "
        f"({max_length}) leaves room for them",
    )


def learned_pieces(tokenizer: Any, row: EncodedRow) -> list[tuple[str, bool]]:
    """A row's text, split where learning starts and stops, each piece with whether it is learned.

    Decoding prefixes keeps the spaces between pieces.
    """
    learned = [label >= 0 for label in row.labels]
    cuts = [index for index in range(1, len(learned)) if learned[index] != learned[index - 1]]
    pieces, before = [], ""
    for start, stop in zip([0, *cuts], [*cuts, len(learned)], strict=True):
        text = tokenizer.decode(row.input_ids[:stop], clean_up_tokenization_spaces=False)
        pieces.append((text[len(before) :], learned[start]))
        before = text
    return pieces
