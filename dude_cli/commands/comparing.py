"""What `dude eval --compare` does: two results, or the scores of two targets, on the same questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dude_cli.commands.scoring import (
    EvalOptions,
    Side,
    all_scored,
    as_asked,
    asked_tasks,
    find_side,
    no_task,
    stored_tasks,
)
from dude_cli.config import DataSource, EvalTask
from dude_cli.console import Output
from dude_cli.errors import UsageError


def compare(names: tuple[str, str], options: EvalOptions, *, target_name: str | None, output: Output) -> None:
    """Compare two results, or the scores of two runs, adapters or models, and show what differs.

    Raises UsageError for a target or a base beside the two.
    """
    option = next((name for name in names if name.startswith("--")), None)
    if option is not None:
        raise UsageError(f"--compare takes two names, and one of them is {option}", where="--compare", fix="give both")
    if target_name is not None or options.compare_base:
        what = f"`{target_name}`" if target_name is not None else "--base"
        raise UsageError(
            f"--compare takes the two that it names, and {what} is given too",
            where="--compare",
            fix="leave it out; a model's folder or hub name may be one of the two",
        )
    sides = [_side(name, options, place) for name, place in zip(names, "ab", strict=True)]
    tasks = _compared_tasks(sides, options)
    is_said = options.task_names or options.rows or any(side.scores for side in sides)
    if tasks and not is_said:
        output.say(f"comparing on the tasks of a config: {_shown(tasks)}")
    tasks = tasks or _stored_by_both(sides, options, output)
    if any(task.apply_chat_template for task in tasks):
        _refuse_other_templates(sides, options)
    with all_scored(sides, tasks, options, output) as output:
        _show(names, [tuple(side.scores[task.name] for side in sides) for task in tasks], output)


def _side(name: str, options: EvalOptions, place: str) -> Side:
    from dude_cli.evaluation import read_results, requested_task

    if Path(name).is_file():
        results = read_results(Path(name))
        return Side(name, scores={requested_task(results).name: results})
    return find_side(name, options, options.output_dir and options.output_dir / place)


def _compared_tasks(sides: Sequence[Side], options: EvalOptions) -> list[EvalTask]:
    """The task of a result file, or those asked for; there may be none.

    Raises UsageError if the options contradict a result file.
    """
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
            "--task": (" ".join(options.task_names) or None, None if task.rows else task.name),
            "--rows": (_paths(options.rows), _paths(task.rows or ())),
            "--num-fewshot": (options.num_fewshot, task.num_fewshot),
            "--limit": (options.limit, task.limit),
            "--apply-chat-template": (options.apply_chat_template or None, task.apply_chat_template),
            "--system-instruction": (options.system_instruction, task.system_instruction),
        }
        for option, (asked, known) in pairs.items():
            if asked not in (None, known):
                raise UsageError(
                    f"{option} is {asked}, and in the result file it is {'not given' if known is None else known}",
                    where=name,
                    fix=f"leave {option} out, or give a run, an adapter or a model in place of the file",
                )
    return list(found.values())[:1] or asked_tasks(sides, options)


def _paths(sources: Sequence[DataSource]) -> str | None:
    return " ".join(source.path for source in sources) or None


def _stored_by_both(sides: Sequence[Side], options: EvalOptions, output: Output) -> list[EvalTask]:
    """The tasks that both have scores of, asked alike; one of each name, which is that with the most questions.

    Raises UsageError if there is none.
    """
    stored = [stored_tasks(side, options) for side in sides]
    common = [task for task in stored[0] if all(task in tasks for tasks in stored[1:])]
    if not common:
        has = [f"{side.name} has scores of {_shown(tasks)}" for side, tasks in zip(sides, stored, strict=True)]
        raise no_task(sides, f", and the two have none in common that is scored already: {', '.join(has)}")
    # The last one of a name stays: in plain text rather than in the chat template, with all questions rather than some.
    common.sort(key=lambda task: (not task.apply_chat_template, task.limit is None, task.limit or 0))
    chosen = {task.name: task for task in common}
    tasks = sorted(chosen.values(), key=lambda task: task.name)
    left_out = [task for task in common if task not in tasks]
    output.say(f"comparing what both have: {_shown(tasks)}")
    if left_out:
        output.say(f"left out: {_shown(left_out)}; --task and its settings name one")
    return [as_asked(task, options) for task in tasks]


def _shown(tasks: Sequence[EvalTask]) -> str:
    """Tasks with the settings that they were asked with, in words."""
    return ", ".join(f"{task.name} ({', '.join(_settings(task))})" for task in tasks) or "none"


def _settings(task: EvalTask) -> list[str]:
    from dude_cli.evaluation import form_of

    found = {
        f"{task.num_fewshot} examples": task.num_fewshot is not None,
        f"first {task.limit}": task.limit is not None,
        str(form_of(task.model_dump())): task.apply_chat_template,
    }
    return [text for text, is_set in found.items() if is_set] or ["all questions"]


def _refuse_other_templates(sides: Sequence[Side], options: EvalOptions) -> None:
    """Raise UsageError unless the prompts of all sides are in one chat template: before hours of scoring."""
    from dude_cli.evaluation import chat_template
    from dude_cli.target import target_tokenizer

    targets = [side.target for side in sides if side.target is not None]
    templates = [chat_template(target_tokenizer(target, options.loading)) for target in targets]
    templates += [results["chat_template"] for side in sides if side.target is None for results in side.scores.values()]
    if len(set(templates)) > 1:
        raise UsageError(
            "the two have different chat templates, so they are not asked the same questions",
            where="--compare, --apply-chat-template",
            fix="compare them in plain text",
        )


def _show(names: tuple[str, str], pairs: Sequence[tuple[dict[str, Any], ...]], output: Output) -> None:
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
    output.result(comparison_shown(comparisons, *names, one_line=not output.out.is_terminal), document)
