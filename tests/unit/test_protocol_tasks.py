"""Published evaluation protocols as lm-eval tasks: prompts, and how an answer is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dude_cli.config import EvalTask
from dude_cli.evaluation.protocols import TASKS_DIR
from dude_cli.evaluation.protocols.answers import number_after_the_answer_is
from dude_cli.evaluation.tasks import load_tasks


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6 - 1 = 5.\nThe answer is: 5", "5"),
        ("The answer is: 4\nNo. The answer is: 1,234 dollars.", "1234"),
        ("The answer is: $-12.00", "-12"),
        ("The answer is: 7/2", "4"),
        ("The answer is: 5/2", "2"),
        ("The answer is: 9/0", "9"),
        ("The answer is: /3", "[invalid]"),
        ("The answer is: many", "[invalid]"),
        ("It is 5", "[invalid]"),
        ("the answer is: 5", "[invalid]"),
    ],
)
def test_the_number_is_the_first_after_the_last_mark(text: str, number: str) -> None:
    assert number_after_the_answer_is(text) == number


def write_gsm8k(folder: Path, question: str) -> Path:
    (folder / "gsm8k").mkdir(parents=True)
    row = {"question": question, "answer": "999+235=1234\n#### 1,234"}
    (folder / "gsm8k" / "README.md").write_text(
        "---\nconfigs:\n- config_name: main\n  data_files:\n  - {split: train, path: train.jsonl}\n"
        "  - {split: test, path: test.jsonl}\n---\n"
    )
    for split in ("train", "test"):
        (folder / "gsm8k" / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    return folder


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_gsm8k(tmp_path_factory.mktemp("data"), "How much are 999 and 235?")
    names = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa")
    for name in names:
        (folder / "commonsense" / name).mkdir(parents=True)
        rows = [
            {"instruction": f"About {name}?", "input": "", "output": "the correct answer is true", "answer": "true"}
        ]
        (folder / "commonsense" / name / "test.json").write_text(json.dumps(rows))
    return folder


def loaded(name: str, data_dir: Path):
    return load_tasks(
        (EvalTask(name=name, num_fewshot=0),), data_dir=data_dir, include_paths=(), log=lambda text: None
    )[0]


def filtered(task, answer: str) -> str:
    filters = task._filters[0].filters
    responses = [[answer]]
    for make in filters:
        responses = make().apply(responses, [{}])
    return next(iter(responses))


@pytest.mark.parametrize("name", ["gsm8k", "pissa_gsm8k"])
def test_the_rows_are_those_of_the_folder_that_is_given(name: str, data_dir: Path, tmp_path: Path) -> None:
    """datasets takes two folders of one name and layout for the same data, and reads the second from its cache."""
    other = write_gsm8k(tmp_path, "How much are 1000 and 234?")
    for folder, question in ((data_dir, "How much are 999 and 235?"), (other, "How much are 1000 and 234?")):
        assert loaded(name, folder).tasks[name].eval_docs[0]["question"] == question
    (tmp_path / "gsm8k" / "test.jsonl").write_text(json.dumps({"question": "Else?", "answer": "#### 1"}) + "\n")
    assert loaded(name, other).tasks[name].eval_docs[0]["question"] == "Else?"


def test_gsm8k_as_pissa_scores_it_has_the_prompt_of_its_training(data_dir: Path) -> None:
    from dude_cli.config import load_config

    task = loaded("pissa_gsm8k", data_dir).tasks["pissa_gsm8k"]
    doc = task.eval_docs[0]
    prompt = load_config(Path("configs/gsm8k.yaml")).data.prompt
    assert prompt is not None
    assert task.doc_to_text(doc) == prompt.replace("{query}", doc["question"])
    assert task.doc_to_target(doc) == "1234"
    assert task.get_config("num_fewshot") == 0
    settings = task.get_config("generation_kwargs")
    assert (settings["max_gen_toks"], settings["do_sample"], settings["until"]) == (1024, False, [])
    assert filtered(task, "The answer is: 1,234.") == "1234"


def test_commonsense_as_dora_scores_it(data_dir: Path) -> None:
    found = loaded("dora_commonsense", data_dir)
    assert len(found.tasks) == 8
    task = found.tasks["dora_boolq"]
    doc = task.eval_docs[0]
    assert task.doc_to_text(doc) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n\n"
        "                ### Instruction:\n                About boolq?\n\n"
        "                ### Response:\n                "
    )
    assert task.doc_to_target(doc) == "true"
    assert task.get_config("generation_kwargs")["num_beams"] == 4
    assert filtered(task, " the correct answer is false, or true") == "false"
    assert filtered(found.tasks["dora_piqa"], "true") == "[invalid]"
    assert [metric.weight_by_size for metric in found.groups["dora_commonsense"].aggregate_metric_list] == [False]


def test_every_task_file_has_its_words() -> None:
    names = {file.stem for file in TASKS_DIR.glob("*.yaml")}
    assert len(names) == 10
