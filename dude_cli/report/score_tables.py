"""Scores as tables: each one, those that tell what is kept of the base, and pairs on the same questions."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from dude_cli.evaluation.results import is_share, shown_score
from dude_cli.evaluation.statistics import summarize
from dude_cli.report.collect import Run, Score
from dude_cli.report.content import SETTING, Column, Shown, Table, count, number, p_value, percent, text_column
from dude_cli.report.paired import Pair
from dude_cli.report.settings import Setting

ScoreKey = tuple[str, str, str, str]  # questions, task, metric, filter


def score_names(settings: Sequence[Setting]) -> dict[ScoreKey, str]:
    """What each score is called, in the order of the runs; those of other prompts under one name are told apart."""
    found: dict[ScoreKey, str] = {}
    for score in all_scores(settings):
        found.setdefault(score.key, score.name)
    names = list(found.values())
    return {key: name if names.count(name) == 1 else f"{name} [questions {key[0]}]" for key, name in found.items()}


def first_names(settings: Sequence[Setting]) -> dict[ScoreKey, str]:
    """The first metric of each task, with its name."""
    first: dict[tuple[str, str], ScoreKey] = {}
    names = score_names(settings)
    for key in names:
        first.setdefault(key[:2], key)
    return {key: names[key] for key in first.values()}


def all_scores(settings: Sequence[Setting]) -> list[Score]:
    return [score for setting in settings for run in setting.runs for score in run.scores]


def score_of(run: Run, key: ScoreKey) -> Score | None:
    return next((score for score in run.scores if score.key == key), None)


def score_value(run: Run, key: ScoreKey) -> float | None:
    score = score_of(run, key)
    return None if score is None else score.value


def shown_metric(metric: str) -> Shown:
    return percent() if is_share(metric) else number()


def scores_table(settings: Sequence[Setting]) -> Table:
    """Every score: the spread over runs and lm-eval's error over questions, which say different things, apart."""
    rows, is_of_fewer = [], False
    for key, name, setting, found in _by_setting(settings):
        shown, change, spread = _written(key[2])
        summary = summarize([score.value for score in found])
        assert summary is not None
        bases = [score.base for score in found if score.base is not None]
        is_of_fewer |= 0 < len(bases) < len(found)
        rows.append(
            {
                "score": name,
                "setting": setting.label,
                "mean": _Number(summary.mean, shown),
                "sd": None if summary.sd is None else _Number(summary.sd, spread),
                "n": summary.n,
                "stderr": _mean_number([score.stderr for score in found], spread),
                "n_base": len(bases),
                "base": _mean_number(bases, shown),
                "difference": _mean_number([score.difference for score in found], change),
                "difference_stderr": _mean_number([score.difference_stderr for score in found], spread),
            }
        )
    return Table(
        "scores",
        "Scores",
        [
            text_column("score", "score"),
            SETTING,
            Column("mean", "mean"),
            Column("sd", "sd over runs"),
            Column("n", "n runs", count),
            Column("stderr", "lm-eval stderr"),
            *([Column("n_base", "n runs with base", count)] if is_of_fewer else []),
            Column("base", "base"),
            Column("difference", "tuned - base"),
            Column("difference_stderr", "its paired stderr"),
        ],
        rows,
        "sd is the standard deviation of the score over n training runs. lm-eval's standard error is over the "
        "questions of one evaluation, the mean over the runs: it does not shrink with more runs, and does not know "
        "of seeds. Spreads and differences of percentages are in percentage points."
        + (" Base and tuned - base are over the runs that were scored with --base alone." if is_of_fewer else ""),
        group_by="score",
    )


def kept_table(settings: Sequence[Setting]) -> Table:
    """Scores that were not what the run was for, before and after."""
    rows = []
    for key, name, setting, scores in _by_setting(settings):
        found = [score for score in scores if score.base is not None and not score.is_of_config]
        after = summarize([score.value for score in found])
        if after is None:
            continue
        shown, change, spread = _written(key[2])
        rows.append(
            {
                "score": name,
                "setting": setting.label,
                "n": after.n,
                "base": _mean_number([score.base for score in found], shown),
                "tuned": _Number(after.mean, shown),
                "sd": None if after.sd is None else _Number(after.sd, spread),
                "difference": _mean_number([score.difference for score in found], change),
                "difference_stderr": _mean_number([score.difference_stderr for score in found], spread),
                "better": {True: "higher", False: "lower", None: None}[found[0].higher_is_better],
            }
        )
    return Table(
        "kept",
        "Before and after",
        [
            text_column("score", "score"),
            text_column("better", "better is"),
            SETTING,
            Column("n", "n runs", count),
            Column("base", "base"),
            Column("tuned", "tuned"),
            Column("sd", "sd over runs"),
            Column("difference", "tuned - base"),
            Column("difference_stderr", "its paired stderr"),
        ],
        rows,
        "Tasks outside of the config's eval.tasks that were scored with --base: what the training was not for.",
        group_by="score",
    )


def pairs_table(pairs: Sequence[Pair]) -> Table:
    rows = []
    for pair in pairs:
        shown, change, _ = _written(pair.metric)
        low, high = pair.test.interval or (math.nan, math.nan)
        rows.append(
            {
                "score": pair.score,
                "a": pair.a,
                "b": pair.b,
                "questions": pair.test.n,
                "mean_a": _Number(pair.test.mean_a, shown),
                "mean_b": _Number(pair.test.mean_b, shown),
                "difference": _Number(pair.test.difference, change),
                "interval": f"{change(low)} to {change(high)}" if pair.test.interval else None,
                "lost": pair.test.lost,
                "gained": pair.test.gained,
                "p_value": pair.test.p_value,
                "adjusted_p_value": pair.adjusted_p_value,
                "runs": f"{pair.runs_a}, {pair.runs_b}",
                "method": pair.test.method,
            }
        )
    return Table(
        "pairs",
        "Paired comparison on the same questions",
        [
            text_column("score", "score"),
            text_column("a", "A"),
            text_column("b", "B"),
            Column("questions", "questions", count),
            Column("mean_a", "A's mean"),
            Column("mean_b", "B's mean"),
            Column("difference", "B - A"),
            Column("interval", "95 % interval"),
            Column("lost", "A better", count),
            Column("gained", "B better", count),
            Column("p_value", "p", p_value),
            Column("adjusted_p_value", "p, Holm", p_value),
            Column("runs", "runs of A, B"),
            text_column("method", "test"),
        ],
        rows,
        "Two-sided. One run each with right or wrong answers: the exact McNemar test; else each question's mean "
        "over the runs, and the sign-flip permutation test. The interval is the paired bootstrap's. Both are over "
        "questions, for these very runs: what other seeds would give is in the standard deviations. Holm's "
        "adjustment is over all pairs on one score.",
        group_by="score",
    )


def _by_setting(settings: Sequence[Setting]) -> Iterator[tuple[ScoreKey, str, Setting, list[Score]]]:
    """Each score and what it is called, with every setting that has it and what the setting's runs have of it."""
    for key, name in score_names(settings).items():
        for setting in settings:
            found = [score for run in setting.runs if (score := score_of(run, key)) is not None]
            if found:
                yield key, name, setting, found


def _written(metric: str) -> tuple[Shown, Shown, Shown]:
    """How a score, a difference with its sign and a spread are written; these of shares in percentage points."""
    return (
        shown_metric(metric),
        lambda value: shown_score(metric, value, signed=True),
        lambda value: shown_score(metric, value).rstrip("%"),
    )


class _Number(float):
    """A number that knows how it is written: the scores of one column are shares and losses."""

    shown: Shown

    def __new__(cls, value: float, shown: Shown) -> _Number:
        made = super().__new__(cls, value)
        made.shown = shown
        return made

    def __str__(self) -> str:
        return self.shown(float(self))


def _mean_number(values: Sequence[float | None], shown: Shown) -> _Number | None:
    known = [value for value in values if value is not None]
    return _Number(statistics.fmean(known), shown) if known else None
