"""Generate the embedded quickstart's problems: what its model is pretrained on and what it is fine-tuned on.

Everything here is a pure function of a seed. A `Kind` describes problems that share one chain of calculations
and the sentences that tell it; a `Problem` is one of them with its numbers. It can be asked in two forms:

- a word problem in GSM8K's layout: ``Question: ...``, ``Answer:``, one calculation per line and ``#### N``;
- a multiple-choice question in the layout of lm-eval's mmlu: the question, four lettered options,
  ``Answer:`` and a letter.

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
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

LETTERS = "ABCD"
LARGEST = 99
GAPS = (2, 15)  # between neighbouring options of a multiple-choice question
FIRST_ROWS = 36_000  # of the pretraining corpus
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


@dataclass(frozen=True)
class Problem:
    """One problem: the kind's name, its numbers in the order of the kind's letters, and its solution."""

    kind: str
    numbers: tuple[int, ...]
    question: str
    calculations: tuple[str, ...]
    answer: int


SMALL, FACTOR, LARGE = (1, 40), (2, 9), (1, 99)

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
    ),
    Kind(
        "gain-loss",
        {"a": LARGE, "b": SMALL, "c": SMALL},
        ("a+b", "_-c"),
        (
            "{name} has {a} {things}, makes {b} more and loses {c}. How many {things} are left?",
            "A bus has {a} people. {b} get on and {c} get off. How many people does the bus have now?",
        ),
    ),
    Kind(
        "loss-gain",
        {"a": LARGE, "b": SMALL, "c": SMALL},
        ("a-b", "_+c"),
        (
            "{name} has {a} {things}, gives {b} away and finds {c} more. "
            "How many {things} does {name} have now?",
            "A jar has {a} coins. {name} takes {b} coins and {other} brings {c} coins. "
            "How many coins does the jar have now?",
        ),
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

SHORT_STORIES = tuple(kind for kind in STORIES if len(kind.steps) == 1)

MARKET = (
    Kind(
        "change",
        {"a": FACTOR, "b": (2, 12), "c": (10, 99)},
        ("a*b", "c-_"),
        (
            "{name} has {c} coins and buys {a} {things} for {b} coins each. How many coins are left?",
            "{name} pays {c} coins for {a} {things} that cost {b} coins each. How many coins come back?",
        ),
    ),
    Kind(
        "wage",
        {"a": FACTOR, "b": (2, 12), "c": (2, 80)},
        ("a*b", "c+_"),
        (
            "{name} has {c} coins and earns {b} coins a day for {a} days. "
            "How many coins does {name} have now?",
            "{name} finds {c} coins and sells {a} {things} for {b} coins each. "
            "How many coins does {name} have now?",
        ),
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
            name, other = rng.sample(NAMES, 2)
            words = {"name": name, "other": other, "things": rng.choice(THINGS)}
            question = rng.choice(kind.templates).format(**values, **words)
            return Problem(kind.name, numbers, question, tuple(calculations), values["_"])


def numbers_near(rng: random.Random, answer: int, taken: tuple[int, ...]) -> list[int]:
    """Draw three wrong options around an answer, none of them among the taken numbers.

    The answer's rank among the four is uniform; the taken numbers are the question's, where the answer does
    not stand either: neither the options' order nor a look for them in the question tells the right one.
    """
    while True:
        rank = rng.randrange(4)
        below = [answer]
        for _ in range(rank):
            below.append(below[-1] - rng.randint(*GAPS))
        above = [answer]
        for _ in range(3 - rank):
            above.append(above[-1] + rng.randint(*GAPS))
        wrong = below[1:] + above[1:]
        if all(1 <= value <= LARGEST and value not in taken for value in wrong):
            return wrong


def choice_document(
    rng: random.Random, question: str, right: object, wrong: list[Any], place: int
) -> dict[str, Any]:
    """Put the right option at a place (0 to 3) among the shuffled wrong ones, in mmlu's columns."""
    options = [str(option) for option in wrong]
    rng.shuffle(options)
    options.insert(place, str(right))
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
    options = "\n".join(
        f"{letter}. {text}" for letter, text in zip(LETTERS, document["choices"], strict=True)
    )
    return {
        "prompt": f"{document['question']}\n{options}\nAnswer:",
        "completion": f" {LETTERS[document['answer']]}",
    }


# The fine-tuning family


@cache
def market_problems(split: str, form: str) -> tuple[Problem, ...]:
    """Draw one split's problems for one form (``problem`` or ``choice``).

    A question stands once in `train`, and a kind with its set of numbers once in `dev` and `test`.
    """
    rng = random.Random(f"{form} {SPLIT_SEEDS[split]}")
    found: dict[object, Problem] = {}
    while len(found) < SPLIT_SIZES[split]:
        problem = draw(rng, rng.choice(MARKET))
        if split_of(problem.numbers) != split or problem.answer in problem.numbers:
            continue
        content = problem.question if split == "train" else (problem.kind, tuple(sorted(problem.numbers)))
        found.setdefault(content, problem)
    return tuple(found.values())


def word_problems(split: str) -> list[dict[str, str]]:
    """Give a split's word problems in GSM8K's columns, ``question`` and ``answer``."""
    return [problem_document(problem) for problem in market_problems(split, "problem")]


def choices(split: str) -> list[dict[str, Any]]:
    """Give a split's multiple-choice questions in mmlu's columns; each letter is right equally often."""
    rng = random.Random(f"options {SPLIT_SEEDS[split]}")
    problems = market_problems(split, "choice")
    places = [index % 4 for index in range(len(problems))]
    rng.shuffle(places)
    return [
        choice_document(
            rng, problem.question, problem.answer, numbers_near(rng, problem.answer, problem.numbers), place
        )
        for problem, place in zip(problems, places, strict=True)
    ]


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


def number_choice_row(rng: random.Random) -> Row:
    """Write a sum, its bare result, or a story of one calculation, with four numbers to choose from."""
    form = rng.choice(("result", "sum", "long sum", "story"))
    problem = draw_seen(rng, {"long sum": LONG_SUMS, "story": SHORT_STORIES}.get(form, SUMS))
    # Finding a given number among the options is learned early, and what calculates one builds on it.
    asked = {"result": f"{problem.answer}=?", "story": problem.question}.get(form, f"{problem.question}=?")
    wrong = numbers_near(rng, problem.answer, ())
    return choice_row(choice_document(rng, asked, problem.answer, wrong, rng.randrange(4)))


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
    return choice_row(choice_document(rng, question, people[asked], wrong, rng.randrange(4)))


def word_choice_row(rng: random.Random) -> Row:
    """Write a word and four words to find it among."""
    right, *wrong = rng.sample(NAMES + THINGS, 4)
    return choice_row(choice_document(rng, f"{right}=?", right, wrong, rng.randrange(4)))


def pretraining_rows(seed: int) -> Iterator[Row]:
    """Give the endless pretraining corpus of a seed, every kind of row mixed from the start.

    The first rows are mostly words to choose: to name an option's letter is the slowest skill to appear (some
    25,000 such rows), and choosing numbers builds on it.
    """
    rng = random.Random(seed)
    writers = (sum_row, story_row, number_choice_row, word_choice_row, reading_row)
    for count in itertools.count():
        weights = (3, 1, 2, 93, 1) if count < FIRST_ROWS else (40, 14, 33, 6, 7)
        yield rng.choices(writers, weights=weights)[0](rng)
