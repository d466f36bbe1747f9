"""How a user's text becomes a prompt: in the form that the training rows had in front of their answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dude_cli.config import DataConfig
from dude_cli.data.chat import ChatEncoder
from dude_cli.data.encode import TextEncoder, prompt_template
from dude_cli.data.messages import Message
from dude_cli.errors import DataError
from dude_cli.template import parse_template, render

_AS_IT_IS = "{text}"


@dataclass(frozen=True)
class Prompt:
    """What a model is given: the text, and its token ids with the tokenizer's BOS where a training has one."""

    text: str
    ids: list[int]


@dataclass(frozen=True)
class PromptForm:
    """A form of prompts: the chat template, or a template with one column, which the user's text fills.

    `description` names it for the user.
    """

    description: str
    encoder: TextEncoder
    chat: ChatEncoder | None = None
    template: str = _AS_IT_IS

    def prompt(self, conversation: Sequence[Message]) -> Prompt:
        """The prompt for an answer to the last message; without a chat template, to that one alone.

        Its ids are those that `data.prepare_data` puts in front of the answer. Raises DataError if the chat template
        refuses the conversation.
        """
        if self.chat is not None:
            return Prompt(*self.chat.prompt(list(conversation)))
        (column,) = parse_template(self.template)
        text = render(self.template, {column: conversation[-1]["content"]})
        return Prompt(text, self.encoder.encode_prompts([text])[0])

    def stop_ids(self, model: Any) -> set[int]:
        """The tokens at which an answer ends.

        Those that a training teaches, EOS or the chat template's end of a turn, and those of `model.generation_config`.
        """
        saved = model.generation_config.eos_token_id
        found = {self.encoder.eos_id, *(saved if isinstance(saved, list) else [saved])} - {None}
        if self.chat is not None:
            with suppress(DataError):  # no row could be trained with such a template, but it can be asked
                found |= self.chat.ends_of_turns()
        return found


def prompt_form(tokenizer: Any, data: DataConfig | None, *, raw: bool) -> PromptForm:
    """The form of the training that `data` describes; without one the chat template, where the tokenizer has one.

    Of a training on several forms of rows it is the chat, else that of the first data set.
    `raw`, or a training whose template has not exactly one column to fill: the text as it is.
    """
    encoder = TextEncoder(tokenizer)
    if raw:
        return PromptForm("the text as it is", encoder)
    if data is None and not getattr(tokenizer, "chat_template", None):
        return PromptForm("the text as it is, for the tokenizer has no chat template", encoder)
    if data is None or data.trains_on_chats:
        return PromptForm("the tokenizer's chat template", encoder, chat=ChatEncoder(encoder))
    form = data.form(data.train[0])
    template = prompt_template(form)
    columns = parse_template(template)
    if len(columns) > 1:
        why = f"the training's template has {len(columns)} columns: {json.dumps(template, ensure_ascii=False)}"
        return PromptForm(f"the text as it is, for {why}; --rows FILE answers rows that have them", encoder)
    if not columns:
        return PromptForm("the text as it is, for the training's prompts have no column", encoder)
    if template == f"{{{columns[0]}}}":
        return PromptForm(f"the text as it is, as the training's column {columns[0]}", encoder)
    name = "Alpaca's" if form.format == "alpaca" else json.dumps(template, ensure_ascii=False)
    return PromptForm(f"the training's template, {name}", encoder, template=template)
