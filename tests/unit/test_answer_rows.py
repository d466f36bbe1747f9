"""Answers to rows in batches: each that of its prompt alone, whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_model, train_a_little
from transformers import AutoConfig, AutoModelForCausalLM

from dude_cli.adapter import AdapterConfig, patch_model
from dude_cli.adapter.layer import AdapterLayer
from dude_cli.config import ModelConfig
from dude_cli.data import Prompt, prompt_form
from dude_cli.data.row_prompts import RowPrompt
from dude_cli.errors import DataError, DivergedError, ResourceError
from dude_cli.generation.generate import Generator, Sampling
from dude_cli.generation.rows import answer_rows, check_rows, pads_unseen, summary, summary_lines
from dude_cli.model import load_model, load_tokenizer

QUICKSTART = ModelConfig(name_or_path="embedded:quickstart", dtype="float32")
QUESTIONS = [
    "Question: Ann has 12 apples and buys 3. How many apples has she?\nAnswer:",
    "Ann",
    "Question: Dina pays 80 coins for 6 toys that cost 7 coins each. How many coins come back?\nAnswer:",
    "Question: Omar has 5 cards. He sells 2 of them. How many has he?\nAnswer:",
    "Question: 4+4?\nAnswer:",
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(QUICKSTART)


@pytest.fixture(scope="module")
def tuned():
    model = patch_model(load_model(QUICKSTART), AdapterConfig(rank=4))
    train_a_little(model, steps=3, learning_rate=1e-2)
    return model


def generator(model, tokenizer, **sampling) -> Generator:
    return Generator(
        model, tokenizer, prompt_form(tokenizer, None, raw=True), Sampling(**{"max_new_tokens": 32, **sampling})
    )


def rows_of(tokenizer, texts=QUESTIONS, expected=None) -> list[RowPrompt]:
    prompts = [Prompt(text, tokenizer(text).input_ids) for text in texts]
    return [RowPrompt(f"row {number}", prompt, expected) for number, prompt in enumerate(prompts, start=1)]


def answered(generator, rows, batch_size, say=lambda line: None, **options):
    numbers = range(1, len(rows) + 1)
    options = {"compare_base": False} | options
    batches = list(answer_rows(generator, rows, numbers, batch_size=batch_size, say=say, **options))
    return sorted((record for batch in batches for record in batch), key=lambda record: record["row"])


def alone(generator, rows):
    """Each row by itself, as `--prompt` asks."""
    found = []
    for number, row in enumerate(rows):
        answer = generator.answer([{"role": "user", "content": row.prompt.text}], number)
        assert answer.prompt == row.prompt
        found.append(answer.record())
    return found


def said_of(records):
    return [{name: record[name] for name in ("completion", "new_tokens", "stop_reason")} for record in records]


def test_a_line_has_the_row_its_prompt_the_answer_and_the_rows_own(tuned, tokenizer):
    rows = rows_of(tokenizer, expected=" 15")
    first = answered(generator(tuned, tokenizer), rows, 8)[0]
    assert list(first) == ["row", "prompt", "prompt_tokens", "completion", "new_tokens", "stop_reason", "expected"]
    assert (first["row"], first["prompt"], first["expected"]) == (1, QUESTIONS[0], " 15")
    assert first["prompt_tokens"] == len(tokenizer(QUESTIONS[0]).input_ids)


@pytest.mark.parametrize("batch_size", [2, 8])
def test_in_a_batch_the_likeliest_answer_is_that_of_the_prompt_alone(tuned, tokenizer, batch_size):
    one = generator(tuned, tokenizer)
    records = answered(one, rows_of(tokenizer), batch_size)
    assert said_of(records) == alone(one, rows_of(tokenizer))
    assert len({record["new_tokens"] for record in records}) > 2
    cut = generator(tuned, tokenizer, max_new_tokens=7)
    assert {record["stop_reason"] for record in answered(cut, rows_of(tokenizer), 8)} == {"eos", "length"}
    assert said_of(answered(cut, rows_of(tokenizer), 8)) == alone(cut, rows_of(tokenizer))


def test_so_it_is_with_a_real_llama(test_data):
    config = ModelConfig(name_or_path=str(test_data / "models/stories260K"), dtype="float32")
    model, tokenizer = load_model(config), load_tokenizer(config)
    texts = ["Once upon a time, there was a little girl named Lily. She", "The", "One day, a dog ran to the park and"]
    one = generator(model, tokenizer)
    assert said_of(answered(one, rows_of(tokenizer, texts), 8)) == alone(one, rows_of(tokenizer, texts))


@pytest.mark.parametrize("kind", ["gpt2", "gemma", "qwen2"])
def test_positions_are_those_of_the_prompt_alone(kind):
    """GPT-2 has a table of positions, the others compute them."""
    one = generator(tiny_model(kind), load_tokenizer(QUICKSTART))
    prompts = [Prompt("", list(range(3, 3 + length))) for length in (20, 1, 7)]
    alone = torch.cat([one.first_logits([prompt]) for prompt in prompts])
    assert float((alone[0] - alone[1]).abs().max()) > 0.01
    torch.testing.assert_close(one.first_logits(prompts), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.5, 1.0), (3.0, 0.95)])
def test_at_random_a_rows_numbers_are_its_own(tuned, tokenizer, temperature, top_p):
    one = generator(tuned, tokenizer, temperature=temperature, top_p=top_p, seed=7)
    rows = rows_of(tokenizer, [*QUESTIONS, *[QUESTIONS[0]] * 4])
    records = answered(one, rows, 8)
    assert said_of(records) == said_of(answered(one, rows, 2)) == alone(one, rows)
    assert len({record["completion"] for record in records if record["prompt"] == QUESTIONS[0]}) > 1
    other = generator(tuned, tokenizer, temperature=temperature, top_p=top_p, seed=8)
    assert said_of(answered(other, rows, 8)) != said_of(records)


def test_the_base_answers_beside_it(tuned, tokenizer):
    rows = rows_of(tokenizer)
    records = answered(generator(tuned, tokenizer), rows, 8, compare_base=True)
    plain = alone(generator(load_model(QUICKSTART), tokenizer), rows)
    assert [record["base"] for record in records] == plain
    assert said_of(records) == alone(generator(tuned, tokenizer), rows) != plain


def test_the_norms_are_computed_once_for_all_batches(tuned, tokenizer, monkeypatch):
    calls = []
    norms = AdapterLayer.factored_squared_norms
    monkeypatch.setattr(AdapterLayer, "factored_squared_norms", lambda *args: calls.append(1) or norms(*args))
    assert len(answered(generator(tuned, tokenizer), rows_of(tokenizer), 1)) == 5
    assert len(calls) == len([layer for layer in tuned.modules() if isinstance(layer, AdapterLayer)])


def test_the_longest_prompts_come_first(tuned, tokenizer):
    rows = rows_of(tokenizer)
    one = generator(tuned, tokenizer, max_new_tokens=1)
    batches = answer_rows(one, rows, [1, 2, 3, 5], batch_size=2, compare_base=False, say=print)
    assert [[record["row"] for record in batch] for batch in batches] == [[3, 1], [5, 2]]


def test_out_of_memory_it_goes_on_with_half_of_the_batch(tokenizer, monkeypatch):
    model = load_model(QUICKSTART)
    one, rows = generator(model, tokenizer), rows_of(tokenizer)
    whole = answered(one, rows, 1)
    most, ours, said = 3, model.forward, []

    def forward(input_ids, **more):
        if len(input_ids) > most:
            raise MemoryError
        return ours(input_ids, **more)

    monkeypatch.setattr(model, "forward", forward)
    assert answered(one, rows, 8, said.append) == whole
    assert said == [f"out of memory: from now on {size} prompts at once" for size in (4, 2)]
    most = 0
    with pytest.raises(ResourceError, match="out of memory"):
        answered(one, rows, 1)


def test_a_model_that_sees_padding_answers_one_by_one(tokenizer):
    """RWKV's state takes in what an attention mask would leave out."""
    torch.manual_seed(0)
    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("rwkv", **size)).eval()
    one, rows, said = generator(model, tokenizer, max_new_tokens=8), rows_of(tokenizer), []
    assert not pads_unseen(one, rows[0].prompt.ids)
    assert said_of(answered(one, rows, 8, said.append)) == alone(one, rows)
    assert said == ["RwkvForCausalLM sees the padding of a batch: rows are answered one by one"]
    for dtype in (torch.float32, torch.bfloat16):
        for row in rows:
            assert pads_unseen(generator(load_model(QUICKSTART).to(dtype), tokenizer), row.prompt.ids)
    assert pads_unseen(generator(load_model(QUICKSTART), tokenizer), [5])


def test_prompts_without_room_are_named_all_at_once(tuned, tokenizer):
    one = generator(tuned, tokenizer)
    check_rows(one, rows_of(tokenizer), "rows.jsonl")
    rows = rows_of(tokenizer, [QUESTIONS[0], "~" * 481, "~" * 480, "", "~" * 500])
    with pytest.raises(DataError) as error:
        check_rows(one, rows, "rows.jsonl")
    shorten = "shorten the prompt, or lower --max-new-tokens"
    too_long = f"the model's context of 512 less --max-new-tokens 32; {shorten}"
    assert error.value.what.splitlines() == [
        "3 of 5 rows cannot be used:",
        f"  row 2: the prompt has 481 tokens, and 480 fit: {too_long}",
        "  row 4: the prompt is empty; give some text",
        f"  row 5: the prompt has 500 tokens, and 480 fit: {too_long}",
    ]


def test_logits_that_are_no_numbers_are_not_taken_for_an_answer(tokenizer):
    model = load_model(QUICKSTART)
    model.lm_head.weight.data[5] = torch.nan
    with pytest.raises(DivergedError, match="not numbers"):
        answered(generator(model, tokenizer), rows_of(tokenizer), 8)


def record(completion: str, expected: str | None, stop_reason: str = "eos", base: str = " 1"):
    base_record = {"completion": base, "stop_reason": "eos"}
    return {"completion": completion, "expected": expected, "stop_reason": stop_reason, "base": base_record}


def test_what_is_counted():
    records = [record(" 1", "1 "), record("1.", "1", "length"), record("1", "1", base="2")]
    found = summary(records, compare_base=True)
    base = {"cut": 0, "exact_matches": 2}
    assert found == {"rows": 3, "rows_with_answer": 3, "cut": 1, "exact_matches": 2, "base": base}
    assert summary_lines(found, 16) == [
        "2 of 3 equal the row's answer exactly (66.67%)",
        "1 of 3 was cut at --max-new-tokens 16",
        "base: 2 of 3 equal the row's answer exactly (66.67%)",
    ]


def test_matches_are_counted_over_the_rows_that_have_an_answer():
    records = [record(" 1", "1 "), record("1.", "1"), record("1", "1", base="2"), record(" 1", None)]
    found = summary(records, compare_base=True)
    assert (found["rows"], found["rows_with_answer"], found["exact_matches"]) == (4, 3, 2)
    assert summary_lines(found, 16) == [
        "2 of 3 rows with an answer equal it exactly (66.67%)",
        "base: 2 of 3 rows with an answer equal it exactly (66.67%)",
    ]
    without = summary([record(" 1", None), record("2", None, "length")], compare_base=False)
    assert without == {"rows": 2, "rows_with_answer": 0, "cut": 1, "exact_matches": None}
    assert len(summary_lines(without, 16)) == 1
