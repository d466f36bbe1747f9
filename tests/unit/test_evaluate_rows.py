"""Scores on rows of the user's own: against their definition, and the form that they are read in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dude_cli.config import DataConfig, DataSource, EvalTask, ModelConfig
from dude_cli.data import as_trained, prepare_data
from dude_cli.errors import DataError
from dude_cli.evaluation import EvalRequest, RowReader, evaluate, load_request
from dude_cli.model import load_model, load_tokenizer

CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
PAIRS = [
    {"prompt": f"Question: Uma has {n} coins and buys {n % 3 + 2} cups.\nAnswer:", "completion": f" {n}-{n % 3}"}
    for n in range(5, 14)
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"{n} coins"},
            {"role": "assistant", "content": f"{n}-3={n - 3}"},
            {"role": "user", "content": "and cups?"},
            {"role": "assistant", "content": f"#### {n}"},
        ]
    }
    for n in range(5, 12)
]
TEXTS = [{"text": "Uma buys cups. " * repeats} for repeats in (1, 3, 20)]


def quickstart(dtype: str = "float32") -> tuple[Any, Any]:
    config = ModelConfig(name_or_path="embedded:quickstart", dtype=dtype)
    tokenizer = load_tokenizer(config)
    tokenizer.chat_template = CHAT
    return load_model(config), tokenizer


def write(path: Path, rows: list[dict[str, Any]]) -> DataSource:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return DataSource(path=str(path))


def score(
    model: Any, tokenizer: Any, source: DataSource, trained: DataConfig | None = None, limit: int | None = None
) -> dict[str, Any]:
    request = EvalRequest((EvalTask(name="own", rows=[source], limit=limit),), batch_size=3)
    tasks = load_request(request, reader=RowReader(tokenizer, trained, 64))
    return evaluate(model, tokenizer, request, tasks=tasks)


def definition(model: Any, tokenizer: Any, source: DataSource, trained: DataConfig | None) -> tuple[list[float], Any]:
    """The summed -ln p of each row's learned tokens, and how many; each row by itself, in float64 behind the logits."""
    data = prepare_data(as_trained([source], trained, 64), tokenizer, 0)
    sums, counts = [], []
    for row in data.train:
        with torch.no_grad():
            logits = model(torch.tensor([row.input_ids])).logits[0].double()
        places = [place for place in range(1, len(row)) if row.labels[place] >= 0]
        likelihoods = logits.log_softmax(-1)
        sums.append(-sum(likelihoods[place - 1, row.labels[place]].item() for place in places))
        counts.append(len(places))
    return sums, counts


@pytest.mark.parametrize("rows", [PAIRS, CHATS, TEXTS], ids=["pairs", "conversations", "documents"])
def test_the_loss_is_the_mean_over_all_tokens_of_the_answers(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    model, tokenizer = quickstart()
    source = write(tmp_path / "own.jsonl", rows)
    results = score(model, tokenizer, source)
    sums, counts = definition(model, tokenizer, source, None)
    assert results["results"]["own"]["loss,none"] == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    mean = sum(counts) / len(counts)
    assert [sample["loss"] for sample in results["samples"]["own"]] == pytest.approx([s / mean for s in sums], rel=1e-4)


def test_in_bfloat16_the_likelihoods_are_summed_in_float32(tmp_path: Path) -> None:
    """Summed in the dtype of the logits they would be numbers of bfloat16, 60 being followed by 60.25."""
    model, tokenizer = quickstart("bfloat16")
    source = write(tmp_path / "own.jsonl", PAIRS)
    sums, _ = definition(model, tokenizer, source, None)
    found = [-sample["resps"][0][0][0] for sample in score(model, tokenizer, source)["samples"]["own"]]
    assert found == pytest.approx(sums, rel=2e-2)
    assert all(value != torch.tensor(value).bfloat16().item() for value in found)


def test_an_exact_match_is_what_the_likeliest_tokens_say(tmp_path: Path) -> None:
    model, tokenizer = quickstart()
    answers = []
    for row in PAIRS:
        ids = tokenizer(row["prompt"], return_tensors="pt").input_ids
        made = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=tokenizer.eos_token_id)[0]
        answers.append(tokenizer.decode(made, skip_special_tokens=True)[len(row["prompt"]) :])
    own = [row | {"completion": text} for row, text in zip(PAIRS, answers, strict=True)]
    changed = own[:4] + [row | {"completion": row["completion"] + "7"} for row in own[4:]]
    for rows, right in ((own, len(own)), (changed, 4)):
        results = score(model, tokenizer, write(tmp_path / "own.jsonl", rows))
        assert [sample["exact_match"] for sample in results["samples"]["own"]] == [1.0] * right + [0.0] * (9 - right)
        assert results["results"]["own"]["exact_match,none"] == pytest.approx(right / 9)


def test_of_a_conversation_each_answer_has_to_match(tmp_path: Path) -> None:
    """The first answers are what the model says, the second ones are not."""
    model, tokenizer = quickstart()
    chats = []
    for question, _, *more in (row["messages"] for row in CHATS):
        given = tokenizer.apply_chat_template(
            [question], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        made = model.generate(**given, max_new_tokens=40, do_sample=False, eos_token_id=tokenizer.eos_token_id)[0]
        text = tokenizer.decode(made[given["input_ids"].shape[1] :], skip_special_tokens=True)
        chats.append({"messages": [question, {"role": "assistant", "content": text}, *more]})
    samples = score(model, tokenizer, write(tmp_path / "own.jsonl", chats))["samples"]["own"]
    matches = [[resp[0][1] for resp in sample["resps"]] for sample in samples]
    assert [True, False] in matches
    assert [sample["exact_match"] for sample in samples] == [float(all(match)) for match in matches]
    assert samples[0]["doc"]["prompt"].endswith("assistant: ")
    assert samples[0]["doc"]["completion"].startswith(chats[0]["messages"][1]["content"])


def test_a_limit_takes_the_first_rows_and_their_tokens_alone(tmp_path: Path) -> None:
    model, tokenizer = quickstart()
    few = write(tmp_path / "few.jsonl", PAIRS[:4])
    all_of_them = write(tmp_path / "all.jsonl", PAIRS)
    expected = score(model, tokenizer, few)["results"]["own"]
    assert score(model, tokenizer, all_of_them, limit=4)["results"]["own"] == expected


def test_rows_are_cut_as_the_training_cuts_them_and_to_the_context(tmp_path: Path) -> None:
    source = write(tmp_path / "own.jsonl", PAIRS)
    for trained, longest in ((24, 24), (500, 64)):
        config = as_trained([source], DataConfig(train=[source], max_length=trained), 64)
        assert config.max_length == longest
    assert as_trained([source], None, 64).max_length == 64


ROWS = {
    "chat": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "chat in two parts": {
        "prompt": [{"role": "user", "content": "q"}],
        "completion": [{"role": "assistant", "content": "a"}],
    },
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "alpaca": {"instruction": "q", "output": "a"},
    "text": {"text": "q"},
}
FORMATS = ("chat", "prompt_completion", "alpaca", "text")


@given(names=st.lists(st.sampled_from(FORMATS), min_size=1, unique=True), kind=st.sampled_from(sorted(ROWS)))
@settings(max_examples=40, deadline=None)
def test_the_form_is_the_first_of_the_trainings_that_the_columns_fit(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], kind: str
) -> None:
    own = kind.split()[0]
    source = write(tmp_path_factory.mktemp("rows") / "own.jsonl", [ROWS[kind]])
    trained = DataConfig(train=[DataSource(path=f"{name}.jsonl", format=name) for name in names])
    if own in names:
        assert as_trained([source], trained, 64).train[0].format == own
    else:
        with pytest.raises(DataError, match="the rows of the training have"):
            as_trained([source], trained, 64)
    assert as_trained([source], None, 64).train[0].format == own


def test_templates_of_the_training_are_taken_over_and_its_learned_prompts_are_not(tmp_path: Path) -> None:
    source = write(tmp_path / "own.jsonl", [{"q": "1+1", "a": "2", "text": "not this"}])
    trained = DataConfig(train=[source], prompt="Q: {q}\nA:", completion=" {a}", train_on_inputs=True, packing=True)
    config = as_trained([source], trained, 64)
    assert (config.train[0].prompt, config.train[0].completion) == ("Q: {q}\nA:", " {a}")
    assert not config.train_on_inputs
    assert not config.packing
    own = DataSource(path=source.path, format="text")
    assert as_trained([own], trained, 64).train == [own]


def test_a_file_without_rows_is_told_as_such(tmp_path: Path) -> None:
    _, tokenizer = quickstart()
    source = write(tmp_path / "own.jsonl", [])
    request = EvalRequest((EvalTask(name="own", rows=[source]),))
    with pytest.raises(DataError, match="no rows"):
        load_request(request, reader=RowReader(tokenizer, None, 64))
