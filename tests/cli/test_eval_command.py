"""`dude eval`: what it keeps when something goes wrong, what it reuses, what it refuses before anything is scored."""

from __future__ import annotations

import json
import shutil
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any

import accelerate
import lm_eval
import pytest
import torch
import yaml
from command import dude_here
from quickstart_config import quickstart_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from dude_cli import quickstart
from dude_cli.commands.reproducing import reproduce_run
from dude_cli.config import EvalTask, ModelConfig, load_config
from dude_cli.errors import UsageError
from dude_cli.evaluation import chat_template
from dude_cli.evaluation.tasks import offline
from dude_cli.model import load_model
from dude_cli.quickstart import documents
from dude_cli.reproduce import Job
from dude_cli.reproduce.plan import Run

CHOICES = ("--task", "quickstart_choices", "--limit", "2")
BOTH = (*CHOICES, "--task", "quickstart_problems")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two trained runs, `runs/a` and `runs/b`."""
    place = tmp_path_factory.mktemp("place")
    for seed, name in enumerate(("a", "b")):
        config = quickstart_config(place / name, rows="16", max_steps="2", output_dir=str(place / "runs" / name))
        done = dude_here("train", config, f"seed={seed}")
        assert done.returncode == 0, done.stderr
    return place


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tasks that lm-eval is asked to score, as they come."""
    names: list[str] = []
    ours = lm_eval.evaluate

    def evaluate(**settings: Any) -> Any:
        names.extend(settings["task_dict"]["tasks"])
        return ours(**settings)

    monkeypatch.setattr(lm_eval, "evaluate", evaluate)
    return names


def test_a_task_that_is_scored_stays_when_the_next_one_fails(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = lm_eval.evaluate

    def evaluate(**settings: Any) -> Any:
        if "quickstart_problems" in settings["task_dict"]["tasks"]:
            raise MemoryError
        return ours(**settings)

    monkeypatch.setattr(lm_eval, "evaluate", evaluate)
    done = dude_here("eval", "runs/a", *BOTH, "--base", "--output", tmp_path, cwd=runs)
    assert done.returncode == 5, done.stderr
    document = json.loads((tmp_path / "quickstart_choices.limit-2.json").read_text())
    assert set(document["results"]) == set(document["base"]["results"]) == {"quickstart_choices"}
    assert len((tmp_path / "samples_quickstart_choices.limit-2.base.jsonl").read_text().splitlines()) == 2


def test_several_tasks_are_one_document_and_a_file_each(runs: Path, tmp_path: Path, scored: list[str]) -> None:
    done = dude_here("eval", "runs/a", *BOTH, "--base", "--json", "--output", tmp_path, cwd=runs)
    assert done.returncode == 0, done.stderr
    names = ["quickstart_choices", "quickstart_problems"]
    assert scored == [names[0], names[0], names[1], names[1]]  # each with its base
    document = json.loads(done.stdout)
    assert list(document["requested"]) == list(document["results"]) == list(document["difference"]) == names
    assert list(document["base"]["results"]) == names
    for name in names:
        own = json.loads((tmp_path / f"{name}.limit-2.json").read_text())
        assert own["results"] == {name: document["results"][name]}
        assert own["base"]["results"] == {name: document["base"]["results"][name]}
        assert own["config"]["limit"] == 2


def test_what_is_wrong_with_a_task_is_told_before_the_model_is_loaded(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dude_cli.target.load_model", lambda *_: pytest.fail("the model was loaded"))
    done = dude_here("eval", "runs/a", "--task", "quickstart_choises", "--output", tmp_path, cwd=runs)
    assert done.returncode == 2
    assert "quickstart_choices" in done.stderr


def test_a_comparison_has_one_model_in_memory_at_a_time(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref[Any]] = []

    def load(*arguments: Any) -> Any:
        assert [model() for model in loaded] == [None] * len(loaded)
        model = load_model(*arguments)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr("dude_cli.target.load_model", load)
    done = dude_here("eval", "--compare", "runs/a", "runs/b", *CHOICES, "--output", tmp_path, cwd=runs)
    assert done.returncode == 0, done.stderr
    assert len(loaded) == 2


def test_ranks_of_init_wait_as_the_config_says_and_those_of_an_evaluation_for_hours(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    ours = accelerate.InitProcessGroupKwargs

    def record(timeout: timedelta) -> Any:
        waits.append(timeout.total_seconds())
        return ours(timeout=timeout)

    monkeypatch.setattr(accelerate, "InitProcessGroupKwargs", record)
    config = quickstart_config(tmp_path, rows="16", extra="  distributed_timeout_s: 77")
    assert dude_here("init", config).returncode == 0
    assert dude_here("eval", "runs/a", *CHOICES, "--output", tmp_path, cwd=runs).returncode == 0
    assert waits[0] == 77
    assert waits[1] >= 3600


def test_a_score_on_another_base_is_not_taken_for_the_runs_own(runs: Path, tmp_path: Path, scored: list[str]) -> None:
    shutil.copytree(runs / "runs", tmp_path / "runs")
    shutil.copytree(quickstart.MODEL_DIR, tmp_path / "moved")
    model = AutoModelForCausalLM.from_pretrained(quickstart.MODEL_DIR)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2)
    shutil.copytree(quickstart.MODEL_DIR, tmp_path / "other")
    model.save_pretrained(tmp_path / "other")

    def compared(*more: object) -> None:
        scored.clear()
        done = dude_here("eval", "--compare", "runs/a", "runs/b", *CHOICES, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr

    other = ("--base-model", "other", "--allow-other-base")
    done = dude_here("eval", "runs/a", *CHOICES, *other, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "scores on another base are not kept with the run's own" in done.stderr
    assert not (tmp_path / "runs/a/eval").exists()
    # In a folder of its own it is kept, and told from a score on the adapter's base.
    compared(*other, "--output", "out")
    compared("--output", "out")
    assert len(scored) == 2
    compared("--output", "out", "--base-model", "moved")
    assert not scored
    compared(*other, "--output", "out")
    assert len(scored) == 2


def evaluated(folder: Path, *arguments: object) -> Any:
    """`dude eval ARGUMENTS`, which succeeds."""
    done = dude_here("eval", *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done


def test_what_was_scored_before_is_not_scored_again(runs: Path, tmp_path: Path, scored: list[str]) -> None:
    place = ("--output", tmp_path)
    first = evaluated(runs, "runs/a", *BOTH, "--json", *place)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    scored.clear()
    again = evaluated(runs, "runs/a", *BOTH, "--json", *place)
    assert not scored
    assert json.loads(again.stdout) == json.loads(first.stdout)
    assert "quickstart_choices was scored before; --rescore scores it again" in again.stderr
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    evaluated(runs, "runs/a", *BOTH, "--rescore", *place)
    assert scored == ["quickstart_choices", "quickstart_problems"]
    scored.clear()
    evaluated(runs, "runs/a", *CHOICES, "--task", "quickstart_problems", "--dtype", "bfloat16", *place)
    assert scored == ["quickstart_choices", "quickstart_problems"]
    scored.clear()
    evaluated(runs, "runs/b", *CHOICES, *place)
    assert scored == ["quickstart_choices"]


def test_of_what_was_scored_before_the_base_alone_is_missing(runs: Path, tmp_path: Path, scored: list[str]) -> None:
    whole = json.loads(evaluated(runs, "runs/a", *BOTH, "--base", "--json", "--output", tmp_path / "a").stdout)
    evaluated(runs, "runs/a", *BOTH, "--output", tmp_path / "b")
    scored.clear()
    completed = json.loads(evaluated(runs, "runs/a", *BOTH, "--base", "--json", "--output", tmp_path / "b").stdout)
    assert scored == ["quickstart_choices", "quickstart_problems"]
    for key in ("results", "base", "difference", "prompt_hashes", "max_gen_toks", "requested"):
        assert completed[key] == whole[key]
    assert {path.name for path in (tmp_path / "b").iterdir()} == {path.name for path in (tmp_path / "a").iterdir()}
    # With other settings the two parts would not be of one kind.
    evaluated(runs, "runs/a", *CHOICES, "--batch-size", "3", "--output", tmp_path / "d")
    scored.clear()
    evaluated(runs, "runs/a", *CHOICES, "--base", "--output", tmp_path / "d")
    assert scored == ["quickstart_choices"]
    evaluated(runs, "runs/a", *CHOICES, "--output", tmp_path / "c")
    scored.clear()
    done = evaluated(runs, "runs/a", *CHOICES, "--base", "--batch-size", "3", "--output", tmp_path / "c")
    assert scored == ["quickstart_choices"] * 2
    assert "batch_size differs: 8 and 3" in done.stderr


def test_each_base_that_is_scored_later_has_the_batch_size_of_its_own_task(
    runs: Path, tmp_path: Path, scored: list[str]
) -> None:
    place = ("--output", tmp_path)
    evaluated(runs, "runs/a", "--task", "quickstart_problems", "--limit", "2", "--batch-size", "3", *place)
    evaluated(runs, "runs/a", *CHOICES, "--batch-size", "2", *place)
    scored.clear()
    evaluated(runs, "runs/a", *BOTH, "--base", *place)
    assert scored == ["quickstart_choices", "quickstart_problems"]
    for task, size in (("quickstart_problems", 3), ("quickstart_choices", 2)):
        document = json.loads((tmp_path / f"{task}.limit-2.json").read_text())
        assert document["config"]["batch_size"] == size


def test_a_task_whose_prompts_are_others_each_time_has_no_difference_to_the_base(
    runs: Path, tmp_path: Path, scored: list[str]
) -> None:
    (tmp_path / "asked.py").write_text("import os\n\n\ndef text(doc):\n    return os.urandom(4).hex() + ' Answer:'\n")
    text = '"{{question.strip()}} Answer:"'
    (tmp_path / "drawn.yaml").write_text(DRAWN.replace(text, "!function asked.text").replace("num_fewshot: 1", ""))
    ours = ("runs/a", "--task", "drawn", "--limit", "2", "--include-path", tmp_path, "--output", tmp_path / "out")
    evaluated(runs, *ours)
    assert "its prompts or questions are others each time" in refused(runs, *ours, "--base", "--rescore")
    assert scored == ["drawn"] * 3


def test_scoring_again_keeps_the_bases_part(runs: Path, tmp_path: Path, scored: list[str]) -> None:
    place = ("--output", tmp_path)
    evaluated(runs, "runs/a", *CHOICES, "--base", *place)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.jsonl")}
    scored.clear()
    document = json.loads(evaluated(runs, "runs/a", *CHOICES, "--rescore", "--json", *place).stdout)
    assert scored == ["quickstart_choices"]
    assert document["base"]["results"].keys() == document["difference"].keys() == {"quickstart_choices"}
    assert {path: path.read_bytes() for path in tmp_path.glob("*.jsonl")} == before
    done = evaluated(runs, "runs/a", *CHOICES, "--rescore", "--batch-size", "3", *place)
    assert "batch_size differs: 8 and 3" in done.stderr
    assert "quickstart_choices.limit-2.json is replaced: it had the base's scores too" in done.stderr


def test_a_score_of_another_kind_is_replaced_with_a_word(runs: Path, tmp_path: Path, scored: list[str]) -> None:
    place = ("--output", tmp_path)
    evaluated(runs, "runs/a", *CHOICES, *place)
    done = evaluated(runs, "runs/a", *CHOICES, "--dtype", "bfloat16", *place)
    assert (
        "quickstart_choices.limit-2.json is replaced: model_dtype was torch.float32 and is torch.bfloat16"
        in done.stderr
    )
    scored.clear()
    done = evaluated(runs, "runs/a", *CHOICES, *place)  # in float32, as it was trained
    assert scored == ["quickstart_choices"]
    done = evaluated(runs, "runs/b", *CHOICES, *place)
    assert "quickstart_choices.limit-2.json is replaced: adapter_sha256 was " in done.stderr


CHANGES = {
    "prompt": ("Answer:", "The answer:"),
    "examples": ("num_fewshot: 1", "num_fewshot: 1\nfewshot_config: {sampler: first_n}"),
    "scoring": ("metric: acc,", "metric: acc_norm,"),
    "version": ("task: drawn", "task: drawn\nmetadata: {version: 7}"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_task_that_has_changed_is_scored_again(runs: Path, tmp_path: Path, scored: list[str], change: str) -> None:
    task = tmp_path / "drawn.yaml"
    task.write_text(DRAWN)
    ours = ("runs/a", "--task", "drawn", "--limit", "2", "--include-path", tmp_path, "--output", tmp_path / "out")
    for _ in range(2):
        evaluated(runs, *ours)
    assert scored == ["drawn"]
    task.write_text(DRAWN.replace(*CHANGES[change]))
    assert "drawn is scored again: " in evaluated(runs, *ours).stderr
    assert scored == ["drawn"] * 2


def test_a_prompt_that_has_changed_far_behind_the_first_is_seen(runs: Path, tmp_path: Path, scored: list[str]) -> None:
    task, text = tmp_path / "drawn.yaml", "{{question.strip()}} Answer:"
    task.write_text(DRAWN)
    ours = ("runs/a", "--task", "drawn", "--limit", "5", "--include-path", tmp_path, "--output", tmp_path / "out")
    last = list(documents.choice_splits()["test"])[4]["question"].strip()
    evaluated(runs, *ours)
    task.write_text(
        DRAWN.replace(text, "{{question.strip()}}{% if question.strip() == '" + last + "' %}!{% endif %} Answer:")
    )
    assert "drawn is scored again: its prompts are others now" in evaluated(runs, *ours).stderr
    assert scored == ["drawn"] * 2


def test_a_longest_answer_that_has_changed_is_scored_again(runs: Path, tmp_path: Path, scored: list[str]) -> None:
    """With --base too: the old tuned score would stand beside a base of shorter answers."""
    task = tmp_path / "own.yaml"
    own = "include: {}\ntask: own\ngeneration_kwargs: {{until: [Question], do_sample: false, max_gen_toks: {}}}\n"
    ours = ("runs/a", "--task", "own", "--limit", "2", "--include-path", tmp_path, "--output", tmp_path / "out")
    # 700 is more than half of the context: what is used is less than the task's own number.
    for tokens, new in ((48, 1), (48, 0), (700, 1), (700, 0)):
        task.write_text(own.format(quickstart.TASKS_DIR / "quickstart_problems.yaml", tokens))
        scored.clear()
        done = evaluated(runs, *ours)
        assert len(scored) == new
        if new and tokens == 700:
            assert "own is scored again: its longest answer was 48 tokens and is 700" in done.stderr
    task.write_text(own.format(quickstart.TASKS_DIR / "quickstart_problems.yaml", 2))
    scored.clear()
    evaluated(runs, *ours, "--base")
    assert scored == ["own", "own"]


def test_a_group_that_has_changed_is_scored_again(runs: Path, tmp_path: Path, scored: list[str]) -> None:
    for name in ("drawn", "other"):
        (tmp_path / f"{name}.yaml").write_text(DRAWN.replace("task: drawn", f"task: {name}"))
    group = tmp_path / "pair.yaml"
    text = "group: pair\ntask: [drawn, other]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    ours = ("runs/a", "--task", "pair", "--limit", "2", "--include-path", tmp_path, "--output", tmp_path / "out")
    group.write_text(text)
    for _ in range(2):
        evaluated(runs, *ours)
    assert scored == ["drawn", "other"]
    for old, new in (("true", "false"), ("metric: acc,", "metric: acc, filter_list: none,")):
        scored.clear()
        group.write_text(text.replace(old, new))
        said = evaluated(runs, *ours).stderr
        assert "pair is scored again: the score of the group pair is made in another way now" in said
        assert scored == ["drawn", "other"]


def test_a_question_that_has_changed_is_seen_by_its_hash(runs: Path, tmp_path: Path, scored: list[str]) -> None:
    evaluated(runs, "runs/a", *CHOICES, "--output", tmp_path)
    samples = tmp_path / "samples_quickstart_choices.limit-2.jsonl"
    first, second = (json.loads(line) for line in samples.read_text().splitlines())
    samples.write_text("\n".join(json.dumps(row) for row in (first, second | {"doc_hash": first["doc_hash"]})))
    scored.clear()
    assert "it has other questions now" in evaluated(runs, "runs/a", *CHOICES, "--output", tmp_path).stderr
    assert scored == ["quickstart_choices"]


def test_a_score_of_another_lm_eval_is_not_reused(runs: Path, tmp_path: Path, scored: list[str]) -> None:
    evaluated(runs, "runs/a", *CHOICES, "--output", tmp_path)
    path = tmp_path / "quickstart_choices.limit-2.json"
    path.write_text(path.read_text().replace('"lm_eval_version": "', '"lm_eval_version": "0.'))
    scored.clear()
    assert "by lm-eval 0." in evaluated(runs, "runs/a", *CHOICES, "--output", tmp_path).stderr
    assert scored == ["quickstart_choices"]


def refused(runs: Path, *arguments: object) -> str:
    """What `dude eval` says that refuses these arguments."""
    done = dude_here("eval", *arguments, cwd=runs)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


@pytest.mark.parametrize("task", [(), CHOICES])
def test_a_name_that_is_nothing_is_told_before_anything_is_scored(
    runs: Path, tmp_path: Path, scored: list[str], task: tuple[str, ...]
) -> None:
    shutil.copytree(runs / "runs/a", tmp_path / "runs/gsm8k")
    with offline():
        said = [refused(tmp_path, "--compare", "runs/gsm8k", "gsm8", *task), refused(tmp_path, "gsm8", *task)]
    for text in said:
        assert "there is no run, folder or file `gsm8` here" in text
        assert "nearest: runs/gsm8k" in text
    assert not scored
    assert not (tmp_path / "runs/gsm8k/eval").exists()


def test_a_base_that_is_gone_is_told_before_the_other_one_is_scored(
    runs: Path, tmp_path: Path, scored: list[str]
) -> None:
    shutil.copytree(runs / "runs", tmp_path / "runs")
    config = tmp_path / "runs/b/config.yaml"
    config.write_text(config.read_text().replace("embedded:quickstart", "/gone", 1))
    said = refused(tmp_path, "--compare", "runs/a", "runs/b", *CHOICES)
    assert "/gone does not exist" in said
    assert "--base-model" in said
    assert not scored


def test_the_tasks_are_those_of_whichever_run_has_some(runs: Path, tmp_path: Path, scored: list[str]) -> None:
    shutil.copytree(runs / "runs", tmp_path / "runs")
    config = tmp_path / "runs/a/config.yaml"
    config.write_text(config.read_text().replace("tasks: []", "tasks: [{name: quickstart_choices, limit: 2}]"))
    done = dude_here("eval", "--compare", "embedded:quickstart", "runs/a", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert scored == ["quickstart_choices"] * 2
    assert "comparing on the tasks of a config: quickstart_choices (first 2)" in done.stderr


def test_without_a_task_what_both_have_stored_is_compared(runs: Path, tmp_path: Path, scored: list[str]) -> None:
    """With the settings that it was scored with, and nothing that only one of them has."""
    shutil.copytree(runs / "runs", tmp_path / "runs")
    (tmp_path / "drawn.yaml").write_text(DRAWN)
    evaluated(tmp_path, "runs/a", *CHOICES)
    said = refused(tmp_path, "--compare", "runs/a", "runs/b")
    assert "no task to evaluate on" in said
    assert "runs/a has scores of quickstart_choices (0 examples, first 2), runs/b has scores of none" in said
    for run in ("runs/a", "runs/b"):
        evaluated(tmp_path, run, *DRAWN_TASK, "--num-fewshot", "0")
    evaluated(tmp_path, "runs/a", "--task", "quickstart_problems", "--limit", "1")
    evaluated(tmp_path, "runs/b", *CHOICES)
    evaluated(tmp_path, "runs/a", "--task", "quickstart_choices", "--limit", "10")
    scored.clear()
    done = evaluated(tmp_path, "--compare", "runs/a", "runs/b", "--json")
    assert not scored
    compared = json.loads(done.stdout)["comparisons"]
    assert {(row["task"], row["test"]["n"]) for row in compared} == {("drawn", 2), ("quickstart_choices", 2)}
    two = "(0 examples, first 2)"
    assert f"comparing what both have: drawn {two}, quickstart_choices {two}" in done.stderr
    # Of a task that both have in several forms it is the one with the most questions.
    evaluated(tmp_path, "runs/b", "--task", "quickstart_choices", "--limit", "10")
    done = evaluated(tmp_path, "--compare", "runs/a", "runs/b", "--json")
    compared = json.loads(done.stdout)["comparisons"]
    assert {(row["task"], row["test"]["n"]) for row in compared} == {("drawn", 2), ("quickstart_choices", 10)}
    assert f"left out: quickstart_choices {two}" in done.stderr


def test_several_tasks_in_one_word_are_told_how_to_be_written(runs: Path) -> None:
    said = refused(runs, "runs/a", "--task", "arc_easy,hellaswag")
    assert "where: --task arc_easy,hellaswag" in said
    assert "write `--task arc_easy --task hellaswag`" in said


@pytest.fixture
def zero_shot(runs: Path, tmp_path: Path) -> Path:
    """A folder with the two runs, of which `a` is scored with no examples, where the task's own number is another."""
    shutil.copytree(runs / "runs", tmp_path / "runs")
    (tmp_path / "drawn.yaml").write_text(DRAWN)
    done = dude_here("eval", "runs/a", *DRAWN_TASK, "--num-fewshot", "0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    return tmp_path


DRAWN = """
task: drawn
custom_dataset: !function dude_cli.quickstart.documents.choice_splits
output_type: multiple_choice
test_split: test
fewshot_split: train
num_fewshot: 1
doc_to_text: "{{question.strip()}} Answer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
DRAWN_TASK = ("--task", "drawn", "--limit", "2", "--include-path", ".")


def test_a_score_with_other_examples_has_a_file_of_its_own(zero_shot: Path, scored: list[str]) -> None:
    """So neither takes the place of the other, and each is found again as it was asked for."""
    folder = zero_shot / "runs/a/eval"
    assert {path.name for path in folder.glob("*.json")} == {"drawn.shots-0.limit-2.json"}
    for shots, new in (((), 2), (("--num-fewshot", "1"), 0), (("--num-fewshot", "0"), 1), ((), 0)):
        scored.clear()
        done = dude_here("eval", "--compare", "runs/a", "runs/b", *DRAWN_TASK, *shots, "--json", cwd=zero_shot)
        assert done.returncode == 0, done.stderr
        assert len(scored) == new
    assert {path.name for path in folder.glob("*.json")} == {"drawn.shots-0.limit-2.json", "drawn.limit-2.json"}
    report = (zero_shot / "runs/a/report.md").read_text()
    assert "drawn (first 2)" in report
    assert "drawn (0 examples, first 2)" in report


def test_saved_scores_of_other_questions_are_refused_before_anything_is_scored(
    zero_shot: Path, scored: list[str]
) -> None:
    task = zero_shot / "drawn.yaml"
    task.write_text(task.read_text().replace("Answer:", "The answer:"))
    assert dude_here("eval", "runs/b", *DRAWN_TASK, "--num-fewshot", "0", cwd=zero_shot).returncode == 0
    scored.clear()
    more = ("--task", "quickstart_choices", "--num-fewshot", "0")
    assert "prompts (their SHA-256) of drawn" in refused(zero_shot, "--compare", "runs/a", "runs/b", *DRAWN_TASK, *more)
    assert not scored


def test_what_a_result_file_is_not_of_cannot_be_asked_for(zero_shot: Path, scored: list[str]) -> None:
    file = "runs/a/eval/drawn.shots-0.limit-2.json"
    scored.clear()
    for option, value in (("--task", "gsm8k"), ("--num-fewshot", "1"), ("--limit", "3")):
        said = refused(zero_shot, "--compare", file, "runs/b", option, value)
        assert f"{option} is {value}, and in the result file it is" in said
    said = refused(zero_shot, "--compare", file, "runs/b", "--apply-chat-template")
    assert "--apply-chat-template is True, and in the result file it is False" in said
    assert not scored
    done = dude_here("eval", "--compare", file, "runs/b", *DRAWN_TASK, "--num-fewshot", "0", cwd=zero_shot)
    assert done.returncode == 0, done.stderr


def test_a_log_file_has_the_progress_of_an_evaluation(runs: Path, tmp_path: Path) -> None:
    done = dude_here("eval", "runs/a", *CHOICES, "--output", tmp_path, cwd=runs)
    assert "requests 1/" in done.stderr


def test_where_nothing_keeps_the_results_it_is_said_before(runs: Path, tmp_path: Path) -> None:
    note = "note: the results are not kept; --output FOLDER keeps them"
    done = dude_here("eval", "runs/a/adapter", *CHOICES, "--json", cwd=runs)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert lines.index(note) < next(place for place, line in enumerate(lines) if line.startswith("requests"))
    json.loads(done.stdout)
    assert note not in dude_here("eval", "runs/a/adapter", *CHOICES, "--output", tmp_path, cwd=runs).stderr


def test_of_several_ranks_that_have_nothing_to_score_one_prints(
    zero_shot: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = zero_shot / "runs/a/eval/drawn.shots-0.limit-2.json"
    printed = []
    for rank in ("0", "1"):
        with monkeypatch.context() as ranks:
            for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}.items():
                ranks.setenv(name, value)
            printed.append(dude_here("eval", "--compare", file, file, "--json").stdout)
    assert json.loads(printed[0])["comparisons"]
    assert printed[1] == ""


def test_a_run_trained_on_conversations_is_told_to_be_scored_on_plain_prompts(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "runs/a", tmp_path / "a")
    config = tmp_path / "a/config.yaml"
    config.write_text(config.read_text().replace("format: prompt_completion", "format: chat"))
    said = {}
    for run in (runs / "runs/a", tmp_path / "a"):
        done = dude_here("eval", run, *CHOICES, "--output", tmp_path / "out", "--rescore", "--json")
        assert json.loads(done.stdout)["chat_template"] is None
        said[run] = "note: trained on conversations, and quickstart_choices scored" in done.stderr
    assert list(said.values()) == [False, True]


CHAT = ("--apply-chat-template", *CHOICES)
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture
def chat_run(runs: Path, tmp_path: Path) -> Path:
    """A run whose tokenizer has a chat template."""
    shutil.copytree(runs / "runs/a", tmp_path / "runs/chat", ignore=shutil.ignore_patterns("eval", "report*"))
    give_template(tmp_path / "runs/chat", CHAT_TEMPLATE)
    return tmp_path


def give_template(run: Path, template: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(quickstart.MODEL_DIR)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(run / "adapter")


def test_a_score_in_the_chat_template_is_kept_beside_the_plain_one(chat_run: Path, scored: list[str]) -> None:
    folder = chat_run / "runs/chat/eval"
    for options, new in ((CHAT, 1), (CHOICES, 1), (CHAT, 0), (CHOICES, 0)):
        scored.clear()
        done = dude_here("eval", *options, "--json", cwd=chat_run)
        assert done.returncode == 0, done.stderr
        assert len(scored) == new
        document = json.loads(done.stdout)
        assert document["chat_template"] == (CHAT_TEMPLATE if options == CHAT else None)
        assert document["prompt_examples"]["quickstart_choices"].startswith("user: ") == (options == CHAT)
    names = {"quickstart_choices.chat.limit-2.json", "quickstart_choices.limit-2.json"}
    assert {path.name for path in folder.glob("*.json")} == names
    assert "quickstart_choices (chat template)" in dude_here("eval", *CHAT, cwd=chat_run).stdout
    report = (chat_run / "runs/chat/report.md").read_text()
    assert "choices (chat template, first 2)" in report
    assert "choices (first 2)" in report


def test_a_config_asks_for_the_chat_template(chat_run: Path, scored: list[str]) -> None:
    config = chat_run / "runs/chat/config.yaml"
    text = yaml.safe_load(config.read_text())
    text["eval"]["tasks"] = [{"name": "quickstart_choices", "limit": 2, "apply_chat_template": True}]
    config.write_text(yaml.safe_dump(text))
    for options, is_chat in (((), True), (CHOICES, False)):
        done = dude_here("eval", "runs/chat", *options, "--json", cwd=chat_run)
        assert done.returncode == 0, done.stderr
        prompt = json.loads(done.stdout)["prompt_examples"]["quickstart_choices"]
        assert prompt.startswith("user: ") == is_chat


def test_a_score_in_another_chat_template_is_not_taken_again(chat_run: Path, scored: list[str]) -> None:
    assert dude_here("eval", *CHAT, cwd=chat_run).returncode == 0
    give_template(chat_run / "runs/chat", CHAT_TEMPLATE.replace(":", ">"))
    scored.clear()
    done = dude_here("eval", *CHAT, "--json", cwd=chat_run)
    assert "quickstart_choices is scored again: its chat template is another one now" in done.stderr
    assert scored == ["quickstart_choices"]
    assert json.loads(done.stdout)["prompt_examples"]["quickstart_choices"].startswith("user> ")
    # Another end of the answer, which no prompt shows.
    give_template(
        chat_run / "runs/chat", CHAT_TEMPLATE.replace(":", ">") + "{{ eos_token if not add_generation_prompt }}"
    )
    assert "its chat template is another one now" in dude_here("eval", *CHAT, cwd=chat_run).stderr


def test_a_template_and_its_values_can_be_given(chat_run: Path, scored: list[str]) -> None:
    """In place of that of the run, whose score is then one of other prompts."""
    own = chat_run / "own.jinja"
    own.write_text("{% for m in messages %}{{ name }} {{ m.role }}> {{ m.content }}\n{% endfor %}")
    assert dude_here("eval", *CHAT, cwd=chat_run).returncode == 0
    given = ("--chat-template", "own.jinja", "--chat-template-kwargs", '{"name": "the"}')
    done = dude_here("eval", *CHAT, *given, "--json", cwd=chat_run)
    assert done.returncode == 0, done.stderr
    assert "is scored again: its chat template is another one now" in done.stderr
    document = json.loads(done.stdout)
    assert document["prompt_examples"]["quickstart_choices"].startswith("the user> ")
    assert document["chat_template"] == '{% set name = "the" %}\n' + own.read_text()
    scored.clear()
    assert dude_here("eval", *CHAT, *given, cwd=chat_run).returncode == 0
    assert not scored  # the same template again
    shutil.copytree(chat_run / "runs/chat", chat_run / "runs/other")
    compared = dude_here(
        "eval", "--compare", "runs/chat", "runs/other", *CHAT, *given[:-1], '{"name": "a"}', cwd=chat_run
    )
    assert compared.returncode == 0, compared.stderr
    assert scored == ["quickstart_choices"] * 2


def test_a_system_instruction_is_asked_with_and_kept_beside_other_scores(chat_run: Path, scored: list[str]) -> None:
    one, two = (("--system-instruction", text) for text in ("Be brief.", "Be kind."))
    for options, new in ((CHAT, 1), ((*CHAT, *one), 1), ((*CHAT, *two), 1), ((*CHAT, *one), 0), (CHAT, 0)):
        scored.clear()
        done = dude_here("eval", *options, "--json", cwd=chat_run)
        assert done.returncode == 0, done.stderr
        assert len(scored) == new
        prompt = json.loads(done.stdout)["prompt_examples"]["quickstart_choices"]
        assert prompt.startswith(f"system: {options[-1]}\nuser: " if "--system-instruction" in options else "user: ")
    assert len(list((chat_run / "runs/chat/eval").glob("quickstart_choices.chat*.json"))) == 3
    table = dude_here("eval", *CHAT, *one, cwd=chat_run).stdout
    assert "quickstart_choices (chat template, system_instruction)" in table
    report = (chat_run / "runs/chat/report.md").read_text()
    assert r"choices (chat template, system\_instruction, first 2)" in report
    file = next(path for path in (chat_run / "runs/chat/eval").glob("*system-*.json"))
    kept = json.loads(file.read_text())["requested"]["quickstart_choices"]["system_instruction"]
    other = "Be kind." if kept == "Be brief." else "Be brief."
    told = refused(chat_run, "--compare", file, file, *CHAT, "--system-instruction", other)
    assert f"--system-instruction is {other}, and in the result file it is {kept}" in told


def test_a_system_instruction_that_would_not_be_seen_is_refused(chat_run: Path, scored: list[str]) -> None:
    given = ("--system-instruction", "Be brief.")
    assert "in plain text, without a chat template" in refused(chat_run, *CHOICES, *given)
    assert "it is empty" in refused(chat_run, *CHAT, "--system-instruction", "")
    give_template(chat_run / "runs/chat", CHAT_TEMPLATE.replace("messages", "messages if m.role != 'system'", 1))
    assert "no place for a system's message" in refused(chat_run, *CHAT, *given)
    assert not scored
    config = chat_run / "runs/chat/config.yaml"
    text = yaml.safe_load(config.read_text())
    text["eval"]["tasks"] = [{"name": "quickstart_choices", "system_instruction": "Be brief."}]
    config.write_text(yaml.safe_dump(text))
    assert "set `apply_chat_template: true` too" in refused(chat_run)


def test_what_cannot_be_done_with_a_template_is_refused(chat_run: Path) -> None:
    no = "in plain text, without a chat template"
    assert no in refused(chat_run, *CHOICES, "--chat-template", "own.jinja")
    assert no in refused(chat_run, *CHOICES, "--chat-template-kwargs", "{a: 1}")
    for text, what in (("{a: [1]}", "`a` is no single value"), ("a", "'a' is no names"), ("{a: 1", "expected")):
        assert what in refused(chat_run, *CHAT, "--chat-template-kwargs", text)
    missing = refused(chat_run, *CHAT, "--chat-template", "own.jinja")
    assert "cannot read the chat template" in missing
    assert "--base-model" not in missing
    assert "`b` is nothing that the chat template asks for" in refused(
        chat_run, *CHAT, "--chat-template-kwargs", "{b: 1}"
    )


def test_two_chat_templates_are_not_compared(chat_run: Path, scored: list[str]) -> None:
    """Before hours of scoring, whether the other one is a run or a file."""
    shutil.copytree(chat_run / "runs/chat", chat_run / "runs/other")
    assert dude_here("eval", "runs/chat", *CHAT, cwd=chat_run).returncode == 0
    give_template(chat_run / "runs/other", CHAT_TEMPLATE.replace(":", ">"))
    scored.clear()
    for first in ("runs/chat", "runs/chat/eval/quickstart_choices.chat.limit-2.json"):
        assert "different chat templates" in refused(chat_run, "--compare", first, "runs/other", *CHAT)
    assert not scored
    give_template(chat_run / "runs/other", CHAT_TEMPLATE)
    done = dude_here("eval", "--compare", "runs/chat", "runs/other", *CHAT, cwd=chat_run)
    assert done.returncode == 0, done.stderr
    assert scored == ["quickstart_choices"]


def test_of_several_tasks_it_is_said_which_are_in_the_chat_template(chat_run: Path) -> None:
    config = chat_run / "runs/chat/config.yaml"
    text = yaml.safe_load(config.read_text())
    text["eval"]["tasks"] = [
        {"name": "quickstart_choices", "limit": 2, "apply_chat_template": True},
        {"name": "quickstart_problems", "limit": 1},
    ]
    config.write_text(yaml.safe_dump(text))
    document = json.loads(dude_here("eval", "runs/chat", "--json", cwd=chat_run).stdout)
    assert document["chat_template"] == {"quickstart_choices": CHAT_TEMPLATE, "quickstart_problems": None}


def test_a_template_that_cannot_be_used_is_no_bug(chat_run: Path) -> None:
    give_template(chat_run / "runs/chat", "{{ raise_exception('never') }}")
    done = dude_here("eval", "runs/chat", *CHAT, cwd=chat_run)
    assert done.returncode == 2, done.stderr
    assert "the chat template refuses a question: never" in done.stderr
    assert dude_here("eval", "runs/chat", *CHOICES, cwd=chat_run).returncode == 0  # in plain text it is not needed


def test_of_several_chat_templates_one_has_to_be_the_default() -> None:
    tokenizer = AutoTokenizer.from_pretrained(quickstart.MODEL_DIR)
    tokenizer.chat_template = {"one": CHAT_TEMPLATE, "two": CHAT_TEMPLATE}
    with pytest.raises(UsageError, match=r"several chat templates \(one, two\), and none has the name `default`"):
        chat_template(tokenizer)


def test_without_a_chat_template_it_is_refused_before_the_model_is_loaded(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dude_cli.target.load_model", lambda *_: pytest.fail("the model was loaded"))
    done = dude_here("eval", "runs/a", *CHAT, "--output", tmp_path, cwd=runs)
    assert done.returncode == 2
    assert "the tokenizer has no chat template" in done.stderr


def test_a_recipes_run_loads_its_model_once_for_all_tasks(
    runs: Path, tmp_path: Path, scored: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(runs / "runs/a", tmp_path / "a")
    config = load_config(tmp_path / "a/config.yaml", [f"output_dir={tmp_path / 'a'}"])
    tasks = (EvalTask(name="quickstart_choices", limit=2), EvalTask(name="quickstart_problems", limit=1))
    loaded: list[str] = []

    def load(config: ModelConfig, *more: Any) -> Any:
        loaded.append(config.name_or_path)
        return load_model(config, *more)

    monkeypatch.setattr("dude_cli.target.load_model", load)
    job = Job(Run("a", config), tmp_path / "configs/a.yaml", tasks)
    reproduce_run(job)
    assert scored == ["quickstart_choices", "quickstart_problems"]
    assert loaded == [quickstart.NAME]
    assert job.is_done


def test_a_recipe_scores_rows_too(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "runs/a", tmp_path / "a")
    config = load_config(tmp_path / "a/config.yaml", [f"output_dir={tmp_path / 'a'}"])
    job = Job(Run("a", config), tmp_path / "configs/a.yaml", (EvalTask(name="mine", rows=config.data.train),))
    assert job.missing_tasks() == list(job.tasks)
    reproduce_run(job)
    assert job.is_done


def test_a_recipe_does_not_take_the_score_of_another_lm_eval(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "runs/a", tmp_path / "a")
    config = load_config(tmp_path / "a/config.yaml", [f"output_dir={tmp_path / 'a'}"])
    assert dude_here("eval", tmp_path / "a", *CHOICES).returncode == 0
    job = Job(Run("a", config), tmp_path / "configs/a.yaml", (EvalTask(name="quickstart_choices", limit=2),))
    assert job.is_done
    path = tmp_path / "a/eval/quickstart_choices.limit-2.json"
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | {"lm_eval_version": "0.4.0"}))
    assert job.missing_tasks() == list(job.tasks)


def test_a_comparison_writes_nothing_through_a_link(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "runs", tmp_path / "runs")
    (tmp_path / "outside").mkdir()
    (tmp_path / "runs/b/eval").symlink_to(tmp_path / "outside")
    assert "eval in it would lead" in refused(tmp_path, "--compare", "runs/a", "runs/b", *CHOICES)


def own_rows(path: Path, count: int = 3, prompt: str = "prompt") -> Path:
    rows = [{prompt: f"Question: {number} cups\nAnswer:", "completion": f" {number}"} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_own_rows_have_the_loss_of_the_trainings_evaluation(runs: Path, tmp_path: Path) -> None:
    """The rows of `data.validation`, with the base and the paired difference, named in the config."""
    run = tmp_path / "run"
    shutil.copytree(runs / "runs/a", run, ignore=shutil.ignore_patterns("eval", "report*"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["eval"] = {"tasks": [{"name": "held-out", "rows": config["data"]["validation"]}]}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    document = json.loads(evaluated(tmp_path, "run", "--base", "--task", "held-out", "--json").stdout)
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    before, after = [line["eval_loss"] for line in losses if "eval_loss" in line]
    assert document["base"]["results"]["held-out"]["loss,none"] == pytest.approx(before, rel=1e-5)
    assert document["results"]["held-out"]["loss,none"] == pytest.approx(after, rel=1e-5)
    assert document["difference"]["held-out"]["loss,none"] == pytest.approx(after - before, rel=1e-3)
    assert document["difference"]["held-out"]["loss_stderr,none"] > 0
    assert "held-out, loss" in (run / "report.md").read_text()


def test_own_rows_are_scored_again_when_they_are_others(runs: Path, tmp_path: Path, scored: list[str]) -> None:
    rows = own_rows(tmp_path / "own.jsonl")
    ask = ("runs/a", "--rows", rows, "--output", tmp_path / "out")
    shown = evaluated(runs, *ask).stdout
    assert [line.split()[:3] for line in shown.splitlines()[1:]] == [
        ["own.jsonl", metric, "none"] for metric in ("loss", "exact_match")
    ]
    assert "was scored before" in evaluated(runs, *ask).stderr
    assert scored == ["own.jsonl"]
    own_rows(rows, count=4)
    assert "own.jsonl is scored again: its rows are others now, or in another form" in evaluated(runs, *ask).stderr
    assert scored == ["own.jsonl"] * 2
    evaluated(runs, *ask, "--limit", "2")
    assert {path.name for path in (tmp_path / "out").glob("*.json")} == {
        "own.jsonl.rows.json",
        "own.jsonl.rows.limit-2.json",
    }


def test_rows_of_another_place_take_the_place_of_those_of_their_name_with_a_word(
    runs: Path, tmp_path: Path, scored: list[str]
) -> None:
    said = []
    for folder, count in (("one", 3), ("two", 2)):
        (tmp_path / folder).mkdir()
        own_rows(tmp_path / folder / "own.jsonl", count=count)
        said.append(
            evaluated(tmp_path, runs / "runs/a", "--rows", f"{folder}/own.jsonl", "--output", tmp_path / "out").stderr
        )
    assert ["its rows were one/own.jsonl and are two/own.jsonl" in text for text in said] == [False, True]
    splits = [f"{{path: two/own.jsonl, split: 'train[:{count}]'}}" for count in (1, 2)]
    both = ("--rows", splits[0], "--rows", splits[1], "--rows", "one/own.jsonl", "--rows", "two/own.jsonl")
    results = json.loads(evaluated(tmp_path, runs / "runs/a", *both, "--json", "--output", tmp_path / "out").stdout)
    names = ["own.jsonl train[:1]", "own.jsonl train[:2]", "one/own.jsonl", "two/own.jsonl"]
    assert list(results["results"]) == names
    files = {path.name for path in (tmp_path / "out").glob("*.json")}
    assert {f"{name}.rows.json" for name in ("own.jsonl_train_1_", "own.jsonl_train_2_", "one_own.jsonl")} < files
    scored[2:] = []
    assert scored == ["own.jsonl"] * 2


def test_two_runs_are_compared_on_own_rows_and_not_on_what_a_file_was(
    runs: Path, tmp_path: Path, scored: list[str]
) -> None:
    rows = own_rows(tmp_path / "own.jsonl")
    compare = ("--compare", "runs/a", "runs/b", "--output", tmp_path / "out")
    done = evaluated(runs, *compare, "--rows", rows)
    assert "sign-flip permutation" in done.stdout
    assert "A: loss" in done.stdout
    evaluated(runs, *compare)  # what both have, without the file
    assert scored == ["own.jsonl"] * 2
    own_rows(rows, count=2)
    document = json.loads(evaluated(runs, *compare, "--rows", rows, "--json").stdout)
    assert scored == ["own.jsonl"] * 4
    assert document["comparisons"][0]["test"]["n"] == 2
    # A file says which rows it is of, and others are not for it.
    assert "--rows" in refused(
        runs, "--compare", tmp_path / "out/a/own.jsonl.rows.json", "runs/b", "--rows", "others.jsonl"
    )
    evaluated(runs, "--compare", tmp_path / "out/a/own.jsonl.rows.json", "runs/b", "--output", tmp_path / "other")
    assert scored == ["own.jsonl"] * 5


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("own.jsonl", ("--num-fewshot", "2"), "--num-fewshot"),
        ("own.jsonl", ("--apply-chat-template",), "--apply-chat-template"),
        ("own.jsonl", ("--rows", "own.jsonl"), "given twice"),
        ("own.jsonl", ("--task", "own.jsonl"), "given twice"),
        ("", (), "names no data set"),
        ("{path: own.jsonl, splitt: test}", (), "did you mean `split`"),
        ("others.jsonl", (), "the rows of the training have 'prompt' and 'completion'"),
        ("others.jsonl", (), "others.jsonl, read for run "),
        ("own.jsonl", ("--chat-template", "template.jinja"), "own.jsonl: these rows are no conversations"),
        ("own.jsonl", ("--compare", "run", "--limit"), "--compare takes two names, and one of them is --limit"),
        ("owm.jsonl", (), "did you mean own.jsonl"),
    ],
)
def test_what_is_wrong_with_own_rows_is_told_before_the_model_is_loaded(
    runs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr("dude_cli.target.load_model", lambda *_: pytest.fail("the model was loaded"))
    own_rows(tmp_path / "own.jsonl")
    own_rows(tmp_path / "others.jsonl", prompt="question")
    (tmp_path / "template.jinja").write_text(CHAT_TEMPLATE)
    done = dude_here("eval", runs / "runs/a", "--rows", name, *options, "--output", "out", cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert not (tmp_path / "out").exists()
