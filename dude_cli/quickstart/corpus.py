"""The corpus that the quickstart's model is pretrained on: sums, stories, reading and choosing a letter."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

from dude_cli.quickstart.draw import Choice, Problem, draw, draw_choice, split_of
from dude_cli.quickstart.kinds import (
    DEEDS,
    LONG_STORIES,
    LONG_SUMS,
    MARKET,
    MARKET_FORMULAS,
    NAMES,
    STORIES,
    STORY_FORMULAS,
    SUMS,
    THINGS,
    Kind,
)
from dude_cli.quickstart.layouts import Row, choice_row, options_document, problem_document, problem_row

FIRST_ROWS = 36_000  # of the pretraining corpus
# Of sums, stories, choices of a calculation, choices of a word, and reading.
FIRST_MIX, LAST_MIX = (3, 1, 2, 93, 1), (34, 16, 34, 6, 10)


def draw_seen(rng: random.Random, kinds: tuple[Kind, ...]) -> Problem:
    """Draw a problem for pretraining, never one with the numbers of a held-out problem."""
    while True:
        problem = draw(rng, rng.choice(kinds))
        if len(problem.numbers) < 3 or split_of(problem.numbers) == "train":
            return problem


def sum_row(rng: random.Random) -> Row:
    """Write a sum and its result."""
    problem = draw_seen(rng, SUMS if rng.random() < 0.5 else LONG_SUMS)
    return {"prompt": f"{problem.question}=", "completion": str(problem.answer)}


def story_row(rng: random.Random) -> Row:
    """Write a story and its calculations."""
    return problem_row(problem_document(draw_seen(rng, STORIES)))


def calculation_choice_row(rng: random.Random) -> Row:
    """Write a story, or a bare calculation, and four calculations to find the one of it among."""
    if rng.random() < 0.6:
        choice = draw_seen_choice(rng, LONG_STORIES, STORY_FORMULAS)
        question = choice.question
    else:
        family, formulas = rng.choice(((LONG_STORIES, STORY_FORMULAS), (MARKET, MARKET_FORMULAS)))
        choice = draw_seen_choice(rng, family, formulas)
        question = f"{choice.right}=?"
    return choice_row(options_document(rng, question, choice.right, choice.wrong, rng.randrange(4)))


def draw_seen_choice(rng: random.Random, kinds: tuple[Kind, ...], formulas: tuple[str, ...]) -> Choice:
    """Draw a choice for pretraining, never one with the numbers of a held-out problem."""
    while True:
        choice = draw_choice(rng, rng.choice(kinds), formulas)
        if split_of(choice.numbers) == "train":
            return choice


def reading_row(rng: random.Random) -> Row:
    """Write who does what, and ask who does one of it: a name, or the letter of a name."""
    people = rng.sample(NAMES, 5)
    deeds = [deed.format(things=rng.choice(THINGS), other=people[4]) for deed in rng.sample(DEEDS, 3)]
    asked = rng.randrange(3)
    text = " ".join(f"{person} {deed}." for person, deed in zip(people, deeds, strict=False))
    question = f"{text} Who {deeds[asked]}?"
    if rng.random() < 0.5:
        return {"prompt": f"Question: {question}\nAnswer:", "completion": f" {people[asked]}"}
    wrong = [person for person in people[:4] if person != people[asked]]
    return choice_row(options_document(rng, question, people[asked], wrong, rng.randrange(4)))


def word_choice_row(rng: random.Random) -> Row:
    """Write a word and four words to find it among."""
    right, *wrong = rng.sample(NAMES + THINGS, 4)
    return choice_row(options_document(rng, f"{right}=?", right, wrong, rng.randrange(4)))


def pretraining_rows(seed: int) -> Iterator[Row]:
    """Give the endless pretraining corpus of a seed, every kind of row mixed from the start.

    The first rows are mostly words to choose: to name an option's letter is the slowest skill to appear (some
    25,000 such rows), and choosing calculations builds on it.
    """
    rng = random.Random(seed)
    for count in itertools.count():
        yield mixed_row(rng, FIRST_MIX if count < FIRST_ROWS else LAST_MIX)


def mixed_row(rng: random.Random, mix: Sequence[int]) -> Row:
    """Write a row of a kind that is drawn with the weights of `mix`."""
    writers = (sum_row, story_row, calculation_choice_row, word_choice_row, reading_row)
    return rng.choices(writers, weights=mix)[0](rng)
