"""What `dude eval` does: score a target, or compare what two of them scored."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dude_cli.config import EvalTask
from dude_cli.console import Output
from dude_cli.errors import UsageError
from dude_cli.system.launch import ranks_to_start, run_ranks

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dude_cli.target import Target


# A rank waits for the others at the end of a task, and while the main one downloads data and computes errors.
RANKS_WAIT_S = 6 * 3600.0


@dataclass(frozen=True)
class EvalOptions:
    """The options of `dude eval` that say how a target is scored; None and empty ones leave it to the target."""

    task_names: Sequence[str] = ()
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int | None = None
    data_dir: Path | None = None
    include_paths: Sequence[Path] = ()
    output_dir: Path | None = None
    base_model: str | None = None
    allow_other_base: bool = False
    dtype: str | None = None
    num_processes: int | None = None


def evaluate(
    target_name: str | None,
    options: EvalOptions,
    *,
    compare_base: bool,
    compare_with: tuple[str, str] | None,
    output: Output,
) -> None:
    """Score a run, an adapter or a model with lm-eval, show the table, write the results; or compare two."""
    if compare_with is not None:
        if target_name is not None or compare_base:
            what = f"`{target_name}`" if target_name is not None else "--base"
            raise UsageError(
                f"--compare takes the two that it names, and {what} is given too",
                where="--compare",
                fix="leave it out; a model's folder or hub name may be one of the two",
            )
        _compare(compare_with, options, output)
        return
    from dude_cli.target import find_target

    target = find_target(target_name)
    _check(target, options)
    evaluate_tasks(target, _eval_tasks([target], options), options, compare_base=compare_base, output=output)


def evaluate_tasks(
    target: Target, tasks: Sequence[EvalTask], options: EvalOptions, *, compare_base: bool, output: Output
) -> None:
    """Score a target on these tasks, whatever `options` says of tasks; show the table, write the results."""
    from dude_cli.evaluation import plain_results, results_table
    from dude_cli.system.runtime import part_ranks

    folder = _results_folder(target, options.output_dir)
    accelerator = _eval_ranks(options)
    output = output.on_rank(accelerator.is_main_process)
    results = _score(target, tasks, options, folder, accelerator, output, compare_base=compare_base)
    if accelerator.is_main_process:
        output.result(results_table(results), plain_results(results))
    part_ranks()


@dataclass
class _Side:
    """One of the two that are compared; of a result file there is neither target nor folder."""

    name: str
    target: Target | None = None
    folder: Path | None = None  # where its results go
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)  # by task


def _compare(names: tuple[str, str], options: EvalOptions, output: Output) -> None:
    """Compare two results, or the scores of two runs, adapters or models, on the same questions.

    A run's results are read from its eval/ if they were scored with these options, and else made. Whatever can be
    known to be wrong with either of the two is told before one is scored.
    """
    from dude_cli.evaluation import refuse_other_questions, task_results
    from dude_cli.system.memory import free_models
    from dude_cli.system.runtime import part_ranks

    sides = [_side(name, options, place) for name, place in zip(names, "ab", strict=True)]
    tasks = _compared_tasks(sides, options)
    for side in sides:
        if side.target is not None:
            side.scores = _saved(side.target, tasks, options, side.folder)
    for task in tasks:
        if all(task.name in side.scores for side in sides):
            refuse_other_questions(*(side.scores[task.name] for side in sides))
    # What is missing is known before any of it is written, so all ranks of an evaluation agree on it.
    missing = [[task for task in tasks if task.name not in side.scores] for side in sides]
    for side, own in zip(sides, missing, strict=True):
        if side.target is not None and own:
            _check(side.target, options)
    accelerator = _eval_ranks(options) if any(missing) else None
    is_main = os.environ.get("RANK", "0") == "0" if accelerator is None else accelerator.is_main_process
    output = output.on_rank(is_main)
    for side, own in zip(sides, missing, strict=True):
        output.say(*(f"{side.name}: {task} was scored before" for task in side.scores if side.target is not None))
        if accelerator is not None and side.target is not None and own:
            results = _score(side.target, own, options, side.folder, accelerator, output)
            side.scores |= {task.name: task_results(results, task.name) for task in own}
            free_models()  # before the next one is loaded
    if is_main:
        _show_comparison(names, [tuple(side.scores[task.name] for side in sides) for task in tasks], output)
    if accelerator is not None:
        part_ranks()


def _side(name: str, options: EvalOptions, place: str) -> _Side:
    from dude_cli.evaluation import read_results, requested_task
    from dude_cli.target import find_target

    if Path(name).is_file():
        results = read_results(Path(name))
        return _Side(name, scores={requested_task(results).name: results})
    target = find_target(name)
    if target.kind == "model":  # nothing of it is saved
        _check(target, options)
    return _Side(name, target, _results_folder(target, options.output_dir and options.output_dir / place))


def _compared_tasks(sides: Sequence[_Side], options: EvalOptions) -> list[EvalTask]:
    """The task of a result file, or those asked for. Raises UsageError if the options contradict a result file."""
    from dude_cli.evaluation import requested_task

    found = {side.name: requested_task(results) for side in sides for results in side.scores.values()}
    names = sorted({task.name for task in found.values()})
    if len(names) > 1:
        raise UsageError(
            f"the two result files are of different tasks: {' and '.join(names)}",
            where="--compare",
            fix="give two results of one task",
        )
    for name, task in found.items():
        pairs = {
            "--task": (" ".join(options.task_names) or None, task.name),
            "--num-fewshot": (options.num_fewshot, task.num_fewshot),
            "--limit": (options.limit, task.limit),
        }
        for option, (asked, known) in pairs.items():
            if asked not in (None, known):
                raise UsageError(
                    f"{option} is {asked}, and in the result file it is {'not given' if known is None else known}",
                    where=name,
                    fix=f"leave {option} out, or give a run, an adapter or a model in place of the file",
                )
    targets = [side.target for side in sides if side.target is not None]
    return list(found.values())[:1] or _eval_tasks(targets, options)


def _results_folder(target: Target, chosen: Path | None) -> Path | None:
    """Where results go, `chosen` or a run's own folder. Raises UsageError if that is a link to somewhere else."""
    from dude_cli.target import results_dir
    from dude_cli.training.run_dir import REPORT_FILES, refuse_links

    if chosen is None and target.kind == "run" and target.path is not None:
        refuse_links(target.path, ["eval", *REPORT_FILES])
    return chosen or results_dir(target)


def _check(target: Target, options: EvalOptions) -> None:
    from dude_cli.target import check_target

    check_target(target, options.dtype, base_model=options.base_model, allow_other_base=options.allow_other_base)


def _show_comparison(names: tuple[str, str], pairs: Sequence[tuple[dict[str, Any], ...]], output: Output) -> None:
    from dude_cli.evaluation import compare_results, comparison_shown, different_settings

    comparisons = [comparison for a, b in pairs for comparison in compare_results(a, b)]
    notes = list(dict.fromkeys(note for a, b in pairs for note in different_settings(a, b)))
    output.say(*(f"note: {note}" for note in notes))
    first, second = (
        {"name": name, "adapter_sha256": side["adapter_sha256"]} for name, side in zip(names, pairs[0], strict=True)
    )
    document = {
        "a": first,
        "b": second,
        "notes": notes,
        "comparisons": [asdict(comparison) for comparison in comparisons],
    }
    output.result(comparison_shown(comparisons, *names), document)


def _saved(
    target: Target, tasks: Sequence[EvalTask], options: EvalOptions, folder: Path | None
) -> dict[str, dict[str, Any]]:
    """The results that `folder` has of this target's adapter, by task."""
    from dude_cli.adapter import read_adapter_config
    from dude_cli.evaluation import find_results

    # Which base another one may be is known when it is loaded.
    if folder is None or target.adapter_dir is None or options.allow_other_base:
        return {}
    saved = read_adapter_config(target.adapter_dir)
    found = {
        task.name: find_results(
            folder,
            task,
            adapter_sha256=saved.sha256,
            base_fingerprint=saved.base_fingerprint,
            dtype=options.dtype,
        )
        for task in tasks
    }
    return {name: results for name, results in found.items() if results is not None}


def _eval_tasks(targets: Sequence[Target], options: EvalOptions) -> list[EvalTask]:
    """The tasks asked for, else those of the config of the first run that has some."""
    from dude_cli.target import eval_config

    given = _given(num_fewshot=options.num_fewshot, limit=options.limit)
    if options.task_names:
        return [EvalTask(name=name, **given) for name in options.task_names]
    found = next((tasks for target in targets if (tasks := eval_config(target).tasks)), [])
    if not found:
        raise UsageError(
            "no task to evaluate on",
            where=", ".join(map(str, targets)),
            fix="name one, such as --task mmlu, or set eval.tasks in the config",
        )
    return [task.model_copy(update=given) for task in found]


def _eval_ranks(options: EvalOptions) -> Accelerator:
    """This rank, or the start of all of them, which does not come back."""
    from dude_cli.system.runtime import make_accelerator

    count = ranks_to_start(options.num_processes)
    if count > 1:
        run_ranks(count)
    return make_accelerator(RANKS_WAIT_S)


def _score(
    target: Target,
    tasks: Sequence[EvalTask],
    options: EvalOptions,
    folder: Path | None,
    accelerator: Accelerator,
    output: Output,
    *,
    compare_base: bool = False,
) -> dict[str, Any]:
    """Load a target and score it; the results of each task are written to `folder`, if there is one, at once."""
    from dude_cli.evaluation import EvalRequest, load_request
    from dude_cli.evaluation import evaluate as score
    from dude_cli.target import data_config, eval_config, load_target, results_dir

    output.say(f"evaluating {target}")
    if folder is None:  # before the hours that it may take
        output.say("note: the results are not kept; --output FOLDER keeps them")
    data = data_config(target)
    if data is not None and data.format == "chat":
        output.say("note: trained on conversations, and scored on lm-eval's plain prompts, without the chat template")
    request = EvalRequest(
        tasks=tuple(tasks),
        batch_size=options.batch_size or eval_config(target).batch_size,
        data_dir=options.data_dir,
        include_paths=tuple(options.include_paths),
        compare_base=compare_base,
    )
    loaded_tasks = load_request(request, accelerator=accelerator, log=output.say)  # quick beside the model
    loaded = load_target(
        target, options.dtype, base_model=options.base_model, allow_other_base=options.allow_other_base
    )
    if loaded.is_on_other_base and folder == results_dir(target):
        folder = None
        output.say("note: scores on another base are not kept with the run's own; --output FOLDER keeps them")

    def keep(results: dict[str, Any]) -> None:
        if accelerator.is_main_process and folder is not None:
            _write(results, target, folder, output)

    with output.counter("requests") as on_progress:
        return score(
            loaded.model,
            loaded.tokenizer,
            request,
            tasks=loaded_tasks,
            accelerator=accelerator,
            adapter_sha256=loaded.adapter_sha256,
            base_fingerprint=loaded.base_fingerprint,
            on_task=keep,
            log=output.say,
            on_progress=on_progress,
        )


def _write(results: dict[str, Any], target: Target, folder: Path, output: Output) -> None:
    """Write results, and with those of a run's own folder its report."""
    from dude_cli.evaluation import write_results
    from dude_cli.report import write_report_if_possible
    from dude_cli.target import results_dir

    for path in write_results(results, folder):
        output.say(f"wrote {path}")
    if target.path is not None and folder == results_dir(target):
        write_report_if_possible([target.path], target.path / "report.html", output.say)


def _given(**values: int | None) -> dict[str, int]:
    return {name: value for name, value in values.items() if value is not None}
