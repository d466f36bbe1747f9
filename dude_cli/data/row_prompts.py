"""The prompts of rows that are to be answered: what a training on such rows has in front of their answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from dude_cli.config import DataConfig, DataSource, RowForm
from dude_cli.data.as_trained import OWN_FORM, as_trained
from dude_cli.data.bad_rows import BadRows
from dude_cli.data.chat import ChatEncoder
from dude_cli.data.encode import TextEncoder, answer_columns, prompt_columns, prompt_template, row_texts
from dude_cli.data.prompt import Prompt, PromptForm
from dude_cli.data.row_files import Rows
from dude_cli.data.rows import Seen, read_source
from dude_cli.errors import DataError
from dude_cli.template import parse_template

_LONGEST = 1 << 30  # a config needs one: prompts are never cut


@dataclass(frozen=True)
class RowPrompt:
    """A row's prompt, where the row stands, and its own answer, None where it has none."""

    place: str
    prompt: Prompt
    expected: str | None


def row_prompts(
    source: DataSource,
    trained: DataConfig | None,
    tokenizer: Any,
    *,
    say: Callable[[str], None],
    moment: datetime | None = None,
) -> tuple[PromptForm, list[RowPrompt]]:
    """Return the form and the prompts of all rows of `source`, as `trained` has it; without that, by their columns.

    A row needs the columns of its prompt; an answer without words is none. Of a conversation the prompt is what is in
    front of its last message if that is the assistant's, else all of it. A chat template is told `moment`, by default
    now. Raises DataError where a source cannot be read or has nothing to answer, and with the rows that cannot be used.
    """
    data = as_trained([source], trained, _LONGEST, prompt_columns)
    (placed,) = data.train
    form = data.form(placed)
    if form.format != "chat" and not parse_template(prompt_template(form)):
        raise DataError(
            "such rows are text without a prompt, so there is nothing to answer",
            where=source.path,
            fix=f"give the data set templates, {OWN_FORM}; or continue one text with --prompt TEXT --raw",
        )
    encoder = TextEncoder(tokenizer)
    chat = ChatEncoder(encoder, moment) if form.format == "chat" else None
    seen = Seen()
    rows = read_source(placed, prompt_columns(form), seen)
    for note in seen.notes():
        say(note)
    if chat is None and trained is None and getattr(tokenizer, "chat_template", None):
        say("note: these prompts are not put into the tokenizer's chat template; rows of `messages` would be")
    found = list(_text_prompts(form, rows, encoder) if chat is None else _chat_prompts(rows, chat, source))
    longer = [] if trained is None else [row for row in found if len(row.prompt.ids) > trained.max_length]
    if trained is not None and longer:
        say(
            f"note: {len(longer):,} of {len(found):,} prompts are longer than data.max_length ({trained.max_length}), "
            "to which the training cut its rows: they are sent whole"
        )
    return PromptForm(_description(form), encoder, chat), found


def _description(form: RowForm) -> str:
    if form.format == "chat":
        return "the tokenizer's chat template"
    template = json.dumps(prompt_template(form), ensure_ascii=False)
    return "Alpaca's template" if form.format == "alpaca" else f"the template {template}"


def _text_prompts(form: RowForm, rows: Rows, encoder: TextEncoder) -> Iterator[RowPrompt]:
    texts = [row_texts(form, row) for row in rows.values]
    prompts = encoder.encode_prompts([prompt for prompt, _ in texts])
    for row, place, ids, (prompt, completion) in zip(rows.values, rows.places, prompts, texts, strict=True):
        is_answered = any(str(row[column]).strip() for column in answer_columns(form))
        yield RowPrompt(place, Prompt(prompt, ids), completion if is_answered else None)


def _chat_prompts(rows: Rows, chat: ChatEncoder, source: DataSource) -> list[RowPrompt]:
    found, bad = [], BadRows()
    for row, place in zip(rows.values, rows.places, strict=True):
        with bad.collected():
            text, ids, expected = chat.asked(row, place)
            found.append(RowPrompt(place, Prompt(text, ids), expected))
    bad.check(len(rows.values), source.path)
    return found
