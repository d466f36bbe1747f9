"""Give the generated held-out problems to lm-eval, whose task files in `tasks/` name these functions."""

from typing import TYPE_CHECKING

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
