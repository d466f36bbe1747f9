"""Problems and choices in the columns of GSM8K and mmlu, and as the prompts that lm-eval makes of these."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from dude_cli.quickstart.draw import Problem

LETTERS = "ABCD"

Row = dict[str, str]


def options_document(rng: random.Random, question: str, right: str, wrong: Sequence[str], place: int) -> dict[str, Any]:
    """Write a question in mmlu's columns, the right option at a place (0 to 3) among the shuffled wrong ones."""
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
