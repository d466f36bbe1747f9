"""The fine-tuning family, `MARKET`: each split's word problems and multiple-choice questions."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

from dude_cli.quickstart.draw import Choice, Problem, draw, draw_choice, split_of
from dude_cli.quickstart.kinds import MARKET, MARKET_FORMULAS
from dude_cli.quickstart.layouts import Row, choice_row, options_document, problem_document, problem_row

SPLIT_SIZES = {"train": 8000, "dev": 500, "test": 500}  # of each of the two forms
SPLIT_SEEDS = {"train": 1, "dev": 2, "test": 3}


@cache
def market_problems(split: str) -> tuple[Problem, ...]:
    """Draw one split's word problems.

    A question stands once in `train`, and a kind with its set of numbers once in `dev` and `test`.
    """
    rng = random.Random(f"problem {SPLIT_SEEDS[split]}")
    found: dict[object, Problem] = {}
    while len(found) < SPLIT_SIZES[split]:
        problem = draw(rng, rng.choice(MARKET))
        if split_of(problem.numbers) != split or problem.answer in problem.numbers:
            continue
        content = problem.question if split == "train" else (problem.kind, tuple(sorted(problem.numbers)))
        found.setdefault(content, problem)
    return tuple(found.values())


@cache
def market_choices(split: str) -> tuple[Choice, ...]:
    """Draw one split's multiple-choice questions, each kind equally often; repetitions as in `market_problems`."""
    rng = random.Random(f"choice {SPLIT_SEEDS[split]}")
    found: dict[object, Choice] = {}
    while len(found) < SPLIT_SIZES[split]:
        kind = MARKET[len(found) % len(MARKET)]
        choice = draw_choice(rng, kind, MARKET_FORMULAS)
        if split_of(choice.numbers) == split:
            content = choice.question if split == "train" else (kind.name, tuple(sorted(choice.numbers)))
            found.setdefault(content, choice)
    return tuple(found.values())


def word_problems(split: str) -> list[dict[str, str]]:
    """Give a split's word problems in GSM8K's columns, ``question`` and ``answer``."""
    return [problem_document(problem) for problem in market_problems(split)]


def choices(split: str) -> list[dict[str, Any]]:
    """Give a split's multiple-choice questions in mmlu's columns; each letter is right equally often."""
    rng = random.Random(f"options {SPLIT_SEEDS[split]}")
    drawn = market_choices(split)
    places = [index % 4 for index in range(len(drawn))]
    rng.shuffle(places)
    return [
        options_document(rng, choice.question, choice.right, choice.wrong, place)
        for choice, place in zip(drawn, places, strict=True)
    ]


def rows(split: str) -> list[Row]:
    """Give a split (`train`, `dev` or `test`) as prompts and completions, both forms in one shuffled list."""
    if split not in SPLIT_SIZES:
        raise ValueError(f"split must be one of {', '.join(SPLIT_SIZES)}, not {split!r}")
    both = [problem_row(document) for document in word_problems(split)]
    both += [choice_row(document) for document in choices(split)]
    random.Random(SPLIT_SEEDS[split]).shuffle(both)
    return both
