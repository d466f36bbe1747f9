"""Settings against each other, and against the base, on the same questions."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from dude_cli.evaluation import Comparison, compare_results, read_results
from dude_cli.evaluation.results import question_values
from dude_cli.evaluation.statistics import PairedTest, holm, paired_test
from dude_cli.report.collect import Run, Score
from dude_cli.report.settings import METHODS, Setting

# With more settings than these, each method's best by evaluation loss are compared.
MOST_SETTINGS = 6
BASE = "base"
Questions = Mapping[tuple[str, int], float]


@dataclass(frozen=True)
class Pair:
    """Two of them on one score. A setting of several runs has the mean over its runs for each question.

    `adjusted_p_value` is Holm's, over all pairs on this score.
    """

    score: str
    metric: str
    a: str
    b: str
    runs_a: int
    runs_b: int
    test: PairedTest
    adjusted_p_value: float


@dataclass(frozen=True)
class Changed:
    """What a run's training did to the base's answers, on one score."""

    label: str
    comparison: Comparison


def chosen_settings(settings: Sequence[Setting]) -> list[Setting]:
    """All settings, or of many for each method the one with the lowest mean evaluation loss: no test score chooses.

    A method's only setting needs no choice; of several without such a loss there is none.
    """
    if len(settings) <= MOST_SETTINGS:
        return list(settings)
    chosen = []
    for method in METHODS:
        members = [setting for setting in settings if setting.method == method]
        losses = [
            (summary.mean, place)
            for place, setting in enumerate(members)
            if (summary := setting.summary(lambda run: run.eval_loss)) is not None
        ]
        chosen += members if len(members) == 1 else [members[place] for _, place in sorted(losses)[:1]]
    return chosen


def pairs(settings: Sequence[Setting]) -> list[Pair]:
    """Every pair of settings, and the base if it was scored, on each task's first metric."""
    found = []
    for first in _first_scores(settings):
        sides = {setting.label: _question_means(setting, first) for setting in settings}
        known = {label: side for label, side in sides.items() if side is not None}
        base = _base_questions(settings, first)
        if base is not None:
            known = {BASE: (base, 1), **known}
        tests = []
        for a, b in combinations(known, 2):
            (before, runs_a), (after, runs_b) = known[a], known[b]
            if before.keys() != after.keys():
                continue
            questions = sorted(before)
            values = ([side[q] for q in questions] for side in (before, after))
            test = paired_test(*values, higher_is_better=first.higher_is_better is not False)
            tests.append(Pair(first.name, first.metric, a, b, runs_a, runs_b, test, test.p_value))
        adjusted = holm([pair.test.p_value for pair in tests])
        found += [replace(pair, adjusted_p_value=value) for pair, value in zip(tests, adjusted, strict=True)]
    return found


def changed_answers(settings: Sequence[Setting]) -> Iterator[Changed]:
    """What changed from the base to the first run of each setting, on each task's first metric."""
    for setting in settings:
        for score in _first_scores([setting]):
            results = _read(setting.runs[0], score)
            if results is None or "samples" not in results.get("base", {}):
                continue
            for comparison in compare_results(_base_part(results), results):
                if (comparison.task, comparison.metric, comparison.filter) == (score.task, score.metric, score.filter):
                    yield Changed(f"{setting.label}, seed {setting.runs[0].seed}", comparison)


def _first_scores(settings: Sequence[Setting]) -> list[Score]:
    """One score for each task and form of its questions: the first metric that lm-eval names."""
    first: dict[tuple[str, str], Score] = {}
    for setting in settings:
        for run in setting.runs:
            for score in run.scores:
                first.setdefault((score.questions, score.task), score)
    return list(first.values())


def _question_means(setting: Setting, score: Score) -> tuple[Questions, int] | None:
    """Each question's mean over the runs that have it, and how many runs those are; None without any."""
    runs = [values for run in setting.runs if (values := _questions(run, score)) is not None]
    if not runs:
        return None
    common = set.intersection(*(set(values) for values in runs))
    return {question: statistics.fmean(values[question] for values in runs) for question in common}, len(runs)


def _questions(run: Run, score: Score) -> Questions | None:
    results = _read(run, score)
    return None if results is None else question_values(results, score.task, score.metric, score.filter)


def _base_questions(settings: Sequence[Setting], score: Score) -> Questions | None:
    runs = [run for setting in settings for run in setting.runs]
    if len({repr(run.config.model) for run in runs}) > 1:
        return None  # several models have several bases
    for run in runs:
        results = _read(run, score)
        if results is not None and "samples" in results.get("base", {}):
            return question_values(_base_part(results), score.task, score.metric, score.filter)
    return None


def _base_part(results: Mapping[str, Any]) -> dict[str, Any]:
    """The base's scores in the layout of a result of its own."""
    return {**results, **results["base"]}


def _read(run: Run, score: Score) -> dict[str, Any] | None:
    own = next((own for own in run.scores if own.key == score.key), None)
    return None if own is None else _read_once(own.path, own.path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=32)
def _read_once(path: Path, changed_ns: int) -> dict[str, Any]:
    return read_results(path)
