"""The sequences that are learned from, and the batches made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from dude_cli.data.table import TokenTable

if TYPE_CHECKING:
    from torch import Tensor

NOT_LEARNED = -100  # the label that torch's cross-entropy ignores


@dataclass(frozen=True)
class EncodedRow:
    """One sequence: a row of the data, or several packed ones.

    `labels[i]` belongs to `input_ids[i]` (the loss shifts them), -100 where nothing is learned. `segment_lengths`
    are the lengths of the rows in the sequence, in order, and `source_rows` their indices in the data read.
    """

    input_ids: list[int]
    labels: list[int]
    segment_lengths: list[int]
    source_rows: list[int]

    def __len__(self) -> int:
        return len(self.input_ids)


class EncodedRows(Sequence[EncodedRow]):
    """The sequences to learn from, each of one row of a table or of several packed ones; the tokens stay in the table.

    `target_tokens[i]` (int64) counts the tokens of sequence i that a prediction is scored on: those learned.
    `lengths[i]` (int64) counts all its tokens.
    """

    def __init__(
        self, table: TokenTable, rows: npt.NDArray[np.int64], groups: Sequence[Sequence[int]] | None = None
    ) -> None:
        """Take `rows` of `table`; `groups`, of places in `rows`, says which of them share a sequence."""
        self._table, self._rows = table, rows
        if groups is None:
            self._sizes, self._places = np.ones(len(rows), np.int64), np.arange(len(rows))
        else:
            self._sizes = np.fromiter(map(len, groups), np.int64, len(groups))
            self._places = np.fromiter((place for group in groups for place in group), np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)])
        self.target_tokens = self._sums(table.target_tokens)
        self.lengths = self._sums(table.lengths)

    def _sums(self, of_rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        before = np.concatenate([[0], np.cumsum(of_rows[self._rows[self._places]])])
        sums: npt.NDArray[np.int64] = np.diff(before[self._starts])
        return sums

    @property
    def longest_encoded_row(self) -> int:
        """The tokens of the longest row as it is learned, after truncation, however rows are put into sequences."""
        return int(self._table.lengths[self._rows].max())

    def row_hashes(self) -> npt.NDArray[np.uint64]:
        """The first 8 bytes of BLAKE2b over each row's tokens, however rows are put into sequences."""
        table = self._table
        starts, stops = table.offsets[self._rows].tolist(), table.offsets[self._rows + 1].tolist()
        digests = (
            hashlib.blake2b(table.input_ids[start:stop].data, digest_size=8).digest()
            for start, stop in zip(starts, stops, strict=True)
        )
        return np.frombuffer(b"".join(digests), np.uint64)

    def shared_with(self, others: EncodedRows) -> int:
        """How many of the rows are among `others` too."""
        return int(np.isin(self.row_hashes(), others.row_hashes()).sum())

    def packed(self, groups: Sequence[Sequence[int]]) -> EncodedRows:
        """Return the same rows with those of each group in one sequence."""
        return EncodedRows(self._table, self._rows, groups)

    def __len__(self) -> int:
        return len(self._sizes)

    def __getitem__(self, index: int) -> EncodedRow:  # type: ignore[override]  # no slices: a step takes indices
        table, rows = self._table, self._rows[self._places[self._starts[index] : self._starts[index + 1]]]
        spans = [slice(table.offsets[row], table.offsets[row + 1]) for row in rows]
        ids = np.concatenate([table.input_ids[span] for span in spans])
        learned = np.concatenate([table.learned[span] for span in spans])
        return EncodedRow(
            input_ids=ids.tolist(),
            labels=np.where(learned, ids, NOT_LEARNED).tolist(),
            segment_lengths=table.lengths[rows].tolist(),
            source_rows=table.sources[rows].tolist(),
        )

    def __iter__(self) -> Iterator[EncodedRow]:
        return (self[index] for index in range(len(self)))

    def fingerprint(self) -> str:
        """SHA-256 over the tokens, what is learned of them, and how they are grouped into sequences."""
        offsets = np.concatenate([[0], np.cumsum(self._table.lengths[self._rows])])
        digest = hashlib.sha256(offsets.data)
        for tokens in (self._table.input_ids, self._table.learned):
            for start, stop in zip(self._table.offsets[self._rows], self._table.offsets[self._rows + 1], strict=True):
                digest.update(tokens[start:stop].data)
        digest.update(self._sizes.data)
        digest.update(self._places.data)
        return digest.hexdigest()


def collate(rows: Sequence[EncodedRow], pad_id: int, *, flatten: bool = False) -> dict[str, Tensor]:
    """Return a batch for `model(**batch, use_cache=False)`: int64 tensors of shape (rows, longest row).

    - `input_ids`, padded on the right with `pad_id`, and `labels`, padded with -100. There is no attention mask:
      a causal model never looks to the right, so padding by length is enough, and the fast causal kernel stays.
    - `position_ids`, where a sequence holds several rows: they restart at 0 with each row, from which
      transformers builds the mask that keeps packed rows apart. It does so only without an attention mask and
      without a cache, hence `use_cache=False`; `packing.check_packing` tells whether a model does it at all.

    `flatten` puts all rows into one sequence of shape (1, tokens) without padding. Flash attention needs it for
    packed rows: it finds their borders only in a batch of one.
    """
    import torch

    segments = [row.segment_lengths for row in rows]
    if flatten:
        rows = [
            EncodedRow(
                input_ids=[token for row in rows for token in row.input_ids],
                labels=[label for row in rows for label in row.labels],
                segment_lengths=[length for lengths in segments for length in lengths],
                source_rows=[source for row in rows for source in row.source_rows],
            )
        ]
    longest = max(len(row) for row in rows)
    input_ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    labels = torch.full((len(rows), longest), NOT_LEARNED, dtype=torch.int64)
    for index, row in enumerate(rows):
        input_ids[index, : len(row)] = torch.tensor(row.input_ids, dtype=torch.int64)
        labels[index, : len(row)] = torch.tensor(row.labels, dtype=torch.int64)
    batch = {"input_ids": input_ids, "labels": labels}
    if any(len(row.segment_lengths) > 1 for row in rows):
        batch["position_ids"] = torch.tensor([_position_ids(row.segment_lengths, longest) for row in rows])
    return batch


def _position_ids(segment_lengths: Sequence[int], longest: int) -> list[int]:
    """Positions that restart with each segment; each token of the padding is a segment, which nothing attends to.

    Were the padding one segment, it could be longer than a model has positions.
    """
    padding = longest - sum(segment_lengths)
    return [position for length in segment_lengths for position in range(length)] + [0] * padding
