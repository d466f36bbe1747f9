"""Encoded rows in memory, and the batches made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

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
    """The sequences of a data set, each of one row or of several packed ones, in flat arrays (5 bytes a token).

    `target_tokens[i]` (int64) counts the tokens of sequence i that a prediction is scored on: those learned. The
    first token of a row is never one, because nothing stands before it to predict it from. `lengths[i]` (int64)
    counts all its tokens.
    """

    def __init__(
        self,
        rows: Sequence[tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]],
        source_rows: Sequence[int],
        groups: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Store `rows`, each of (token ids, learned flags); `groups` says which of them share a sequence."""
        sizes = np.fromiter((len(ids) for ids, _ in rows), np.int64, len(rows))
        self._offsets = np.concatenate([[0], np.cumsum(sizes)])
        self._ids = np.empty(self._offsets[-1], np.int32)
        self._learned = np.empty(self._offsets[-1], np.bool_)
        for (ids, learned), start, stop in zip(rows, self._offsets, self._offsets[1:], strict=False):
            self._ids[start:stop] = ids
            self._learned[start:stop] = learned
        self._learned[self._offsets[:-1][sizes > 0]] = False
        self._source_rows = np.asarray(source_rows, np.int64)
        self._set_groups([[index] for index in range(len(rows))] if groups is None else groups)

    def _set_groups(self, groups: Sequence[Sequence[int]]) -> None:
        self._groups = [np.asarray(group, np.int64) for group in groups]
        learned_before = np.concatenate([[0], np.cumsum(self._learned)])
        row_targets = learned_before[self._offsets[1:]] - learned_before[self._offsets[:-1]]
        row_lengths = np.diff(self._offsets)
        count = len(self._groups)
        self.target_tokens = np.fromiter((row_targets[group].sum() for group in self._groups), np.int64, count)
        self.lengths = np.fromiter((row_lengths[group].sum() for group in self._groups), np.int64, count)

    def packed(self, groups: Sequence[Sequence[int]]) -> EncodedRows:
        """Return the same rows with those of each group in one sequence."""
        new = object.__new__(EncodedRows)
        new._offsets, new._ids, new._learned = self._offsets, self._ids, self._learned
        new._source_rows = self._source_rows
        new._set_groups(groups)
        return new

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> EncodedRow:  # type: ignore[override]  # no slices: a step takes indices
        group = self._groups[index]
        spans = [slice(self._offsets[row], self._offsets[row + 1]) for row in group]
        ids = np.concatenate([self._ids[span] for span in spans])
        learned = np.concatenate([self._learned[span] for span in spans])
        return EncodedRow(
            input_ids=ids.tolist(),
            labels=np.where(learned, ids, NOT_LEARNED).tolist(),
            segment_lengths=[int(span.stop - span.start) for span in spans],
            source_rows=self._source_rows[group].tolist(),
        )

    def __iter__(self) -> Iterator[EncodedRow]:
        return (self[index] for index in range(len(self)))

    def fingerprint(self) -> str:
        """SHA-256 over the tokens, what is learned of them, and how they are grouped into sequences."""
        digest = hashlib.sha256()
        sizes = np.fromiter((len(group) for group in self._groups), np.int64, len(self._groups))
        members: npt.NDArray[np.int64] = np.concatenate([*self._groups, np.empty(0, np.int64)])
        for array in (self._offsets, self._ids, self._learned, sizes, members):
            digest.update(array.tobytes())
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
    """Positions that restart with each segment; padding is a segment of its own, which nothing attends to."""
    padding = longest - sum(segment_lengths)
    return [position for length in (*segment_lengths, padding) for position in range(length)]
