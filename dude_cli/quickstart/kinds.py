"""What the problems are made of: names, things, chains of calculations, and the sentences that tell them."""

from __future__ import annotations

from dataclasses import dataclass

NAMES = (
    *("Ada", "Ben", "Carl", "Dina", "Emma", "Finn", "Gus", "Hana", "Ivan", "Jill"),
    *("Kim", "Leo", "Mia", "Nora", "Omar", "Pia", "Rosa", "Sam", "Tom", "Uma"),
)
THINGS = (
    *("apples", "pens", "cards", "shells", "stamps", "books", "pies", "cakes", "eggs", "plums"),
    *("kites", "toys", "rings", "hats", "cups", "keys", "bells", "dolls", "stones", "flags"),
)


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
