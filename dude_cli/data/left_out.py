"""What a chat template leaves out of a conversation: it would be missing in the training, and nothing would say so."""

from __future__ import annotations

from collections import Counter

from dude_cli.data.messages import Conversation
from dude_cli.errors import DataError

# What data sets call what a model thinks in front of its answer.
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
_END_OF_THOUGHTS = "</think>"


def check_written(talk: Conversation, text: str, turns: list[tuple[int, int]], where: str) -> None:
    """Raise DataError if `text` lacks the words of a system's or a user's message, or of an answer that is learned.

    `turns` are the assistant's. The thoughts of earlier answers may be left out, and what they say beside a call, which
    GPT-OSS's template takes for thoughts: a model is not given them either. White space, which templates change, is not
    compared.
    """
    whole = _letters(text)
    for message in talk.messages:
        role, said = message["role"], message.get("content")
        if role in ("system", "developer", "user") and isinstance(said, str) and _letters(said) not in whole:
            raise _left_out(f"the {role}'s message", said, where)
    answers = [message for message in talk.messages if message["role"] == "assistant"]
    for number, (message, is_learned) in enumerate(zip(answers, talk.learned, strict=True)):
        is_last = message is talk.messages[-1]
        written = text
        if len(turns) == len(answers):
            start, stop = turns[number]
            # Thoughts may begin in the prompt for the answer.
            written = text[turns[number - 1][1] if number and is_last else 0 if is_last else start : stop]
        _check_calls(message, written, where)
        if is_learned and (is_last or not message.get("tool_calls")):
            _check_answer(message, _letters(written), where, is_last=is_last)


def _check_calls(message: dict[str, object], written: str, where: str) -> None:
    calls = message.get("tool_calls") or ()
    assert isinstance(calls, list | tuple)
    for name, count in Counter(call.get("function", call)["name"] for call in calls).items():
        if written.count(name) < count:
            raise DataError(
                f"the chat template leaves the call of {name!r} out of the assistant's turn",
                where=where,
                fix="use a chat template that writes tool calls (`data.chat_template`), or leave out such rows",
            )


def _check_answer(message: dict[str, object], written: str, where: str, *, is_last: bool) -> None:
    for field in ("content", *_THOUGHTS) if is_last else ("content",):
        said = message.get(field)
        if isinstance(said, str):
            expected = said if is_last else said.rpartition(_END_OF_THOUGHTS)[2]
            if _letters(expected) not in written:
                whose = "the last answer" if is_last else "an answer"
                raise _left_out(f"a part of {whose}, of its `{field}`", said, where)


def _left_out(what: str, said: str, where: str) -> DataError:
    return DataError(
        f"the chat template leaves out {what}: {said[:40]!r}",
        where=where,
        fix="use a chat template that writes it (`data.chat_template`), or leave it out of the row",
    )


def _letters(text: str) -> str:
    return "".join(text.split())
