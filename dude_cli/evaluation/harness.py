"""The model as lm-eval sees it: quiet, counting what it cuts, and left as it was found."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dude_cli.data import prompt_form
from dude_cli.errors import is_out_of_memory
from dude_cli.evaluation.chat import chat_renderer
from dude_cli.system.memory import free_models

if TYPE_CHECKING:
    from accelerate import Accelerator

OnProgress = Callable[[int, int], None]  # (requests done, requests in all)
KEPT_TEMPLATES = 1024  # mmlu has two for each of its 57 subjects


def harness_model(
    model: Any,
    tokenizer: Any,
    batch_size: int,
    on_progress: OnProgress,
    accelerator: Accelerator | None = None,
    log: Callable[[str], None] = lambda message: None,
) -> Any:
    """An lm-eval HFLM on a model in memory that reports progress and remembers the prompts that it cuts.

    Out of memory, it goes on with half of `batch_size`, until that is one; `batch_size` is then the smallest one of
    all ranks.

    The ranks of `accelerator` share the questions, and each has all the answers. lm-eval does not know of them: had it
    given each rank its own documents, the examples that it draws at random would depend on the number of ranks.
    `cut_prompts` holds each prompt that did not fit and lost its start: for an answer to score, when prompt and
    answer are longer than the context; for an answer to generate, when the prompt is longer than the context less
    `max_gen_toks`. lm-eval itself only logs a warning.
    """
    import torch
    from lm_eval.models.huggingface import HFLM

    class HarnessModel(HFLM):  # type: ignore[misc]
        softmax_dtype: torch.dtype | None

        def __init__(self) -> None:
            # lm-eval sets a pad token; on a copy, so that the caller's tokenizer stays as it is.
            super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
            self.cut_prompts: set[str] = set()
            self._done, self._total = 0, 0
            self.answer_ends: list[int] | None = None
            # lm-eval tells its cache about every finished request.
            self.set_cache_hook(self)

        def add_partial(self, kind: str, request: Any, response: Any) -> None:
            self._done += 1
            on_progress(self._done, self._total)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            has_tokens = all(hasattr(request, "tokens") for request in requests)
            return self._answered(self._of_tokens if has_tokens else super().loglikelihood, requests)

        def _of_tokens(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            """The likelihoods of requests that bring their tokens.

            lm-eval's own are summed in the dtype of the logits, which in bfloat16 is too coarse for a long answer.
            """
            before, self.softmax_dtype = self.softmax_dtype, torch.float32
            try:
                return self._loglikelihood_tokens([(request.args, *request.tokens) for request in requests])
            finally:
                self.softmax_dtype = before

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            return self._answered(super().loglikelihood_rolling, requests)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            for request in requests:
                prompt, settings = request.args
                room = self.max_length - max_gen_tokens(settings)
                if len(self.tok_encode(prompt)) > room:
                    self.cut_prompts.add(prompt)
            return self._answered(super().generate_until, requests)

        def _model_generate(self, *given: Any, **settings: Any) -> Any:
            ends = {} if self.answer_ends is None else {"eos_token_id": self.answer_ends}
            return super()._model_generate(*given, **settings, **ends)

        @contextlib.contextmanager
        def asked_in_chat(self) -> Iterator[None]:
            """Within, questions are asked in the chat template, and an answer ends with its turn.

            lm-eval would stop at EOS and at a task's strings alone, and at these when the whole batch has come to one.
            """
            self.apply_chat_template = chat_renderer(tokenizer)  # in place of the class's
            self.answer_ends = sorted(prompt_form(tokenizer, None, raw=False).stop_ids(model))
            try:
                yield
            finally:
                del self.apply_chat_template
                self.answer_ends = None

        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> Any:
            for texts, prompt, answer in requests:
                # The last token of the answer is scored but not fed, hence the one more.
                if texts is not None and len(prompt) + len(answer) > self.max_length + 1:
                    self.cut_prompts.add(texts[0])
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

        def _answered(self, answer: Callable[..., Any], requests: list[Any]) -> list[Any]:
            """The answers to all `requests`, of which this rank gives its share."""
            if accelerator is None or accelerator.num_processes == 1:
                return self._answers(answer, requests)
            from accelerate.utils import gather_object

            own = shared_out(requests, accelerator.num_processes)[accelerator.process_index]
            answers = self._answers(answer, [requests[number] for number in own]) if own else []
            found: dict[int, Any] = {}
            for numbers, answered, cut, size in gather_object([(own, answers, self.cut_prompts, self.batch_size)]):
                found |= dict(zip(numbers, answered, strict=True))
                self.cut_prompts |= cut
                self.batch_size_per_gpu = min(self.batch_size, size)
            return [found[number] for number in range(len(requests))]

        def _answers(self, answer: Callable[..., Any], requests: list[Any]) -> list[Any]:
            """The answers to this rank's requests. The longest come first, so too large a batch fails early."""
            while True:
                self._done, self._total = 0, len(requests)
                try:
                    return list(answer(requests, disable_tqdm=True))
                except Exception as error:
                    if not is_out_of_memory(error) or self.batch_size == 1:
                        raise
                size = self.batch_size_per_gpu = self.batch_size // 2
                log(f"out of memory: from now on {size} prompts per forward")
                free_models()  # what the failed forward held

    return HarnessModel()


def max_gen_tokens(settings: dict[str, Any]) -> int:
    """The most tokens of an answer that `generation_kwargs` ask for, under whichever of lm-eval's names."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs

    return int(normalize_gen_kwargs(settings, HFLM.max_gen_toks.fget(None))["max_gen_toks"])


def shared_out(requests: Sequence[Any], count: int) -> list[list[int]]:
    """The numbers of the requests that each of `count` ranks answers: all of one document's go to one.

    The model reads what they have in common once.
    """
    owners: dict[tuple[str, int], int] = {}
    shares: list[list[int]] = [[] for _ in range(count)]
    for number, request in enumerate(requests):
        owner = owners.setdefault((request.task_name, request.doc_id), len(owners) % count)
        shares[owner].append(number)
    return shares


def own_generation_length(task: Any) -> int | None:
    """The `max_gen_toks` of a task that is as it was loaded; None for one that generates nothing."""
    if task.get_config("output_type") != "generate_until":
        return None
    return max_gen_tokens(task.get_config("generation_kwargs") or {})


def fit_generation_length(lm: Any, task: Any) -> tuple[int, int] | None:
    """Leave the prompt at least half of the context; return the task's own `max_gen_toks` and the one to use.

    The task's own number (256 for gsm8k) is kept wherever it is at most half of the context, so every model with a
    context of 512 tokens or more is scored as papers do. None for a task that generates nothing. The task is changed in
    place, so a second call would take the one to use for its own.
    """
    own = own_generation_length(task)
    if own is None:
        return None
    used = min(own, lm.max_length // 2)
    if used < own:
        task.set_config(key="generation_kwargs", value={"max_gen_toks": used}, update=True)
    return own, used


@contextlib.contextmanager
def left_as_found(model: Any) -> Iterator[None]:
    """Give each module its train or eval mode back at the end; lm-eval puts the model in eval mode."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextlib.contextmanager
def templates_compiled_once() -> Iterator[None]:
    """Within, lm-eval keeps the templates of tasks compiled.

    It compiles one anew for each question and each example, which is nearly all of the time that mmlu's prompts take.
    """
    from lm_eval.utils import env

    env.from_string = functools.lru_cache(KEPT_TEMPLATES)(env.from_string)  # in front of the class's
    try:
        yield
    finally:
        del env.from_string


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval's prints, its warnings, and its bars for subjects and standard errors off the screen."""
    import datasets
    import lm_eval.api.task as task_module
    import tqdm

    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]

    class NoBar(tqdm.tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **(settings | {"disable": True}))

    # One is imported once, the other by each function that draws.
    bars, bars_on = (task_module.tqdm, tqdm.tqdm), datasets.are_progress_bars_disabled() is False
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        task_module.tqdm = tqdm.tqdm = NoBar
        datasets.disable_progress_bars()
        with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        task_module.tqdm, tqdm.tqdm = bars
        if bars_on:
            datasets.enable_progress_bars()
