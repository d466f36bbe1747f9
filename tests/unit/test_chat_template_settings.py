from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dude_cli.data import set_chat_template
from dude_cli.data.chat_template import OPTIONS, _names
from dude_cli.errors import UsageError

THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if enable_thinking is defined and enable_thinking is false %}"
    "<think></think>{% endif %}{% endif %}"
)
QUESTION = [{"role": "user", "content": "hello"}]


def prompt_of(tokenizer) -> str:
    return tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)


def test_a_value_is_written_into_the_template_and_saved_with_it(chat_tokenizer, tmp_path):
    tokenizer = chat_tokenizer(THINKING)
    assert prompt_of(tokenizer) == "<|user|>hello<|assistant|>"
    set_chat_template(tokenizer, None, {"enable_thinking": False})
    assert prompt_of(tokenizer) == "<|user|>hello<|assistant|><think></think>"
    tokenizer.save_pretrained(tmp_path)
    assert prompt_of(type(tokenizer).from_pretrained(tmp_path)) == prompt_of(tokenizer)


def test_the_value_that_is_given_last_holds(chat_tokenizer):
    """A run's tokenizer has the training's, and may be asked with another one."""
    tokenizer = chat_tokenizer(THINKING)
    for value, prompt in ((False, "<think></think>"), (True, ""), (False, "<think></think>")):
        set_chat_template(tokenizer, None, {"enable_thinking": value})
        assert prompt_of(tokenizer) == "<|user|>hello<|assistant|>" + prompt
    assert tokenizer.chat_template.endswith("%}\n" + THINKING)


values = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    return make_tokenizer(None)


@settings(max_examples=100, deadline=None)
@given(value=values)
def test_a_template_sees_any_value_as_it_is(tokenizer, value):
    tokenizer.chat_template = "\n{{ given is sameas none if value is none else given == value }}"
    set_chat_template(tokenizer, None, {"given": value})
    text = tokenizer.apply_chat_template(QUESTION, tokenize=False, value=value)
    assert text == "\nTrue"  # and the line break that the template begins with stays


def test_a_template_of_ones_own_takes_the_place_of_the_tokenizers(chat_tokenizer, tmp_path):
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}!")
    tokenizer = chat_tokenizer(THINKING)
    set_chat_template(tokenizer, str(tmp_path / "own.jinja"), {})
    assert prompt_of(tokenizer) == "hello!"


def test_a_file_of_windows_is_read_as_any_other(chat_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "own.jinja").write_bytes("\ufeff{{ messages[0].content }}\r\n{{ 1 }}".encode())
    tokenizer = chat_tokenizer(THINKING)
    set_chat_template(tokenizer, "~/own.jinja", {})
    assert prompt_of(tokenizer) == "hello\n1"


@pytest.mark.parametrize("path", sorted(Path(importlib.util.find_spec("trl").origin).parent.glob("*/*.jinja")), ids=str)
def test_the_names_of_published_templates_are_known(path):
    names = _names(path.read_text(), str(path))
    without_comments = re.sub(r"\{#.*?#\}", "", path.read_text(), flags=re.DOTALL)
    assert "messages" in names
    assert ("enable_thinking" in names) == ("enable_thinking" in without_comments)


def test_control_tokens_that_the_tokenizer_does_not_have_are_told(chat_tokenizer, tmp_path):
    (tmp_path / "own.jinja").write_text(
        "{{ '<|im_start|>' + '<|' + messages[0].content + '<|end|>' }}<|end|><|{{ 1 }}|><end_of_turn>"
    )
    notes: list[str] = []
    set_chat_template(chat_tokenizer("x"), str(tmp_path / "own.jinja"), {}, notes.append)
    assert len(notes) == 1
    assert "writes <|end|>, <end_of_turn>, which" in notes[0]


@pytest.mark.parametrize(
    ("name", "what", "fix"),
    [
        ("enable_thinkin", "is nothing that the chat template asks for", "did you mean `enable_thinking`?"),
        ("zzzz", "is nothing that the chat template asks for", "it asks for: enable_thinking"),
        *((name, "is nothing that", "") for name in ("think", "user", "role", "m", "if", "true", "namespace")),
        ("messages", "is what each conversation gives", "leave it out"),
    ],
)
def test_a_name_that_the_template_does_not_ask_for_is_refused(chat_tokenizer, name, what, fix):
    with pytest.raises(UsageError, match=f"`{name}` {what}") as caught:
        set_chat_template(chat_tokenizer(THINKING), None, {name: 1}, keys=OPTIONS)
    assert fix in caught.value.fix
    assert caught.value.where == "--chat-template-kwargs"


def test_values_for_no_template_are_refused(make_tokenizer):
    with pytest.raises(UsageError, match="the tokenizer has no chat template") as caught:
        set_chat_template(make_tokenizer(None), None, {"enable_thinking": False})
    assert caught.value.where == "data.chat_template_kwargs"


@pytest.mark.parametrize(
    ("content", "what", "where"),
    [
        (None, "cannot read the chat template: No such file or directory", "own.jinja"),
        (b"\xff\xfe", "cannot read the chat template: it is not UTF-8 text", "own.jinja"),
        (b"{% for m in messages %}\n{{ m.content\n{% endfor %}", "no Jinja template", "own.jinja:3"),
        (b"{% for m in messages %}\n{{ m.content }}", "no Jinja template", "own.jinja:2"),
        (b" \n", "cannot read the chat template: it is empty", "own.jinja"),
    ],
)
def test_what_is_no_template_is_refused(chat_tokenizer, tmp_path, content, what, where):
    path: Path = tmp_path / "own.jinja"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=what) as caught:
        set_chat_template(chat_tokenizer(THINKING), str(path), {})
    assert caught.value.where.endswith(where)


def test_a_template_that_refuses_a_lone_question_is_taken(chat_tokenizer, tmp_path):
    (tmp_path / "own.jinja").write_text("{{ raise_exception('no system') if messages[0].role != 'system' }}")
    set_chat_template(chat_tokenizer(THINKING), str(tmp_path / "own.jinja"), {})
