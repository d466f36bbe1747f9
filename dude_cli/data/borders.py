"""Texts as tokens, and how many of these are in front of given borders in a text.

In front of a border are the tokens with which the text up to there begins too: a token across it is behind it. To
encode each of these beginnings would take time that grows with the square of a conversation's turns. A tokenizer
divides a text at its added tokens (`<|im_end|>`) first, and encodes what is between them by itself: the part from the
last one in front of a border is enough.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import lru_cache

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
        self.texts = {int(index): token.content for index, token in added.items()}

    def encode(self, rows: Sequence[BorderedText]) -> list[tuple[list[int], list[int]]]:
        """Return each text's ids, and how many of them are in front of each of its borders.

        All texts go to the tokenizer together, which has a thread for each core.
        """
        wholes = self.encoder.raw([row.text for row in rows])
        divided = self.texts.keys() & {token for ids in wholes for token in ids}
        pattern = _pattern(frozenset(self.texts[token] for token in divided))
        starts = [self._starts(row, ids, divided, pattern) for row, ids in zip(rows, wholes, strict=True)]
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

    def _starts(
        self, row: BorderedText, ids: list[int], divided: Set[int], pattern: re.Pattern[str]
    ) -> list[tuple[int, int]]:
        """Where the part begins that shows a border, in characters and in tokens; one for each border."""
        marks = list(pattern.finditer(row.text))
        places = [place for place, token in enumerate(ids) if token in divided]
        if [mark[0] for mark in marks] != [self.texts[ids[place]] for place in places]:
            marks = []  # some are looked for in normalised text, as whole words, or not at all
        stops = [mark.end() for mark in marks]
        before = [bisect_right(stops, border) - 1 for border in row.borders]
        return [(marks[number].start(), places[number]) if number >= 0 else (0, 0) for number in before]


@lru_cache
def _pattern(texts: frozenset[str]) -> re.Pattern[str]:
    """Finds any of some texts, the longest first, as a tokenizer prefers them.

    They are the few added tokens that a tokenizer has found: Gemma's has thousands, which would be tried one by one.
    """
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
