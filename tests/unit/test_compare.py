"""Two results on the same questions: what is compared, what is refused, what is said of the answers that changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import dude_here
from report_runs import scored

from dude_cli.config import EvalTask
from dude_cli.errors import UsageError
from dude_cli.evaluation import compare_results, different_settings, find_results, read_results, write_results

A = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
B = [0.0, 1.0, 1.0, 1.0, 1.0, 0.0]


def test_the_discordant_questions_are_counted_tested_and_shown() -> None:
    (found,) = compare_results(scored(A), scored(B))
    assert found.test is not None
    assert (found.test.gained, found.test.lost, found.test.method) == (3, 1, "exact McNemar")
    assert found.test.p_value == pytest.approx(0.625)
    assert [change.doc_id for change in found.gained] == [2, 3, 4]
    (lost,) = found.lost
    assert (lost.question, lost.target, lost.answer_a, lost.answer_b) == ("0 + 0?", "0", "0", "7")


def test_results_from_disk_are_those_that_were_written(tmp_path: Path) -> None:
    (path,) = write_results(scored(B, A), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"sums.json", "samples_sums.jsonl", "samples_sums.base.jsonl"}
    read = read_results(path)
    assert read["samples"] == scored(B)["samples"]
    assert read["base"]["samples"] == scored(A)["samples"]
    write_results(scored(B), tmp_path)
    assert not (tmp_path / "samples_sums.base.jsonl").exists(), "the base's answers of an earlier evaluation"


def test_a_score_is_reused_for_the_same_adapter_base_examples_and_dtype_alone(tmp_path: Path) -> None:
    write_results(scored(A), tmp_path)

    def found(task: EvalTask, sha256: str = "a" * 64, base: str = "b" * 64, dtype: str = "float32") -> bool:
        wanted = {"adapter_sha256": sha256, "base_fingerprint": base}
        return find_results(tmp_path, task, **wanted, dtype=dtype) is not None

    assert found(EvalTask(name="sums"))
    assert found(EvalTask(name="sums", num_fewshot=0))
    assert not found(EvalTask(name="sums"), sha256="b" * 64)
    assert not found(EvalTask(name="sums"), base="c" * 64)
    assert not found(EvalTask(name="sums", num_fewshot=5))
    assert not found(EvalTask(name="sums", limit=3))
    assert not found(EvalTask(name="sums"), dtype="bfloat16")

    # Of five examples that were asked for, a prompt that is written for none has none.
    write_results(scored(A, requested={"sums": {"names": ["sums"], "limit": None, "num_fewshot": 5}}), tmp_path)
    assert found(EvalTask(name="sums", num_fewshot=5))
    (tmp_path / "sums.json").write_text("{}")
    assert not found(EvalTask(name="sums"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompt_hashes": {"sums": "q" * 64}}, "prompts (their SHA-256) of sums: pppppppppppp and qqqqqqqqqqqq"),
        ({"versions": {"sums": 2.0}}, "task version of sums: 1.0 and 2.0"),
        ({"task_hashes": {"sums": "u" * 64}}, "questions and answers (their SHA-256) of sums"),
        ({"n-shot": {"sums": 5}}, "number of examples in the prompt of sums: 0 and 5"),
    ],
)
def test_other_questions_are_refused_and_what_differs_is_named(change: dict[str, object], named: str) -> None:
    with pytest.raises(UsageError) as error:
        compare_results(scored(A), scored(B, **change))
    assert named in str(error.value)


def test_answers_of_another_length_and_other_tasks_are_refused() -> None:
    lengths = [{"sums": {"official": 256, "used": used}} for used in (256, 128)]
    with pytest.raises(UsageError, match="longest answer of sums: 256 and 128 tokens"):
        compare_results(scored(A, max_gen_toks=lengths[0]), scored(B, max_gen_toks=lengths[1]))
    with pytest.raises(UsageError, match="products, sums in one of them alone"):
        compare_results(scored(A), scored(B, task="products"))


def test_what_may_change_a_score_a_little_is_told() -> None:
    other = scored(B)
    other["config"] = other["config"] | {"model_dtype": "torch.bfloat16", "batch_size": 32}
    assert different_settings(scored(A), scored(B)) == []
    assert different_settings(scored(A), other) == [
        "model_dtype differs: torch.float32 and torch.bfloat16",
        "batch_size differs: 8 and 32",
    ]


def test_the_command_compares_files(tmp_path: Path) -> None:
    paths = [write_results(scored(values), tmp_path / name)[0] for name, values in (("a", A), ("b", B))]
    done = dude_here("eval", "--compare", *paths, "--json")
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["comparisons"]
    assert found["test"]["p_value"] == pytest.approx(0.625)
    shown = dude_here("eval", "--compare", *paths).stdout
    assert "0.625" in shown
    assert "3 right in B alone" in shown


def test_the_command_refuses_what_cannot_be_compared(tmp_path: Path) -> None:
    (a,) = write_results(scored(A), tmp_path / "a")
    (b,) = write_results(scored(B, prompt_hashes={"sums": "q" * 64}), tmp_path / "b")
    done = dude_here("eval", "--compare", a, b)
    assert (done.returncode, done.stdout) == (2, "")
    assert "prompts" in done.stderr
    assert dude_here("eval", tmp_path, "--compare", a, a).returncode == 2
    (products,) = write_results(scored(B, task="products"), tmp_path / "b")
    done = dude_here("eval", "--compare", a, products)
    assert (done.returncode, done.stdout) == (2, "")
    assert "of different tasks: products and sums" in done.stderr
    (tmp_path / "c.json").write_text("{}")
    done = dude_here("eval", "--compare", a, tmp_path / "c.json")
    assert done.returncode == 2
    assert "no result of `dude eval`" in done.stderr
