"""Rows in at most so many tokens: what of a prompt, an answer, a conversation or a document is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dude_cli.data.encode import Encoded


@dataclass(frozen=True)
class Truncated:
    """A row in its length, and what it lost for that.

    `is_start_lost`: tokens of its context; `is_question_lost`: all that others than the assistant say in front of the
    first answer; `is_answer_cut`: the end of its answer, with its EOS; `is_end_lost`: messages at its end that would be
    learned, of which `lost_turns` are the assistant's.
    """

    ids: list[int]
    learned: list[bool]
    is_start_lost: bool = False
    is_question_lost: bool = False
    is_answer_cut: bool = False
    is_end_lost: bool = False
    lost_turns: int = 0


def truncate(row: Encoded, max_length: int) -> Truncated:
    """Return a row in at most `max_length` tokens.

    A conversation ends behind the last learned turn that fits, or behind its first one. Then the context loses tokens:
    what others than the assistant say its start, and if that is not enough, all from its start on. The leading tokens
    stay, and at least one token in front of the answer, without which its first token could not be predicted. Only an
    answer that does not fit behind that is cut at its end, and then has no EOS.
    """
    shorter = _without_last_turns(row, max_length)
    lost_turns = len(row.stops) - len(shorter.stops)
    is_end_lost = lost_turns > 0 or (row.goes_on and shorter is not row)
    excess = len(shorter.ids) - max_length
    if excess <= 0:
        return Truncated(shorter.ids, shorter.learned, is_end_lost=is_end_lost, lost_turns=lost_turns)
    start, stop = row.words or (0, 0)
    is_within_words = excess < stop - start
    front = start if is_within_words else row.leading
    kept_from = front + min(excess, row.context - (front or min(row.context, 1)))
    ids = shorter.ids[:front] + shorter.ids[kept_from:]
    learned = shorter.learned[:front] + shorter.learned[kept_from:]
    return Truncated(
        ids[:max_length],
        learned[:max_length],
        is_start_lost=kept_from > front,
        is_question_lost=row.words is not None and not is_within_words,
        is_answer_cut=any(learned[max_length:]),
        is_end_lost=is_end_lost,
        lost_turns=lost_turns,
    )


def _without_last_turns(row: Encoded, max_length: int) -> Encoded:
    if len(row.ids) <= max_length or not row.stops:
        return row
    ends = [(stop, list(closing)) for stop, closing in zip(row.stops, row.closings, strict=True)]
    kept = max(1, sum(stop + len(closing) <= max_length for stop, closing in ends))
    stop, closing = ends[kept - 1]
    ids, learned = row.ids[:stop] + closing, row.learned[:stop] + [True] * len(closing)
    return replace(row, ids=ids, learned=learned, stops=row.stops[:kept], closings=row.closings[:kept])


def split(row: Encoded, max_length: int) -> Iterator[Encoded]:
    """Yield a document in rows of at most `max_length` tokens, in which each of its learned tokens is learned once.

    Each row after the first begins with the leading tokens (BOS), with which a model is always asked, and the last
    token of the row before, from which its first new token is predicted. A `max_length` without room for more than
    these gives the document as it is.
    """
    repeated = row.leading + 1
    if len(row.ids) <= max_length or max_length <= repeated:
        yield row
        return
    yield replace(row, ids=row.ids[:max_length], learned=row.learned[:max_length])
    for start in range(max_length, len(row.ids), max_length - repeated):
        stop = start + max_length - repeated
        ids = row.ids[: row.leading] + row.ids[start - 1 : stop]
        learned = [False] * repeated + row.learned[start:stop]
        yield replace(row, ids=ids, learned=learned, context=repeated)
