"""How a published evaluation reads a number from a model's answer; lm-eval's task files name these functions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fractions import Fraction

_MARK = "The answer is: "
_NUMBER = re.compile(r"[-+]?\d*[.,/]?\d+")
NO_NUMBER = "[invalid]"


def numbers_after_the_answer_is(responses: Iterable[Sequence[str]], docs: object) -> list[list[str]]:
    """`number_after_the_answer_is` of each response to each question, as an lm-eval filter gives them."""
    return [[number_after_the_answer_is(text) for text in texts] for texts in responses]


def number_after_the_answer_is(text: str) -> str:
    """The first number after the last "The answer is: ", rounded to a whole one; `[invalid]` if there is none.

    As PiSSA's scripts do it: a comma is left out, `7/2` is a fraction, halves are rounded to even, and a number has
    one separator at most, so that of 1,234,567 the first four digits count.
    """
    _, mark, after = text.rpartition(_MARK)
    found = _NUMBER.search(after.strip()) if mark else None
    if found is None:
        return NO_NUMBER
    number = found.group().replace(",", "")
    numerator, slash, denominator = number.partition("/")
    if slash and not numerator.lstrip("+-"):
        return NO_NUMBER
    if slash and int(denominator) == 0:
        return str(int(numerator))
    return str(round(Fraction(number)))
