"""From runs to verdicts: the rate that is chosen, the mean over the seeds, and how it stands to a published number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dude_cli.config import EvalTask
from dude_cli.errors import UsageError
from dude_cli.evaluation.results import scores
from dude_cli.evaluation.statistics import Summary, summarize
from dude_cli.reproduce.execute import Failures
from dude_cli.reproduce.plan import Plan, Run, Setting
from dude_cli.reproduce.recipe import EVAL_LOSS, Number, Recipe
from dude_cli.reproduce.scores import Measured, eval_loss, task_results, task_score

Word = Literal["reproduced", "differs", "not run", "not comparable", "smoke"]


@dataclass(frozen=True)
class Choice:
    """The rate of a setting that was chosen, and what each rate had on the development rows or task.

    `rate` is None as long as a run of the search is missing. A rate that diverged has no value and is never chosen.
    `at_edge` says that the best rate is the lowest or highest of the grid, so that a better one may lie outside.
    """

    rate: float | None
    values: dict[float, float | None]
    diverged: frozenset[float] = frozenset()

    @property
    def at_edge(self) -> bool:
        return len(self.values) > 1 and self.rate in (min(self.values), max(self.values))


def choose_rate(plan: Plan, setting: Setting, failures: Failures) -> Choice:
    """The rate with the lowest development loss, or with the highest score of the development task; ties: the lower."""
    if not setting.search:
        return Choice(setting.rates[0], {})
    values: dict[float, float | None] = {}
    for run in setting.search:
        measured = _development(plan, run)
        values[run.learning_rate] = None if measured is None else measured.value
    diverged = frozenset(run.learning_rate for run in setting.search if run.name in failures.diverged)
    known = {rate: value for rate, value in values.items() if value is not None}
    if not known or len(known) + len(diverged) < len(values):
        return Choice(None, values, diverged)
    sign = 1 if plan.development_task is None else -1
    return Choice(min(known, key=lambda rate: (sign * known[rate], rate)), values, diverged)


def _development(plan: Plan, run: Run) -> Measured | None:
    selection, task = plan.recipe.selection, plan.development_task
    if selection is None or selection.metric is None or task is None:
        return eval_loss(run)
    return _score(run, task, selection.metric)


@dataclass(frozen=True)
class OverSeeds(Summary):
    """A figure over the seeds; `stderr` is lm-eval's, over the questions.

    It is kept apart from `sd`: that says how far another seed may be, this how far other questions may be. Of several
    runs it is the mean of theirs, because they answer the same questions.
    """

    stderr: float | None


def over_seeds(measured: Sequence[Measured], scale: float = 1.0) -> OverSeeds | None:
    """The summary of one figure of several runs; None of none."""
    values = summarize([scale * one.value for one in measured])
    errors = summarize([scale * one.stderr for one in measured if one.stderr is not None])
    if values is None:
        return None
    stderr = errors.mean if errors is not None and errors.n == values.n else None
    return OverSeeds(values.mean, values.sd, values.n, stderr)


@dataclass(frozen=True)
class Verdict:
    """How a published number stands to what was measured; `why` explains a word that the figures do not."""

    number: Number
    word: Word
    measured: OverSeeds | None
    beside: OverSeeds | None
    why: str = ""

    @property
    def difference(self) -> float | None:
        return None if self.measured is None else self.measured.mean - self.number.value

    @property
    def is_met(self) -> bool:
        return self.word == "reproduced"


def judge(plan: Plan, number: Number, choice: Choice) -> Verdict:
    """`reproduced` if the mean over all of the recipe's seeds is within the number's tolerance of it, else `differs`.

    The tolerance is fixed before the runs and does not grow with their spread, so that noise is no help.
    """
    setting = plan.setting_of(number)
    runs = () if choice.rate is None else setting.final[choice.rate]
    if number.base:
        runs = runs[:1]
    measured = _over(plan.recipe, runs, number.task, number.metric, number.unit, base=number.base)
    beside = None
    if number.beside is not None:
        other = number.beside
        beside = _over(plan.recipe, runs, other.task, other.metric, number.unit, base=number.base)
    if plan.is_smoke:
        return Verdict(number, "smoke" if measured is not None else "not run", measured, beside)
    if measured is None:
        return Verdict(number, "not run", None, beside, "no learning rate is chosen yet" if choice.rate is None else "")
    if measured.n < len(runs):
        return Verdict(number, "not run", measured, beside, f"{measured.n} of {len(runs)} runs")
    if number.protocol == "unknown" or number.tolerance is None:
        return Verdict(number, "not comparable", measured, beside, number.unknown)
    # As decimals: 0.1 + 0.2 is not further from 0.3 than a tolerance of 0.
    is_within = abs(measured.mean - number.value) <= number.tolerance + 1e-9
    return Verdict(number, "reproduced" if is_within else "differs", measured, beside)


def setting_scores(setting: Setting, choice: Choice) -> dict[str, OverSeeds]:
    """Every figure of a setting's runs at the chosen rate, as lm-eval gives it: by task, metric and filter."""
    runs = () if choice.rate is None else setting.final[choice.rate]
    figures: dict[str, list[Measured]] = {}
    for run in runs:
        loss = eval_loss(run)
        if loss is not None:
            figures.setdefault("development loss", []).append(loss)
        for task in setting.tasks:
            results = task_results(run, task)
            for metric, filter_name, _ in scores(results["results"][task.name] if results else {}):
                key = f"{metric},{filter_name}"
                measured = _score(run, task, key)
                if measured is not None:
                    figures.setdefault(f"{task.name} {key}", []).append(measured)
    summaries = {name: over_seeds(measured) for name, measured in figures.items()}
    return {name: summary for name, summary in summaries.items() if summary is not None}


def _over(
    recipe: Recipe, runs: Sequence[Run], task: str | None, metric: str, unit: str, *, base: bool
) -> OverSeeds | None:
    found = [_figure(recipe, run, task, metric, base=base) for run in runs]
    measured = [one for one in found if one is not None and math.isfinite(one.value)]
    return over_seeds(measured, 100.0 if unit == "percent" else 1.0)


def _figure(recipe: Recipe, run: Run, task: str | None, metric: str, *, base: bool) -> Measured | None:
    if metric == EVAL_LOSS:
        return eval_loss(run)
    asked = next(one for one in recipe.evaluation.tasks if one.name == task)
    return _score(run, asked, metric, base=base)


def _score(run: Run, task: EvalTask, metric: str, *, base: bool = False) -> Measured | None:
    try:
        return task_score(run, task, metric, base=base)
    except KeyError as error:
        raise UsageError(
            f"the results of {task.name} have no {error.args[0]}",
            where=str(run.folder / "eval"),
            fix="name the metric and its filter as lm-eval does, such as acc,none",
        ) from error
