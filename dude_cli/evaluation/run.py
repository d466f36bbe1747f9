"""Benchmark scores: lm-eval on the model in memory, for a run, an adapter or a plain model."""

from __future__ import annotations

import importlib.metadata
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dude_cli.config import EvalTask
from dude_cli.errors import UsageError, memory_errors
from dude_cli.evaluation.chat import chat_renderer, chat_template, check_system_instruction, has_place_for_system
from dude_cli.evaluation.compare import different_settings
from dude_cli.evaluation.harness import (
    OnProgress,
    fit_generation_length,
    harness_model,
    left_as_found,
    quiet,
    templates_compiled_once,
)
from dude_cli.evaluation.results import BY_TASK, differences
from dude_cli.evaluation.row_reader import RowReader
from dude_cli.evaluation.saved import join_results
from dude_cli.evaluation.tasks import FEWSHOT_SEED, LoadedTask, is_offline, load_tasks, offline, sampler_note
from dude_cli.system.runtime import local_main_first

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# lm-eval's own settings, so that a score here is a score there.
BOOTSTRAP_ITERS = 100_000
RANDOM_SEED, NUMPY_SEED, TORCH_SEED = 0, 1234, 1234


@dataclass(frozen=True)
class EvalRequest:
    """What to score. `num_fewshot` None in a task: 5 for mmlu and gsm8k, else the task's own.

    `data_dir` holds local copies, `mmlu/` and `gsm8k/`, and keeps the evaluation off the network; `include_paths` are
    folders with the user's own lm-eval task files; `compare_base` scores the model without its adapter as well.

    `earlier` has documents of some of the tasks, of this model, with their samples: what they have is not scored again,
    and the rest with as many sequences per forward as they were, if `earlier_batch_size`.
    With `rescore` only the base's part of them is taken, and if `compare_base` asks for that too, nothing.
    """

    tasks: tuple[EvalTask, ...]
    batch_size: int = 8
    data_dir: Path | None = None
    include_paths: tuple[Path, ...] = ()
    compare_base: bool = False
    earlier: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    earlier_batch_size: bool = True
    rescore: bool = False


def load_request(
    request: EvalRequest,
    *,
    reader: RowReader | None = None,
    accelerator: Accelerator | None = None,
    log: Callable[[str], None] = lambda message: None,
    warn: Callable[[str], None] = lambda message: None,
) -> list[LoadedTask]:
    """The tasks of `request` with their data. What is wrong with them is told here, before any model is loaded.

    `reader` is for rows of the user's own, and `warn` for what may spoil their scores. Raises UsageError and DataError
    as `load_tasks` does.
    """
    with quiet(), _off_network(request):
        _seed()
        with nullcontext() if accelerator is None else local_main_first(accelerator):  # it fills the cache of datasets
            return load_tasks(
                request.tasks,
                data_dir=request.data_dir,
                include_paths=request.include_paths,
                log=log,
                warn=warn,
                reader=reader,
            )


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    request: EvalRequest,
    *,
    tasks: Sequence[LoadedTask] | None = None,
    accelerator: Accelerator | None = None,
    adapter_sha256: str | None = None,
    base_fingerprint: str | None = None,
    on_task: Callable[[dict[str, Any]], None] = lambda results: None,
    log: Callable[[str], None] = lambda message: None,
    on_progress: OnProgress = lambda done, total: None,
) -> dict[str, Any]:
    """Score `model` on every task of `request` and return lm-eval's result layout, for all tasks in one document.

    lm-eval's keys (`results`, `groups`, `group_subtasks`, `configs`, `versions`, `n-shot`, `higher_is_better`,
    `n-samples`, `samples`, `config`, `task_hashes`) and these: `requested` (each task asked for, with the names it
    stands for, its limit, its number of examples if given, whether it has as many as by default, whether its
    questions are asked in the chat template, which is then `chat_template`, and its system's message), `prompt_hashes`
    (SHA-256 over a task's prompts), `prompt_examples` (the text of the first one), `prompts_cut` (how many did not fit
    the context and lost their start), `group_configs` (a group's members and metrics), `fewshot_sampler`,
    `max_gen_toks` (the task's own, `official`, and the one `used`), `adapter_sha256` and `base_fingerprint` as given.
    With `compare_base`, `base` has the untuned model's part and `difference` tuned minus base with the paired standard
    error (see `statistics.paired_difference`).

    One task after the other, each with its base; `on_task` receives the document of each as soon as it is scored.
    `tasks` are those of `request` where `load_request` has loaded them already, as it must have rows of the user's own.

    The ranks of `accelerator` share the questions, each with the whole model; all of them return the same but for
    standard errors that are bootstrapped, which the main one alone has.

    The model's modes, the tokenizer and the environment are left as they were; Python's, numpy's and torch's global
    random generators are seeded as lm-eval does. `log` receives one line for each stage, `on_progress` the requests
    done and their number. Raises UsageError for what the user can put right and ResourceError out of memory.
    """
    from dude_cli.adapter import adapter_layers

    if request.compare_base and not adapter_layers(model):
        raise UsageError(
            "the model has no adapter, so there is no base to compare it with",
            where="--base",
            fix="give a run or an adapter, or leave --base out",
        )
    date = time.time()
    if tasks is None:
        tasks = load_request(request, accelerator=accelerator, log=log)
    with left_as_found(model), quiet(), templates_compiled_once(), _off_network(request):
        lm = harness_model(model, tokenizer, request.batch_size, on_progress, accelerator, log)
        bootstrap_iters = BOOTSTRAP_ITERS if accelerator is None or accelerator.is_main_process else 0
        names = {"adapter_sha256": adapter_sha256, "base_fingerprint": base_fingerprint, "date": date}
        documents = []
        for found in tasks:
            start, size = time.time(), lm.batch_size
            earlier = request.earlier.get(found.request.name) if request.earlier_batch_size else None
            if earlier is not None:
                lm.batch_size_per_gpu = earlier["config"]["batch_size"]
            facts = _facts(lm, found, log)
            scores = _scored(lm, found, request, log, bootstrap_iters)
            took = {"total_evaluation_time_seconds": str(time.time() - start)}
            documents.append(names | _environment(lm, found.request) | scores | facts | took)
            if earlier is not None:
                lm.batch_size_per_gpu = size
            on_task(documents[-1])
        return join_results(documents)


def _scored(
    lm: Any, found: LoadedTask, request: EvalRequest, log: Callable[[str], None], bootstrap_iters: int
) -> dict[str, Any]:
    """One requested task's scores: the tuned model's, and the base's if asked for or there."""
    from dude_cli.adapter import constant_adapters, disable_adapters

    earlier = _earlier(lm, found, request, log)
    if "results" in earlier:
        tuned = {key: earlier[key] for key in (*BY_TASK, "samples") if key in earlier}
    else:
        with constant_adapters(lm.model):
            tuned = _score(lm, found, "", log, bootstrap_iters)
    base = earlier.get("base")
    if base is None and request.compare_base:
        with disable_adapters(lm.model):
            base = _score(lm, found, " (base)", log, bootstrap_iters)
    if base is not None:
        if base["task_hashes"] != tuned["task_hashes"]:
            if not earlier:
                raise UsageError(
                    "its prompts or questions are others each time it is asked, so two scores cannot be compared",
                    where=f"--task {found.request.name}",
                    fix="make nothing in its task file random, or leave --base out",
                )
            # Not seen before: the example of a later prompt is another.
            return _scored(lm, found, replace(request, earlier={}), log, bootstrap_iters)
        tuned["base"] = {key: base[key] for key in ("results", "groups", "samples") if key in base}
        tuned["difference"] = differences(base, tuned, _weighting(found))
    return tuned


def _facts(lm: Any, found: LoadedTask, log: Callable[[str], None]) -> dict[str, Any]:
    """What a document says of a requested task as it is asked, whoever answers."""
    asked = found.request.model_dump(exclude={"name"})
    return {
        "requested": {found.request.name: {"names": found.names, **asked, "default_examples": found.default_examples}},
        "group_configs": found.group_configs,
        "fewshot_sampler": {name: sampler_note(task) for name, task in found.tasks.items()},
        "max_gen_toks": _fit_generation_lengths(lm, found, log),
    }


def _earlier(lm: Any, found: LoadedTask, request: EvalRequest, log: Callable[[str], None]) -> Mapping[str, Any]:
    """What need not be scored of a task: `results` and what belongs to them, or `base`.

    Nothing, if the two parts of the document would have been scored with different settings.
    """
    name = found.request.name
    earlier = request.earlier.get(name)
    if earlier is None or (request.rescore and request.compare_base):
        return {}
    differing = different_settings(earlier, _environment(lm, found.request))
    if differing:
        log(f"{name}: what was scored before is left out: {'; '.join(differing)}")
        return {}
    base = {"base": earlier["base"] | {"task_hashes": earlier["task_hashes"]}} if "base" in earlier else {}
    return base if request.rescore else {**earlier, **base}


def _score(lm: Any, found: LoadedTask, suffix: str, log: Callable[[str], None], bootstrap_iters: int) -> dict[str, Any]:
    """lm-eval's results for one requested task, and what we add to them."""
    import lm_eval

    name, limit = found.request.name, found.request.limit
    log(f"scoring {name}{suffix}: {_questions(found)} questions")
    lm.cut_prompts.clear()
    _seed()
    for task in found.tasks.values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    fix = "use --dtype bfloat16, or a device with more memory"
    in_chat = found.request.apply_chat_template
    if in_chat:
        check_system_instruction(lm.tokenizer, found.request)
    described = any(task.get_config("description") for task in found.tasks.values())
    if in_chat and described and not suffix and not has_place_for_system(chat_renderer(lm.tokenizer)):
        log(f"{name}: its description is left out, for the chat template has no place for a system's message")
    with (
        memory_errors("out of memory, with one prompt at a time too", where=f"--task {name}", fix=fix),
        lm.asked_in_chat() if in_chat else nullcontext(),
    ):
        results: dict[str, Any] = lm_eval.evaluate(
            lm=lm,
            task_dict={"tasks": found.tasks, "groups": found.groups},
            limit=limit,
            bootstrap_iters=bootstrap_iters,
            apply_chat_template=in_chat,
            fewshot_as_multiturn=in_chat,
            system_instruction=found.request.system_instruction,
        )
    results |= _prompt_facts(results["samples"], lm.cut_prompts)
    results["n-shot"] |= _group_num_fewshot(found)
    cut = sum(results["prompts_cut"].values())
    if cut and not suffix:
        log(f"{name}: {cut} prompts lost their start to fit the context of {lm.max_length} tokens")
    return results


def _prompt_facts(samples: dict[str, list[dict[str, Any]]], cut_prompts: set[str]) -> dict[str, dict[str, Any]]:
    """Hash and count each task's prompts, keep the first, and drop the others' text: most of the samples' memory."""
    from lm_eval.utils import hash_string

    facts: dict[str, dict[str, Any]] = {
        "task_hashes": {},
        "prompt_hashes": {},
        "prompt_examples": {},
        "prompts_cut": {},
    }
    for name, rows in samples.items():
        # As lm-eval's own tracker computes it.
        facts["task_hashes"][name] = hash_string(
            "".join(row["doc_hash"] + row["prompt_hash"] + row["target_hash"] for row in rows)
        )
        # Each filter repeats the questions.
        once = [row for row in rows if row["filter"] == rows[0]["filter"]]
        facts["prompt_hashes"][name] = hash_string("".join(row["prompt_hash"] for row in once))
        facts["prompt_examples"][name] = min(once, key=lambda row: int(row["doc_id"]))["arguments"][0][0]
        facts["prompts_cut"][name] = sum(
            any(arguments[0] in cut_prompts for arguments in row["arguments"]) for row in once
        )
        for row in rows:
            del row["arguments"]
    return facts


def _fit_generation_lengths(lm: Any, found: LoadedTask, log: Callable[[str], None]) -> dict[str, dict[str, int]]:
    lengths = {}
    for name, task in found.tasks.items():
        fitted = fit_generation_length(lm, task)
        if fitted is None:
            continue
        own, used = fitted
        lengths[name] = {"official": own, "used": used}
        if used < own:
            log(f"{name}: answers have {used} tokens at most, not {own}: half of the context of {lm.max_length}")
    return lengths


def _weighting(found: LoadedTask) -> dict[str, dict[str, bool]]:
    return {
        name: {metric.metric: metric.weight_by_size for metric in group.aggregate_metric_list or ()}
        for name, group in found.groups.items()
    }


def _group_num_fewshot(found: LoadedTask) -> dict[str, int]:
    # lm-eval gives a group of groups, such as mmlu, no number.
    numbers = {
        name: {task.get_config("num_fewshot") for task in group.get_all_tasks()} for name, group in found.groups.items()
    }
    return {name: next(iter(values)) for name, values in numbers.items() if len(values) == 1}


def _questions(found: LoadedTask) -> int:
    limit = found.request.limit
    sizes = [len(task.eval_docs) for task in found.tasks.values()]
    return sum(sizes if limit is None else [min(size, limit) for size in sizes])


def _environment(lm: Any, task: EvalTask) -> dict[str, Any]:
    from dude_cli.adapter.weight import quantization

    return {
        "chat_template": chat_template(lm.tokenizer) if task.apply_chat_template else None,  # lm-eval's name for it
        "config": {
            "model": lm.model.config._name_or_path,
            "model_num_parameters": lm.model.num_parameters(),
            "model_dtype": str(lm.model.dtype),
            "model_quantization": quantization(lm.model),
            "batch_size": lm.batch_size,
            "device": str(lm.device),
            "limit": task.limit,
            "bootstrap_iters": BOOTSTRAP_ITERS,
            "random_seed": RANDOM_SEED,
            "numpy_seed": NUMPY_SEED,
            "torch_seed": TORCH_SEED,
            "fewshot_seed": FEWSHOT_SEED,
        },
        "max_length": lm.max_length,
        "lm_eval_version": importlib.metadata.version("lm_eval"),
        "transformers_version": importlib.metadata.version("transformers"),
    }


def _off_network(request: EvalRequest) -> AbstractContextManager[None]:
    return offline() if request.data_dir is not None or is_offline() else nullcontext()


def _seed() -> None:
    import numpy
    import torch

    random.seed(RANDOM_SEED)
    numpy.random.seed(NUMPY_SEED)
    torch.manual_seed(TORCH_SEED)
