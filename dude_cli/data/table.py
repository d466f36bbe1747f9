"""The rows of a data set as token ids, in flat arrays that can be kept in a file and mapped from it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import numpy.typing as npt

from dude_cli.data.encode import Encoded
from dude_cli.data.truncation import split, truncate


@dataclass(frozen=True)
class TokenTable:
    """All rows of a data set after truncation, those with nothing to learn included, at 5 bytes a token.

    A row of the data is one row here, or, where documents are split, one or several that follow each other.

    - `offsets` (rows + 1, int64): row i is `input_ids[offsets[i]:offsets[i + 1]]`
    - `input_ids` (tokens, int32)
    - `learned` (tokens, bool): which of them are learned. The first of a row never is, because nothing stands before
      it to predict it from.
    - `full_lengths` (rows, int64): tokens before truncation
    - `lost_starts`, `lost_questions`, `cut_answers`, `lost_ends` (rows, bool), `lost_turns` (rows, int64): what
      truncation took (`Truncated`)
    - `empty_answers` (rows, bool): whether the answer has no words
    - `sources` (rows, int64): which row of the data it is, or is a part of
    """

    offsets: npt.NDArray[np.int64]
    input_ids: npt.NDArray[np.int32]
    learned: npt.NDArray[np.bool_]
    full_lengths: npt.NDArray[np.int64]
    lost_starts: npt.NDArray[np.bool_]
    lost_questions: npt.NDArray[np.bool_]
    cut_answers: npt.NDArray[np.bool_]
    lost_ends: npt.NDArray[np.bool_]
    lost_turns: npt.NDArray[np.int64]
    empty_answers: npt.NDArray[np.bool_]
    sources: npt.NDArray[np.int64]

    @classmethod
    def of(cls, rows: Iterable[Encoded], max_length: int) -> TokenTable:
        """Store `rows`, each truncated to `max_length` tokens, documents split into rows of so many."""
        ids: list[npt.NDArray[np.int32]] = [np.empty(0, np.int32)]
        learned: list[npt.NDArray[np.bool_]] = [np.empty(0, np.bool_)]
        full_lengths, sources, empty, lost = [], [], [], []
        for source, whole in enumerate(rows):
            for row in split(whole, max_length) if whole.is_document else [whole]:
                kept = truncate(row, max_length)
                ids.append(np.array(kept.ids, np.int32))
                learned.append(np.array(kept.learned, np.bool_))
                learned[-1][:1] = False
                full_lengths.append(len(row.ids))
                sources.append(source)
                empty.append(row.is_empty)
                flags = (kept.is_start_lost, kept.is_question_lost, kept.is_answer_cut, kept.is_end_lost)
                lost.append((*flags, kept.lost_turns))
        lost_starts, lost_questions, cut_answers, lost_ends, lost_turns = np.array(lost, np.int64).reshape(-1, 5).T
        return cls(
            offsets=np.cumsum([len(row_ids) for row_ids in ids], dtype=np.int64),
            input_ids=np.concatenate(ids),
            learned=np.concatenate(learned),
            full_lengths=np.array(full_lengths, np.int64),
            lost_starts=lost_starts.astype(np.bool_),
            lost_questions=lost_questions.astype(np.bool_),
            cut_answers=cut_answers.astype(np.bool_),
            lost_ends=lost_ends.astype(np.bool_),
            lost_turns=lost_turns.copy(),
            empty_answers=np.array(empty, np.bool_),
            sources=np.array(sources, np.int64),
        )

    def __len__(self) -> int:
        return len(self.full_lengths)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """The tokens of each row (rows, int64)."""
        return np.diff(self.offsets)

    @cached_property
    def target_tokens(self) -> npt.NDArray[np.int64]:
        """The tokens of each row that are learned (rows, int64)."""
        learned_before = np.concatenate([[0], np.cumsum(self.learned, dtype=np.int64)])
        return np.diff(learned_before[self.offsets])

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """The arrays by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def sha256(self) -> str:
        """Over all arrays, in hexadecimal."""
        digest = hashlib.sha256()
        for name, array in self.arrays().items():
            digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
            digest.update(array.data)
        return digest.hexdigest()
