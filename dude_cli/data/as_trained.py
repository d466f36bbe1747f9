"""Rows that are evaluated or answered, read in the form of the rows that were trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from dude_cli.config import DataConfig, DataSource, RowForm
from dude_cli.data.columns import Columns
from dude_cli.data.encode import format_columns
from dude_cli.data.rows import source_columns
from dude_cli.errors import DataError

# What rows may look like where nothing says how they were trained on.
USUAL_FORMS = tuple(RowForm(name, None, None) for name in ("chat", "prompt_completion", "alpaca", "text"))


def as_trained(
    sources: Sequence[DataSource],
    trained: DataConfig | None,
    max_length: int,
    columns: Callable[[RowForm], Columns] = format_columns,
    own_form: str = "name the data set in `eval.tasks`, with a format or templates",
) -> DataConfig:
    """How to read and encode `sources`: as `trained` says, whose answers alone are learned; else by their columns.

    A source with a form of its own keeps it. Of a training on several forms, and without one, it is the first whose
    columns a source has. Rows are cut as the training's are; `max_length` is for those of no training. The chat
    template is the tokenizer's. `columns` says which ones a form needs, and `own_form` how to give a source a form of
    its own. Raises DataError, with the columns that are there, where no form fits.
    """
    forms = USUAL_FORMS if trained is None else _trained_forms(trained)
    placed = [source if _has_own_form(source) else _with_form(source, forms, columns, own_form) for source in sources]
    return DataConfig(train=placed, max_length=max_length if trained is None else trained.max_length)


def _trained_forms(trained: DataConfig) -> tuple[RowForm, ...]:
    return tuple(dict.fromkeys(trained.form(source) for source in trained.train))


def _has_own_form(source: DataSource) -> bool:
    return source.format is not None or source.completion is not None


def _with_form(
    source: DataSource, forms: Sequence[RowForm], columns: Callable[[RowForm], Columns], own_form: str
) -> DataSource:
    form = forms[0] if len(forms) == 1 else _fitting(source, forms, columns, own_form)
    return source.model_copy(
        update={"format": form.format, "prompt": form.prompt, "completion": form.completion},
    )


def _fitting(
    source: DataSource, forms: Sequence[RowForm], columns: Callable[[RowForm], Columns], own_form: str
) -> RowForm:
    there = source_columns(source)
    found = next((form for form in forms if columns(form).are_in(there)), None)
    if found is None:
        wanted = "; or ".join(", ".join(columns(form).required) for form in forms)
        raise DataError(
            f"the columns are {', '.join(there)}, and none of the forms that are known for them fits: {wanted}",
            where=source.path,
            fix=f"give the columns such names, or {own_form}",
        )
    return found
