"""Generate the embedded quickstart's problems: what its model is pretrained on and what it is fine-tuned on.

Everything here is a pure function of a seed. A `Kind` describes problems that share one chain of calculations
and the sentences that tell it. It is asked in two forms:

- a `Problem` in GSM8K's layout: ``Question: ...``, ``Answer:``, one calculation per line and ``#### N``;
- a `Choice` in the layout of lm-eval's mmlu: the question, four lettered options, ``Answer:`` and a letter. The
  options are calculations, and one of them solves the question. All questions of a family have the same four
  calculations to choose from, on numbers drawn alike, so that neither options nor numbers tell the right one.

The pretraining corpus mixes sums, stories, reading and choosing a letter. The fine-tuning family, `MARKET`,
joins a multiplication with an addition or a subtraction, which no pretraining story does, in words that
pretraining uses otherwise.

Which split a problem belongs to depends only on its set of numbers: no held-out problem has the numbers of
a training problem, whatever their order, the sentence around them or the form of the question. Pretraining
leaves those sets out too.
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

LETTERS = "ABCD"
LARGEST = 99
FIRST_ROWS = 36_000  # of the pretraining corpus
# Of sums, stories, choices of a calculation, choices of a word, and reading.
FIRST_MIX, LAST_MIX = (3, 1, 2, 93, 1), (34, 16, 34, 6, 10)
SPLIT_SIZES = {"train": 8000, "dev": 500, "test": 500}  # of each of the two forms
SPLIT_SEEDS = {"train": 1, "dev": 2, "test": 3}

NAMES = (
    *("Ada", "Ben", "Carl", "Dina", "Emma", "Finn", "Gus", "Hana", "Ivan", "Jill"),
    *("Kim", "Leo", "Mia", "Nora", "Omar", "Pia", "Rosa", "Sam", "Tom", "Uma"),
)
THINGS = (
    *("apples", "pens", "cards", "shells", "stamps", "books", "pies", "cakes", "eggs", "plums"),
    *("kites", "toys", "rings", "hats", "cups", "keys", "bells", "dolls", "stones", "flags"),
)

Row = dict[str, str]


@dataclass(frozen=True)
class Kind:
    """Problems with one chain of calculations.

    `ranges` gives the smallest and largest value of each number; a step such as ``c-_`` is three characters,
    where ``_`` stands for the result of the step before; a template has places for numbers, names and things.
    """

    name: str
    ranges: dict[str, tuple[int, int]]
    steps: tuple[str, ...]
    templates: tuple[str, ...]
    formula: str = ""  # the whole chain as one calculation of its family; empty where none is asked for
    places: str = "abc"  # which letters stand for the numbers 0, 1 and 2 of the formula


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


SMALL, FACTOR, LARGE = (1, 40), (2, 9), (1, 99)
STORY_FORMULAS = ("{0}+{1}+{2}", "{0}+{1}-{2}", "{0}-{1}+{2}", "{0}-{1}-{2}")
MARKET_FORMULAS = ("{0}-{1}*{2}", "{0}+{1}*{2}", "({0}+{1})*{2}", "({0}-{1})*{2}")

SUMS = (
    Kind("add", {"a": LARGE, "b": LARGE}, ("a+b",), ("{a}+{b}",)),
    Kind("subtract", {"a": LARGE, "b": LARGE}, ("a-b",), ("{a}-{b}",)),
    Kind("multiply", {"a": (2, 49), "b": (2, 49)}, ("a*b",), ("{a}*{b}",)),
)
LONG_SUMS = (
    Kind("product-add", {"a": FACTOR, "b": (2, 12), "c": LARGE}, ("a*b", "c+_"), ("{c}+{a}*{b}",)),
    Kind("product-subtract", {"a": FACTOR, "b": (2, 12), "c": LARGE}, ("a*b", "c-_"), ("{c}-{a}*{b}",)),
    Kind("sum-times", {"a": (2, 47), "b": (2, 47), "c": FACTOR}, ("a+b", "_*c"), ("({a}+{b})*{c}",)),
    Kind("rest-times", {"a": (5, 80), "b": (2, 75), "c": FACTOR}, ("a-b", "_*c"), ("({a}-{b})*{c}",)),
)

STORIES = (
    Kind(
        "gain",
        {"a": LARGE, "b": LARGE},
        ("a+b",),
        (
            "{name} has {a} {things} and buys {b} more. How many {things} does {name} have now?",
            "{name} finds {a} {things} in the morning and {b} in the evening. How many {things} are there?",
        ),
    ),
    Kind(
        "loss",
        {"a": LARGE, "b": LARGE},
        ("a-b",),
        (
            "{name} has {a} {things} and gives {b} to {other}. How many {things} are left?",
            "There are {a} {things} in a shop. {name} takes {b} of them. How many {things} are left?",
        ),
    ),
    Kind(
        "packs",
        {"a": (2, 20), "b": (2, 20)},
        ("a*b",),
        (
            "{name} fills {a} boxes with {b} {things} each. How many {things} are there?",
            "{name} reads {b} pages a day for {a} days. How many pages does {name} read?",
        ),
    ),
    Kind(
        "gains",
        {"a": SMALL, "b": SMALL, "c": SMALL},
        ("a+b", "_+c"),
        (
            "{name} has {a} {things}, {other} has {b} and the shop has {c}. How many {things} are there?",
            "{name} walks {a} miles, rides {b} miles and runs {c} miles. How many miles is that?",
        ),
        "{0}+{1}+{2}",
    ),
    Kind(
        "gain-loss",
        {"a": LARGE, "b": SMALL, "c": SMALL},
        ("a+b", "_-c"),
        (
            "{name} has {a} {things}, makes {b} more and loses {c}. How many {things} are left?",
            "A bus has {a} people. {b} get on and {c} get off. How many people does the bus have now?",
        ),
        "{0}+{1}-{2}",
    ),
    Kind(
        "loss-gain",
        {"a": LARGE, "b": SMALL, "c": SMALL},
        ("a-b", "_+c"),
        (
            "{name} has {a} {things}, gives {b} away and finds {c} more. How many {things} does {name} have now?",
            "A jar has {a} coins. {name} takes {b} coins and {other} brings {c} coins. "
            "How many coins does the jar have now?",
        ),
        "{0}-{1}+{2}",
    ),
    Kind(
        "losses",
        {"a": LARGE, "b": SMALL, "c": SMALL},
        ("a-b", "_-c"),
        (
            "{name} bakes {a} {things}. {other} takes {b} and {c} break. How many {things} are left?",
            "A book has {a} pages. {name} reads {b} pages in the morning and {c} in the evening. "
            "How many pages are left?",
        ),
        "{0}-{1}-{2}",
    ),
    Kind(
        "compare",
        {"a": SMALL, "b": SMALL},
        ("a+b", "a+_"),
        (
            "{name} has {a} {things} and {other} has {b} more than {name}. How many {things} do they have?",
            "{name} has {a} {things}. {other} has {b} more. They count all. How many {things} is that?",
        ),
    ),
)

LONG_STORIES = tuple(kind for kind in STORIES if kind.formula)

MARKET = (
    Kind(
        "change",
        {"a": FACTOR, "b": (2, 12), "c": (10, 99)},
        ("a*b", "c-_"),
        (
            "{name} has {c} coins and buys {a} {things} for {b} coins each. How many coins are left?",
            "{name} pays {c} coins for {a} {things} that cost {b} coins each. How many coins come back?",
        ),
        "{0}-{1}*{2}",
        "cab",
    ),
    Kind(
        "wage",
        {"a": FACTOR, "b": (2, 12), "c": (2, 80)},
        ("a*b", "c+_"),
        (
            "{name} has {c} coins and earns {b} coins a day for {a} days. How many coins does {name} have now?",
            "{name} finds {c} coins and sells {a} {things} for {b} coins each. How many coins does {name} have now?",
        ),
        "{0}+{1}*{2}",
        "cab",
    ),
    Kind(
        "takings",
        {"a": (2, 47), "b": (2, 47), "c": FACTOR},
        ("a+b", "_*c"),
        (
            "{name} bakes {a} {things} in the morning and {b} in the evening and sells each for {c} coins. "
            "How many coins does {name} earn?",
            "{name} has {a} {things} and {other} has {b}. They sell all for {c} coins each. "
            "How many coins do they earn?",
        ),
        "({0}+{1})*{2}",
    ),
    Kind(
        "rest",
        {"a": (5, 80), "b": (2, 75), "c": FACTOR},
        ("a-b", "_*c"),
        (
            "{name} has {a} {things}, keeps {b} and sells the rest for {c} coins each. "
            "How many coins does {name} earn?",
            "{other} breaks {b} of {a} {things}. {name} sells the rest for {c} coins each. "
            "How many coins does {name} earn?",
        ),
        "({0}-{1})*{2}",
    ),
)

# What people do in the reading questions: the words of MARKET in another use, without numbers.
DEEDS = (
    "pays for the cups",
    "pays the shop",
    "earns a day of rest",
    "earns all the coins",
    "sells old {things}",
    "sells all the {things}",
    "sells the cost of a book",
    "keeps the rest of the day",
    "keeps each of the {things}",
    "breaks the {things}",
    "breaks a cup in the morning",
    "buys {things} for {other}",
    "buys each cake that is left",
    "bakes pies in the evening",
    "finds the coins that come back",
    "finds what the cups cost",
    "wants to earn coins",
    "wants to sell {things}",
    "has coins for all the {things}",
    "reads all day",
    "rides the bus in the morning",
    "keeps a jar of coins",
)


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


def choice_document(rng: random.Random, choice: Choice, place: int) -> dict[str, Any]:
    """Write a choice in mmlu's columns, the right option at a place (0 to 3) among the shuffled wrong ones."""
    return options_document(rng, choice.question, choice.right, choice.wrong, place)


def options_document(rng: random.Random, question: str, right: str, wrong: Sequence[str], place: int) -> dict[str, Any]:
    """Write a question, its right option and three wrong ones in mmlu's columns."""
    options = rng.sample(wrong, len(wrong))
    options.insert(place, right)
    return {"question": question, "choices": options, "answer": place}


def problem_document(problem: Problem) -> dict[str, str]:
    """Write a problem in GSM8K's columns."""
    return {
        "question": problem.question,
        "answer": "\n".join(problem.calculations) + f"\n#### {problem.answer}",
    }


def problem_row(document: dict[str, str]) -> Row:
    """Write a word problem as the prompt that lm-eval's gsm8k gives, and its completion."""
    return {"prompt": f"Question: {document['question']}\nAnswer:", "completion": f" {document['answer']}"}


def choice_row(document: dict[str, Any]) -> Row:
    """Write a multiple-choice question as the prompt that lm-eval's mmlu gives, and the letter."""
    options = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, document["choices"], strict=True))
    return {
        "prompt": f"{document['question']}\n{options}\nAnswer:",
        "completion": f" {LETTERS[document['answer']]}",
    }


# The fine-tuning family


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
    return [choice_document(rng, choice, place) for choice, place in zip(drawn, places, strict=True)]


def rows(split: str) -> list[Row]:
    """Give a split (`train`, `dev` or `test`) as prompts and completions, both forms in one shuffled list."""
    if split not in SPLIT_SIZES:
        raise ValueError(f"split must be one of {', '.join(SPLIT_SIZES)}, not {split!r}")
    both = [problem_row(document) for document in word_problems(split)]
    both += [choice_row(document) for document in choices(split)]
    random.Random(SPLIT_SEEDS[split]).shuffle(both)
    return both


# The pretraining corpus


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
