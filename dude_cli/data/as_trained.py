"""Rows that are evaluated or answered, read in the form of the rows that were trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dude_cli.config import DataConfig, DataSource, RowForm
from dude_cli.data.columns import Columns
from dude_cli.data.encode import format_columns
from dude_cli.data.rows import first_values
from dude_cli.errors import DataError

OWN_FORM = '"{path: FILE, prompt: ..., completion: ...}", or with a format'  # as an option, or in a config
# What rows may look like where nothing says how they were trained on.
USUAL_FORMS = tuple(RowForm(name, None, None) for name in ("chat", "prompt_completion", "alpaca", "text"))


def as_trained(
    sources: Sequence[DataSource],
    trained: DataConfig | None,
    max_length: int,
    columns: Callable[[RowForm], Columns] = format_columns,
) -> DataConfig:
    """How to read and encode `sources`: as `trained` says, whose answers alone are learned; else by their columns.

    A source with a form of its own keeps it; else it is the first of the training's, or of the usual ones, whose
    columns a source has; `columns` says which ones a form needs. Rows are cut as the training's are, and to
    `max_length`. The chat template is the tokenizer's. Raises DataError, with the columns that are there, where no form
    fits.
    """
    forms = USUAL_FORMS if trained is None else _trained_forms(trained)
    placed = [source if _has_own_form(source) else _with_form(source, forms, trained, columns) for source in sources]
    return DataConfig(train=placed, max_length=max_length if trained is None else min(trained.max_length, max_length))


def _trained_forms(trained: DataConfig) -> tuple[RowForm, ...]:
    return tuple(dict.fromkeys(trained.form(source) for source in trained.train))


def _has_own_form(source: DataSource) -> bool:
    return source.format is not None or source.completion is not None


def _with_form(
    source: DataSource, forms: Sequence[RowForm], trained: DataConfig | None, columns: Callable[[RowForm], Columns]
) -> DataSource:
    row = first_values(source)
    # What is wrong with a source without rows is told when it is read.
    form = next((form for form in forms if row is None or columns(form).fit(row)), None)
    if form is None:
        wanted = ", or ".join(columns(form).wanted() for form in forms)
        of_whom = "the rows of the training" if trained is not None else "rows"
        raise DataError(
            f"the columns are {', '.join(map(repr, row or {}))}; {of_whom} have {wanted}",
            where=source.path,
            fix=f"give the columns these names, or the data set a form of its own: {OWN_FORM}",
        )
    return source.model_copy(update={"format": form.format, "prompt": form.prompt, "completion": form.completion})
