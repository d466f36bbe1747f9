"""What `dude eval` does with one target: score it, but for what is scored already."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dude_cli.config import DataSource, EvalTask
from dude_cli.console import Output
from dude_cli.errors import DataError, UsageError
from dude_cli.system.launch import ranks_to_start, run_ranks
from dude_cli.target import AS_TRAINED, Loading

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dude_cli.evaluation import LoadedTask, RowReader
    from dude_cli.target import Target


# A rank waits for the others at the end of a task, and while the main one downloads data and computes errors.
RANKS_WAIT_S = 6 * 3600.0


@dataclass(frozen=True)
class EvalOptions:
    """The options of `dude eval` that say how a target is scored; None and empty ones leave it to the target."""

    task_names: Sequence[str] = ()
    rows: Sequence[DataSource] = ()  # of the user's own
    num_fewshot: int | None = None
    limit: int | None = None
    apply_chat_template: bool = False
    system_instruction: str | None = None
    batch_size: int | None = None
    data_dir: Path | None = None
    include_paths: Sequence[Path] = ()
    output_dir: Path | None = None
    loading: Loading = AS_TRAINED
    num_processes: int | None = None
    compare_base: bool = False
    rescore: bool = False


@dataclass
class Side:
    """What is scored, or one of two that are compared; of a result file there is neither target nor folder."""

    name: str
    target: Target | None = None
    folder: Path | None = None  # where its results go
    stored: dict[str, dict[str, Any]] = field(default_factory=dict)  # what the folder has of it, by task
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)  # by task


def evaluate(target_name: str | None, options: EvalOptions, output: Output) -> None:
    """Score a run, an adapter or a model with lm-eval, show the table, write the results."""
    side = find_side(target_name, options, options.output_dir)
    tasks = asked_tasks([side], options)
    if not tasks:
        raise no_task([side])
    _show_scores(side, tasks, options, output)


def evaluate_tasks(target: Target, tasks: Sequence[EvalTask], options: EvalOptions, output: Output) -> None:
    """Score a target on these tasks, whatever `options` says of tasks; show the table, write the results."""
    side = Side(str(target), target, _results_folder(target, options.output_dir))
    _show_scores(side, tasks, options, output)


def _show_scores(side: Side, tasks: Sequence[EvalTask], options: EvalOptions, output: Output) -> None:
    from dude_cli.evaluation import join_results, plain_results, results_table

    with all_scored([side], tasks, options, output) as output:
        results = join_results(side.scores[task.name] for task in tasks)
        output.result(results_table(results, one_line=not output.out.is_terminal), plain_results(results))


def find_side(name: str | None, options: EvalOptions, output_dir: Path | None) -> Side:
    """The run, adapter or model of that name; None is the newest run."""
    from dude_cli.target import find_target

    target = find_target(name)
    if target.kind == "model":  # nothing of it is stored
        _check(target, (), options)
    return Side(name or target.name, target, _results_folder(target, output_dir))


def asked_tasks(sides: Sequence[Side], options: EvalOptions) -> list[EvalTask]:
    """The tasks asked for, else those of the config of the first run that has some; there may be none.

    A name may be that of rows in a run's config.
    """
    from dude_cli.target import eval_config

    _check_asked(options)
    targets = [side.target for side in sides if side.target is not None]
    configs = [eval_config(target).tasks for target in targets]
    if options.task_names or options.rows:
        own = {task.name: task for tasks in configs for task in tasks if task.rows is not None}
        named = [own.get(name) or EvalTask(name=name) for name in options.task_names]
        pairs = zip(_names_of(options.rows), options.rows, strict=True)
        given = [EvalTask(name=name, rows=[source]) for name, source in pairs]
        return [as_asked(task, options) for task in (*named, *given)]
    return [as_asked(task, options) for task in next(filter(None, configs), [])]


def _check_asked(options: EvalOptions) -> None:
    """Raise UsageError for names and a text that say nothing, and for what is asked twice."""
    names = [*options.task_names, *_names_of(options.rows)]
    for name in names:
        if not name.strip():
            raise UsageError("a name is empty", where="--task, --rows", fix="name a task, or a file of rows")
        if names.count(name) > 1:
            fix = "give it once; in a config, `eval.tasks`, rows may have another name"
            raise UsageError(f"`{name}` is given twice", where="--task, --rows", fix=fix)
    for name in options.task_names:
        if "," in name:  # as lm-eval's own --tasks takes them
            repeated = " ".join(f"--task {part.strip()}" for part in name.split(",") if part.strip())
            raise UsageError("--task names one task", where=f"--task {name}", fix=f"write `{repeated}`")
    if options.system_instruction is not None and not options.system_instruction.strip():
        raise UsageError("it is empty", where="--system-instruction", fix="leave it out, or say something")


def _names_of(sources: Sequence[DataSource]) -> list[str]:
    """What rows that are given as options are called in tables and file names: as their file, or as its whole path."""
    short = [_name_of(source, Path(source.path).resolve().name) for source in sources]
    pairs = zip(short, sources, strict=True)
    return [name if short.count(name) == 1 else _name_of(source, source.path) for name, source in pairs]


def _name_of(source: DataSource, place: str) -> str:
    return " ".join(filter(None, (place, source.name, source.split if source.split != "train" else None)))


def no_task(sides: Sequence[Side], more: str = "") -> UsageError:
    """The error where nothing says what to score."""
    return UsageError(
        f"no task to evaluate on{more}",
        where=", ".join(str(side.target) for side in sides),
        fix="name one, such as --task mmlu, or set eval.tasks in the config",
    )


def stored_tasks(side: Side, options: EvalOptions) -> list[EvalTask]:
    """The tasks that a side's folder has scores of, of its adapter as it would be loaded, each as it was asked."""
    from dude_cli.evaluation import read_results, requested_task, result_files

    paths = [] if side.folder is None else result_files(side.folder)
    tasks = [requested_task(read_results(path, samples=False)) for path in paths]
    return [task for task in tasks if _stored(side, [task], options)]


def as_asked(task: EvalTask, options: EvalOptions) -> EvalTask:
    """A task with what the options say of it; a system's message is one of those that are asked in chat.

    Of the user's own rows they say how many: their prompts are those of the training.
    """
    if task.rows is not None:
        return task if options.limit is None else task.model_copy(update={"limit": options.limit})
    in_chat = task.apply_chat_template or options.apply_chat_template
    given = {
        "num_fewshot": options.num_fewshot,
        "limit": options.limit,
        "apply_chat_template": options.apply_chat_template or None,
        "system_instruction": options.system_instruction if in_chat else None,
    }
    return task.model_copy(update={name: value for name, value in given.items() if value is not None})


@contextmanager
def all_scored(
    sides: Sequence[Side], tasks: Sequence[EvalTask], options: EvalOptions, output: Output
) -> Iterator[Output]:
    """Within, each side has the scores of all tasks; yields the output of this rank.

    What a side's folder has is taken, and the rest scored and written there. Whatever can be known to be wrong with a
    side is told before any is scored.
    """
    from dude_cli.evaluation import refuse_other_questions
    from dude_cli.system.memory import free_models
    from dude_cli.system.runtime import part_ranks

    _refuse_meaningless_options(tasks, options)
    notes = _take_stored(sides, tasks, options)
    for one, other in pairwise(sides):
        for task in one.scores.keys() & other.scores.keys():
            refuse_other_questions(one.scores[task], other.scores[task])
    # What is missing is known before any of it is written, so all ranks of an evaluation agree on it.
    missing = [[task for task in tasks if task.name not in side.scores] for side in sides]
    for side, own in zip(sides, missing, strict=True):
        if side.target is not None and own:
            _check(side.target, own, options)
    accelerator = _eval_ranks(options) if any(missing) else None
    is_main = os.environ.get("RANK", "0") == "0" if accelerator is None else accelerator.is_main_process
    output = output.on_rank(is_main)
    output.say(*notes)
    own_rows = [
        _own_rows(side.target, own, options, accelerator, output) if side.target is not None else []
        for side, own in zip(sides, missing, strict=True)
    ]
    for side, own, rows in zip(sides, missing, own_rows, strict=True):
        if accelerator is not None and side.target is not None and own:
            _score(side, side.target, own, rows, options, accelerator, output)
            free_models()  # before the next one is loaded
    yield output
    if accelerator is not None:
        part_ranks()


def _refuse_meaningless_options(tasks: Sequence[EvalTask], options: EvalOptions) -> None:
    """Raise UsageError for options that say how benchmarks are asked where none is asked so."""
    of_benchmarks = {
        "--num-fewshot": options.num_fewshot is not None,
        "--apply-chat-template": options.apply_chat_template,
        "--system-instruction": options.system_instruction is not None,
    }
    found = [option for option, is_given in of_benchmarks.items() if is_given]
    if found and all(task.rows is not None for task in tasks):
        raise UsageError(
            "rows of your own are asked as the rows of the training are", where=", ".join(found), fix="leave it out"
        )
    of_chats = {
        "--chat-template, --chat-template-kwargs": options.loading.changes_chat_template,
        "--system-instruction": options.system_instruction is not None,
    }
    found = [option for option, is_given in of_chats.items() if is_given]
    if found and not any(task.apply_chat_template or task.rows is not None for task in tasks):
        raise UsageError(
            "the questions are asked in plain text, without a chat template",
            where=", ".join(found),
            fix="add --apply-chat-template, or leave these out",
        )


def _take_stored(sides: Sequence[Side], tasks: Sequence[EvalTask], options: EvalOptions) -> list[str]:
    """Take over the scores that the sides' folders have; returns what is to be said of it.

    A stored score is compared with its task as it is now, but where all of several sides have one: these are compared
    with each other, which needs no data, unless another chat template or a file of rows is given.
    """
    from dude_cli.evaluation import changes_since
    from dude_cli.target import target_tokenizer

    notes = []
    for side in sides:
        side.stored = _stored(side, tasks, options)
        if not options.rescore:
            side.scores |= {
                name: have for name, have in side.stored.items() if "base" in have or not options.compare_base
            }
    doubtful = [
        task
        for task in tasks
        if len(sides) == 1
        or not all(task.name in side.scores for side in sides)
        or (task.apply_chat_template and options.loading.changes_chat_template)
        or task.name in _names_of(options.rows)  # a file may have changed, or be another one of that name
    ]
    doubtful = [task for task in doubtful if any(task.name in side.stored for side in sides)]
    benchmarks = _loaded([task for task in doubtful if task.rows is None], options)
    for side in sides:
        if side.target is None:
            continue
        rows = [task for task in doubtful if task.rows is not None and task.name in side.stored]
        for found in (*benchmarks, *_loaded(rows, options, side.target)):
            name = found.request.name
            if name not in side.stored:
                continue
            in_chat = found.request.apply_chat_template
            tokenizer = target_tokenizer(side.target, options.loading) if in_chat else None
            changes = changes_since(side.stored[name], found, tokenizer)
            if changes:
                notes.append(f"{side.name}: {name} is scored again: {'; '.join(changes)}")
                side.scores.pop(name, None)
                del side.stored[name]
    notes += [
        f"{side.name}: {name} was scored before; --rescore scores it again"
        for side in sides
        for name in side.scores
        if side.target is not None
    ]
    return notes


def _own_rows(
    target: Target, tasks: Sequence[EvalTask], options: EvalOptions, accelerator: Accelerator | None, output: Output
) -> list[LoadedTask]:
    """Those of the tasks that are rows of the user's own, read by `target`; the user is told what is to be known.

    Raises UsageError for a chat template that none of them goes through.
    """
    rows = [task for task in tasks if task.rows is not None]
    found = _loaded(rows, options, target, accelerator, output)
    in_chat = any(task.apply_chat_template for task in tasks)
    if rows and options.loading.changes_chat_template and not in_chat and not any(_are_chats(task) for task in found):
        raise UsageError(
            f"{', '.join(task.name for task in rows)}: these rows are no conversations, and have no template",
            where="--chat-template, --chat-template-kwargs",
            fix="leave these out",
        )
    return found


def _are_chats(found: LoadedTask) -> bool:
    return any(task.are_chats for task in found.tasks.values())


def _loaded(
    tasks: Sequence[EvalTask],
    options: EvalOptions,
    target: Target | None = None,
    accelerator: Accelerator | None = None,
    output: Output | None = None,
) -> list[LoadedTask]:
    """Tasks with their data; `target` reads those that are rows of the user's own. Without an output all is quiet."""
    from dude_cli.evaluation import EvalRequest, load_request

    if not tasks:
        return []
    request = EvalRequest(tuple(tasks), data_dir=options.data_dir, include_paths=tuple(options.include_paths))
    if target is None:
        return load_request(request)
    said = {} if output is None else {"log": output.say, "warn": output.warn}
    try:
        return load_request(request, reader=_reader(target, options), accelerator=accelerator, **said)
    except DataError as error:  # of two that are compared it may fit one alone
        where = ", ".join(filter(None, [error.where, f"read for {target}"]))
        raise DataError(error.what, where=where, fix=error.fix) from error


def _reader(target: Target, options: EvalOptions) -> RowReader:
    """How a target reads rows of the user's own."""
    from dude_cli.evaluation import RowReader
    from dude_cli.target import context_length, data_config, run_of, target_tokenizer
    from dude_cli.training.trained_rows import trained_rows

    run = run_of(target)
    known = None if run is None else trained_rows(run)
    tokenizer = target_tokenizer(target, options.loading)
    return RowReader(tokenizer, data_config(target), context_length(target, options.loading), known)


def _stored(side: Side, tasks: Sequence[EvalTask], options: EvalOptions) -> dict[str, dict[str, Any]]:
    """The results that a side's folder has of its adapter, by task."""
    from dude_cli.adapter import read_adapter_config
    from dude_cli.evaluation import find_results

    adapter_dir = None if side.target is None else side.target.adapter_dir
    # Which base another one may be is known when it is loaded.
    if side.folder is None or adapter_dir is None or options.loading.allow_other_base:
        return {}
    saved = read_adapter_config(adapter_dir)
    found = {
        task.name: find_results(
            side.folder,
            task,
            adapter_sha256=saved.sha256,
            base_fingerprint=saved.base_fingerprint,
            dtype=options.loading.dtype or saved.base_dtype,
        )
        for task in tasks
    }
    return {name: results for name, results in found.items() if results is not None}


def _results_folder(target: Target, chosen: Path | None) -> Path | None:
    """Where results go, `chosen` or a run's own folder. Raises UsageError if that is a link to somewhere else."""
    from dude_cli.target import results_dir
    from dude_cli.training.run_dir import REPORT_FILES, refuse_links

    if chosen is None and target.run_dir is not None:
        refuse_links(target.run_dir, ["eval", *REPORT_FILES])
    return chosen or results_dir(target)


def _check(target: Target, tasks: Sequence[EvalTask], options: EvalOptions) -> None:
    from dude_cli.evaluation import chat_template, check_system_instruction
    from dude_cli.target import check_target, target_tokenizer

    check_target(target, options.loading)
    if any(task.apply_chat_template for task in tasks):
        tokenizer = target_tokenizer(target, options.loading)
        chat_template(tokenizer)
        for task in tasks:
            check_system_instruction(tokenizer, task)


def _eval_ranks(options: EvalOptions) -> Accelerator:
    """This rank, or the start of all of them, which does not come back."""
    from dude_cli.system.runtime import make_accelerator

    count = ranks_to_start(options.num_processes)
    if count > 1:
        run_ranks(count)
    return make_accelerator(RANKS_WAIT_S)


def _score(
    side: Side,
    target: Target,
    tasks: Sequence[EvalTask],
    own_rows: Sequence[LoadedTask],
    options: EvalOptions,
    accelerator: Accelerator,
    output: Output,
) -> None:
    """Load a target and score it on `tasks`, of which `own_rows` are loaded already.

    The results of each task are written to its folder, if there is one, at once.
    """
    from dude_cli.evaluation import EvalRequest, load_request
    from dude_cli.evaluation import evaluate as score
    from dude_cli.target import data_config, eval_config, load_target, results_dir

    folder = side.folder
    output.say(f"evaluating {target}")
    if folder is None:  # before the hours that it may take
        output.say("note: the results are not kept; --output FOLDER keeps them")
    data = data_config(target)
    plain = [task.name for task in tasks if task.rows is None and not task.apply_chat_template]
    if data is not None and data.trains_on_chats and plain:
        output.say(
            f"note: trained on conversations, and {', '.join(plain)} scored on lm-eval's plain prompts; "
            "--apply-chat-template asks in the chat template"
        )
    request = EvalRequest(
        tasks=tuple(tasks),
        batch_size=options.batch_size or eval_config(target).batch_size,
        earlier_batch_size=options.batch_size is None,
        data_dir=options.data_dir,
        include_paths=tuple(options.include_paths),
        compare_base=options.compare_base,
        earlier=side.stored,
        rescore=options.rescore,
    )
    benchmarks = replace(request, tasks=tuple(task for task in tasks if task.rows is None))
    # Quick beside the model.
    loaded_tasks = load_request(benchmarks, accelerator=accelerator, log=output.say) if benchmarks.tasks else []
    loaded = load_target(target, options.loading)
    if loaded.is_on_other_base and folder == results_dir(target):
        folder = None
        output.say("note: scores on another base are not kept with the run's own; --output FOLDER keeps them")

    def keep(results: dict[str, Any]) -> None:
        (task,) = results["requested"]
        side.scores[task] = results
        if accelerator.is_main_process and folder is not None:
            _write(results, target, folder, output)

    with output.counter("requests") as on_progress:
        score(
            loaded.model,
            loaded.tokenizer,
            request,
            tasks=[*loaded_tasks, *own_rows],
            accelerator=accelerator,
            adapter_sha256=loaded.adapter_sha256,
            base_fingerprint=loaded.base_fingerprint,
            on_task=keep,
            log=output.say,
            on_progress=on_progress,
        )


def _write(results: dict[str, Any], target: Target, folder: Path, output: Output) -> None:
    """Write one task's results, and with those of a run's own folder its report."""
    from dude_cli.evaluation import replaced_by, write_results
    from dude_cli.report import write_report_if_possible
    from dude_cli.target import results_dir

    output.say(*filter(None, [replaced_by(results, folder)]))
    for path in write_results(results, folder):
        output.say(f"wrote {path}")
    if target.path is not None and folder == results_dir(target):
        write_report_if_possible([target.path], target.path / "report.html", output.say)
