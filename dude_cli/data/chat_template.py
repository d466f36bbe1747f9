"""A tokenizer's chat template: another one in its place, and values for the names that it asks for.

Both are written into the tokenizer, and so into what is saved with an adapter: an answer is asked for as it was
learned, by this tool and by any other.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dude_cli.config.data_schema import plain_values
from dude_cli.config.strict_yaml import parse
from dude_cli.errors import UsageError, nearest

TEMPLATE_KEY = "data.chat_template"
DATA_KEYS = (TEMPLATE_KEY, "data.chat_template_kwargs")  # where the two are given: in a config
OPTIONS = ("--chat-template", "--chat-template-kwargs")  # on the command line

_FOR_QUESTIONS = (
    "ask in plain text, without `apply_chat_template`, or give a template: in a config with `data.chat_template`, to "
    "`dude eval` with --chat-template"
)
# What transformers gives a template in any case.
_GIVEN = {"messages", "tools", "documents", "add_generation_prompt"}
_CONTROL_TOKEN = re.compile(r"<[|｜][\w ▁]+[|｜]>|<\w+_of_\w+>")
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")
_ASSIGNED = re.compile(r"(?:\{% set \w+ = .*? %\})+\n|")  # what `_assigned` has written in front of a template


@dataclass(frozen=True)
class Templates:
    """What conversations go through: `default`, or where they have tools `tool_use`, which may be the same."""

    default: str
    tool_use: str

    def of(self, tools: Any) -> str:
        """The template of a conversation with these tools, if it has any; transformers chooses it by the same rule."""
        return self.tool_use if tools else self.default

    def changed(self, change: Callable[[str], str]) -> Templates:
        """Both, changed."""
        return Templates(change(self.default), change(self.tool_use))

    @property
    def text(self) -> str:
        """Both of them, to tell them from others: one text where they are one."""
        return self.default if self.default == self.tool_use else f"{self.default}\0{self.tool_use}"


def set_chat_template(
    tokenizer: Any,
    path: str | None,
    values: Mapping[str, Any],
    say: Callable[[str], None] = lambda note: None,
    keys: tuple[str, str] = DATA_KEYS,
) -> None:
    """Give `tokenizer` the template in the file at `path`, if it is not None, with `values` for its names.

    Where it has several, the file takes the place of all, and each gets those of the values that it asks for.
    `say` is told of control tokens in the file that the tokenizer does not have. Raises UsageError, naming one of
    `keys`, for a file that cannot be read or is no template, and for a name that no template asks for.
    """
    if path is not None:
        tokenizer.chat_template = _read(path, keys[0])
        _tell_of_unknown_tokens(tokenizer, path, say)
    if values:
        default = default_template(tokenizer, keys[1], "give a template too")
        found = tokenizer.chat_template
        several = _assigned({"default": default} if isinstance(found, str) else found, values, keys[1])
        tokenizer.chat_template = several["default"] if isinstance(found, str) else several


def default_template(tokenizer: Any, where: str, fix: str = _FOR_QUESTIONS) -> str:
    """The chat template that `tokenizer` takes if none is named.

    Raises UsageError, with `where` and `fix`, if it has none, or several and none of them is the default.
    """
    found: str | dict[str, str] | None = getattr(tokenizer, "chat_template", None)
    if not found:
        raise UsageError("the tokenizer has no chat template", where=where, fix=fix)
    if isinstance(found, str):
        return found
    if "default" not in found:
        what = f"the tokenizer has several chat templates ({', '.join(found)}), and none has the name `default`"
        raise UsageError(what, where=where, fix=fix)
    return found["default"]


def templates_of(tokenizer: Any, where: str, fix: str) -> Templates:
    """The templates that conversations go through with and without tools. Raises as `default_template` does."""
    default = default_template(tokenizer, where, fix)
    found = tokenizer.chat_template
    return Templates(default, default if isinstance(found, str) else found.get("tool_use", default))


def parse_values(text: str | None) -> dict[str, Any]:
    """The values that `--chat-template-kwargs` gives a template, as YAML or JSON. Raises UsageError."""
    if text is None:
        return {}
    parsed, option = parse(text), OPTIONS[1]
    try:
        if parsed.problems:
            raise ValueError(parsed.problems[0].message)
        if not isinstance(parsed.value, dict):
            raise ValueError(f"{text!r} is no names with their values")
        return plain_values(parsed.value)
    except ValueError as error:
        raise UsageError(str(error), where=option, fix=f'write it as {option} "{{enable_thinking: false}}"') from error


def _read(path: str, key: str) -> str:
    try:
        template = Path(os.path.expanduser(path)).read_text(encoding="utf-8-sig")
        why = None if template.strip() else "it is empty"
    except OSError as error:
        why = error.strerror
    except UnicodeDecodeError:
        why = "it is not UTF-8 text"
    if why is not None:
        raise UsageError(
            f"cannot read the chat template: {why}",
            where=f"{key}: {path}",
            fix="give a file with a Jinja template, as `chat_template.jinja` beside a model is",
        )
    _names(template, path)  # it is a template
    return template


def _names(template: str, where: str) -> set[str]:
    """The names that a template asks for. Raises UsageError, with the line in `where`, if it is no template."""
    from jinja2 import Environment, TemplateSyntaxError, meta

    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        return meta.find_undeclared_variables(environment.parse(_GENERATION.sub("", template)))
    except TemplateSyntaxError as error:
        raise UsageError(
            f"the chat template is no Jinja template: {error.message}",
            where=f"{where}:{error.lineno}",
            fix="correct that line, or give another file",
        ) from error


def _tell_of_unknown_tokens(tokenizer: Any, path: str, say: Callable[[str], None]) -> None:
    tokens = dict.fromkeys(_CONTROL_TOKEN.findall(tokenizer.chat_template))
    unknown = [token for token in tokens if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id)]
    if unknown:
        say(f"note: {path} writes {', '.join(unknown)}, which this model's tokenizer takes for ordinary text")


def _assigned(templates: Mapping[str, str], values: Mapping[str, Any], key: str) -> dict[str, str]:
    """Each of the templates with those of `values` that it asks for set in front of it, behind those set before.

    Raises UsageError for a value that none of them asks for.
    """
    new, asked = {}, set()
    for kind, whole in templates.items():
        found = _ASSIGNED.match(whole)
        before = found[0] if found else ""
        template = whole.removeprefix(before)
        names = _names(template, "the tokenizer's chat template")
        asked |= names
        lines = "".join(f"{{% set {name} = {_literal(value)} %}}" for name, value in values.items() if name in names)
        new[kind] = before.removesuffix("\n") + lines + "\n" + template if lines else whole
    for name in values:
        if name in _GIVEN or name not in asked:
            raise _not_asked_for(name, asked, key)
    return new


def _literal(value: Any) -> str:
    """A value as Jinja writes it: as JSON does, but for null."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _not_asked_for(name: str, names: set[str], key: str) -> UsageError:
    if name in _GIVEN:
        what, fix = "is what each conversation gives", "leave it out"
    else:
        asked = sorted(names - _GIVEN)
        close = nearest(name, asked)
        what = "is nothing that the chat template asks for"
        fix = f"did you mean `{close[0]}`?" if close else f"it asks for: {', '.join(asked) or 'nothing'}"
    return UsageError(f"`{name}` {what}", where=key, fix=fix)
