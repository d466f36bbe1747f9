"""The embedded quickstart: its data cannot be guessed or looked up; model, tokenizer and tasks are whole."""

import itertools
import json
import random
import re
import subprocess
import sys
from collections import Counter

import pytest

from dude_cli.quickstart import MODEL_DIR, TASKS_DIR, rows
from dude_cli.quickstart.corpus import FIRST_ROWS, pretraining_rows
from dude_cli.quickstart.draw import Problem, draw_choice
from dude_cli.quickstart.kinds import MARKET, MARKET_FORMULAS, STORIES
from dude_cli.quickstart.layouts import LETTERS
from dude_cli.quickstart.problems import SPLIT_SIZES, choices, market_choices, market_problems, word_problems

SPLITS = tuple(SPLIT_SIZES)
HELD_OUT = ("dev", "test")
LONGEST_ROW_TOKENS = 80
# Of all splits, and the first rows of the corpus that the model is pretrained on: other rows, other published numbers.
ROWS_SHA256 = "f304dbd0ed5ea0c4cb76202241c0c9b076fd2cb1b3d26d3c271beb16c8660a3f"


def numbers_in(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def number_sets(split: str) -> set[tuple[int, ...]]:
    """Every set of numbers that a split's questions hold, read from their text."""
    questions = [row["question"] for row in word_problems(split)] + [row["question"] for row in choices(split)]
    return {tuple(sorted(numbers_in(question))) for question in questions}


@pytest.mark.parametrize("split", SPLITS)
def test_rows_mix_both_forms_in_the_benchmarks_layouts(split: str) -> None:
    letters = 0
    for row in rows(split):
        assert set(row) == {"prompt", "completion"}
        if row["prompt"].startswith("Question: "):
            assert row["prompt"].endswith("\nAnswer:")
            assert re.fullmatch(r" (\d+[-+*]\d+=\d+\n){2,}#### \d+", row["completion"])
        else:
            assert re.fullmatch(r"[^\n]+(\n[ABCD]\. [-+*()\d]+){4}\nAnswer:", row["prompt"])
            assert row["completion"] in {f" {letter}" for letter in LETTERS}
            letters += 1
    assert letters == SPLIT_SIZES[split] == len(rows(split)) - letters
    assert 0.3 < sum(len(row["completion"]) == 2 for row in rows(split)[:100]) / 100 < 0.7  # shuffled


def test_unknown_split_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="train, dev, test"):
        rows("validation")


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_many_and_none_stands_in_its_question(split: str) -> None:
    problems = market_problems(split)
    counts = Counter(problem.answer for problem in problems)
    assert len(counts) >= 50
    assert max(counts.values()) <= 0.1 * len(problems)
    assert not [problem for problem in problems if problem.answer in numbers_in(problem.question)]


@pytest.mark.parametrize("split", SPLITS)
def test_right_calculations_are_many_and_none_stands_in_its_question(split: str) -> None:
    drawn = market_choices(split)
    counts = Counter(choice.right for choice in drawn)
    assert len(counts) >= 50
    assert max(counts.values()) <= 0.1 * len(drawn)
    assert not [choice for choice in drawn if choice.right in choice.question]


@pytest.mark.parametrize("split", SPLITS)
def test_calculations_are_right_and_use_every_number(split: str) -> None:
    for problem in market_problems(split):
        assert len(problem.calculations) >= 2
        used = []
        for calculation in problem.calculations:
            sum_, result = calculation.split("=")
            assert eval(sum_) == int(result)
            used += numbers_in(sum_)
        assert int(problem.calculations[-1].split("=")[1]) == problem.answer
        assert sorted(problem.numbers) == sorted(numbers_in(problem.question))
        assert not Counter(problem.numbers) - Counter(used)


def test_a_choices_right_calculation_is_the_word_problems_chain() -> None:
    """On the same numbers, the calculation of a kind gives the result of its steps, and no other one does."""
    rng = random.Random(0)
    for kind in MARKET:
        for _ in range(50):
            choice = draw_choice(rng, kind, MARKET_FORMULAS)
            values = dict(zip(kind.places, choice.numbers, strict=True))
            for left, operator, right in kind.steps:
                values["_"] = eval(f"{values[left]}{operator}{values[right]}")
            assert eval(choice.right) == values["_"]
            assert len({eval(option) for option in (choice.right, *choice.wrong)}) == 4


@pytest.mark.parametrize("split", SPLITS)
def test_letters_are_equally_often_right(split: str) -> None:
    counts = Counter(row["answer"] for row in choices(split))
    assert len(set(counts.values())) == 1
    assert set(counts) == {0, 1, 2, 3}


@pytest.mark.parametrize("split", SPLITS)
def test_the_right_option_cannot_be_told_without_the_question(split: str) -> None:
    """Every question has the same four calculations, each right equally often, on numbers drawn alike."""
    right, sizes = Counter(), {kind.name: [] for kind in MARKET}
    for row, choice in zip(choices(split), market_choices(split), strict=True):
        assert row["choices"][row["answer"]] == choice.right
        assert sorted(row["choices"]) == sorted(formula.format(*choice.numbers) for formula in MARKET_FORMULAS)
        right[re.sub(r"\d+", "N", choice.right)] += 1
        sizes[choice.kind].append(choice.numbers)
    assert len(set(right.values())) == 1
    assert len(right) == 4
    for place in range(3):
        means = [sum(numbers[place] for numbers in drawn) / len(drawn) for drawn in sizes.values()]
        assert max(means) < 1.25 * min(means)


@pytest.mark.parametrize("held_out", HELD_OUT)
def test_held_out_problems_share_no_set_of_numbers_with_training(held_out: str) -> None:
    assert not number_sets("train") & number_sets(held_out)


def test_dev_and_test_share_no_set_of_numbers() -> None:
    assert not number_sets("dev") & number_sets("test")


@pytest.mark.parametrize("split", HELD_OUT)
@pytest.mark.parametrize("drawn", [market_problems, market_choices])
def test_no_held_out_problem_is_asked_twice(split: str, drawn) -> None:  # type: ignore[no-untyped-def]
    contents = [(problem.kind, *sorted(problem.numbers)) for problem in drawn(split)]
    assert len(set(contents)) == len(contents)


def test_pretraining_holds_the_words_but_neither_the_family_nor_the_held_out_numbers() -> None:
    corpus = list(itertools.islice(pretraining_rows(0), FIRST_ROWS, FIRST_ROWS + 20_000))
    words = Counter(re.findall(r"[A-Za-z]+", " ".join(row["prompt"] for row in corpus)))
    market_words = set(re.findall(r"[A-Za-z]+", " ".join(row["prompt"] for row in rows("train"))))
    assert not {word for word in market_words if words[word] < 20}

    def skeleton(text: str) -> str:
        return re.sub(r"\d+", "N", text)

    stories = {skeleton(template.split(". ")[-1]) for kind in STORIES for template in kind.templates}
    assert not stories & {skeleton(template) for kind in MARKET for template in kind.templates}
    held_out = number_sets("dev") | number_sets("test")
    for row in corpus:
        question = row["prompt"].split("\nA. ")[0]
        assert tuple(sorted(numbers_in(question))) not in held_out
        assert not re.search(r"\d\*.*\n.*[-+].*\n|[-+].*\n.*\*.*\n", row["completion"])  # never both in one story


def test_data_is_that_of_the_published_numbers_in_every_process() -> None:
    code = (
        "import hashlib, itertools; from dude_cli.quickstart import corpus, rows\n"
        "data = [*map(rows, ('train', 'dev', 'test')), list(itertools.islice(corpus.pretraining_rows(0), 2000))]\n"
        "print(hashlib.sha256(repr(data).encode()).hexdigest())"
    )
    digests = [
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    ]  # fmt: skip
    assert {digest.strip() for digest in digests} == {ROWS_SHA256}


def test_the_module_does_not_import_torch() -> None:
    code = "import sys, dude_cli.quickstart; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, check=True)


def test_rows_are_the_callers_to_change() -> None:
    rows("dev")[0]["prompt"] = "changed"
    assert rows("dev")[0]["prompt"] != "changed"


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL_DIR)


def test_tokenizer_splits_digits_and_gives_back_every_text(tokenizer) -> None:  # type: ignore[no-untyped-def]
    assert tokenizer.convert_ids_to_tokens(tokenizer("2048")["input_ids"]) == ["2", "0", "4", "8"]
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert len(special) == 3
    assert None not in special
    for row in [*rows("test"), *rows("dev"), *itertools.islice(pretraining_rows(1), 1000)]:
        prompt, completion = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]
        whole = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        assert whole == prompt + completion  # so a letter is scored as the token that was trained
        assert len(whole) < LONGEST_ROW_TOKENS
        assert not special & set(whole)
        assert tokenizer.decode(whole) == row["prompt"] + row["completion"]


def test_letters_are_single_tokens(tokenizer) -> None:  # type: ignore[no-untyped-def]
    assert [len(tokenizer(f" {letter}")["input_ids"]) for letter in LETTERS] == [1, 1, 1, 1]


def test_words_of_the_family_are_single_tokens(tokenizer) -> None:  # type: ignore[no-untyped-def]
    words = set(re.findall(r" [a-z]+", " ".join(row["prompt"] for row in rows("test"))))
    assert {word for word in words if len(tokenizer(word)["input_ids"]) > 1} == set()


def test_model_is_small_and_loads(tokenizer) -> None:  # type: ignore[no-untyped-def]
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    assert model.config.architectures == ["LlamaForCausalLM"]
    assert 0.5e6 < model.num_parameters() < 3e6
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.max_position_embeddings == 512
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert sum(file.stat().st_size for file in MODEL_DIR.iterdir()) < 8e6
    prompt = tokenizer("Question: Tom has 12 pens and buys 7 more. How many pens does Tom have now?\nAnswer:")
    output = model.generate(torch.tensor([prompt["input_ids"]]), max_new_tokens=24, do_sample=False)
    assert tokenizer.decode(output[0, len(prompt["input_ids"]) :]) == " 12+7=19\n#### 19</s>"


def test_model_files_name_no_folder_of_the_machine_that_trained_them() -> None:
    for file in MODEL_DIR.glob("*.json"):
        text = json.dumps(json.loads(file.read_text()))
        assert "/tmp" not in text
        assert "/home" not in text


def test_tasks_load_offline_and_give_the_generated_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    manager = TaskManager(include_path=str(TASKS_DIR), include_defaults=False)
    names = ["quickstart_choices", "quickstart_choices_dev", "quickstart_problems", "quickstart_problems_dev"]
    assert manager.all_tasks == ["quickstart_base", *names]
    tasks = manager.load(names)["tasks"]
    for name in names:
        task = tasks[name]
        split = "dev" if name.endswith("_dev") else "test"
        documents = list(task.test_docs())
        assert documents == (word_problems(split) if "problems" in name else choices(split))
        prompts = {row["prompt"]: row["completion"] for row in rows(split)}
        for document in documents[:50]:
            completion = prompts[task.doc_to_text(document)]
            target = task.doc_to_target(document)
            if "problems" in name:
                assert completion == f" {target}"
            else:
                assert completion == f" {task.doc_to_choice(document)[target]}"


def test_the_bases_own_text_is_of_its_training_and_not_of_the_fine_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    task = TaskManager(include_path=str(TASKS_DIR), include_defaults=False).load(["quickstart_base"])["tasks"]
    documents = list(task["quickstart_base"].test_docs())
    assert len(documents) == 500
    known = {row["prompt"] for row in itertools.islice(pretraining_rows(0), FIRST_ROWS, FIRST_ROWS + 40_000)}
    assert sum(document["prompt"] in known for document in documents) > 50, "rows that its training may have had"
    tuned = {row["prompt"] for split in ("train", "dev", "test") for row in rows(split)}
    assert not tuned & {document["prompt"] for document in documents}
    first = documents[0]
    assert task["quickstart_base"].doc_to_text(first) + task["quickstart_base"].doc_to_target(first) == (
        first["prompt"] + first["completion"]
    )


def test_problem_reads_as_a_sentence() -> None:
    for problem in itertools.islice(market_problems("test"), 20):
        assert isinstance(problem, Problem)
        assert problem.question.endswith("?")
        assert "{" not in problem.question
