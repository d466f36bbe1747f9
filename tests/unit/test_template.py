from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dude_cli.template import parse_template, render


def test_columns_come_once_in_order_of_appearance() -> None:
    assert parse_template("{b} {a} {{c}} {b} {two words}") == ["b", "a", "two words"]


def test_values_are_inserted_as_they_are() -> None:
    row = {"question": "what is {x}, {{y}} or {question}?", "n": 3, "none": None}
    assert render("Q: {question} {n}{none}.", row) == "Q: what is {x}, {{y}} or {question}? 3."


def test_double_braces_are_literal() -> None:
    assert render("{{{a}}} {{}}", {"a": 1}) == "{1} {}"


@pytest.mark.parametrize("text", ["a {b", "a } b", "{", "}", "{a}}", "{{a}", "{a{b}}"])
def test_a_brace_without_its_partner_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"has no partner; write `(\{\{|\}\})` for a literal brace"):
        parse_template(text)


@pytest.mark.parametrize("field", ["a.b", "a[0]", "a!r", "a:>3", "__class__.__mro__", " a"])
def test_a_field_is_a_plain_name(field: str) -> None:
    with pytest.raises(ValueError, match="more than a column's name"):
        parse_template(f"{{{field}}}")


def test_an_empty_field_is_an_error() -> None:
    with pytest.raises(ValueError, match="names no column"):
        parse_template("{}")


def test_a_column_that_the_row_lacks_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="b"):
        render("{a}{b}", {"a": 1})


@given(st.text())
def test_escaped_text_renders_to_itself(text: str) -> None:
    assert render(text.replace("{", "{{").replace("}", "}}"), {}) == text


@given(st.text())
def test_a_value_is_never_parsed_again(value: str) -> None:
    assert render("<{a}>", {"a": value}) == f"<{value}>"
