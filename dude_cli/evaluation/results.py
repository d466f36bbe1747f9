"""What an evaluation gives: the difference to the base model, the table, and lm-eval's JSON layout on disk."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dude_cli.files import write_text

if TYPE_CHECKING:
    from rich.table import Table

NOT_AVAILABLE = "N/A"  # lm-eval's word for a standard error that it has not
_SHARES = frozenset({"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "em", "f1", "mcc"})
# Keys of the results whose values are dicts by task or group name.
BY_TASK = (
    "results",
    "groups",
    "group_subtasks",
    "configs",
    "versions",
    "n-shot",
    "higher_is_better",
    "n-samples",
    "task_hashes",
    "prompt_hashes",
    "prompts_cut",
    "fewshot_sampler",
    "max_gen_toks",
    "difference",
)


def paired_difference(base: Sequence[float], tuned: Sequence[float]) -> tuple[float, float | None]:
    """The mean difference over the same questions, and its standard error.

    With d_i = tuned_i - base_i:   mean(d)   and   SE = sqrt(sum_i (d_i - mean(d))^2 / (n - 1)) / sqrt(n),
    the standard error of a paired t-test. Both models find the same questions hard, so it is smaller than
    sqrt(SE_base^2 + SE_tuned^2), which takes the two for independent. None for fewer than two questions.
    """
    if len(base) != len(tuned) or not base:
        raise ValueError(f"paired scores need the same questions: {len(base)} and {len(tuned)}")
    differences = [after - before for before, after in zip(base, tuned, strict=True)]
    n = len(differences)
    mean = math.fsum(differences) / n
    if n == 1:
        return mean, None
    variance = math.fsum((difference - mean) ** 2 for difference in differences) / (n - 1)
    return mean, math.sqrt(variance / n)


def weighted_standard_error(errors: Sequence[float], weights: Sequence[float]) -> float:
    """The standard error of a weighted mean of independent parts: sqrt(sum_k (w_k SE_k)^2) / sum_k w_k.

    With w_k the number of questions of subject k it belongs to mmlu's `acc`, which weights its subjects by size.
    """
    return math.sqrt(math.fsum((w * e) ** 2 for w, e in zip(weights, errors, strict=True))) / math.fsum(weights)


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


def results_table(results: Mapping[str, Any]) -> Table:
    """The scores as a table of 80 columns: groups with their categories, without the tasks that a group's score covers.

    Shares of questions are percentages, and their differences percentage points; other metrics are as lm-eval gives
    them. ± is one standard error, that of the difference the paired one.
    """
    from rich.table import Table

    base = results.get("base")
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bold")
    table.add_column("task", overflow="fold")
    table.add_column("metric", overflow="fold")
    table.add_column("filter", overflow="fold")
    table.add_column("shots", justify="right", no_wrap=True)
    for heading in ("base", "tuned", "difference") if base else ("score ± stderr",):
        table.add_column(heading, justify="right", no_wrap=True)
    for depth, name in _table_rows(results):
        row = results["results"][name]
        label = "  " * depth + str(row.get("alias", name)).strip(" -")
        shots = str(results.get("n-shot", {}).get(name, ""))
        for metric, filter_name, value in scores(row):
            error = row.get(f"{metric}_stderr,{filter_name}", NOT_AVAILABLE)
            if base:
                before, change = base["results"][name], results["difference"][name]
                key, error_key = f"{metric},{filter_name}", f"{metric}_stderr,{filter_name}"
                cells = [
                    f"{_number(metric, before[key])}\n{_error(metric, before.get(error_key, NOT_AVAILABLE))}",
                    f"{_number(metric, value)}\n{_error(metric, error)}",
                    f"{_number(metric, change[key], signed=True)}\n{_error(metric, change[error_key])}",
                ]
            else:
                cells = [f"{_number(metric, value)} {_error(metric, error)}"]
            table.add_row(label, metric, filter_name, shots, *cells)
            label, shots = "", ""
    return table


def plain_results(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results in lm-eval's layout and JSON's own types, without the samples; NaN is the text "NaN"."""
    plain: dict[str, Any] = _plain(_without_samples(results))
    return plain


def results_json(results: Mapping[str, Any]) -> str:
    """`plain_results` as one strict JSON document."""
    return json.dumps(plain_results(results), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_results(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write each requested task's part of `results` to `folder`/<task>.json and its samples to samples_<task>.jsonl.

    With a limit N they are <task>.limit-N.json and samples_<task>.limit-N.jsonl, so that a quick look does not replace
    the full score. Each file is whole or not there. Returns the paths of the results. `base` and `difference` are in
    the same file.
    """
    paths = []
    for name, request in results["requested"].items():
        part = task_results(results, name)
        safe = name.replace("/", "_")  # a task file of someone's may be called ../../x
        stem = safe if request["limit"] is None else f"{safe}.limit-{request['limit']}"
        path = folder / f"{stem}.json"
        lines = [
            json.dumps(_plain({"task": task, **sample}), ensure_ascii=False, allow_nan=False)
            for task, samples in part.get("samples", {}).items()
            for sample in samples
        ]
        if lines:
            write_text(folder / f"samples_{stem}.jsonl", "\n".join(lines) + "\n")
        write_text(path, results_json(part))
        paths.append(path)
    return paths


def task_results(results: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The part of `results` that belongs to one requested task: the same layout with fewer names."""
    request = results["requested"][name]
    names = set(request["names"])

    def cut(section: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: {task: value[task] for task in value if task in names} if key in (*BY_TASK, "samples") else value
            for key, value in section.items()
        }

    part = cut(results)
    part["requested"] = {name: request}
    part["config"] = {**results["config"], "limit": request["limit"]}
    if "base" in results:
        part["base"] = cut(results["base"])
    return part


def _paired_error(
    base: Mapping[str, Any], tuned: Mapping[str, Any], task: str, metric: str, filter_name: str
) -> float | None:
    before = _values(base, task, metric, filter_name)
    after = _values(tuned, task, metric, filter_name)
    if before is None or after is None or before.keys() != after.keys():
        return None
    questions = sorted(before)
    return paired_difference([before[q] for q in questions], [after[q] for q in questions])[1]


def _values(results: Mapping[str, Any], task: str, metric: str, filter_name: str) -> dict[int, float] | None:
    """Each question's number, by doc_id, where the score is their mean; None where it is another statistic."""
    row = results["results"][task]
    score = _as_float(row[f"{metric},{filter_name}"])
    values: dict[int, float] = {}
    for sample in results.get("samples", {}).get(task, []):
        value = _as_float(sample.get(metric)) if sample["filter"] == filter_name else None
        if value is not None:
            values[sample["doc_id"]] = value
    if score is None or not values or len(values) != row["sample_len"]:
        return None
    return values if math.isclose(math.fsum(values.values()) / len(values), score, abs_tol=1e-9) else None


def _difference(metric: str, filter_name: str, after: Any, before: Any, error: float | None) -> dict[str, float | str]:
    after, before = _as_float(after), _as_float(before)
    return {
        f"{metric},{filter_name}": NOT_AVAILABLE if after is None or before is None else after - before,
        f"{metric}_stderr,{filter_name}": NOT_AVAILABLE if error is None else error,
    }


def _leaves(children: Mapping[str, Sequence[str]], group: str) -> list[str]:
    return [leaf for child in children[group] for leaf in (_leaves(children, child) if child in children else [child])]


def _table_rows(results: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
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


def _number(metric: str, value: Any, signed: bool = False) -> str:
    number = _as_float(value)
    if number is None:
        return str(value)
    sign = "+" if signed else ""
    if metric in _SHARES:
        return f"{100 * number:{sign}.2f}" + ("" if signed else "%")
    return f"{number:{sign}.4g}"


def _error(metric: str, value: Any) -> str:
    return f"± {_number(metric, value).rstrip('%')}"


def _as_float(value: Any) -> float | None:
    """A number, of Python's or numpy's, as a float; None for anything else, such as "N/A"."""
    if getattr(value, "shape", None) == ():
        value = value.item()
    return float(value) if isinstance(value, (bool, int, float)) else None


def _without_samples(results: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in results.items() if key != "samples"}
    if "base" in kept:
        kept["base"] = {key: value for key, value in kept["base"].items() if key != "samples"}
    return kept


def _plain(value: Any) -> Any:
    """`value` in JSON's own types; numbers that JSON has not, and anything else, as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(item) for item in value]
    if getattr(value, "shape", None) == ():  # a numpy or torch scalar
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
