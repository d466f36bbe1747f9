"""Rows of text to token ids and labels, and which of them each optimizer step takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from dude_cli.batches import EncodedRow, EncodedRows, collate
from dude_cli.chat import ChatEncoder
from dude_cli.config import DataConfig, DataSource
from dude_cli.encode import Encoded, TextEncoder, format_columns, row_texts, truncate
from dude_cli.errors import DataError
from dude_cli.packing import pack
from dude_cli.row_files import Row
from dude_cli.rows import read_sources

__all__ = [
    "DataReport",
    "EncodedRow",
    "EncodedRows",
    "PreparedData",
    "collate",
    "prepare_data",
    "step_rows",
    "steps_per_epoch",
]

_CHUNK_ROWS = 1000  # rows given to the tokenizer at once


@dataclass(frozen=True)
class DataReport:
    """What became of a data set's rows.

    `rows` counts the rows to learn from; `rows_without_target` those left out because nothing of them is learned.
    `tokens` and `target_tokens` are over `rows`, after truncation; `longest_row` is in tokens, before it.
    `packed_sequences` is None without packing. `example` is the first row as pieces of text, each with whether it
    is learned.
    """

    rows: int
    tokens: int
    target_tokens: int
    truncated_rows: int
    rows_without_target: int
    longest_row: int
    max_length: int
    packed_sequences: int | None
    example: list[tuple[str, bool]]


@dataclass(frozen=True)
class PreparedData:
    """Encoded training and validation rows; `fingerprint` is a SHA-256 of the training rows as they are encoded."""

    train: EncodedRows
    validation: EncodedRows | None
    train_report: DataReport
    validation_report: DataReport | None
    fingerprint: str


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
        truncated = without_target = longest = 0
        for index, row in zip(indices, self._encode(rows, indices, name), strict=True):
            longest = max(longest, len(row.ids))
            truncated += len(row.ids) > config.max_length
            ids, learned = truncate(row, config.max_length)
            if any(learned[1:]):
                kept.append((np.asarray(ids, np.int32), np.asarray(learned, np.bool_)))
                sources.append(int(index))
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


# --- order ------------------------------------------------------------------------------------------------------


def steps_per_epoch(n_rows: int, global_batch_size: int) -> int:
    """Return the optimizer steps of one pass; the last may take fewer rows."""
    return -(-n_rows // global_batch_size)


def step_rows(n_rows: int, step: int, global_batch_size: int, seed: int, shuffle: bool) -> npt.NDArray[np.int64]:
    """Return the indices of the rows of optimizer step `step`, counted from 0 over all epochs.

    A pure function: a resumed run asks for its next step and needs no saved state. Each epoch takes each row once,
    in the rows' own order or, with `shuffle`, in a permutation of its own; the last step of an epoch takes what is
    left of it.
    """
    epoch, window = divmod(step, steps_per_epoch(n_rows, global_batch_size))
    order = _permutation(n_rows, (seed, epoch)) if shuffle else np.arange(n_rows)
    return order[window * global_batch_size : (window + 1) * global_batch_size].copy()


def split_rows(n_rows: int, share: float, seed: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the indices to train on and those held out: `share` of the rows, at least one, chosen by `seed`."""
    held_out = max(1, round(n_rows * share))
    if held_out >= n_rows:
        raise DataError(
            f"holding out {held_out} of {n_rows} rows leaves none to train on",
            where=f"data.validation: {share}",
            fix="give more rows, a smaller share, or a validation set of its own",
        )
    order = _permutation(n_rows, (seed, 0, 1))  # (seed, epoch) never equals it: the stream is another one
    return np.sort(order[held_out:]), np.sort(order[:held_out])


@lru_cache(maxsize=4)
def _permutation(size: int, key: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """A permutation from the raw stream of Philox, which numpy keeps stable over versions (`shuffle` it does not)."""
    raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(size)
    order = np.argsort(raw, kind="stable")
    order.flags.writeable = False
    return order
