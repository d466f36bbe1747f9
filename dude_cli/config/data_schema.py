"""The schema of `data`: which rows there are, and how they become text and tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from dude_cli.config.section import Contradiction, PositiveInt, Section
from dude_cli.template import parse_template

DataFormat = Literal["prompt_completion", "alpaca", "chat", "text"]


def plain_values(values: dict[str, Any]) -> dict[str, Any]:
    """Return `values`, which a chat template is given by name. Raises ValueError if a template cannot take one."""
    for name, value in values.items():
        if not name.isidentifier():
            raise ValueError(f"{json.dumps(name)} is no name in a template; wanted one such as `enable_thinking`")
        is_number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
        if not (value is None or is_number or isinstance(value, str)):
            raise ValueError(f"`{name}` is no single value; wanted text, a number, true, false or null")
    return values


@dataclass(frozen=True)
class RowForm:
    """How rows become text: a format, or templates in place of its columns."""

    format: DataFormat
    prompt: str | None
    completion: str | None


def _form_contradictions(
    form: DataFormat | None, prompt: str | None, completion: str | None
) -> Iterator[Contradiction]:
    if prompt is not None and completion is None:
        yield "`prompt` needs `completion` beside it: the text to learn", ("prompt", "completion")
    if completion is not None and form in ("alpaca", "chat"):
        yield (
            f"`prompt` and `completion` replace `format: {form}`: give one or the other",
            ("completion", "format"),
        )


class DataSource(Section):
    path: str = Field(
        min_length=1,
        examples=["meta-math/MetaMathQA"],
        description=(
            "Hub name, folder, or a .jsonl, .json, .csv, .tsv, .txt (a text a line) or .parquet file, or "
            "`embedded:quickstart`. All but .parquet may be compressed: .jsonl.gz, also .bz2 and .xz."
        ),
    )
    name: str | None = Field(None, description="Configuration (subset) of a hub data set or folder.")
    split: str = Field("train", description='Split, with slices as in `datasets`: "train[:1000]", "train[10%:]".')
    revision: str | None = Field(None, description="Hub revision of the data set.")
    format: DataFormat | None = Field(
        None,
        description=(
            "This data set's format; with `prompt` and `completion` here it takes the place of all three of `data`; "
            "null: theirs."
        ),
    )
    prompt: str | None = Field(None, description="This data set's template of the prompt.")
    completion: str | None = Field(None, description="This data set's template of the completion.")

    @field_validator("prompt", "completion")
    @classmethod
    def _template_is_well_formed(cls, template: str | None) -> str | None:
        return _well_formed(template)

    def contradictions(self) -> Iterator[Contradiction]:
        yield from _form_contradictions(self.format, self.prompt, self.completion)


def _well_formed(template: str | None) -> str | None:
    if template is not None:
        parse_template(template)
    return template


class DataConfig(Section):
    train: list[DataSource] = Field(min_length=1, description="Data sets to train on, one after the other.")
    validation: Annotated[list[DataSource], Field(min_length=1)] | Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Data sets for the evaluation loss, or the share of the training rows to hold out for it."
    )
    format: DataFormat = Field(
        "prompt_completion",
        description=(
            "prompt_completion: columns prompt and completion; alpaca: instruction, input, output; "
            "chat: messages (or conversations, or the lists prompt and completion), and tools and system where they "
            "are there, through the tokenizer's chat template; text: text. "
            "`prompt` and `completion` below replace the columns by templates."
        ),
    )
    prompt: str | None = Field(None, description='Template over the columns, such as "Question: {question}\\nAnswer:".')
    completion: str | None = Field(None, description='Template over the columns, such as " {answer}".')
    chat_template: str | None = Field(
        None,
        min_length=1,
        description=(
            "File with a Jinja template for conversations, in place of the tokenizer's or where it has none. It is "
            "saved with the adapter's tokenizer."
        ),
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description=(
            "Values for names that the chat template asks for, such as `{enable_thinking: false}`. They are written "
            "into the template that is saved with the adapter's tokenizer."
        ),
    )
    max_length: PositiveInt = Field(
        512,
        description=(
            "Longest row in tokens; longer ones lose the start of their prompt. In format chat they lose whole "
            "messages at their end first. In format text without a prompt they lose nothing: they are split into "
            "several rows."
        ),
    )
    packing: bool = Field(False, description="Pack several rows into one sequence; no row attends to another.")
    train_on_inputs: bool = Field(False, description="Learn the prompt's tokens too, not the completion's alone.")
    shuffle: bool = Field(True, description="A new order of the rows each epoch, from the seed; else their own order.")
    group_by_length: bool = Field(
        False,
        description=(
            "Put rows of similar length into one step: less padding where a step has few rows, but which rows meet "
            "depends on their length. Within a step they are always sorted."
        ),
    )

    @field_validator("chat_template_kwargs")
    @classmethod
    def _values_are_plain(cls, values: dict[str, Any]) -> dict[str, Any]:
        return plain_values(values)

    @field_validator("prompt", "completion")
    @classmethod
    def _template_is_well_formed(cls, template: str | None) -> str | None:
        return _well_formed(template)

    def form(self, source: DataSource) -> RowForm:
        """How the rows of `source` become text."""
        if source.format is None and source.completion is None:
            return RowForm(self.format, self.prompt, self.completion)
        return RowForm(source.format or "prompt_completion", source.prompt, source.completion)

    def forms(self) -> list[RowForm]:
        """Those of all training and validation data sets, each once."""
        validation = self.validation if isinstance(self.validation, list) else []
        return list(dict.fromkeys(self.form(source) for source in (*self.train, *validation)))

    @property
    def has_chats(self) -> bool:
        return any(form.format == "chat" for form in self.forms())

    @property
    def trains_on_chats(self) -> bool:
        return any(self.form(source).format == "chat" for source in self.train)

    def contradictions(self) -> Iterator[Contradiction]:
        yield from _form_contradictions(self.format, self.prompt, self.completion)
        for key in ("chat_template", "chat_template_kwargs"):
            if getattr(self, key) and not self.has_chats:
                yield f"`data.{key}` is for conversations: it needs `data.format: chat`", (key, "format")
        if self.group_by_length and not self.shuffle:
            yield (
                "`data.group_by_length` changes the order of the rows, and `data.shuffle: false` keeps it: give one",
                ("group_by_length", "shuffle"),
            )
