"""Encode conversations through the tokenizer's chat template; only what the assistant says is learned."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from dude_cli.data.borders import BorderedText, BorderEncoder
from dude_cli.data.chat_template import templates_of
from dude_cli.data.encode import Encoded, TextEncoder
from dude_cli.data.left_out import check_written
from dude_cli.data.messages import Conversation, Message, conversation_of
from dude_cli.data.told_time import told_at
from dude_cli.data.turns import NotShownError, assistant_turns
from dude_cli.errors import DataError

_NO_TOKEN = re.compile(r"'(\w+_token)' is undefined")  # as jinja2 says it
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """A conversation's text, and the assistant's turns in it: from and to which character, and which are learned.

    `words` is from and to which character others say something in front of the first answer that is learned, where that
    is seen. It is empty if such an answer is. `learn_all`: what is around the turns is learned too, and then it
    `goes_on` if others say something behind the last turn that is learned.
    """

    text: str
    words: tuple[int, int] | None
    turns: list[tuple[int, int]]
    learned: list[bool]
    ends_with_a_turn: bool
    is_empty: bool
    learn_all: bool
    goes_on: bool

    def bordered(self) -> BorderedText:
        """The text with the borders of the words and of each turn."""
        return BorderedText(self.text, [border for span in (self.words or (0, 0), *self.turns) for border in span])


class ChatEncoder:
    """Encodes conversations. The template alone decides the text, BOS and end-of-turn tokens included.

    A tokenizer may have one of its own, `tool_use`, for conversations with tools.

    A turn of the assistant is learned with its end-of-turn token and nothing after that; an EOS inside it is data.
    The turns are taken from the template's `{% generation %}` blocks; without those, from how the text grows
    message by message (`turns.py`). Where a template ends the last turn with no special token, one EOS is added, or
    the model would never learn to stop. A template that asks for the date is told that of `moment`, by default of now.
    """

    def __init__(self, encoder: TextEncoder, moment: datetime | None = None) -> None:
        tokenizer = encoder.tokenizer
        templates = templates_of(
            tokenizer,
            f"data.format: chat, with {tokenizer.name_or_path or 'this tokenizer'}",
            "give one with `data.chat_template`, or use an instruction-tuned model",
        )
        self.encoder, self.tokenizer = encoder, tokenizer
        self.borders = BorderEncoder(encoder)
        told = moment or datetime.now()
        self.templates = templates.changed(lambda template: told_at(template, told))
        added = tokenizer.added_tokens_decoder.items()
        self.special_ids = {int(index) for index, token in added if token.special} | set(tokenizer.all_special_ids)

    def encode(self, row: Mapping[str, Any], *, where: str, learn_all: bool) -> Encoded:
        """Return one encoded conversation. Raises DataError, naming `where`, if the template does not fit it."""
        return self.encode_all([self.render(row, where, learn_all=learn_all)])[0]

    def render(self, row: Mapping[str, Any], where: str, *, learn_all: bool) -> Rendered:
        """Return a row's text and turns. Raises DataError, naming `where`, if the template does not fit it."""
        talk = conversation_of(row, templates=self.templates, where=where, learn_all=learn_all)
        try:
            marked = _marks_turns(self.templates.of(talk.tools))
            text, turns = self._marked_turns(talk) if marked else self._found_turns(talk, where)
        except DataError:
            raise
        except Exception as error:  # jinja2's errors, and whatever a template raises by itself
            raise _refused(error, where) from error
        check_written(talk, text, turns, where)
        learned = _learned_turns(talk, turns, where)
        ends_with_a_turn = talk.messages[-1]["role"] == "assistant"
        return Rendered(
            text,
            _words(talk, text, turns),
            turns,
            learned,
            ends_with_a_turn,
            talk.has_empty_answer(),
            learn_all,
            goes_on=learn_all and talk.goes_on(),
        )

    def encode_all(self, conversations: Sequence[Rendered]) -> list[Encoded]:
        """Return encoded conversations."""
        encoded = self.borders.encode([each.bordered() for each in conversations])
        return [self._finish(each, ids, cuts) for each, (ids, cuts) in zip(conversations, encoded, strict=True)]

    def _finish(self, rendered: Rendered, ids: list[int], borders: list[int]) -> Encoded:
        """Make the row of the text's ids; `borders` are its own, in tokens."""
        first, last, *cuts = borders
        spans = [self._with_end_of_turn(ids, *span) for span in zip(cuts[::2], cuts[1::2], strict=True)]
        turns = [(start, stop, on) for (start, stop), on in zip(spans, rendered.learned, strict=True) if start < stop]
        if rendered.ends_with_a_turn and turns and not self._ends(ids, *turns[-1][:2]):
            ids.append(self.encoder.eos_id)
            turns[-1] = turns[-1][0], len(ids), turns[-1][2]
        learned = [rendered.learn_all] * len(ids)
        for start, stop, on in turns:
            learned[start:stop] = [on and token != self.encoder.eos_id for token in ids[start : stop - 1]] + [on]
        leading = int(bool(ids) and ids[0] == self.tokenizer.bos_token_id)
        shown = [(start, stop) for start, stop, on in turns if on]
        context = shown[0][0] if shown else len(ids)
        first, last = max(first, leading), min(last, context)
        return Encoded(
            ids,
            learned,
            leading,
            context=max(context, leading),
            words=(first, last) if first < last else None,
            stops=tuple(stop for _, stop in shown),
            closings=tuple(() if self._ends(ids, *turn) else (self.encoder.eos_id,) for turn in shown),
            goes_on=rendered.goes_on,
            is_empty=rendered.is_empty,
        )

    def prompt(
        self, messages: list[Message], tools: list[Any] | None = None, where: str = "the prompt"
    ) -> tuple[str, list[int]]:
        """Return what a training row has in front of the assistant's next turn, as text and as ids.

        That is the template's generation prompt. A template with `{% generation %}` blocks may have none; then it is
        the text up to the block. Raises DataError, naming `where`, if the template does not fit the conversation.
        """
        try:
            text = self._render(messages, tools, True)
            if _marks_turns(self.templates.of(tools)):
                answer = {"role": "assistant", "content": "answer"}
                whole, turns = self._marked_turns(Conversation([*messages, answer], [], tools))
                before = whole[: turns[-1][0]]
                text = text if whole.startswith(text) and len(text) > len(before) else before
        except Exception as error:  # as in `encode`
            raise _refused(error, where) from error
        return text, self.encoder.raw([text])[0]

    def asked(self, row: Mapping[str, Any], where: str) -> tuple[str, list[int], str | None]:
        """Return the prompt for a row's last answer, as text and as ids, and that answer as the template writes it.

        A row that does not end with a message of the assistant's is asked as it is, and has no answer. Special tokens
        are no part of an answer. Raises DataError, naming `where`, as `render` does, and for a row that is nothing but
        an answer.
        """
        given = {column: value for column, value in row.items() if column != "completion" or value}
        talk = conversation_of(given, templates=self.templates, where=where)
        *before, last = talk.messages
        if last["role"] != "assistant":
            before, answer = talk.messages, None
        elif before:
            answer = last
        else:
            raise DataError(
                "the conversation is an answer alone, with no message that it answers",
                where=where,
                fix="leave out such rows",
            )
        text, ids = self.prompt(before, talk.tools, where)
        asked = [False] * sum(message["role"] == "assistant" for message in before)
        check_written(Conversation(before, asked, talk.tools), text, [], where)
        return text, ids, None if answer is None else self._written(talk, text, where)

    def _written(self, talk: Conversation, prompt: str, where: str) -> str | None:
        """The last message as a model would have to write it behind the prompt; None for one without words.

        Where the template asks with text that it does not write in an answer, that is the message's content.
        """
        try:
            whole = self._render(talk.messages, talk.tools, False)
        except Exception as error:  # as in `encode`
            raise _refused(error, where) from error
        content = str(talk.messages[-1].get("content", ""))
        written = whole.removeprefix(prompt) if whole.startswith(prompt) else content
        for token in self.tokenizer.convert_ids_to_tokens(sorted(self.special_ids)):
            written = written.replace(token, "")
        return written.rstrip() or None

    def other_prompt(self, row: Mapping[str, Any], where: str) -> str | None:
        """Return the generation prompt for a row's last answer if the row itself has another text there, else None.

        DeepSeek-R1's template asks with `<think>`, and writes answers without.
        """
        talk = conversation_of(row, templates=self.templates, where=where)
        answers = [index for index, message in enumerate(talk.messages) if message["role"] == "assistant"]
        if not answers or not answers[-1]:
            return None
        before, answered = talk.messages[: answers[-1]], talk.messages[: answers[-1] + 1]
        try:
            head, asked = (self._render(before, talk.tools, prompt) for prompt in (False, True))
            text = self._render(answered, talk.tools, False)
        except Exception:  # it takes the rows, and need not take a part of one
            return None
        return None if text.startswith(asked) or not text.startswith(head) else asked.removeprefix(head)

    def ends_of_turns(self) -> set[int]:
        """Return the tokens that a training teaches at the ends of the assistant's turns.

        Phi-3's template ends the last turn of a conversation with another one than those in front of it.
        """
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}] * 2
        row = self.encode({"messages": messages}, where="the chat template", learn_all=False)
        behind = [*row.learned[1:], False]
        ends = {token for token, on, goes_on in zip(row.ids, row.learned, behind, strict=True) if on and not goes_on}
        return ends & self.special_ids  # a turn may end with text, and the conversation with EOS alone

    def _marked_turns(self, talk: Conversation) -> tuple[str, list[tuple[int, int]]]:
        """Return the text and the `{% generation %}` blocks in it, in characters.

        `apply_chat_template(return_assistant_tokens_mask=True)` would give tokens, but where a tokenizer's offsets
        leave out white space (Llama 3, GPT-2) it drops a turn that begins with a space, and all turns after it,
        and never ends one that ends with a line break (seen in transformers 5.23).
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, turns = render_jinja_template(
            conversations=[talk.messages],
            tools=talk.tools,
            chat_template=self.templates.of(talk.tools),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        return texts[0], list(turns[0])

    def _found_turns(self, talk: Conversation, where: str) -> tuple[str, list[tuple[int, int]]]:
        """Return the text and the assistant's turns in it, found by what the template makes of parts of it."""
        try:
            return assistant_turns(talk.messages, lambda messages, prompt: self._render(messages, talk.tools, prompt))
        except NotShownError as error:
            raise DataError(
                "the chat template changes what messages say, so it does not show where the assistant's turns are",
                where=where,
                fix="mark the assistant's text in the template with {% generation %} ... {% endgeneration %}",
            ) from error

    def _render(self, messages: list[Message], tools: list[Any] | None, prompt: bool) -> str:
        text: str = self.tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=self.templates.of(tools),
            tokenize=False,
            add_generation_prompt=prompt,
        )
        return text

    def _ends(self, ids: list[int], start: int, stop: int) -> bool:
        """Whether a turn has an end-of-turn token last; white space may follow it."""
        return start < stop and ids[self._without_space(ids, start, stop) - 1] in self.special_ids

    def _with_end_of_turn(self, ids: list[int], start: int, stop: int) -> tuple[int, int]:
        """Stretch or shrink a turn so that its end-of-turn token is its last one."""
        if self._ends(ids, start, stop):
            stop = self._without_space(ids, start, stop)
        elif stop < len(ids) and ids[stop] in self.special_ids:
            stop += 1
        return start, stop

    def _without_space(self, ids: list[int], start: int, stop: int) -> int:
        """Where a turn stops without the white space at its end, which may be any number of tokens.

        Llama's tokenizer makes three of "</s>" and a line break: it puts a space in front of what follows "</s>".
        """
        while start < stop - 1 and ids[stop - 1] not in self.special_ids:
            if self.tokenizer.decode(ids[stop - 1 : stop]).strip():
                break
            stop -= 1
        return stop


@lru_cache
def _marks_turns(template: str) -> bool:
    """Whether it says which text is the assistant's."""
    return bool(_GENERATION.search(template))


def _refused(error: Exception, where: str) -> DataError:
    token = _NO_TOKEN.search(str(error))
    if token:
        return DataError(
            f"the chat template asks for `{token[1]}`, which the tokenizer does not have",
            where=where,
            fix=f"give a template without it (`data.chat_template`), or set `{token[1]}` in the model's "
            "tokenizer_config.json to a token of its vocabulary",
        )
    return DataError(
        f"the chat template refuses the conversation: {error}",
        where=where,
        fix="check the order of its roles and its fields against the model's chat template",
    )


def _words(talk: Conversation, text: str, turns: list[tuple[int, int]]) -> tuple[int, int] | None:
    """From and to which character others than system and assistant say something in front of what is learned first.

    None where it is not seen: a template may change what they say.
    """
    answers = [place for place, message in enumerate(talk.messages) if message["role"] == "assistant"]
    if len(turns) != len(answers) or not any(talk.learned):
        return None
    first = talk.learned.index(True)
    position, spans = 0, []
    for message in talk.messages[: answers[first]]:
        said, role = str(message.get("content", "")).strip(), message["role"]
        found = text.find(said, position, turns[first][0]) if said else -1
        if found < 0:
            if role == "assistant" or not said:
                continue  # the thoughts of earlier answers may be left out
            return None
        position = found + len(said)
        if role not in ("system", "developer", "assistant"):
            spans.append((found, position))
    return (spans[0][0], spans[-1][1]) if spans else None


def _learned_turns(talk: Conversation, turns: list[tuple[int, int]], where: str) -> list[bool]:
    """Which turns of the text are learned: those of the assistant's messages that are."""
    if len(turns) == len(talk.learned):
        return talk.learned
    if all(talk.learned):
        return [True] * len(turns)
    raise DataError(
        f"the chat template marks {len(turns)} turns of {len(talk.learned)} messages of the assistant's, so that it "
        "does not show which of them are not learned (of weight 0, or in a prompt)",
        where=where,
        fix="put one {% generation %} block around each of these messages in the template",
    )
