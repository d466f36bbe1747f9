"""`dude generate --rows` as a user meets it: the file, the summary, an interruption, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command import dude_here, environment
from quickstart_config import quickstart_config
from training import train_here

TEMPLATE = ['data.prompt="{story}\\nQuestion: {question}\\nAnswer:"', 'data.completion=" {answer}"']
ROWS = [
    {"story": "Ann has 12 apples.", "question": "How many?", "answer": "12"},
    {"story": "Ann has 12 apples and buys 3.", "question": "How many apples has she now?", "answer": "15"},
    {"story": "Omar has 5 cards.", "question": "How many?", "answer": "5"},
] * 4


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run whose prompts have two columns."""
    folder = tmp_path_factory.mktemp("rows")
    rows = write(folder / "rows.jsonl", ROWS)
    data = [f"data.train=[{{path: '{rows}'}}]", "data.validation=null", *TEMPLATE]
    train_here(quickstart_config(folder, max_steps="30"), *data, "train.learning_rate=0.005")
    return folder / "run"


def answers(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_row_has_a_line_and_the_summary_counts_them(run, tmp_path):
    rows, out = write(tmp_path / "rows.jsonl", ROWS), tmp_path / "answers.jsonl"
    done = dude_here("generate", run, "--rows", rows, "--output", out, "--base", "--json", "--max-new-tokens", "8")
    assert done.returncode == 0, done.stderr
    found, document = answers(out), json.loads(done.stdout)
    assert [line["row"] for line in found] == list(range(1, 13))
    assert found[1]["prompt"] == "Ann has 12 apples and buys 3.\nQuestion: How many apples has she now?\nAnswer:"
    assert [line["expected"] for line in found[:3]] == [" 12", " 15", " 5"]
    equal = sum(line["completion"].strip() == line["expected"].strip() for line in found)
    assert equal > 0
    assert document | {"base": None} == {
        "target": f"run {run}",
        "adapter_sha256": json.loads((run / "adapter/adapter_config.json").read_text())["sha256"],
        "prompt_form": 'the template "{story}\\nQuestion: {question}\\nAnswer:"',
        "sampling": {"max_new_tokens": 8, "temperature": 0.0, "top_p": 1.0, "seed": 0},
        "data": str(rows),
        "output": str(out),
        "rows": 12,
        "rows_with_answer": 12,
        "cut": sum(line["stop_reason"] == "length" for line in found),
        "exact_matches": equal,
        "base": None,
    }
    assert set(document["base"]) == {"cut", "exact_matches"}
    asked = dude_here("generate", run, "--prompt", found[1]["prompt"], "--raw", "--json", "--max-new-tokens", "8")
    (answer,) = json.loads(asked.stdout)["answers"]
    assert {name: found[1][name] for name in ("completion", "new_tokens", "stop_reason")}.items() <= answer.items()
    assert answer["prompt_tokens"] == found[1]["prompt_tokens"]


def test_rows_without_an_answer_and_an_entry_of_a_config(run, tmp_path):
    bare = [{name: row[name] for name in ("story", "question")} for row in ROWS]
    rows, out = write(tmp_path / "rows.jsonl", bare), tmp_path / "answers.jsonl"
    entry = f"{{path: '{rows}', split: 'train[:3]'}}"
    done = dude_here("generate", run, "--rows", entry, "--output", out, "--max-new-tokens", "1", "--batch-size", "2")
    assert done.returncode == 0, done.stderr
    assert [line["expected"] for line in answers(out)] == [None] * 3
    assert done.stdout.splitlines() == [
        f"3 answers are in {out}",
        "3 of 3 were cut at --max-new-tokens 1",
    ]
    assert done.stderr.splitlines()[:2] == [
        f"answering 3 rows with run {run}",
        'prompt form: the template "{story}\\nQuestion: {question}\\nAnswer:"',
    ]
    quiet = dude_here("generate", run, "--rows", entry, "--output", tmp_path / "b", "--max-new-tokens", "1", "--quiet")
    assert (quiet.stdout.count("\n"), quiet.stderr) == (2, "")
    first = entry.replace(":3", ":1")
    one = dude_here("generate", run, "--rows", first, "--output", tmp_path / "c", "--max-new-tokens", "1")
    assert one.stdout == f"1 answer is in {tmp_path / 'c'}\n1 of 1 was cut at --max-new-tokens 1\n"
    assert one.stderr.startswith("answering 1 row with run")


def test_an_interrupted_command_keeps_its_answers_and_the_same_one_goes_on(run, tmp_path):
    rows, out, whole = write(tmp_path / "rows.jsonl", ROWS * 8), tmp_path / "answers.jsonl", tmp_path / "whole.jsonl"
    options = ("--rows", str(rows), "--batch-size", "2", "--temperature", "1", "--output")
    command = [sys.executable, "-m", "dude_cli", "generate", str(run), *options, str(out)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    partial, deadline = tmp_path / "answers.jsonl.partial", time.monotonic() + 120
    while not (partial.exists() and partial.read_text().count("\n") > 4):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(2)
    stdout, stderr = process.communicate(timeout=60)
    kept = partial.read_text().count("\n") - 1
    assert (process.returncode, stdout) == (75, ""), stderr
    assert 4 <= kept < 96
    assert stderr.splitlines()[-2:] == [
        f"{kept} of 96 answers are kept in {partial}; the same command goes on from there",
        "error: stopped",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.jsonl.partial", "rows.jsonl"]
    other = dude_here("generate", run, *options, out, "--seed", "1")
    assert other.returncode == 2
    assert "from a command that differs in: sampling" in other.stderr
    done = dude_here("generate", run, *options, out)
    assert f"{kept} of 96 answers are there already" in done.stderr
    assert dude_here("generate", run, *options, whole).returncode == 0
    assert out.read_bytes() == whole.read_bytes()
    again = dude_here("generate", run, *options, out)
    assert again.returncode == 2
    assert "is there already, and nothing is ever replaced" in again.stderr


def test_what_cannot_be_answered_is_told_before_the_model_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr("dude_cli.target.load_model", lambda *_: pytest.fail("the model was loaded"))
    rows, out = write(tmp_path / "rows.jsonl", [{"story": "Ann", "answer": "1"}]), tmp_path / "answers.jsonl"
    cases = [
        (["--rows", rows], "the answers to rows need a file"),
        (["--output", out], "--output and --batch-size are for the answers to rows"),
        (["--batch-size", "2", "--prompt", "a"], "--output and --batch-size are for the answers to rows"),
        (["--rows", rows, "--output", rows], "is there already"),
        (["--rows", rows, "--rows", out, "--output", out], "--rows takes one data set here, and 2 are given"),
        (["--rows", rows, "--output", out], "the rows of the training have 'story' and 'question'"),
        (["--rows", rows, "--output", out, "--top-p", "0.5"], "does nothing"),
        (["--rows", "", "--output", out], "'' names no data set"),
        (["--rows", "\udcff", "--output", out], "names no data set"),
        (["--rows", f"{{path: {rows}, spilt: x}}", "--output", out], "unknown key `spilt`"),
        (["--rows", rows, "--output", out, "--prompt", "a", "--raw"], "so does --prompt, --raw"),
        (["--rows", rows, "--output", out, "--interactive", "--system", "b"], "so does --interactive, --system"),
    ]
    for options, said in cases:
        done = dude_here("generate", run, *options)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr
    write(rows, ROWS)
    for options in (["--rows", rows, "--output", out], ["--prompt", "a", "--raw"]):
        done = dude_here("generate", run, *options, "--dtype", "bf16")
        assert done.stderr.startswith("error: unknown dtype bf16"), options
    template = tmp_path / "own.jinja"
    template.write_text("{{ messages[0].content }}")
    done = dude_here("generate", run, "--rows", rows, "--output", out, "--chat-template", template)
    assert "only a chat has a template" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own.jinja", "rows.jsonl"]


def test_rows_that_are_too_long_are_named_before_the_first_answer(run, tmp_path):
    rows = write(
        tmp_path / "rows.jsonl", [*ROWS, {"story": "~" * 600, "question": "?"}, {"story": "~" * 700, "question": "?"}]
    )
    done = dude_here("generate", run, "--rows", rows, "--output", tmp_path / "answers.jsonl")
    assert done.returncode == 2
    assert "2 of 14 rows cannot be used" in done.stderr
    assert f"{rows}:13: the prompt has" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_prompt_for_two_columns_points_to_the_rows(run):
    done = dude_here("generate", run, "--prompt", "Ann", "--max-new-tokens", "1")
    assert "--rows FILE answers rows that have them" in done.stderr


def test_as_many_answers_are_exact_as_an_evaluation_on_the_rows_says(tmp_path):
    """One generates them, the other asks how likely the rows' own answers are."""
    rows = ("--rows", "{path: 'embedded:quickstart', split: 'dev[:30]'}")
    answered = dude_here("generate", "embedded:quickstart", *rows, "--output", tmp_path / "answers.jsonl", "--json")
    scored = dude_here("eval", "embedded:quickstart", *rows, "--json", cwd=tmp_path)
    exact = json.loads(answered.stdout)["exact_matches"]
    assert 0 < exact < 30
    score = json.loads(scored.stdout)["results"]["embedded:quickstart dev[:30]"]["exact_match,none"]
    assert score == pytest.approx(exact / 30)
