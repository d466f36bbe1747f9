"""Encode conversations through the tokenizer's chat template; only what the assistant says is learned."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from dude_cli.encode import Encoded, TextEncoder, common_prefix
from dude_cli.errors import DataError

Message = dict[str, Any]
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class ChatEncoder:
    """Encodes conversations. The template alone decides the text, BOS and end-of-turn tokens included.

    A turn of the assistant is learned with its end-of-turn token and nothing after that. The turns are taken from
    the template's `{% generation %}` blocks; without those, from how the text grows message by message. Where
    a template ends the last turn with no special token, one EOS is added, or the model would never learn to stop.
    """

    def __init__(self, encoder: TextEncoder) -> None:
        tokenizer = encoder.tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                "the tokenizer has no chat template",
                where=f"data.format: chat, with {tokenizer.name_or_path or 'this tokenizer'}",
                fix="use an instruction-tuned model's tokenizer, or `data.prompt` and `data.completion` instead",
            )
        self.encoder, self.tokenizer = encoder, tokenizer
        self.marks_turns = bool(_GENERATION.search(tokenizer.get_chat_template()))
        added = tokenizer.added_tokens_decoder.items()
        self.special_ids = {int(index) for index, token in added if token.special} | set(tokenizer.all_special_ids)

    def encode(self, conversation: Any, *, where: str, learn_all: bool) -> Encoded:
        """Return one encoded conversation. Raises DataError, naming `where`, if the template does not fit it."""
        messages = _checked(conversation, where)
        try:
            ids, spans = self._by_marks(messages) if self.marks_turns else self._by_prefixes(messages, where)
        except DataError:
            raise
        except Exception as error:  # jinja2's errors, and whatever a template raises by itself
            raise DataError(
                f"the chat template refuses the conversation: {error}",
                where=where,
                fix="check the order of its roles and its fields against the model's chat template",
            ) from error
        return self._finish(ids, [self._with_end_of_turn(ids, *span) for span in spans], learn_all)

    def _finish(self, ids: list[int], spans: list[tuple[int, int]], learn_all: bool) -> Encoded:
        learned = [learn_all] * len(ids)
        for start, stop in spans:
            learned[start:stop] = [True] * (stop - start)
        if spans and spans[-1][1] == len(ids) and not self._ends(ids, *spans[-1]):
            ids, learned = [*ids, self.encoder.eos_id], [*learned, True]
        leading = int(bool(ids) and ids[0] == self.tokenizer.bos_token_id)
        return Encoded(ids, learned, leading, max(spans[0][0] if spans else len(ids), leading))

    def _ends(self, ids: list[int], start: int, stop: int) -> bool:
        """Whether a turn holds an end-of-turn token; white space may follow it."""
        return any(token in self.special_ids for token in ids[max(start, stop - 2) : stop])

    def _with_end_of_turn(self, ids: list[int], start: int, stop: int) -> tuple[int, int]:
        """Stretch or shrink a turn so that its end-of-turn token is its last one."""
        if self._ends(ids, start, stop):
            while ids[stop - 1] not in self.special_ids:
                stop -= 1
        elif stop < len(ids) and ids[stop] in self.special_ids:
            stop += 1
        return start, stop

    def _by_marks(self, messages: list[Message]) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self.tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        mask = [0, *encoded["assistant_masks"], 0]
        starts = [index for index in range(1, len(mask)) if mask[index] and not mask[index - 1]]
        stops = [index for index in range(1, len(mask)) if mask[index - 1] and not mask[index]]
        return list(encoded["input_ids"]), [(a - 1, b - 1) for a, b in zip(starts, stops, strict=True)]

    def _by_prefixes(self, messages: list[Message], where: str) -> tuple[list[int], list[tuple[int, int]]]:
        whole = self._render(messages)
        borders: list[str] = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                borders.append(self._render(messages[:index], add_generation_prompt=True) if index else "")
                borders.append(self._render(messages[: index + 1]))
        if not all(whole.startswith(border) for border in borders):
            raise DataError(
                "the chat template changes earlier text when a message is added, so it does not show "
                "where the assistant's turns are",
                where=where,
                fix="mark the assistant's text in the template with {% generation %} ... {% endgeneration %}",
            )
        ids, *prefixes = self._tokenize([whole, *borders])
        cuts = [common_prefix(ids, prefix) for prefix in prefixes]
        return ids, list(zip(cuts[::2], cuts[1::2], strict=True))

    def _render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        text: str = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
        return text

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return [list(ids) for ids in encoded["input_ids"]]


def _checked(conversation: Any, where: str) -> list[Message]:
    """Return the messages, or raise DataError with what a conversation looks like."""
    messages = list(conversation) if isinstance(conversation, list | tuple) else []
    sound = all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages)
    if not messages or not sound:
        raise DataError(
            f"`messages` is not a conversation: {str(conversation)[:80]}",
            where=where,
            fix='write it as [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]',
        )
    return messages
