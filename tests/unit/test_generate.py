"""The answer to a prompt: which tokens are chosen, what of them is shown, and when it ends."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import train_a_little
from transformers import GenerationConfig

from dude_cli.adapter import AdapterConfig, disable_adapters, patch_model
from dude_cli.adapter.layer import AdapterLayer
from dude_cli.config import ModelConfig
from dude_cli.data import prompt_form
from dude_cli.errors import DataError, DivergedError, UsageError
from dude_cli.generation.conversation import Conversation
from dude_cli.generation.generate import Generator, Sampling, _TextStream, at_temperature
from dude_cli.model import load_model, load_tokenizer

QUICKSTART = ModelConfig(name_or_path="embedded:quickstart", dtype="float32")
QUESTION = [{"role": "user", "content": "Question: Ann has 12 apples and buys 3. How many apples has she?\nAnswer:"}]
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(QUICKSTART)


@pytest.fixture(scope="module")
def tuned():
    model = patch_model(load_model(QUICKSTART), AdapterConfig(rank=4))
    train_a_little(model, steps=3, learning_rate=1e-2)
    return model


def generator(model, tokenizer, *, raw=True, **sampling) -> Generator:
    return Generator(
        model, tokenizer, prompt_form(tokenizer, None, raw=raw), Sampling(**{"max_new_tokens": 32, **sampling})
    )


def by_hand(model, ids: list[int], stop: int, length: int) -> list[int]:
    """The likeliest token each time, without a cache."""
    new: list[int] = []
    while len(new) < length and (not new or new[-1] != stop):
        with torch.no_grad():
            new.append(int(model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
    return new


def test_the_likeliest_tokens_are_taken_whatever_the_models_own_settings_are(tuned, tokenizer, monkeypatch):
    answer = generator(tuned, tokenizer).answer(QUESTION)
    new = by_hand(tuned, answer.prompt.ids, tokenizer.eos_token_id, 32)
    assert answer.completion == tokenizer.decode(new, skip_special_tokens=True)
    assert (answer.new_tokens, answer.stop_reason) == (len(new), "eos")
    own = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=3.0, min_new_tokens=30, max_length=40)
    monkeypatch.setattr(tuned, "generation_config", own)
    assert generator(tuned, tokenizer).answer(QUESTION) == answer
    assert tuned.generation_config is own


def test_it_ends_at_the_models_own_end_tokens_too_and_at_the_length(tuned, tokenizer, monkeypatch):
    whole = generator(tuned, tokenizer).answer(QUESTION)
    new = by_hand(tuned, whole.prompt.ids, tokenizer.eos_token_id, 32)
    assert len(new) > 3
    cut = generator(tuned, tokenizer, max_new_tokens=2).answer(QUESTION)
    assert (cut.new_tokens, cut.stop_reason) == (2, "length")
    assert cut.completion == tokenizer.decode(new[:2])
    monkeypatch.setattr(tuned, "generation_config", GenerationConfig(eos_token_id=[999, new[1]]))
    ended = generator(tuned, tokenizer).answer(QUESTION)
    at = new.index(new[1]) + 1
    assert (ended.new_tokens, ended.stop_reason) == (at, "eos")
    assert ended.completion == tokenizer.decode(new[: at - 1])


def test_random_choice_depends_on_the_seed_and_the_number_alone(tuned, tokenizer):
    def answers(**sampling):
        one = generator(tuned, tokenizer, temperature=1.5, **sampling)
        return [one.answer(QUESTION, number).completion for number in (0, 1)]

    first, second = answers(seed=1)
    torch.rand(3)
    assert answers(seed=1) == [first, second]
    assert first != second
    assert answers(seed=2) != [first, second]
    greedy = generator(tuned, tokenizer).answer(QUESTION).completion
    assert answers(top_p=0.0) == [greedy, greedy]


@pytest.mark.parametrize("temperature", [1e-5, 1e-38, 5e-324])
def test_a_temperature_near_zero_is_as_good_as_zero(tuned, tokenizer, temperature):
    """Logits divided by it are infinite in float32."""
    greedy = generator(tuned, tokenizer).answer(QUESTION)
    assert generator(tuned, tokenizer, temperature=temperature).answer(QUESTION) == greedy
    assert generator(tuned, tokenizer, temperature=temperature, top_p=0.5).answer(QUESTION) == greedy


def test_at_a_temperature_tokens_have_the_probabilities_of_the_divided_logits():
    logits = torch.tensor([[1.0, -2.0, 4.0, float("-inf")]])
    found = at_temperature(logits, 0.7).softmax(-1)
    torch.testing.assert_close(found, (logits / 0.7).softmax(-1))


def test_the_base_answers_as_the_model_without_adapters(tuned, tokenizer):
    answers = Conversation(generator(tuned, tokenizer), compare_base=True).ask(QUESTION[0]["content"])
    plain = generator(load_model(QUICKSTART), tokenizer).answer(QUESTION)
    assert answers["base"] == plain
    assert answers["tuned"] == generator(tuned, tokenizer).answer(QUESTION) != plain
    with disable_adapters(tuned):
        assert generator(tuned, tokenizer).answer(QUESTION) == plain


def test_the_norms_are_computed_once_for_an_answer(tuned, tokenizer, monkeypatch):
    calls = []
    norms = AdapterLayer.factored_squared_norms
    monkeypatch.setattr(AdapterLayer, "factored_squared_norms", lambda *args: calls.append(1) or norms(*args))
    assert generator(tuned, tokenizer).answer(QUESTION).new_tokens > 2
    assert len(calls) == len([layer for layer in tuned.modules() if isinstance(layer, AdapterLayer)])


def test_a_chat_remembers_what_was_said_until_it_is_reset(tuned, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", CHAT, raising=False)
    chat = Conversation(generator(tuned, tokenizer, raw=False, max_new_tokens=4), compare_base=True)
    first, second = chat.ask("one"), chat.ask("two")
    for name in ("base", "tuned"):
        said = first[name].completion
        assert second[name].prompt.text == f"user: one\nassistant: {said}\nuser: two\nassistant:"
    with pytest.raises(UsageError):
        chat.ask("long " * 500)
    assert chat.ask("three")["tuned"].prompt.text.startswith(second["tuned"].prompt.text)
    chat.reset()
    assert chat.ask("four")["tuned"].prompt.text == "user: four\nassistant:"
    alone = Conversation(generator(tuned, tokenizer, max_new_tokens=4), compare_base=False)
    alone.ask("one")
    assert alone.ask("two")["tuned"].prompt.text == "two"


def test_text_comes_in_whole_letters_and_adds_up(make_tokenizer):
    tokenizer = make_tokenizer(None, eos_token="</s>")
    prompt, answer = tokenizer("the cat").input_ids, tokenizer(" naïve 😀 cafés\n 12").input_ids
    pieces: list[str] = []
    stream = _TextStream(tokenizer, prompt, {tokenizer.eos_token_id}, pieces.append)
    stream.put(torch.tensor([prompt]))
    for token in [*answer, tokenizer.eos_token_id]:
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(pieces) == stream.text == " naïve 😀 cafés\n 12"
    assert len(pieces) > 5
    assert not any("\ufffd" in piece for piece in pieces)


def test_the_space_between_prompt_and_answer_is_kept():
    """A sentencepiece tokenizer drops the space of a text's first word: the answer's is not the first."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"\u2581a": 0, "\u2581b": 1, "c": 2, "</s>": 3}, unk_token="c"))
    inner.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    assert tokenizer.decode([1]) == "b"
    stream = _TextStream(tokenizer, [0], {3}, lambda text: None)
    for tokens in ([0], [1], [2], [1]):
        stream.put(torch.tensor(tokens))
    stream.end()
    assert stream.text == " bc b"


def test_what_is_left_of_a_letter_at_the_end_is_shown(make_tokenizer):
    tokenizer = make_tokenizer(None, eos_token="</s>")
    stream = _TextStream(tokenizer, [], set(), lambda text: None)
    stream.put(torch.tensor([[]], dtype=torch.long))
    for token in tokenizer("a😀").input_ids[:-1]:
        stream.put(torch.tensor([token]))
    stream.end()
    assert stream.text.startswith("a\ufffd")


def test_a_prompt_without_room_names_both_numbers(tuned, tokenizer):
    def ask(tokens: int):
        answer = generator(tuned, tokenizer).answer([{"role": "user", "content": "~" * tokens}])
        assert len(answer.prompt.ids) == tokens

    ask(480)
    with pytest.raises(UsageError, match="has 481 tokens, and 480 fit: the model's context of 512 less") as error:
        ask(481)
    assert "--max-new-tokens" in error.value.fix


def test_an_empty_prompt_is_refused(tuned, tokenizer):
    with pytest.raises(UsageError, match="empty"):
        generator(tuned, tokenizer).answer([{"role": "user", "content": ""}])


def test_logits_that_are_no_numbers_are_not_taken_for_an_answer(tokenizer):
    model = load_model(QUICKSTART)
    model.lm_head.weight.data[5] = torch.nan
    with pytest.raises(DivergedError, match="not numbers"):
        generator(model, tokenizer).answer(QUESTION)


@pytest.mark.parametrize("sampling", [{"temperature": float("inf")}, {"top_p": 0.5}])
def test_settings_that_do_nothing_are_refused(sampling):
    with pytest.raises(UsageError):
        Sampling(**sampling).check()


def chat_generator(model, tokenizer, template: str) -> Generator:
    with_template = copy.deepcopy(tokenizer)
    with_template.chat_template = template
    return generator(model, with_template, raw=False, max_new_tokens=4)


def test_a_system_prompt_is_said_in_front_of_each_conversation(tuned, tokenizer):
    conversation = Conversation(chat_generator(tuned, tokenizer, CHAT), compare_base=True, system="Be brief.")
    for _ in range(2):
        for answer in conversation.ask("Hello").values():
            assert answer.prompt.text == "system: Be brief.\nuser: Hello\nassistant:"
        for answer in conversation.ask("And?").values():
            assert answer.prompt.text.startswith("system: Be brief.\nuser: Hello\nassistant:")
        conversation.reset()


GEMMA = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHAT
NO_PLACE = CHAT.replace("{{ m.role }}", "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role }}")
REFUSES_ALL = "{{ raise_exception('no') }}"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "only a chat has a system prompt, and here the form of prompts is the text as it is"),
        (GEMMA, "with a system prompt, the chat template refuses the conversation: System role not supported"),
        (NO_PLACE, "the chat template leaves the system prompt out"),
    ],
)
def test_a_system_prompt_that_has_no_place_is_refused(tuned, tokenizer, template, said):
    for_raw = generator(tuned, tokenizer)
    with pytest.raises(UsageError) as error:
        Conversation(
            for_raw if template is None else chat_generator(tuned, tokenizer, template),
            compare_base=False,
            system="Be brief.",
        )
    assert error.value.what == said
    assert error.value.where == "--system"


def test_a_template_that_refuses_all_is_not_blamed_on_the_system_prompt(tuned, tokenizer):
    with pytest.raises(DataError, match="refuses the conversation: no"):
        Conversation(chat_generator(tuned, tokenizer, REFUSES_ALL), compare_base=False, system="Be brief.")
