"""Two results on the same questions: the difference, whether chance explains it, and which answers changed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from dude_cli.errors import UsageError
from dude_cli.evaluation.results import (
    NOT_AVAILABLE,
    as_number,
    leaf_tasks,
    question_values,
    scores,
    shown_error,
    shown_score,
    table_rows,
)
from dude_cli.evaluation.statistics import PairedTest, paired_test

# What must be equal for two scores to be of the same questions, by its key in the results.
_SAME_QUESTIONS = {
    "versions": "task version",
    "n-shot": "number of examples in the prompt",
    "prompt_hashes": "prompts (their SHA-256)",
    "task_hashes": "questions and answers (their SHA-256)",
}
# What may change a score a little and is told: keys of `config`, or of the results themselves.
_TOLD = ("model_dtype", "model_quantization", "batch_size", "device", "max_length", "lm_eval_version")
_QUESTION_KEYS = ("question", "problem", "query", "instruction", "goal", "prompt", "ctx", "sentence", "text", "input")
SHOWN_EXAMPLES = 3
_SHOWN_CHARACTERS = 240


@dataclass(frozen=True)
class Change:
    """A question that only one of the two answers right, or one better than the other."""

    task: str
    doc_id: int
    question: str
    target: str
    answer_a: str
    answer_b: str
    score_a: float
    score_b: float


@dataclass(frozen=True)
class Comparison:
    """One task's or group's score in two results, b against a.

    `test` is None where the score is not the mean of one number for each question, such as a perplexity.
    `gained` are the questions that are better in b, `lost` those that are better in a. Whether a higher number is
    better is the metric's: `higher_is_better`, None if lm-eval does not say, when it is taken to be.
    """

    task: str
    metric: str
    filter: str
    higher_is_better: bool | None
    score_a: float | str
    score_b: float | str
    stderr_a: float | str
    stderr_b: float | str
    test: PairedTest | None
    gained: tuple[Change, ...]
    lost: tuple[Change, ...]


def compare_results(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Comparison]:
    """Compare every score that both results show, on the same questions.

    Raises UsageError, naming all that differs, unless both have the same tasks in the same versions with the same
    prompts and questions.
    """
    refuse_other_questions(a, b)
    return [
        _comparison(a, b, name, metric, filter_name)
        for _, name in table_rows(a)
        for metric, filter_name, _ in scores(a["results"][name])
        if f"{metric},{filter_name}" in b["results"][name]
    ]


def different_settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What the two were not scored with alike, in words: such a score may differ a little for that reason alone."""
    pairs = {key: [(side["config"] if key in side["config"] else side).get(key) for side in (a, b)] for key in _TOLD}
    return [f"{key} differs: {before} and {after}" for key, (before, after) in pairs.items() if before != after]


def comparison_shown(
    comparisons: Sequence[Comparison], name_a: str, name_b: str, *, one_line: bool = False
) -> RenderableType:
    """A table of both scores, the difference, the discordant questions and the p-value, and some that changed.

    It has 80 columns; with `one_line` a row is one line, as long as it takes.
    """
    br = " " if one_line else "\n"
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    for heading in ("task", "metric"):
        table.add_column(heading, overflow="fold")
    for heading in ("A", "B", "B - A", "A better", "B better", "p-value"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in comparisons:
        label = row.metric if row.filter == "none" else f"{row.metric}{br}{row.filter}"
        a, b = (f"{shown_score(row.metric, value)}" for value in (row.score_a, row.score_b))
        cells = [f"{a}{br}{shown_error(row.metric, row.stderr_a)}", f"{b}{br}{shown_error(row.metric, row.stderr_b)}"]
        table.add_row(row.task, label, *cells, *_test_cells(row, br))
    methods = sorted({row.test.method for row in comparisons if row.test is not None})
    return Group(
        f"A: {name_a}",
        f"B: {name_b}",
        "",
        table,
        "",
        "± is one standard error, of the difference the paired one; p-values are two-sided"
        + (f", {' or '.join(methods)}" if methods else ""),
        *_examples_shown(comparisons),
    )


def answer_of(sample: Mapping[str, Any]) -> str:
    """What the model answered, after the task's filter: a generated text, or the choice that it finds likeliest.

    Of a row with its own answer, how likely the model finds that.
    """
    given = sample["filtered_resps"]
    if not given or not isinstance(given[0], (list, tuple)):
        return str(given[0]) if given else ""
    if {"loss", "exact_match"} <= set(sample):  # of rows of the user's own
        return f"loss {sample['loss']:.4g}{', word for word' if sample['exact_match'] else ''}"
    # Log-likelihoods of the choices, each with whether it is what greedy decoding gives.
    likelihoods = [as_number(choice[0]) for choice in given]
    known = [value for value in likelihoods if value is not None]
    return _choice(sample, likelihoods.index(max(known))) if len(known) == len(likelihoods) else str(given)


def target_of(sample: Mapping[str, Any]) -> str:
    """The right answer; of a multiple-choice question the choice."""
    target, given = sample["target"], sample["filtered_resps"]
    is_choice = bool(given) and isinstance(given[0], (list, tuple)) and str(target).isdecimal()
    return _choice(sample, int(target)) if is_choice else str(target)


def question_of(sample: Mapping[str, Any]) -> str:
    """The question as the data set has it, without the prompt around it."""
    doc = sample["doc"]
    if not isinstance(doc, Mapping):
        return str(doc)
    named = next((doc[key] for key in _QUESTION_KEYS if isinstance(doc.get(key), str)), None)
    return named if named is not None else json.dumps(doc, ensure_ascii=False, default=str)


def _choice(sample: Mapping[str, Any], index: int) -> str:
    """`choice 2: its text`, counted from 1; the text where the question has its choices under that name."""
    choices = sample["doc"].get("choices") if isinstance(sample["doc"], Mapping) else None
    if isinstance(choices, Mapping):  # some data sets have {"text": [...], "label": [...]}
        choices = choices.get("text")
    if isinstance(choices, (list, tuple)) and index < len(choices):
        return f"choice {index + 1}: {choices[index]}"
    return f"choice {index + 1}"


def refuse_other_questions(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    """Raise UsageError, naming all that differs, unless two results are of the same questions in the same form."""
    problems = []
    names_a, names_b = (set(side["results"]) for side in (a, b))
    if names_a != names_b:
        problems.append(f"tasks: {', '.join(sorted(names_a ^ names_b)[:8])} in one of them alone")
    for key, word in _SAME_QUESTIONS.items():
        for name in sorted(a[key].keys() & b[key].keys()):
            if a[key][name] != b[key][name]:
                problems.append(f"{word} of {name}: {_short(a[key][name])} and {_short(b[key][name])}")
    for name in sorted(a["max_gen_toks"].keys() & b["max_gen_toks"].keys()):
        lengths = [side["max_gen_toks"][name]["used"] for side in (a, b)]
        if lengths[0] != lengths[1]:
            problems.append(f"longest answer of {name}: {lengths[0]} and {lengths[1]} tokens")
    if not problems:
        return
    fix = (
        "evaluate both with the same tasks, --num-fewshot and --limit, in plain text or in one chat template, by the "
        "same version of lm-eval"
    )
    if any(request.get("rows") for request in a["requested"].values()):
        fix = (
            "each is asked in the form that it was trained on, cut to its length: give both one, as "
            '--rows "{path: FILE, prompt: ..., completion: ...}"; or their rows have changed: --rescore'
        )
    shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
    raise UsageError(
        "the two results are not of the same questions in the same form; different are:\n  " + "\n  ".join(shown),
        where="--compare",
        fix=fix,
    )


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text


def _comparison(a: Mapping[str, Any], b: Mapping[str, Any], name: str, metric: str, filter_name: str) -> Comparison:
    key, error_key = f"{metric},{filter_name}", f"{metric}_stderr,{filter_name}"
    rows = [side["results"][name] for side in (a, b)]
    before, after = (question_values(side, name, metric, filter_name) for side in (a, b))
    higher_is_better = higher_is_better_of(a, name, metric)
    test, changes = None, []
    if before is not None and after is not None and before.keys() == after.keys():
        questions = sorted(before)
        values = ([side[q] for q in questions] for side in (before, after))
        test = paired_test(*values, higher_is_better=higher_is_better is not False)
        changes = list(_changes(a, b, name, filter_name, before, after))
    higher = [change for change in changes if change.score_b > change.score_a]
    lower = [change for change in changes if change.score_b < change.score_a]
    return Comparison(
        task=name,
        metric=metric,
        filter=filter_name,
        higher_is_better=higher_is_better,
        score_a=rows[0][key],
        score_b=rows[1][key],
        stderr_a=rows[0].get(error_key, NOT_AVAILABLE),
        stderr_b=rows[1].get(error_key, NOT_AVAILABLE),
        test=test,
        gained=tuple(higher if higher_is_better is not False else lower),
        lost=tuple(lower if higher_is_better is not False else higher),
    )


def higher_is_better_of(results: Mapping[str, Any], name: str, metric: str) -> bool | None:
    """Whether a higher value of a task's or group's metric is better; None if lm-eval does not say, or not for all."""
    known = results.get("higher_is_better", {})
    values = {known.get(task, {}).get(metric) for task in (name, *leaf_tasks(results, name))} - {None}
    return values.pop() if len(values) == 1 else None


def _changes(
    a: Mapping[str, Any],
    b: Mapping[str, Any],
    name: str,
    filter_name: str,
    before: Mapping[tuple[str, int], float],
    after: Mapping[tuple[str, int], float],
) -> Iterator[Change]:
    changed = sorted(question for question in before if before[question] != after[question])
    samples = [
        {
            (task, sample["doc_id"]): sample
            for task in leaf_tasks(side, name)
            for sample in side["samples"].get(task, [])
            if sample["filter"] == filter_name
        }
        for side in (a, b)
    ]
    for question in changed:
        sample_a, sample_b = (side[question] for side in samples)
        yield Change(
            task=question[0],
            doc_id=question[1],
            question=question_of(sample_a),
            target=target_of(sample_a),
            answer_a=answer_of(sample_a),
            answer_b=answer_of(sample_b),
            score_a=before[question],
            score_b=after[question],
        )


def _test_cells(row: Comparison, br: str) -> list[str]:
    test = row.test
    if test is None:
        before, after = as_number(row.score_a), as_number(row.score_b)
        difference = NOT_AVAILABLE if before is None or after is None else after - before
        return [shown_score(row.metric, difference, signed=True), "", "", NOT_AVAILABLE]
    error = NOT_AVAILABLE if test.standard_error is None else test.standard_error
    difference = f"{shown_score(row.metric, test.difference, signed=True)}{br}{shown_error(row.metric, error)}"
    return [difference, f"{test.lost:,}", f"{test.gained:,}", f"{test.p_value:.3g}"]


def _examples_shown(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """Some questions of each task's first metric that changed, each way."""
    seen = set()
    for row in comparisons:
        if row.task in seen or row.test is None:
            continue
        seen.add(row.task)
        word = "right in {} alone" if row.test.method == "exact McNemar" else "better in {}"
        for heading, changes in ((word.format("B"), row.gained), (word.format("A"), row.lost)):
            if not changes:
                continue
            yield f"\n{row.task}, {row.metric} ({row.filter}): {len(changes)} {heading}"
            for change in changes[:SHOWN_EXAMPLES]:
                yield f"  {change.task} {change.doc_id}: {one_line(change.question)}"
                answers = {"A": change.answer_a, "B": change.answer_b, "target": change.target}
                yield f"    {'   '.join(f'{name}: {one_line(text)}' for name, text in answers.items())}"
            if len(changes) > SHOWN_EXAMPLES:
                yield f"  and {len(changes) - SHOWN_EXAMPLES} more: --json has all of them"


def one_line(text: str, characters: int = _SHOWN_CHARACTERS) -> str:
    """`text` with its white space as single spaces, cut to so many characters."""
    line = " ".join(text.split())
    return line if len(line) <= characters else line[: characters - 1] + "…"
