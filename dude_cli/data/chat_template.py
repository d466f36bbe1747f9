"""A tokenizer's chat template: another one in its place, and values for the names that it asks for.

Both are written into the tokenizer, and so into what is saved with an adapter: an answer is asked for as it was
learned, by this tool and by any other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dude_cli.config.schema import plain_values
from dude_cli.config.strict_yaml import parse
from dude_cli.errors import UsageError, nearest

# What transformers gives a template in any case.
_GIVEN = {"messages", "tools", "documents", "add_generation_prompt"}
_TAG = re.compile(r"<[|｜][^<>\s]*[|｜]>")


def set_chat_template(tokenizer: Any, path: str | None, values: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Give `tokenizer` the template in the file at `path`, if it is not None, with `values` for its names.

    `say` is told of control tokens in the file that the tokenizer does not have. Raises UsageError for a file that
    cannot be read or is no template, and for a name that the template does not ask for.
    """
    if path is not None:
        tokenizer.chat_template = _read(path)
        _check_syntax(tokenizer, path)
        _tell_of_unknown_tokens(tokenizer, path, say)
    if values:
        tokenizer.chat_template = _assigned(_own_template(tokenizer), values)


def parse_values(text: str | None, option: str) -> dict[str, Any]:
    """The values that `option` of the command line gives a template, as YAML or JSON. Raises UsageError."""
    if text is None:
        return {}
    parsed = parse(text)
    try:
        if parsed.problems:
            raise ValueError(parsed.problems[0].message)
        if not isinstance(parsed.value, dict):
            raise ValueError(f"{text!r} is no names with their values")
        return plain_values(parsed.value)
    except ValueError as error:
        raise UsageError(str(error), where=option, fix=f'write it as {option} "{{enable_thinking: false}}"') from error


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(
            f"cannot read the chat template: {why}",
            where=f"chat_template: {path}",
            fix="give a file with a Jinja template, as `chat_template.jinja` beside a model is",
        ) from error


def _check_syntax(tokenizer: Any, path: str) -> None:
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "question"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise UsageError(
            f"the chat template is no Jinja template: {error.message}",
            where=f"{path}:{error.lineno}",
            fix="correct that line, or give another file",
        ) from error
    except (TemplateError, TypeError, ValueError):  # it may refuse this conversation, and take the rows'
        return


def _tell_of_unknown_tokens(tokenizer: Any, path: str, say: Callable[[str], None]) -> None:
    tags = dict.fromkeys(_TAG.findall(tokenizer.chat_template))
    unknown = [tag for tag in tags if tokenizer.convert_tokens_to_ids(tag) in (None, tokenizer.unk_token_id)]
    if unknown:
        say(f"note: {path} writes {', '.join(unknown)}, which this model's tokenizer takes for ordinary text")


def _own_template(tokenizer: Any) -> str:
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError as error:  # there is none, or several and no default
        raise UsageError(
            f"there is no chat template to give values to: {str(error).splitlines()[0]}",
            where="chat_template_kwargs",
            fix="give a template too",
        ) from error
    return template


def _assigned(template: str, values: Mapping[str, Any]) -> str:
    """The template with `values` set in front of it."""
    for name in values:
        if name in _GIVEN or not re.search(rf"\b{name}\b", template):
            raise _not_asked_for(name, template)
    return "".join(f"{{% set {name} = {_literal(value)} %}}" for name, value in values.items()) + "\n" + template


def _literal(value: Any) -> str:
    """A value as Jinja writes it: as JSON does, but for null."""
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


def _not_asked_for(name: str, template: str) -> UsageError:
    if name in _GIVEN:
        what, fix = "is what each conversation gives", "leave it out"
    else:
        close = nearest(name, sorted(set(re.findall(r"(\w+) is (?:not )?defined", template))))
        what = "is nothing that the chat template asks for"
        fix = f"did you mean `{close[0]}`?" if close else "look for its name in the template"
    return UsageError(f"`{name}` {what}", where="chat_template_kwargs", fix=fix)
