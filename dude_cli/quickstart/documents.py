"""Give the generated held-out problems to lm-eval, whose task files in `tasks/` name these functions."""

import random
from typing import TYPE_CHECKING

from dude_cli.quickstart.corpus import LAST_MIX, mixed_row
from dude_cli.quickstart.layouts import Row
from dude_cli.quickstart.problems import SPLIT_SIZES, choices, word_problems

if TYPE_CHECKING:
    from datasets import Dataset


def word_problem_splits(**_: object) -> dict[str, "Dataset"]:
    """Give the word problems of each split; lm-eval passes a task's metadata, which changes nothing here."""
    from datasets import Dataset

    return {split: Dataset.from_list(word_problems(split)) for split in SPLIT_SIZES}


def choice_splits(**_: object) -> dict[str, "Dataset"]:
    """Give the choices of each split; lm-eval passes a task's metadata, which changes nothing here."""
    from datasets import Dataset

    return {split: Dataset.from_list(choices(split)) for split in SPLIT_SIZES}


def base_rows(number: int) -> list[Row]:
    """Give rows of what the base was trained on last, from a seed of their own: what a fine-tuning should not undo."""
    rng = random.Random("rows of the base's own kind")
    return [mixed_row(rng, LAST_MIX) for _ in range(number)]


def base_splits(**_: object) -> dict[str, "Dataset"]:
    """Give rows of what the base was trained on; lm-eval passes a task's metadata, which changes nothing here."""
    from datasets import Dataset

    return {"test": Dataset.from_list(base_rows(SPLIT_SIZES["test"]))}
