"""Where the assistant's turns are in a rendered conversation, for chat templates that do not mark them.

A turn begins where the prompt for it ends, one that opens the conversation with its words, and ends where the
conversation ends that has it last. With most templates both are beginnings of the whole text. Some write a message
otherwise when others follow: Qwen3's leaves the thoughts of earlier turns out, Phi-3's ends the last turn with one
token more, DeepSeek-R1's asks with `<think>` and writes none. There the border is as far as the same text follows the
message's own words in both.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import count, pairwise
from typing import Any

from dude_cli.data.encode import common_prefix
from dude_cli.data.messages import Message

# Renders messages, and where the second argument is true the generation prompt behind them.
Render = Callable[[list[Message], bool], str]

_OPEN_TAG = re.compile(r"<[^<>]*\Z")


class NotShownError(Exception):
    """The template changes the words themselves, so that it does not show which ones are the assistant's."""


def assistant_turns(messages: list[Message], render: Render) -> tuple[str, list[tuple[int, int]]]:
    """Return the rendered conversation, and from and to which character of it each turn of the assistant is.

    Raises NotShownError, and whatever `render` raises.
    """
    text = render(messages, False)
    turns = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            start = _reach(messages, index - 1, text, render, prompt=True) if index else _first(messages, text, render)
            turns.append((start, _reach(messages, index, text, render, prompt=False)))
    borders = [0, *(border for turn in turns for border in turn)]
    if any(left > right for left, right in pairwise(borders)):
        raise NotShownError
    return text, turns


def _first(messages: list[Message], text: str, render: Render) -> int:
    """Where the words of the first message begin: there is no prompt that could say so."""
    whole, mark = _marked(messages, 0, text, render)
    return min(common_prefix(text, whole), whole.index(mark))


def _reach(messages: list[Message], index: int, text: str, render: Render, *, prompt: bool) -> int:
    """How far `text` goes on behind message `index` as it does where that message is the last.

    Where the shorter conversation is no beginning of `text`, both are rendered with a mark for the message's words, and
    what is behind the mark is compared, as far as `text` has it too. `<think>` and `<tool_call>` have two letters in
    common: a tag is taken whole or not at all.
    """
    alone = render(messages[: index + 1], prompt)
    if text.startswith(alone):
        return len(alone)
    whole, mark = _marked(messages, index, text, render)
    alone, mark = _marked(messages[: index + 1], index, text, render, prompt=prompt)
    if not _from_first_to_last(mark, alone).endswith(_from_first_to_last(mark, whole)):
        raise NotShownError  # the message's words stand in another order, or in other places
    behind = whole[whole.rindex(mark) + len(mark) :]
    shared = _common_suffix(text, behind)
    follows = alone[alone.rindex(mark) + len(mark) :][len(behind) - shared :]
    start = len(text) - shared
    common = text[start : start + common_prefix(text[start:], follows)]
    return start + len(_OPEN_TAG.sub("", common))


def _marked(messages: list[Message], index: int, text: str, render: Render, *, prompt: bool = False) -> tuple[str, str]:
    """Return the conversation rendered with a mark, which is not in `text`, for the words of message `index`."""
    mark = next(word for number in count() if (word := f"mark{number}") not in text)
    message = dict(messages[index])
    if message.get("tool_calls"):
        message["tool_calls"] = [_marked_call(call, mark) for call in message["tool_calls"]]
    if message.get("content") or not message.get("tool_calls"):
        message["content"] = mark
    whole = render([*messages[:index], message, *messages[index + 1 :]], prompt)
    if mark not in whole:
        raise NotShownError
    return whole, mark


def _marked_call(call: dict[str, Any], mark: str) -> dict[str, Any]:
    if "function" in call:
        return call | {"function": _marked_call(call["function"], mark)}
    return call | {"arguments": {mark: mark}}


def _from_first_to_last(mark: str, text: str) -> str:
    return text[text.index(mark) : text.rindex(mark)]


def _common_suffix(left: str, right: str) -> int:
    return common_prefix(left[::-1], right[::-1])
