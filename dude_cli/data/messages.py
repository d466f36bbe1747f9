"""Conversations as users have them, in the one form that chat templates take.

Messages have `role` and `content`, or ShareGPT's `from` and `value`. What OpenAI's fine-tuning files have is taken too:
`weight: 0` for a message that is not learned, content in parts, and calls of tools in place of content. TRL's rows have
two lists, a prompt and the completion that is learned. Beside the messages a row may have descriptions of tools, and,
as ShareGPT's may, the system's message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from dude_cli.data.chat_template import Templates
from dude_cli.errors import DataError

Message = dict[str, Any]

_ROLES = {"human": "user", "gpt": "assistant"} | {
    role: role for role in ("system", "developer", "user", "assistant", "tool")
}


@dataclass(frozen=True)
class Conversation:
    """What a chat template is given; `learned` says of each message of the assistant's whether it is to be learned."""

    messages: list[Message]
    learned: list[bool]
    tools: list[dict[str, Any]] | None

    def goes_on(self) -> bool:
        """Whether others than the assistant say something behind its last message that is to be learned."""
        learned, behind = iter(self.learned), False
        for message in self.messages:
            if message["role"] != "assistant":
                behind = True
            elif next(learned):
                behind = False
        return behind

    def has_empty_answer(self) -> bool:
        """Whether a message that is to be learned says nothing, calls nothing and thinks nothing."""
        answers = [message for message in self.messages if message["role"] == "assistant"]
        return any(
            is_learned and not any(str(value).strip() for name, value in message.items() if name != "role")
            for message, is_learned in zip(answers, self.learned, strict=True)
        )


def conversation_of(
    row: Mapping[str, Any], *, templates: Templates, where: str, learn_all: bool = False
) -> Conversation:
    """Return a row's conversation. Raises DataError, naming `where`, for one that its template cannot be given.

    The row has `messages`, or `prompt` and `completion`, which go on from each other, or that prompt alone: what the
    assistant says in it is not learned, unless all is, and in the completion it has to say something. The row may have
    `tools`: a list of their descriptions or the same as JSON, and `system`: the text of a message in front of the
    others.
    """
    try:
        tools = _tools(row.get("tools"), templates)
    except _PartError as error:
        raise DataError(error.what, where=where, fix=error.fix) from error
    template = templates.of(tools)
    plain: list[Message] = []
    learned: list[bool] = []
    parts = [column for column in ("prompt", "completion") if column in row]
    for column in ["messages"] if "messages" in row else parts:
        is_context, answers_before = column == "prompt" and not learn_all, len(learned)
        for number, fields in enumerate(_messages(row, column, where), start=1):
            try:
                weight = fields.pop("weight", 1)
                message = fields | {"role": _role(fields["role"], template)} | _content(fields)
                if message["role"] == "assistant":
                    learned.append(_is_learned(weight) and not is_context)
            except _PartError as error:
                name = f"message {number}" if column == "messages" else f"message {number} of `{column}`"
                raise DataError(f"{name} {error.what}", where=where, fix=error.fix) from error
            plain.append(message)
        if column == "completion" and len(learned) == answers_before:
            raise DataError(
                "`completion` has no message of the assistant's",
                where=where,
                fix='give what is to be learned the role "assistant"',
            )
    try:
        return Conversation(_with_system(row.get("system"), plain), learned, tools)
    except _PartError as error:
        raise DataError(error.what, where=where, fix=error.fix) from error


class _PartError(Exception):
    """What is wrong with a part of a conversation, and what to do about it."""

    def __init__(self, what: str, fix: str) -> None:
        self.what, self.fix = what, fix


def _messages(row: Mapping[str, Any], column: str, where: str) -> list[Message]:
    """The fields of each message in a column, of which a prompt may have none. Raises DataError for anything else."""
    value = _read_json(row[column])
    found = [_fields(message) for message in value] if isinstance(value, list | tuple) else [None]
    messages = [fields for fields in found if fields is not None]
    if len(messages) < len(found) or not (messages or column == "prompt"):
        start = '{"role": "user", "content": "..."}'
        answer = '{"role": "assistant", "content": "..."}'
        fix = "write it as [" + {"prompt": start, "completion": answer}.get(column, f"{start}, {answer}") + "]"
        if column != "messages" and isinstance(value, str):
            fix += ", or set data.format: prompt_completion if both columns are texts"
        raise DataError(f"`{column}` is not a conversation: {str(value)[:80]}", where=where, fix=fix)
    return messages


def _fields(message: Any) -> Message | None:
    """The fields with a value, by the names that templates know; None for what is no message.

    A column of messages has each field in all of them if one has it.
    """
    if not isinstance(message, dict):
        return None
    fields = {key: value for key, value in message.items() if value is not None}
    for ours, sharegpts in (("role", "from"), ("content", "value")):
        if ours not in fields and sharegpts in fields:
            fields[ours] = fields.pop(sharegpts)
    return fields if isinstance(fields.get("role"), str) else None


def _role(role: str, template: str) -> str:
    """The usual name of a role; another one is taken where the template names it, and could be a slip elsewhere."""
    if role in _ROLES:
        return _ROLES[role]
    if f"'{role}'" in template or f'"{role}"' in template:
        return role
    raise _PartError(f"has the role {role!r}", f"use a role that the chat template names, or: {', '.join(_ROLES)}")


def _content(fields: Message) -> Message:
    """The fields that need another form: text as one string, the arguments of calls as objects."""
    content, calls = fields.get("content"), fields.get("tool_calls")
    if content is None and not calls:
        raise _PartError("has no content", "fill in `content`, or `tool_calls`; leave out messages that say nothing")
    new: Message = {} if content is None else {"content": _text(content)}
    if not calls:
        return new
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise _PartError(
            f"has `tool_calls` that are no list of objects: {str(calls)[:40]}", "write them as OpenAI does"
        )
    return new | {"tool_calls": [_call(call) for call in calls]}


def _text(content: Any) -> str:
    if isinstance(content, dict):
        raise _PartError("has an object as content", "write the content as text")
    if not isinstance(content, str | list):
        raise _PartError(f"has content that is no text: {str(content)[:40]}", "write the content as text, in quotes")
    if isinstance(content, str):
        return content
    for part in content:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise _PartError(
                f"has a part that is no text: {str(kind)[:40]!r}", "leave out rows with other parts than text"
            )
    return "".join(part["text"] for part in content)


def _call(call: Message) -> Message:
    """A call of a tool with its arguments as an object, as templates want them; OpenAI writes that as JSON."""
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _PartError("has a tool call without a name", 'give each call a `function` with "name" and "arguments"')
    name, arguments = function["name"], function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"has arguments of {name!r} that are not JSON")
    if not isinstance(arguments, dict):
        raise _PartError(f"has arguments of {name!r} that are no object", 'write them as {"name": value, ...}')
    function = function | {"arguments": arguments}
    return call | {"function": function} if "function" in call else function


def _is_learned(weight: Any) -> bool:
    if weight not in (0, 1):
        raise _PartError(
            f"has the weight {weight!r}", "give 1 to a message that is to be learned, and 0 to one that is not"
        )
    return bool(weight)


def _with_system(text: Any, messages: list[Message]) -> list[Message]:
    """The messages behind the one of the column `system`, where that has a text."""
    if text is None or text == "":
        return messages
    if not isinstance(text, str):
        raise _PartError(f"column 'system' is no text: {str(text)[:40]}", "write the system's message as text")
    if messages[0]["role"] in ("system", "developer"):
        if messages[0]["content"] == text:
            return messages
        raise _PartError(
            "column 'system' has a text, and the conversation begins with another such message", "keep one of the two"
        )
    return [{"role": "system", "content": text}, *messages]


def _tools(tools: Any, templates: Templates) -> list[dict[str, Any]] | None:
    found = _parsed(tools, "column 'tools' is not JSON") if isinstance(tools, str) and tools.strip() else tools
    if not found or isinstance(found, str):
        return None
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise _PartError("column 'tools' is no list of tools", "write a list of JSON schemas, as OpenAI does")
    if not re.search(r"\btools\b", templates.of(found)):
        raise _PartError(
            "column 'tools' has tools, and the chat template has no place for them",
            "use a model whose chat template takes tools, or remove that column",
        )
    return found


def _read_json(value: Any) -> Any:
    """A list that a table's cell has as JSON; else the value as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(json.JSONDecodeError, RecursionError):
            return json.loads(value)
    return value


def _parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise _PartError(f"{what}: {text[:40]}", "write it as JSON, or as an object") from error
