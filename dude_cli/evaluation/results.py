"""What an evaluation gives: the difference to the base model, each question's score, the table, JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dude_cli.evaluation.statistics import paired_difference, weighted_standard_error

if TYPE_CHECKING:
    from rich.table import Table

NOT_AVAILABLE = "N/A"  # lm-eval's word for a standard error that it has not
_SHARES = frozenset({"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "em", "f1", "mcc"})
# Keys of the results whose values are dicts by task or group name.
BY_TASK = (
    "results",
    "groups",
    "group_subtasks",
    "group_configs",
    "configs",
    "versions",
    "n-shot",
    "higher_is_better",
    "n-samples",
    "task_hashes",
    "prompt_hashes",
    "prompt_examples",
    "prompts_cut",
    "fewshot_sampler",
    "max_gen_toks",
    "difference",
)


def differences(
    base: Mapping[str, Any], tuned: Mapping[str, Any], weight_by_size: Mapping[str, Mapping[str, bool]]
) -> dict[str, dict[str, float | str]]:
    """Tuned minus base for each task, group and metric, with its paired standard error, under lm-eval's keys.

    `weight_by_size` says for each group and metric whether its score weights its tasks by their number of questions.
    The standard error is "N/A" where a score is not the mean of one number for each question.
    """
    found: dict[str, dict[str, float | str]] = {}
    for name, tuned_scores in tuned["results"].items():
        if name in tuned.get("group_subtasks", {}):
            continue
        found[name] = {}
        for metric, filter_name, score in scores(tuned_scores):
            key = f"{metric},{filter_name}"
            before = base["results"][name][key]
            error = _paired_error(base, tuned, name, metric, filter_name)
            found[name] |= _difference(metric, filter_name, score, before, error)
    for name in tuned.get("group_subtasks", {}):
        leaves = [leaf for leaf in _leaves(tuned["group_subtasks"], name) if leaf in found]
        group: dict[str, float | str] = {}
        for metric, filter_name, score in scores(tuned["results"].get(name, {})):
            parts = [leaf for leaf in leaves if f"{metric},{filter_name}" in found[leaf]]
            errors = [found[leaf][f"{metric}_stderr,{filter_name}"] for leaf in parts]
            sizes = [tuned["results"][leaf]["sample_len"] for leaf in parts]
            by_size = weight_by_size.get(name, {}).get(metric, True)
            known = [error for error in errors if not isinstance(error, str)]
            error = (
                weighted_standard_error(known, sizes if by_size else [1.0] * len(sizes))
                if parts and len(known) == len(errors)
                else None
            )
            before = base["results"][name][f"{metric},{filter_name}"]
            group |= _difference(metric, filter_name, score, before, error)
        if group:
            found[name] = group
    return found


def scores(row: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """The (metric, filter, value) triples of a row of lm-eval's results, standard errors left out."""
    for key, value in row.items():
        metric, comma, filter_name = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            yield metric, filter_name, value


def form_of(request: Mapping[str, Any]) -> str | None:
    """How the questions of a requested task are asked, in a document's words for it; None is plain text."""
    if not request.get("apply_chat_template"):
        return None
    return "chat template" if request.get("system_instruction") is None else "chat template, system_instruction"


def results_table(results: Mapping[str, Any], *, one_line: bool = False) -> Table:
    """The scores as a table of 80 columns: groups with their categories, without the tasks that a group's score covers.

    With `one_line` a row is one line, with its task's name, and as long as it takes.

    Shares of questions are percentages, and their differences percentage points; other metrics are as lm-eval gives
    them. ± is one standard error, that of the difference the paired one.
    """
    from rich.table import Table

    base, br = results.get("base"), " " if one_line else "\n"
    forms = {name: form_of(request) for request in results["requested"].values() for name in request["names"]}
    own_rows = {name for name, request in results["requested"].items() if request.get("rows")}
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold")
    table.add_column("filter", overflow="fold")
    table.add_column("shots", justify="right", no_wrap=True)
    for heading in ("base", "tuned", "difference") if base else ("score ± stderr",):
        table.add_column(heading, justify="right", no_wrap=True)
    for depth, name in table_rows(results):
        row = results["results"][name]
        label = "  " * depth + str(row.get("alias", name)).strip(" -")
        form = forms.get(name) if depth == 0 else None
        label += f" ({form})" if form else ""
        shots = "" if name in own_rows else str(results.get("n-shot", {}).get(name, ""))
        for metric, filter_name, value in scores(row):
            error = row.get(f"{metric}_stderr,{filter_name}", NOT_AVAILABLE)
            if base:
                before, change = base["results"][name], results["difference"][name]
                key, error_key = f"{metric},{filter_name}", f"{metric}_stderr,{filter_name}"
                base_error = shown_error(metric, before.get(error_key, NOT_AVAILABLE))
                cells = [
                    f"{shown_score(metric, before[key])}{br}{base_error}",
                    f"{shown_score(metric, value)}{br}{shown_error(metric, error)}",
                    f"{shown_score(metric, change[key], signed=True)}{br}{shown_error(metric, change[error_key])}",
                ]
            else:
                cells = [f"{shown_score(metric, value)} {shown_error(metric, error)}"]
            table.add_row(label, metric, filter_name, shots, *cells)
            if not one_line:
                label, shots = "", ""
    return table


def plain_results(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results in lm-eval's layout and JSON's own types, without the samples; NaN is the text "NaN"."""
    document: dict[str, Any] = plain(_without_samples(results))
    return document


def results_json(results: Mapping[str, Any]) -> str:
    """`plain_results` as one strict JSON document."""
    return json.dumps(plain_results(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def question_values(
    results: Mapping[str, Any], name: str, metric: str, filter_name: str
) -> dict[tuple[str, int], float] | None:
    """Each question's number, by (task, doc_id), of a task or a group whose score is their mean; else None."""
    values: dict[tuple[str, int], float] = {}
    for task in leaf_tasks(results, name):
        for sample in results.get("samples", {}).get(task, []):
            value = as_number(sample.get(metric)) if sample["filter"] == filter_name else None
            if value is not None:
                values[task, sample["doc_id"]] = value
    row = results["results"][name]
    score = as_number(row.get(f"{metric},{filter_name}"))
    if score is None or not values or len(values) != row["sample_len"]:
        return None
    return values if math.isclose(math.fsum(values.values()) / len(values), score, abs_tol=1e-9) else None


def leaf_tasks(results: Mapping[str, Any], name: str) -> list[str]:
    """The tasks that a name of the results stands for: itself, or those of a group, its groups' too."""
    children = results.get("group_subtasks", {})
    return _leaves(children, name) if name in children else [name]


def _paired_error(
    base: Mapping[str, Any], tuned: Mapping[str, Any], task: str, metric: str, filter_name: str
) -> float | None:
    before = question_values(base, task, metric, filter_name)
    after = question_values(tuned, task, metric, filter_name)
    if before is None or after is None or before.keys() != after.keys():
        return None
    questions = sorted(before)
    return paired_difference([before[q] for q in questions], [after[q] for q in questions])[1]


def _difference(metric: str, filter_name: str, after: Any, before: Any, error: float | None) -> dict[str, float | str]:
    after, before = as_number(after), as_number(before)
    return {
        f"{metric},{filter_name}": NOT_AVAILABLE if after is None or before is None else after - before,
        f"{metric}_stderr,{filter_name}": NOT_AVAILABLE if error is None else error,
    }


def _leaves(children: Mapping[str, Sequence[str]], group: str) -> list[str]:
    return [leaf for child in children[group] for leaf in (_leaves(children, child) if child in children else [child])]


def table_rows(results: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    """The names whose scores are shown, each with its depth: groups with their categories, or with their tasks."""
    children = results.get("group_subtasks", {})

    def below(name: str, depth: int) -> Iterator[tuple[int, str]]:
        yield depth, name
        has_score = any(True for _ in scores(results["results"].get(name, {})))
        for child in children.get(name, ()):
            if child in children or not has_score:
                yield from below(child, depth + 1)

    for request in results["requested"].values():
        members = {child for name in request["names"] for child in children.get(name, ())}
        for name in request["names"]:
            if name not in members:
                yield from below(name, 0)


def is_share(metric: str) -> bool:
    """Whether a metric is a share of the questions, which is shown as a percentage."""
    return metric in _SHARES


def shown_score(metric: str, value: Any, signed: bool = False) -> str:
    """A score as the tables have it: a share of questions as a percentage, a difference of shares in points."""
    number = as_number(value)
    if number is None:
        return str(value)
    sign = "+" if signed else ""
    if is_share(metric):
        return f"{100 * number:{sign}.2f}" + ("" if signed else "%")
    return f"{number:{sign}.4g}"


def shown_error(metric: str, value: Any) -> str:
    return f"± {shown_score(metric, value).rstrip('%')}"


def as_number(value: Any) -> float | None:
    """A number, of Python's or numpy's, as a float; None for anything else, such as "N/A"."""
    if getattr(value, "shape", None) == ():
        value = value.item()
    return float(value) if isinstance(value, (bool, int, float)) else None


def _without_samples(results: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in results.items() if key != "samples"}
    if "base" in kept:
        kept["base"] = {key: value for key, value in kept["base"].items() if key != "samples"}
    return kept


def plain(value: Any) -> Any:
    """`value` in JSON's own types; numbers that JSON has not, and anything else, as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if getattr(value, "shape", None) == ():  # a numpy or torch scalar
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
