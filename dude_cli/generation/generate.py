"""Text from a model: the answer to one prompt, as it grows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from dude_cli.data import Message, Prompt, PromptForm
from dude_cli.errors import DivergedError, UsageError, memory_errors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OnText = Callable[[str], None]
# Tokens before a new one that are decoded with it: enough for the parts of a letter.
CONTEXT_TOKENS = 8


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the likeliest with temperature 0, else at random, from `seed` and the prompt's number.

    What the model's own generation config says (a repetition penalty, say) has no part in it.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raise UsageError for a temperature that is no number, and for a `top_p` that would do nothing."""
        if not math.isfinite(self.temperature):
            raise UsageError(f"the temperature is {self.temperature}", where="--temperature", fix="give a number")
        if self.top_p < 1 and self.temperature == 0:
            raise UsageError(
                f"top-p {self.top_p} does nothing while the likeliest token is always taken",
                where="--top-p",
                fix="give a temperature too, such as --temperature 0.7",
            )


@dataclass(frozen=True)
class Answer:
    """What a model answered; `new_tokens` counts the one that ended it, which is not in `completion`."""

    prompt: Prompt
    completion: str
    new_tokens: int
    stop_reason: Literal["eos", "length"]

    def record(self) -> dict[str, object]:
        return {"completion": self.completion, "new_tokens": self.new_tokens, "stop_reason": self.stop_reason}


class Generator:
    """Answers with one model, in one form of prompts."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, form: PromptForm, sampling: Sampling
    ) -> None:
        self.model, self.tokenizer, self.form, self.sampling = model, tokenizer, form, sampling
        self.stop_ids = form.stop_ids(model)

    def answer(self, conversation: Sequence[Message], number: int = 0, on_text: OnText = lambda text: None) -> Answer:
        """The model's answer to the last message; `on_text` receives its text as it grows.

        The `number` of a prompt and the seed give the random numbers. The completion is the text that follows the
        prompt, its first space included, special tokens left out. Raises UsageError for an empty prompt and one that
        leaves no room in the model's context, DivergedError for logits that are NaN, ResourceError out of memory.
        """
        import torch

        from dude_cli.adapter import constant_adapters
        from dude_cli.system.runtime import seed_everything

        prompt = self.form.prompt(conversation)
        self._check_room(prompt)
        stream = _TextStream(self.tokenizer, prompt.ids, self.stop_ids, on_text)
        ids = torch.tensor([prompt.ids], device=self.model.device)
        seed_everything(self.sampling.seed, number)
        fix = "lower it, shorten the prompt, or use --dtype bfloat16"
        no_memory = memory_errors("out of memory", where="--max-new-tokens", fix=fix)
        with no_memory, constant_adapters(self.model), self._own_settings():
            output = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                streamer=stream,
                logits_processor=[self._scores],
            )
        new_ids = output[0, len(prompt.ids) :].tolist()
        is_ended = bool(new_ids) and new_ids[-1] in self.stop_ids
        return Answer(prompt, stream.text, len(new_ids), "eos" if is_ended else "length")

    def _scores(self, _ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """What the next token is chosen by, before `top_p`: transformers has no temperature to divide by."""
        _refuse_nan(logits)
        temperature = self.sampling.temperature
        return at_temperature(logits, temperature) if temperature > 0 else logits

    def _check_room(self, prompt: Prompt) -> None:
        if not prompt.ids:
            raise UsageError("the prompt is empty", where="--prompt", fix="give some text")
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        longest_answer = self.sampling.max_new_tokens
        if context is not None and len(prompt.ids) + longest_answer > context:
            raise UsageError(
                f"the prompt has {len(prompt.ids)} tokens, and {max(0, context - longest_answer)} fit: "
                f"the model's context of {context} less --max-new-tokens {longest_answer}",
                where="--prompt",
                fix="shorten the prompt, or lower --max-new-tokens",
            )

    @contextmanager
    def _own_settings(self) -> Iterator[None]:
        """transformers fills what a call leaves open from the model's generation config: ours takes its place."""
        from transformers import GenerationConfig

        sampling, before = self.sampling, self.model.generation_config
        is_random = sampling.temperature > 0
        self.model.generation_config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted(self.stop_ids),
            pad_token_id=self.form.encoder.eos_id,  # one prompt at a time: nothing is padded, but one must be named
            **({"do_sample": True, "top_p": sampling.top_p, "top_k": 0} if is_random else {}),
        )
        try:
            yield
        finally:
            self.model.generation_config = before


class _TextStream:
    """Turns tokens into text as they come; transformers calls `put` and `end`.

    A token alone may be a part of a letter, or lose the space in front of it. So each piece of text is what the new
    tokens add to the text of some tokens before them.
    """

    def __init__(self, tokenizer: Any, prompt_ids: Sequence[int], stop_ids: set[int], on_text: OnText) -> None:
        self.text = ""
        self._tokenizer, self._stop_ids, self._on_text = tokenizer, stop_ids, on_text
        self._ids = list(prompt_ids[-CONTEXT_TOKENS:])
        self._shown = len(self._ids)  # tokens whose text is out
        self._has_begun = False

    def put(self, tokens: torch.Tensor) -> None:
        if self._has_begun:  # the first call brings the prompt
            self._ids += [token for token in tokens.flatten().tolist() if token not in self._stop_ids]
            self._emit(is_last=False)
        self._has_begun = True

    def end(self) -> None:
        self._emit(is_last=True)

    def _emit(self, *, is_last: bool) -> None:
        before, after = self._decode(self._ids[: self._shown]), self._decode(self._ids)
        is_whole = not after.endswith("\N{REPLACEMENT CHARACTER}")
        if len(after) > len(before) and (is_whole or is_last):
            piece = after[len(before) :]
            self.text += piece
            start = max(0, self._shown - CONTEXT_TOKENS)
            self._ids, self._shown = self._ids[start:], len(self._ids) - start
            self._on_text(piece)

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def at_temperature(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logits whose softmax is that of `logits / temperature`, of which the largest is zero: never infinite.

    With a temperature near zero all others are minus infinity.
    """
    wide = logits.double()
    return ((wide - wide.amax(-1, keepdim=True)) / temperature).to(logits.dtype)


def _refuse_nan(logits: torch.Tensor) -> None:
    """Greedy choice would take NaN for the largest number, and answer with nonsense."""
    if logits.isnan().any():
        raise DivergedError(
            "the model's logits are not numbers", where="--dtype", fix="try --dtype float32, or bfloat16 on a GPU"
        )
