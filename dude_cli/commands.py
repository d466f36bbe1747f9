"""What each verb does, in order. `cli.py` parses the command line and calls one of these."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dude_cli import files
from dude_cli.config import Config, EvalTask, load_config
from dude_cli.console import Output
from dude_cli.errors import UsageError
from dude_cli.launch import ranks_to_start, run_ranks

if TYPE_CHECKING:
    from accelerate import Accelerator

    from dude_cli.reproduce import Job
    from dude_cli.target import Target


def init(
    config_path: Path,
    overrides: Sequence[str],
    *,
    smoke: bool,
    estimate: bool,
    num_processes: int | None,
    output: Output,
) -> None:
    """Check everything, decompose, save the initial adapter, and show what a training would do.

    With `estimate` only predict the memory that it would take.
    """
    config = load_config(config_path, overrides)  # before the imports: a mistake in it is told at once
    count = ranks_to_start(num_processes)
    if count > 1 and not estimate:
        run_ranks(count)
    config = _resolved(config, smoke=smoke)
    from dude_cli.decompositions import check_decompositions
    from dude_cli.init_report import init_report
    from dude_cli.prepare import prepare
    from dude_cli.run_dir import check_run_dir, is_finished_run
    from dude_cli.runtime import make_accelerator, part_ranks

    if estimate:
        _estimate(config, count, output)
        return
    accelerator = make_accelerator()
    output = output.on_rank(accelerator.is_main_process)
    check_run_dir(config)
    is_finished = is_finished_run(config)
    accelerator.wait_for_everyone()  # before any rank writes, all have looked at the same folder
    if is_finished:
        raise UsageError(
            f"{config.output_dir} holds a finished run",
            where="output_dir",
            fix="choose another, or `dude train --overwrite`",
        )
    prepared = prepare(config, accelerator, output.say, counter=partial(output.counter, every=32))
    output.say(*prepared.data.warnings())
    if accelerator.is_main_process:
        checked = [] if config.adapter.init_from is not None else check_decompositions(prepared.model)
        document = prepared.report() | {"checked_decompositions": [asdict(layer) for layer in checked]}
        output.result(init_report(prepared, checked), document)
    part_ranks()


def _estimate(config: Config, count: int, output: Output) -> None:
    from dude_cli.init_report import memory_table
    from dude_cli.memory import device_bytes
    from dude_cli.prepare import estimate
    from dude_cli.runtime import make_accelerator

    accelerator = make_accelerator()
    forecast, length_source = estimate(config, max(count, accelerator.num_processes))
    device, size = str(accelerator.device), device_bytes(accelerator.device)
    document = forecast.report() | {"length_source": length_source, "device": device, "device_bytes": size}
    output.result(memory_table(forecast, device, size, length_source), document)


def train(
    config_path: Path,
    overrides: Sequence[str],
    *,
    smoke: bool,
    overwrite: bool,
    num_processes: int | None,
    output: Output,
) -> None:
    """Prepare what is not prepared, train, and write the adapter."""
    config = load_config(config_path, overrides)  # before the imports, as in `init`
    count = ranks_to_start(num_processes)
    if count > 1:
        run_ranks(count)
    config = _resolved(config, smoke=smoke, overwrite=overwrite)
    from dude_cli.init_report import init_report, memory_line
    from dude_cli.metrics import run_summary
    from dude_cli.prepare import prepare
    from dude_cli.run_dir import check_run_dir, is_finished_run
    from dude_cli.runtime import make_accelerator, part_ranks, stop_signals
    from dude_cli.train import train as run_training

    accelerator = make_accelerator()
    output = output.on_rank(accelerator.is_main_process)
    check_run_dir(config)
    is_finished = not overwrite and is_finished_run(config)
    accelerator.wait_for_everyone()  # before any rank writes, all have looked at the same folder
    if is_finished:
        output.say(f"{config.output_dir} holds this run, finished; --overwrite starts anew")
        summary = run_summary(config)
    else:
        counter = partial(output.counter, every=32)
        prepared = prepare(config, accelerator, output.say, counter=counter, overwrite=overwrite)
        output.say(*prepared.data.warnings())
        if not prepared.reused:
            output.progress.print(init_report(prepared))
        with stop_signals() as stop:
            summary = run_training(prepared, accelerator, output.progress, stop)
        if accelerator.is_main_process:
            _update_report(config.run_dir, output)
    if accelerator.is_main_process:
        shown = [f"adapter: {config.run_dir / 'adapter'}", f"score it: dude eval {config.output_dir}"]
        if (config.run_dir / "report.html").exists():
            shown.append(f"report: {config.run_dir / 'report.html'}")
        output.result("\n".join([*shown, *memory_line(summary)]), summary)
    part_ranks()


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
    from dude_cli.evaluation import plain_results, results_table
    from dude_cli.runtime import part_ranks
    from dude_cli.target import find_target, results_dir

    target = find_target(target_name)
    tasks = _eval_tasks(target, options)
    accelerator = _eval_ranks(options)
    output = output.on_rank(accelerator.is_main_process)
    folder = options.output_dir or results_dir(target)
    results = _score(target, tasks, options, folder, accelerator, output, compare_base=compare_base)
    if accelerator.is_main_process:
        output.result(results_table(results), plain_results(results))
    part_ranks()


def _compare(names: tuple[str, str], options: EvalOptions, output: Output) -> None:
    """Compare two results, or the scores of two runs, adapters or models, on the same questions.

    A run's results are read from its eval/ if they were scored with these options, and else made.
    """
    from dude_cli.evaluation import read_results, requested_task, task_results
    from dude_cli.runtime import part_ranks
    from dude_cli.target import find_target, results_dir

    files = {name: read_results(Path(name)) for name in names if Path(name).is_file()}
    targets = {name: find_target(name) for name in names if name not in files}
    tasks = [requested_task(results) for results in files.values()][:1] or _eval_tasks(targets[names[0]], options)
    folders = [None if options.output_dir is None else options.output_dir / place for place in "ab"]
    sides: list[dict[str, Any]] = []
    for name, folder in zip(names, folders, strict=True):
        if name in files:
            sides.append({tasks[0].name: files[name]})
        else:
            sides.append(_saved(targets[name], tasks, options, folder or results_dir(targets[name])))
    # What is missing is known before any of it is written, so all ranks of an evaluation agree on it.
    missing = [[task for task in tasks if task.name not in side] for side in sides]
    accelerator = _eval_ranks(options) if any(missing) else None
    is_main = accelerator is None or accelerator.is_main_process
    output = output.on_rank(is_main)
    for name, folder, side, own in zip(names, folders, sides, missing, strict=True):
        output.say(*(f"{name}: {task} was scored before" for task in side if name in targets))
        if accelerator is not None and own:
            results = _score(targets[name], own, options, folder or results_dir(targets[name]), accelerator, output)
            side.update({task.name: task_results(results, task.name) for task in own})
    if is_main:
        _show_comparison(names, [tuple(side[task.name] for side in sides) for task in tasks], output)
    if accelerator is not None:
        part_ranks()


def _show_comparison(names: tuple[str, str], pairs: Sequence[tuple[dict[str, Any], ...]], output: Output) -> None:
    from dude_cli.evaluation import compare_results, comparison_shown, different_settings

    comparisons = [comparison for a, b in pairs for comparison in compare_results(a, b)]
    notes = list(dict.fromkeys(note for a, b in pairs for note in different_settings(a, b)))
    output.say(*(f"note: {note}" for note in notes))
    a, b = (
        {"name": name, "adapter_sha256": side["adapter_sha256"]} for name, side in zip(names, pairs[0], strict=True)
    )
    document = {"a": a, "b": b, "notes": notes, "comparisons": [asdict(comparison) for comparison in comparisons]}
    output.result(comparison_shown(comparisons, *names), document)


def _saved(
    target: Target, tasks: Sequence[EvalTask], options: EvalOptions, folder: Path | None
) -> dict[str, dict[str, Any]]:
    """The results that `folder` has of this target's adapter, by task."""
    from dude_cli.adapter import read_adapter_config
    from dude_cli.evaluation import find_results

    # A score is known to be of this target by its adapter's hash, which says nothing of another base.
    if folder is None or target.adapter_dir is None or options.base_model is not None or options.allow_other_base:
        return {}
    sha256 = read_adapter_config(target.adapter_dir).sha256
    found = {task.name: find_results(folder, task, adapter_sha256=sha256, dtype=options.dtype) for task in tasks}
    return {name: results for name, results in found.items() if results is not None}


def _eval_tasks(target: Target, options: EvalOptions) -> list[EvalTask]:
    """The tasks asked for, else those of the run's config."""
    from dude_cli.target import eval_config

    given = _given(num_fewshot=options.num_fewshot, limit=options.limit)
    tasks = [EvalTask(name=name, **given) for name in options.task_names] or [
        task.model_copy(update=given) for task in eval_config(target).tasks
    ]
    if not tasks:
        raise UsageError(
            "no task to evaluate on",
            where=str(target),
            fix="name one, such as --task mmlu, or set eval.tasks in the config",
        )
    return tasks


def _eval_ranks(options: EvalOptions) -> Accelerator:
    """This rank, or the start of all of them, which does not come back."""
    from dude_cli.runtime import make_accelerator

    count = ranks_to_start(options.num_processes)
    if count > 1:
        run_ranks(count)
    return make_accelerator()


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
    """Load a target, score it, and write the results to `folder`, if there is one, and the report of a run."""
    from dude_cli.evaluation import EvalRequest, write_results
    from dude_cli.evaluation import evaluate as score
    from dude_cli.target import eval_config, load_target, results_dir

    output.say(f"evaluating {target}")
    request = EvalRequest(
        tasks=tuple(tasks),
        batch_size=options.batch_size or eval_config(target).batch_size,
        data_dir=options.data_dir,
        include_paths=tuple(options.include_paths),
        compare_base=compare_base,
    )
    loaded = load_target(
        target, options.dtype, base_model=options.base_model, allow_other_base=options.allow_other_base
    )
    with output.counter("requests") as on_progress:
        results = score(
            loaded.model,
            loaded.tokenizer,
            request,
            accelerator=accelerator,
            adapter_sha256=loaded.adapter_sha256,
            log=output.say,
            on_progress=on_progress,
        )
    if accelerator.is_main_process and folder is not None:
        for path in write_results(results, folder):
            output.say(f"wrote {path}")
        if target.path is not None and folder == results_dir(target):
            _update_report(target.path, output)
    return results


def generate(
    target_name: str | None,
    prompts: Sequence[str],
    *,
    interactive: bool,
    raw: bool,
    compare_base: bool,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    dtype: str | None,
    base_model: str | None,
    allow_other_base: bool,
    output: Output,
) -> None:
    """Answer prompts, or the lines of a conversation, with a run, an adapter or a model."""
    from dude_cli.conversation import Conversation, answer_prompts, converse, read_prompt
    from dude_cli.data import prompt_form
    from dude_cli.generate import Generator, Sampling
    from dude_cli.target import data_config, find_target, load_target

    if interactive == bool(prompts):
        what = "--prompt and --interactive exclude each other" if interactive else "there is nothing to answer"
        raise UsageError(what, where="--prompt", fix="give --prompt TEXT, or --prompt - to read it, or --interactive")
    if interactive and output.as_json:
        raise UsageError("a conversation is no JSON document", where="--json", fix="give --prompt TEXT with --json")
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    sampling.check()
    target = find_target(target_name)
    if compare_base and target.adapter_dir is None:
        raise UsageError(
            "the model has no adapter, so there is no base to compare it with",
            where="--base",
            fix="give a run or an adapter, or leave --base out",
        )
    texts = [read_prompt(text, raw=raw) for text in prompts]
    output.say(f"answering with {target}")
    loaded = load_target(target, dtype, base_model=base_model, allow_other_base=allow_other_base)
    form = prompt_form(loaded.tokenizer, data_config(target), raw=raw)
    output.say(f"prompt form: {form.description}")
    conversation = Conversation(Generator(loaded.model, loaded.tokenizer, form, sampling), compare_base=compare_base)
    if interactive:
        converse(conversation, output)
        return
    answers = answer_prompts(conversation, texts, output)
    if output.as_json:
        document = {"target": str(target), "adapter_sha256": loaded.adapter_sha256, "prompt_form": form.description}
        output.result("", document | {"sampling": asdict(sampling), "answers": answers})


def export(
    target_name: str,
    out: Path,
    *,
    kind: str,
    rank: int | None,
    max_error: float | None,
    dtype: str | None,
    base_model: str | None,
    allow_other_base: bool,
    output: Output,
) -> None:
    """Write a trained adapter as a merged model, a PEFT adapter or a plain LoRA, and say how exact it is."""
    from dude_cli.export import export_lora, export_merged, export_peft, export_shown
    from dude_cli.target import check_dtype, find_target, load_target

    _check_export_options(kind, rank, max_error, dtype)
    chosen = check_dtype(dtype)
    out = _new_folder(out)
    target = find_target(target_name)
    if target.adapter_dir is None:
        raise UsageError(
            f"`{target_name}` is no run and no adapter, so there is nothing to export",
            where=str(Path(target_name).absolute()) if target.path is None else target_name,
            fix="give the folder of a run or of an adapter",
        )
    output.say(f"loading {target}")
    loaded = load_target(target, None, base_model=base_model, allow_other_base=allow_other_base)
    if kind == "merged":
        report = export_merged(loaded, out, chosen or loaded.config.dtype)
    elif kind == "peft":
        report = export_peft(loaded, out)
    else:
        report = export_lora(loaded, out, rank=rank, max_error=max_error, say=output.say)
    output.result(export_shown(report), report.record())


def import_adapter(
    folder: Path,
    out: Path,
    *,
    base_model: str | None,
    initial: Path | None,
    quantization: str | None,
    dtype: str | None,
    output: Output,
) -> None:
    """Make an adapter of ours from PEFT's, and compare the two."""
    from dude_cli.export import import_shown, import_to, peft_base
    from dude_cli.model import check_vocabulary, load_model, load_tokenizer
    from dude_cli.runtime import best_device, quiet_libraries
    from dude_cli.target import check_dtype

    chosen = check_dtype(dtype)
    out = _new_folder(out)
    quiet_libraries()
    config = peft_base(folder, base_model, chosen, quantization)
    output.say(f"loading {config.name_or_path} in {config.dtype}")
    model = load_model(config, best_device())
    # A trained adapter may bring a tokenizer with a chat template that the base has not.
    tokenizer = load_tokenizer(config, folder)
    check_vocabulary(model, tokenizer)
    report = import_to(model, tokenizer, config, folder, out, initial=initial)
    output.result(import_shown(report), report.record())


def _new_folder(out: Path) -> Path:
    """The absolute path of `out`. Raises UsageError unless nothing is there yet and a folder can be made there."""
    out = out.expanduser().absolute()
    is_empty = out.is_dir() and not out.is_symlink() and not any(out.iterdir())
    if os.path.lexists(out) and (not is_empty or out == Path.cwd()):
        raise UsageError(
            f"{out.name or out} is there already, and nothing is ever replaced", where=str(out), fix="name a new folder"
        )
    try:
        files.check_writable(out.parent)
    except OSError as error:
        raise UsageError(
            f"no folder can be made here: {error.strerror}", where=str(out.parent), fix="name another place"
        ) from error
    return out


def _check_export_options(kind: str, rank: int | None, max_error: float | None, dtype: str | None) -> None:
    """Refuse options that another format has, and two that say the same."""
    for name, value, wanted in (
        ("--rank", rank, "lora"),
        ("--max-error", max_error, "lora"),
        ("--dtype", dtype, "merged"),
    ):
        if value is not None and kind != wanted:
            raise UsageError(
                f"{name} is for --format {wanted} alone; an adapter is exported as it is, in float32",
                where=f"{name} {value}, --format {kind}",
                fix=f"leave {name} out, or use --format {wanted}",
            )
    if rank is not None and max_error is not None:
        raise UsageError(
            "--rank and --max-error both say how close the LoRA is to be", where="--rank, --max-error", fix="give one"
        )


def reproduce(
    recipe_path: Path,
    *,
    plan_only: bool,
    smoke: bool,
    jobs: int | None,
    output_dir: Path | None,
    data_dir: Path | None,
    output: Output,
) -> None:
    """Plan a recipe's runs, make those that are missing, score them, and judge the numbers."""
    from dude_cli import reproduce as recipes

    recipe, file = recipes.load_recipe(recipe_path)
    folder = output_dir or Path("runs") / "reproduce" / file.stem
    if smoke:
        recipe, folder = recipes.smoke_recipe(recipe), folder.with_name(f"{folder.name}-smoke")
    plan = recipes.make_plan(recipe, file, folder, smoke=smoke)
    if plan_only:
        from rich.console import Group

        shown = Group(recipes.plan_table(plan), "", recipes.plan_summary(plan))
        output.result(shown, recipes.plan_document(plan))
        return
    output.say(recipes.plan_summary(plan))
    places = recipes.slots(jobs, recipe.threads)
    result = recipes.reproduce(plan, places, reproduce_run, data_dir=data_dir, say=output.say)
    output.result(recipes.result_table(result), result.document())
    output.say(f"wrote {folder / 'report.md'} and report.json")
    recipes.check_result(result)


def reproduce_run(job: Job) -> None:
    """One run of a recipe, in a process of its own: `dude train`, then `dude eval` for each task that it lacks."""
    output = Output()
    if job.anew or not job.run.is_finished:
        train(job.config_path, [], smoke=job.run.is_smoke, overwrite=job.anew, num_processes=1, output=output)
    for task in job.missing_tasks():
        options = EvalOptions(
            task_names=[task.name],
            num_fewshot=task.num_fewshot,
            limit=task.limit,
            data_dir=job.data_dir,
            num_processes=1,
        )
        evaluate(str(job.run.folder), options, compare_base=job.base, compare_with=None, output=output)


def report(folders: Sequence[Path], out: Path | None, losses: Sequence[float], *, output: Output) -> None:
    """Write the page of some runs, and the same as Markdown beside it."""
    from dude_cli.report import write_report

    out = out or (folders[0] / "report.html" if len(folders) == 1 else Path("report.html"))
    if out.suffix != ".html":
        raise UsageError(
            f"the page is an HTML file, and `{out.name}` does not end in .html",
            where=f"--out {out}",
            fix=f"name it {out.with_suffix('.html').name}; the Markdown is written beside it",
        )
    document = write_report(folders, out, losses=losses)
    output.result(f"{document['html']}\n{document['markdown']}", document)


def _update_report(run_dir: Path, output: Output) -> None:
    """The page in the run's own folder. It is a picture of what is there: where it fails, nothing else is lost."""
    from dude_cli.report import write_report

    try:
        write_report([run_dir], run_dir / "report.html")
    except Exception as error:
        output.say(f"no report was written: {type(error).__name__}: {error}")


def list_shipped(output: Output) -> None:
    """The shipped configs and recipes, with what each is for."""
    from rich.table import Table

    from dude_cli import shipped

    found = shipped.list_shipped()
    table = Table.grid(padding=(0, 2))
    for name, description in found:
        table.add_row(name, description)
    output.result(table, [{"name": name, "description": description} for name, description in found])


def copy_shipped(name: str, dest: Path, output: Output) -> None:
    """Copy a shipped config or recipe, to edit it."""
    from dude_cli import shipped

    copied = shipped.copy_shipped(name, dest)
    output.result(f"copied to {copied}", {"path": str(copied)})


def _resolved(config: Config, *, smoke: bool, overwrite: bool = False) -> Config:
    """The config on the inputs of `--smoke`, and with what the adapter to continue from fixes."""
    from dude_cli.init_from import resolve_init_from

    if smoke:
        from dude_cli.runtime import make_accelerator
        from dude_cli.smoke import smoke_config, write_smoke_inputs

        accelerator = make_accelerator()
        if accelerator.is_main_process:
            write_smoke_inputs(config)
        accelerator.wait_for_everyone()
        config = smoke_config(config)
    return resolve_init_from(config, overwrite=overwrite)


def _given(**values: int | None) -> dict[str, int]:
    return {name: value for name, value in values.items() if value is not None}
