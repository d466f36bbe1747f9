"""The difference to the base with its paired standard error, the table, the files."""

from __future__ import annotations

import json
import math
import resource
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from dude_cli.config import DataSource, EvalTask
from dude_cli.evaluation import join_results, results_json, results_table, write_results
from dude_cli.evaluation.compare import answer_of
from dude_cli.evaluation.results import differences
from dude_cli.evaluation.saved import results_path
from dude_cli.evaluation.statistics import paired_difference, weighted_standard_error


def score(values: list[float], **names: Any) -> dict[str, Any]:
    """A row of results as lm-eval makes it: the mean of the questions' scores and its standard error."""
    return {
        "sample_len": len(values),
        "acc,none": float(np.mean(values)),
        "acc_stderr,none": float(np.std(values, ddof=1) / np.sqrt(len(values))),
        **names,
    }


def samples(values: list[float]) -> list[dict[str, Any]]:
    # Out of order on purpose: questions are matched by doc_id, not by place.
    rows = [{"doc_id": i, "filter": "none", "acc": value} for i, value in enumerate(values)]
    return rows[1::2] + rows[::2]


def make_results(subjects: dict[str, list[float]]) -> dict[str, Any]:
    """Results of a group `group` with one category `category` over `subjects`."""
    everything = [value for values in subjects.values() for value in values]
    group = score(everything)
    return {
        "results": {
            **{name: score(values, alias=name) for name, values in subjects.items()},
            "category": {**group, "alias": "the category"},
            "group": {**group, "alias": "group"},
        },
        "groups": {"group": group},
        "group_subtasks": {"group": ["category"], "category": list(subjects)},
        "n-shot": dict.fromkeys(["group", "category", *subjects], 5),
        "requested": {"group": {"names": ["group", "category", *subjects], "limit": None}},
        "config": {"limit": None, "batch_size": 4},
        "samples": {name: samples(values) for name, values in subjects.items()},
    }


@pytest.fixture
def base_and_tuned() -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    rng = np.random.default_rng(0)
    base = {name: rng.integers(0, 2, size).astype(float).tolist() for name, size in (("algebra", 40), ("law", 9))}
    tuned = {name: [max(value, float(rng.random() < 0.3)) for value in values] for name, values in base.items()}
    return base, tuned


def compared(base: dict[str, list[float]], tuned: dict[str, list[float]], by_size: bool = True) -> dict[str, Any]:
    before, after = make_results(base), make_results(tuned)
    weighting = {"group": {"acc": by_size}, "category": {"acc": by_size}}
    return after | {"base": before, "difference": differences(before, after, weighting)}


def test_the_paired_standard_error_is_that_of_a_paired_t_test() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    base = rng.integers(0, 2, 50).astype(float)
    tuned = np.maximum(base, rng.integers(0, 2, 50))

    mean, error = paired_difference(base.tolist(), tuned.tolist())

    test = stats.ttest_rel(tuned, base)
    assert error is not None
    assert mean == pytest.approx((tuned - base).mean())
    assert mean / error == pytest.approx(test.statistic, rel=1e-12)
    unpaired = math.sqrt(base.var(ddof=1) / 50 + tuned.var(ddof=1) / 50)
    assert error < 0.9 * unpaired


def test_one_question_has_a_difference_and_no_standard_error() -> None:
    assert paired_difference([0.0], [1.0]) == (1.0, None)


def test_unequal_questions_cannot_be_paired() -> None:
    with pytest.raises(ValueError, match="same questions"):
        paired_difference([0.0, 1.0], [1.0])


def test_a_groups_standard_error_weights_its_subjects_as_its_score_does(
    base_and_tuned: tuple[dict[str, list[float]], dict[str, list[float]]],
) -> None:
    base, tuned = base_and_tuned
    change = {name: np.array(tuned[name]) - np.array(base[name]) for name in base}
    error = {name: d.std(ddof=1) / np.sqrt(len(d)) for name, d in change.items()}

    found = compared(base, tuned)["difference"]["group"]
    share = {name: len(d) / 49 for name, d in change.items()}
    assert found["acc,none"] == pytest.approx(sum(share[name] * change[name].mean() for name in change))
    assert found["acc_stderr,none"] == pytest.approx(np.sqrt(sum((share[n] * error[n]) ** 2 for n in change)))

    equal = compared(base, tuned, by_size=False)["difference"]["group"]
    assert equal["acc_stderr,none"] == pytest.approx(np.sqrt(sum((error[n] / 2) ** 2 for n in change)))
    assert weighted_standard_error([3.0, 4.0], [1.0, 1.0]) == 2.5


def test_the_weighted_standard_error_is_the_spread_of_the_weighted_mean() -> None:
    rng = np.random.default_rng(2)
    sizes, spreads = [200, 50], [1.0, 3.0]
    means = [
        np.average([rng.normal(0, s, n).mean() for n, s in zip(sizes, spreads, strict=True)], weights=sizes)
        for _ in range(4000)
    ]
    errors = [s / math.sqrt(n) for n, s in zip(sizes, spreads, strict=True)]
    assert weighted_standard_error(errors, sizes) == pytest.approx(np.std(means), rel=0.05)


def test_a_statistic_that_is_no_mean_has_a_difference_without_a_standard_error(
    base_and_tuned: tuple[dict[str, list[float]], dict[str, list[float]]],
) -> None:
    before, after = (make_results(values) for values in base_and_tuned)
    after["results"]["law"]["acc,none"] = 0.123  # not the mean of its questions
    found = differences(before, after, {})
    assert found["law"]["acc_stderr,none"] == "N/A"
    assert found["group"]["acc_stderr,none"] == "N/A"
    assert found["algebra"]["acc_stderr,none"] != "N/A"


def test_different_questions_have_no_paired_standard_error(
    base_and_tuned: tuple[dict[str, list[float]], dict[str, list[float]]],
) -> None:
    before, after = (make_results(values) for values in base_and_tuned)
    for sample in after["samples"]["law"]:
        sample["doc_id"] += 1
    assert differences(before, after, {})["law"]["acc_stderr,none"] == "N/A"


def table_text(results: dict[str, Any]) -> str:
    console = Console(file=StringIO(), width=80)
    console.print(results_table(results))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_the_table_has_the_group_and_its_category_and_fits_80_columns(
    base_and_tuned: tuple[dict[str, list[float]], dict[str, list[float]]],
) -> None:
    results = compared(*base_and_tuned)
    text = table_text(results)
    lines = text.splitlines()

    assert max(len(line) for line in lines) <= 80
    assert lines[0].split() == ["task", "metric", "filter", "shots", "base", "tuned", "difference"]
    row, error_row = lines[1].split(), lines[2].split()
    before, after = results["base"]["results"]["group"], results["results"]["group"]
    change = results["difference"]["group"]
    assert row[:4] == ["group", "acc", "none", "5"]
    assert row[4:] == [
        f"{100 * before['acc,none']:.2f}%",
        f"{100 * after['acc,none']:.2f}%",
        f"{100 * change['acc,none']:+.2f}",
    ]
    assert error_row == [
        word for value in (before, after, change) for word in ("±", f"{100 * value['acc_stderr,none']:.2f}")
    ]
    assert "  the category" in text
    assert "algebra" not in text


def test_for_grep_a_row_is_one_line_with_its_tasks_name(
    base_and_tuned: tuple[dict[str, list[float]], dict[str, list[float]]],
) -> None:
    results = compared(*base_and_tuned)
    results["results"]["group"] |= {"f1,none": 0.5, "f1_stderr,none": 0.1}
    results["base"]["results"]["group"] |= {"f1,none": 0.5}
    results["difference"]["group"] |= {"f1,none": 0.0, "f1_stderr,none": "N/A"}
    rows = list(results_table(results, one_line=True).columns[0].cells)
    assert rows == ["group", "group", "  the category"]
    text = [cell for column in results_table(results, one_line=True).columns for cell in column.cells]
    assert not any("\n" in str(cell) for cell in text)


def test_the_table_without_a_base_shows_tasks_that_no_score_covers() -> None:
    results = make_results({"algebra": [0.0, 1.0], "law": [1.0, 1.0, 0.0]})
    for name in ("group", "category"):
        results["results"][name] = {"alias": name}
    text = table_text(results)
    assert "algebra" in text
    assert "50.00% ± 50.00" in text


def test_missing_and_non_finite_numbers_are_shown_and_other_metrics_are_no_percentages() -> None:
    results = {
        "results": {
            "one": {"alias": "one", "acc,none": math.nan, "acc_stderr,none": "N/A"},
            "two": {"alias": "two", "perplexity,none": 12.3456, "perplexity_stderr,none": np.float64(0.5)},
        },
        "n-shot": {"one": 0, "two": 0},
        "requested": {"one": {"names": ["one"], "limit": None}, "two": {"names": ["two"], "limit": None}},
    }
    text = table_text(results)
    assert "nan% ± N/A" in text
    assert "12.35 ± 0.5" in text
    document = json.loads(results_json(results), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert document["results"]["one"]["acc,none"] == "NaN"
    assert document["results"]["two"]["perplexity_stderr,none"] == 0.5


def test_each_requested_task_has_its_own_file_in_lm_evals_layout(
    tmp_path: Path, base_and_tuned: tuple[dict[str, list[float]], dict[str, list[float]]]
) -> None:
    results = compared(*base_and_tuned)
    results["results"]["gsm8k"] = score([1.0, 0.0], alias="gsm8k")
    results["requested"]["gsm8k"] = {"names": ["gsm8k"], "limit": 2}

    paths = write_results(results, tmp_path / "eval")

    assert [path.name for path in paths] == ["group.json", "gsm8k.limit-2.json"]
    group, gsm8k = (json.loads(path.read_text()) for path in paths)
    assert set(group["results"]) == {"algebra", "law", "category", "group"}
    assert group["results"] == {name: results["results"][name] for name in group["results"]}
    assert set(group["difference"]) == set(group["base"]["results"]) == set(group["results"])
    assert "samples" not in group
    assert "samples" not in group["base"]
    assert set(gsm8k["results"]) == {"gsm8k"}
    assert gsm8k["config"]["limit"] == 2
    lines = (tmp_path / "eval" / "samples_group.jsonl").read_text().splitlines()
    assert len(lines) == 49
    assert json.loads(lines[0])["task"] == "algebra"


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path: Path) -> None:
    results = make_results({"algebra": [0.0, 1.0]})
    (path,) = write_results(results, tmp_path)
    old = path.read_bytes()
    results["config"]["batch_size"] = 99
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # the disk is full after 400 bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (400, hard))
        with pytest.raises(OSError, match="File too large"):
            write_results(results, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == old


def test_rows_of_the_users_own_never_take_the_file_of_a_benchmark() -> None:
    rows = EvalTask(name="gsm8k", rows=[DataSource(path="openai/gsm8k")])
    assert results_path(Path("eval"), rows, None) != results_path(Path("eval"), EvalTask(name="gsm8k"), None)


def test_of_several_tasks_the_time_is_that_of_all() -> None:
    parts = [{"total_evaluation_time_seconds": took, "results": {}} for took in ("1.5", "2.25")]
    assert join_results(parts)["total_evaluation_time_seconds"] == "3.75"


def test_a_choice_is_shown_whatever_its_task_calls_its_metrics() -> None:
    sample = {"filtered_resps": [(-1.0, False), (-0.5, True)], "loss": 0.5, "target": "1", "doc": {}}
    assert answer_of(sample) == "choice 2"
