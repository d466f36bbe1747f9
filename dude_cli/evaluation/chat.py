"""Questions in a model's chat template, as lm-eval asks them: examples and answers are turns."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from datetime import datetime
from types import SimpleNamespace
from typing import Any

from dude_cli.data.told_time import told_at
from dude_cli.errors import UsageError

# What a template that asks for the date is told, so that a score does not depend on the day: the date that Llama 3's
# templates write where they cannot ask.
TOLD_DAY = datetime(2024, 7, 26)


def chat_renderer(tokenizer: Any) -> Callable[..., str]:
    """lm-eval's own rendering of a list of messages by the template of `tokenizer`, told `TOLD_DAY`.

    It leaves out the system's message, a task's description, where a template refuses one.
    """
    from lm_eval.models.huggingface import HFLM

    dated = copy.deepcopy(tokenizer)
    dated.chat_template = chat_template(tokenizer)
    return functools.partial(HFLM.apply_chat_template, SimpleNamespace(tokenizer=dated, chat_template_args={}))


def chat_template(tokenizer: Any) -> str:
    """The template of `tokenizer`, told `TOLD_DAY`. Raises UsageError if it has none."""
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            "the tokenizer has no chat template",
            where=f"apply_chat_template, with {tokenizer.name_or_path or 'this tokenizer'}",
            fix="ask in plain text, without `apply_chat_template`, or use an instruction-tuned model",
        )
    return told_at(tokenizer.get_chat_template(), TOLD_DAY)


def has_place_for_system(render: Callable[..., str]) -> bool:
    """Whether the system's message is in what `render` makes: a template may refuse it, or not look at it."""
    word = "5d1c7b2f"
    return word in render([{"role": "system", "content": word}, {"role": "user", "content": "question"}])


def prompt_settings(render: Callable[..., str] | None) -> dict[str, Any]:
    """How a task of lm-eval is to build its prompts: plain, or by `render` with each example as two turns."""
    if render is None:
        return {}
    return {"apply_chat_template": True, "fewshot_as_multiturn": True, "chat_template": render}
