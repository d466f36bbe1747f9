"""Questions in a model's chat template, as lm-eval asks them: examples and answers are turns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from datetime import datetime
from types import SimpleNamespace
from typing import Any

from dude_cli.config import EvalTask
from dude_cli.data.chat_template import default_template
from dude_cli.data.row_files import first_line
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
    model = SimpleNamespace(tokenizer=dated, chat_template_args={})

    def render(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        try:
            text: str = HFLM.apply_chat_template(model, messages, add_generation_prompt)
        except Exception as error:  # jinja2's errors, and whatever a template raises by itself
            raise UsageError(
                f"the chat template refuses a question: {first_line(error)}",
                where=_where(tokenizer),
                fix="ask in plain text, without `apply_chat_template`",
            ) from error
        return text

    return render


def chat_template(tokenizer: Any) -> str:
    """The template of `tokenizer`, told `TOLD_DAY`. Raises UsageError if it has none, or several and no default."""
    return told_at(default_template(tokenizer, _where(tokenizer)), TOLD_DAY)


def check_system_instruction(tokenizer: Any, task: EvalTask) -> None:
    """Raise UsageError if a task has a system's message that the template of `tokenizer` would leave out."""
    if task.system_instruction is not None and not has_place_for_system(chat_renderer(tokenizer)):
        raise UsageError(
            "the chat template has no place for a system's message",
            where=f"system_instruction, with {tokenizer.name_or_path or 'this tokenizer'}",
            fix="leave it out, or give another template with --chat-template",
        )


def has_place_for_system(render: Callable[..., str]) -> bool:
    """Whether the system's message is in what `render` makes: a template may refuse it, or not look at it."""
    word = "5d1c7b2f"
    return word in render([{"role": "system", "content": word}, {"role": "user", "content": "question"}])


def _where(tokenizer: Any) -> str:
    return f"apply_chat_template, with {tokenizer.name_or_path or 'this tokenizer'}"


def prompt_settings(task: EvalTask, tokenizer: Any) -> dict[str, Any]:
    """How a task of lm-eval is to build its prompts: plain, or in a chat template with each example as two turns."""
    if not task.apply_chat_template:
        return {}
    return {
        "apply_chat_template": True,
        "fewshot_as_multiturn": True,
        "chat_template": chat_renderer(tokenizer),
        "system_instruction": task.system_instruction,
    }
