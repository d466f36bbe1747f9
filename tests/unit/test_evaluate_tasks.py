"""Which tasks lm-eval scores, with data made here: names, local copies, few-shot examples."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import lm_eval.utils
import pytest

from dude_cli.config import EvalTask
from dude_cli.errors import UsageError
from dude_cli.evaluation.harness import templates_compiled_once
from dude_cli.evaluation.tasks import LoadedTask, load_tasks, offline

MMLU_README = """---
configs:
- config_name: anatomy
  data_files:
  - {split: test, path: test/anatomy.jsonl}
  - {split: dev, path: dev/anatomy.jsonl}
---
"""
GSM8K_README = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: train.jsonl}
  - {split: test, path: test.jsonl}
---
"""


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gsm8k of 20 and 6 rows and an mmlu of one subject, in the layout of the official data sets."""
    folder = tmp_path_factory.mktemp("data")
    for split, size in (("train", 20), ("test", 6)):
        rows = [{"question": f"{split}: {i} + 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(size)]
        write_rows(folder / "gsm8k" / f"{split}.jsonl", rows)
    for split, size in (("dev", 5), ("test", 4)):
        choices = ["one", "two", "three", "four"]
        rows = [
            {"question": f"{split} {i}?", "subject": "anatomy", "choices": choices, "answer": i % 4}
            for i in range(size)
        ]
        write_rows(folder / "mmlu" / split / "anatomy.jsonl", rows)
    (folder / "gsm8k" / "README.md").write_text(GSM8K_README)
    (folder / "mmlu" / "README.md").write_text(MMLU_README)
    return folder


@pytest.fixture(autouse=True)
def cache_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def load(*tasks: EvalTask, data_dir: Path | None, include_paths: tuple[Path, ...] = ()) -> list[LoadedTask]:
    with offline():
        return load_tasks(tasks, data_dir=data_dir, include_paths=include_paths, log=lambda message: None)


def prompts(task: Any, rank: int = 0, world_size: int = 1) -> dict[int, str]:
    task.set_fewshot_seed(seed=1234)
    task.build_all_requests(rank=rank, world_size=world_size)
    return {instance.doc_id: instance.args[0] for instance in task.instances}


def test_unknown_tasks_are_named_with_the_nearest() -> None:
    wrong = {"mmul": "mmlu", "gsm8": "gsm8k", "mmlu_anatomi": "mmlu_anatomy", "arc_esay": "arc_easy"}
    with pytest.raises(UsageError, match="no task `mmul`, `gsm8`, `mmlu_anatomi`, `arc_esay`") as caught:
        load(*(EvalTask(name=name) for name in ["gsm8k", *wrong]), data_dir=None)
    assert caught.value.fix is not None
    assert set(wrong.values()) <= set(caught.value.fix.removeprefix("nearest names: ").split(", "))


def test_the_official_benchmarks_have_five_examples_and_others_their_own(data_dir: Path, tmp_path: Path) -> None:
    write_user_task(tmp_path / "mine", data_dir)
    gsm8k, anatomy, mine = load(
        EvalTask(name="gsm8k"),
        EvalTask(name="mmlu_anatomy"),
        EvalTask(name="mine"),
        data_dir=data_dir,
        include_paths=(tmp_path / "mine",),
    )
    numbers = [found.tasks[found.request.name].get_config("num_fewshot") for found in (gsm8k, anatomy, mine)]
    assert numbers == [5, 5, 2]
    assert next(iter(prompts(gsm8k.tasks["gsm8k"]).values())).count("Question:") == 6
    assert next(iter(prompts(anatomy.tasks["mmlu_anatomy"]).values())).count("Answer:") == 6


def test_the_number_of_examples_can_be_given(data_dir: Path) -> None:
    (gsm8k,) = load(EvalTask(name="gsm8k", num_fewshot=0), data_dir=data_dir)
    assert prompts(gsm8k.tasks["gsm8k"])[2] == "Question: test: 2 + 1?\nAnswer:"


def test_more_examples_than_there_are_is_an_error(data_dir: Path) -> None:
    with pytest.raises(UsageError, match=r"has 5 few-shot examples, not 6(.|\n)*ask for 5 at most"):
        load(EvalTask(name="mmlu_anatomy", num_fewshot=6), data_dir=data_dir)


def test_gsm8ks_examples_do_not_depend_on_the_number_of_processes(data_dir: Path) -> None:
    (found,) = load(EvalTask(name="gsm8k"), data_dir=data_dir)
    task = found.tasks["gsm8k"]
    alone = prompts(task)
    assert len(alone) == 6
    together: dict[int, str] = {}
    for rank in range(2):
        together |= prompts(task, rank, world_size=2)
    assert together == alone
    assert [f"train: {i} + 1?" in alone[0] for i in range(7)] == [True] * 5 + [False] * 2


def test_the_same_prompts_come_out_twice(data_dir: Path) -> None:
    request = (EvalTask(name="gsm8k"), EvalTask(name="mmlu_anatomy"))
    first, second = (load(*request, data_dir=data_dir) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert {name: prompts(task) for name, task in a.tasks.items()} == {
            name: prompts(task) for name, task in b.tasks.items()
        }


@pytest.mark.parametrize("name", ["gsm8k", "mmlu_anatomy"])
def test_only_the_data_differ_from_the_official_task(data_dir: Path, name: str) -> None:
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    root = Path(lm_eval.tasks.__file__).parent
    official = load_yaml(root / ("gsm8k/gsm8k.yaml" if name == "gsm8k" else f"mmlu/default/{name}.yaml"))
    (found,) = load(EvalTask(name=name), data_dir=data_dir)
    task = found.tasks[name]

    for key in ("doc_to_text", "doc_to_target", "doc_to_choice", "metric_list", "filter_list", "output_type"):
        assert task.get_config(key) == official.get(key), key
    for key in ("test_split", "fewshot_split", "dataset_name", "description", "generation_kwargs"):
        assert task.get_config(key) == official.get(key, "" if key == "description" else None), key
    assert official["metadata"]["version"] == task.VERSION
    if name == "gsm8k":
        assert task.get_config("generation_kwargs")["until"] == ["Question:", "</s>", "<|im_end|>"]
        assert [f["name"] for f in task.get_config("filter_list")] == ["strict-match", "flexible-extract"]
    assert task.get_config("dataset_path") == str(data_dir / name.partition("_")[0])
    assert task.get_config("metadata")["config_source"].startswith("lm_eval/tasks/")


def write_user_task(folder: Path, data_dir: Path, name: str = "mine") -> None:
    folder.mkdir(parents=True)
    (folder / "task.yaml").write_text(
        f"task: {name}\ndataset_path: {data_dir / 'gsm8k'}\ndataset_name: main\noutput_type: generate_until\n"
        "test_split: test\nfewshot_split: train\nnum_fewshot: 2\ndoc_to_text: 'Q: {{question}} A:'\n"
        "doc_to_target: '{{answer}}'\ngeneration_kwargs: {until: ['Q:']}\n"
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )


def test_a_users_task_replaces_an_official_one_of_its_name(data_dir: Path, tmp_path: Path) -> None:
    write_user_task(tmp_path / "mine", data_dir, name="gsm8k")
    (found,) = load(EvalTask(name="gsm8k"), data_dir=data_dir, include_paths=(tmp_path / "mine",))
    assert found.tasks["gsm8k"].get_config("num_fewshot") == 2
    assert prompts(found.tasks["gsm8k"])[0].endswith("Q: test: 0 + 1? A:")


def test_the_same_task_twice_is_refused(data_dir: Path) -> None:
    with pytest.raises(UsageError, match="given twice"):
        load(EvalTask(name="gsm8k"), EvalTask(name="gsm8k", limit=2), data_dir=data_dir)


def test_no_task_and_folders_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no task"):
        load(data_dir=None)
    with pytest.raises(UsageError, match=r"no folder(.|\n)*--data-dir"):
        load(EvalTask(name="gsm8k"), data_dir=tmp_path / "none")
    with pytest.raises(UsageError, match=r"no folder(.|\n)*--include-path"):
        load(EvalTask(name="gsm8k"), data_dir=None, include_paths=(tmp_path / "none",))


def test_a_data_dir_without_the_benchmark_is_an_error(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"`mmlu` has no data in --data-dir") as caught:
        load(EvalTask(name="mmlu"), data_dir=tmp_path)
    assert caught.value.where == str(tmp_path / "mmlu")
    with pytest.raises(UsageError, match="cannot be read") as caught:
        load(EvalTask(name="mmlu_virology"), data_dir=data_dir)
    assert caught.value.where == str(data_dir / "mmlu")


def test_offline_without_data_the_error_names_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    with pytest.raises(UsageError, match=r"not on this machine(.|\n)*--data-dir DIR with a copy in DIR/gsm8k"):
        load(EvalTask(name="gsm8k"), data_dir=None)


def test_offline_puts_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "0")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with offline():
        assert os.environ["HF_HUB_OFFLINE"] == os.environ["HF_DATASETS_OFFLINE"] == "1"
        assert huggingface_hub.constants.HF_HUB_OFFLINE
        assert datasets.config.HF_HUB_OFFLINE
    assert "HF_HUB_OFFLINE" not in os.environ
    assert os.environ["HF_DATASETS_OFFLINE"] == "0"
    assert not huggingface_hub.constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE


def test_a_task_and_a_group_that_has_it_are_refused(data_dir: Path, tmp_path: Path) -> None:
    write_user_task(tmp_path / "mine", data_dir)
    (tmp_path / "mine" / "group.yaml").write_text("{group: pair, task: [mine]}")
    with pytest.raises(UsageError, match="`mine` is part of both `pair` and `mine`"):
        load(EvalTask(name="pair"), EvalTask(name="mine"), data_dir=data_dir, include_paths=(tmp_path / "mine",))


def test_each_template_of_a_task_is_compiled_once(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval does it for each question and each example: minutes for mmlu. The prompts are the same."""
    (found,) = load(EvalTask(name="mmlu_anatomy"), data_dir=data_dir)
    (task,) = found.tasks.values()
    compiled: list[str] = []
    environment = type(lm_eval.utils.env)
    ours = environment.from_string

    def from_string(env: Any, source: str, **settings: Any) -> Any:
        compiled.append(source)
        return ours(env, source, **settings)

    monkeypatch.setattr(environment, "from_string", from_string)
    plain = prompts(task)
    assert len(compiled) > len(set(compiled)) > 0
    compiled.clear()
    with templates_compiled_once():
        assert prompts(task) == plain
    assert len(compiled) == len(set(compiled)) > 0
    compiled.clear()
    prompts(task)  # as before
    assert len(compiled) > len(set(compiled))
