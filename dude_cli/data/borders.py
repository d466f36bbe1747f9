"""Texts as tokens, and how many of these are in front of given borders in a text.

In front of a border are the tokens with which the text up to there begins too: a token across it is behind it. To
encode each of these beginnings would take time that grows with the square of a conversation's turns. A tokenizer
divides a text at its added tokens (`<|im_end|>`) first, and encodes what is between them by itself: the part from the
last one in front of a border is enough.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from dude_cli.data.encode import TextEncoder, common_prefix


@dataclass(frozen=True)
class BorderedText:
    """A text, and the borders in it, in characters, that are to be found among its tokens."""

    text: str
    borders: list[int]


class BorderEncoder:
    """Encodes texts, without the tokenizer's own BOS and EOS, and finds borders in them."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder
        tokenizer = encoder.tokenizer
        added = tokenizer.added_tokens_decoder if tokenizer.is_fast else {}
        self.ids = {token.content: int(index) for index, token in added.items()}
        longest_first = sorted(self.ids, key=len, reverse=True)  # as a tokenizer prefers them
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def encode(self, rows: Sequence[BorderedText]) -> list[tuple[list[int], list[int]]]:
        """Return each text's ids, and how many of them are in front of each of its borders.

        All texts go to the tokenizer together, which has a thread for each core.
        """
        wholes = self.encoder.raw([row.text for row in rows])
        starts = [self._starts(row, ids) for row, ids in zip(rows, wholes, strict=True)]
        parts = iter(
            self.encoder.raw(
                [
                    row.text[start:border]
                    for row, own in zip(rows, starts, strict=True)
                    for (start, _), border in zip(own, row.borders, strict=True)
                ]
            )
        )
        return [
            (ids, [first + common_prefix(ids[first:], next(parts)) for _, first in own])
            for ids, own in zip(wholes, starts, strict=True)
        ]

    def _starts(self, row: BorderedText, ids: list[int]) -> list[tuple[int, int]]:
        """Where the part begins that shows a border, in characters and in tokens; one for each border."""
        marks = list(self.pattern.finditer(row.text))
        divided = set(self.ids.values())
        places = [place for place, token in enumerate(ids) if token in divided]
        if [self.ids[mark[0]] for mark in marks] != [ids[place] for place in places]:
            marks = []  # some are looked for in normalised text, as whole words, or not at all
        stops = [mark.end() for mark in marks]
        before = [bisect_right(stops, border) - 1 for border in row.borders]
        return [(marks[number].start(), places[number]) if number >= 0 else (0, 0) for number in before]
