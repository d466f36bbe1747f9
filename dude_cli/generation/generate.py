"""Text from a model: the answer to one prompt, as it grows, or to several at once."""

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
        prompt = self.form.prompt(conversation)
        self.check_room(prompt)
        stream = _TextStream(self.tokenizer, prompt.ids, self.stop_ids, on_text)
        fix = "lower it, shorten the prompt, or use --dtype bfloat16"
        with memory_errors("out of memory", where="--max-new-tokens", fix=fix):
            (new_ids,) = self._new_ids([prompt], [number], stream)
        return self._answer(prompt, stream.text, new_ids)

    def answer_all(self, prompts: Sequence[Prompt], numbers: Sequence[int]) -> list[Answer]:
        """The answers to several prompts at once, each the one that `answer` gives with its number, but for rounding.

        Raises DivergedError, and what torch raises out of memory.
        """
        found = []
        for prompt, new_ids in zip(prompts, self._new_ids(prompts, numbers), strict=True):
            stream = _TextStream(self.tokenizer, prompt.ids, self.stop_ids, lambda text: None)
            stream.put_all(new_ids)
            found.append(self._answer(prompt, stream.text, new_ids))
        return found

    def _answer(self, prompt: Prompt, completion: str, new_ids: list[int]) -> Answer:
        return Answer(prompt, completion, len(new_ids), "eos" if new_ids[-1] in self.stop_ids else "length")

    def _new_ids(
        self, prompts: Sequence[Prompt], numbers: Sequence[int], stream: _TextStream | None = None
    ) -> list[list[int]]:
        """The tokens of each answer, with the one that ended it."""
        from dude_cli.adapter import constant_adapters

        padded = self._padded(prompts)
        choice = _Choice(self.sampling, numbers, self.model.device)
        with constant_adapters(self.model), self._own_settings():
            output = self.model.generate(**padded, streamer=stream, logits_processor=[choice])
        width = padded["input_ids"].shape[1]
        return [self._until_the_end(ids) for ids in output[:, width:].tolist()]

    def first_logits(self, prompts: Sequence[Prompt]) -> torch.Tensor:
        """What the first token of each of several answers is chosen by."""
        with self._own_settings():
            output = self.model.generate(
                **self._padded(prompts), max_new_tokens=1, output_logits=True, return_dict_in_generate=True
            )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _padded(self, prompts: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        """A batch: shorter prompts are padded in front. transformers counts positions from where the mask begins."""
        import torch

        device, width = self.model.device, max(len(prompt.ids) for prompt in prompts)
        pads = [width - len(prompt.ids) for prompt in prompts]
        ids = [[self.form.encoder.eos_id] * pad + prompt.ids for pad, prompt in zip(pads, prompts, strict=True)]
        mask = [[0] * pad + [1] * (width - pad) for pad in pads]
        return {
            "input_ids": torch.tensor(ids, device=device),
            "attention_mask": torch.tensor(mask, device=device),
        }

    def _until_the_end(self, ids: list[int]) -> list[int]:
        """Without what a batch has behind the end of an answer that is not its longest."""
        return ids[: next((place for place, token in enumerate(ids, 1) if token in self.stop_ids), len(ids))]

    def check_room(self, prompt: Prompt) -> None:
        """Raise UsageError for an empty prompt, and for one that leaves no room for the longest answer."""
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

        before = self.model.generation_config
        self.model.generation_config = GenerationConfig(
            max_new_tokens=self.sampling.max_new_tokens,
            eos_token_id=sorted(self.stop_ids),
            pad_token_id=self.form.encoder.eos_id,  # behind the end of an answer, while others in its batch go on
        )
        try:
            yield
        finally:
            self.model.generation_config = before


class _Choice:
    """Chooses the next token of each prompt of a batch: of the logits it leaves that one.

    At random each has a generator of its own, so that an answer does not depend on what else is in the batch.
    transformers has one for all, and no temperature to divide by.
    """

    def __init__(self, sampling: Sampling, numbers: Sequence[int], device: torch.device) -> None:
        import torch

        from dude_cli.system.runtime import torch_seed

        self._sampling = sampling
        self._generators = [torch.Generator(device).manual_seed(torch_seed(sampling.seed, each)) for each in numbers]

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        import torch
        from transformers import TopPLogitsWarper

        _refuse_nan(logits)
        sampling = self._sampling
        if sampling.temperature == 0:
            return logits
        scores = at_temperature(logits, sampling.temperature)
        if sampling.top_p < 1:
            scores = TopPLogitsWarper(sampling.top_p)(ids, scores)
        shares = scores.softmax(-1)
        pairs = zip(shares, self._generators, strict=True)
        chosen = torch.stack([torch.multinomial(share, 1, generator=generator) for share, generator in pairs])
        return torch.full_like(logits, -math.inf).scatter(1, chosen, 0.0)


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
            self._add(tokens.flatten().tolist())
        self._has_begun = True

    def put_all(self, new_ids: Sequence[int]) -> None:
        """Take a whole answer, token by token as if it came so."""
        for token in new_ids:
            self._add([token])
        self.end()

    def end(self) -> None:
        self._emit(is_last=True)

    def _add(self, tokens: list[int]) -> None:
        self._ids += [token for token in tokens if token not in self._stop_ids]
        self._emit(is_last=False)

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
