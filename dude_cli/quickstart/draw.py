"""Draw problems with their solutions, and say which split each belongs to."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

from dude_cli.quickstart.kinds import NAMES, THINGS, Kind

LARGEST = 99


@dataclass(frozen=True)
class Problem:
    """One problem: the kind's name, its numbers in the order of the kind's letters, and its solution."""

    kind: str
    numbers: tuple[int, ...]
    question: str
    calculations: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Choice:
    """One question with four calculations to choose from: the kind's name, its numbers, the right calculation."""

    kind: str
    numbers: tuple[int, ...]
    question: str
    right: str
    wrong: tuple[str, ...]


def calculate(left: int, operator: str, right: int) -> int:
    """Give the result of one calculation."""
    if operator == "+":
        return left + right
    return left - right if operator == "-" else left * right


def split_of(numbers: tuple[int, ...]) -> str:
    """Say which split a set of numbers belongs to: a tenth each for `dev` and `test`, else `train`."""
    share = zlib.crc32(repr(sorted(numbers)).encode()) % 10
    return {0: "test", 1: "dev"}.get(share, "train")


def draw(rng: random.Random, kind: Kind) -> Problem:
    """Draw one problem of a kind whose intermediate results and answer all lie in 1 .. `LARGEST`."""
    while True:
        values = {letter: rng.randint(*bounds) for letter, bounds in kind.ranges.items()}
        numbers = tuple(values.values())
        calculations = []
        for left, operator, right in map(tuple, kind.steps):
            result = calculate(values[left], operator, values[right])
            calculations.append(f"{values[left]}{operator}{values[right]}={result}")
            values["_"] = result
            if not 1 <= result <= LARGEST:
                break
        else:
            answer = values.pop("_")
            return Problem(kind.name, numbers, tell(rng, kind, values), tuple(calculations), answer)


def tell(rng: random.Random, kind: Kind, values: dict[str, int]) -> str:
    """Tell one of a kind's stories with the given numbers."""
    name, other = rng.sample(NAMES, 2)
    return rng.choice(kind.templates).format(**values, name=name, other=other, things=rng.choice(THINGS))


def draw_choice(rng: random.Random, kind: Kind, formulas: tuple[str, ...]) -> Choice:
    """Draw a question of a kind with the calculations of its family, no two of which have one value.

    The first number is larger than the product of the other two, so that every calculation is a sensible one, and
    the numbers are drawn alike for all kinds.
    """
    while True:
        numbers = (rng.randint(10, LARGEST), rng.randint(2, 12), rng.randint(2, 12))
        if numbers[1] * numbers[2] >= numbers[0] or len(set(numbers)) < 3:
            continue
        values_of_formulas = formula_values(numbers)
        if len({values_of_formulas[formula] for formula in formulas}) < len(formulas):
            continue
        written = {formula: formula.format(*numbers) for formula in formulas}
        right = written.pop(kind.formula)
        values = dict(zip(kind.places, numbers, strict=True))
        return Choice(kind.name, numbers, tell(rng, kind, values), right, tuple(written.values()))


def formula_values(numbers: tuple[int, ...]) -> dict[str, int]:
    """Give the value of each family's calculations on three numbers."""
    first, second, third = numbers
    return {
        "{0}+{1}+{2}": first + second + third,
        "{0}+{1}-{2}": first + second - third,
        "{0}-{1}+{2}": first - second + third,
        "{0}-{1}-{2}": first - second - third,
        "{0}-{1}*{2}": first - second * third,
        "{0}+{1}*{2}": first + second * third,
        "({0}+{1})*{2}": (first + second) * third,
        "({0}-{1})*{2}": (first - second) * third,
    }
