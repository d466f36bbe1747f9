"""What each verb does, in order; `cli.py` parses the command line and calls one.

`dude eval` is in `scoring.py`, `dude export` and `dude import` are in `exchanging.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from dude_cli.config import Config, load_config
from dude_cli.console import Output
from dude_cli.errors import UsageError
from dude_cli.launch import ranks_to_start, run_ranks

if TYPE_CHECKING:
    from dude_cli.reproduce import Job


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
    from dude_cli.run_dir import alone_in_run_dir, check_run_dir, is_finished_run
    from dude_cli.runtime import make_accelerator, part_ranks

    if estimate:
        _estimate(config, count, output)
        return
    accelerator = make_accelerator(config.train.distributed_timeout_s)
    output = output.on_rank(accelerator.is_main_process)
    with alone_in_run_dir(config, accelerator, output.say):
        check_run_dir(config)
        is_finished = is_finished_run(config)
        accelerator.wait_for_everyone()  # before any rank writes, all have looked at the same folder
        if is_finished:
            raise UsageError(
                f"{config.output_dir} holds a finished run",
                where="output_dir",
                fix="choose another, or `dude train --overwrite`",
            )
        prepared = prepare(config, accelerator, output.say, counter=output.counter, continues=False)
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
    allow_changes: bool,
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
    from dude_cli.ranks import stopping_together
    from dude_cli.report import write_report_if_possible
    from dude_cli.run_dir import alone_in_run_dir, changed_settings, check_run_dir, is_finished_run
    from dude_cli.runtime import make_accelerator, part_ranks, stop_signals
    from dude_cli.train import train as run_training

    accelerator = make_accelerator(config.train.distributed_timeout_s)
    output = output.on_rank(accelerator.is_main_process)
    with stopping_together(accelerator), alone_in_run_dir(config, accelerator, output.say):
        check_run_dir(config)
        is_finished = not overwrite and is_finished_run(config, allow_changes=allow_changes)
        changed = [] if overwrite else changed_settings(config)
        accelerator.wait_for_everyone()  # before any rank writes, all have looked at the same folder
        if is_finished:
            output.say(f"{config.output_dir} holds this run, finished; --overwrite starts anew")
            summary = run_summary(config)
        else:
            if changed:
                output.say(f"continuing with other settings: {', '.join(changed)}")
            prepared = prepare(
                config,
                accelerator,
                output.say,
                counter=output.counter,
                overwrite=overwrite,
                allow_changes=allow_changes,
            )
            output.say(*prepared.data.warnings())
            if not prepared.reused:
                output.progress.print(init_report(prepared))
            with stop_signals() as stop:
                summary = run_training(prepared, accelerator, output.progress, stop)
            if accelerator.is_main_process:
                write_report_if_possible([config.run_dir], config.run_dir / "report.html", output.say)
    if accelerator.is_main_process:
        shown = [f"adapter: {config.run_dir / 'adapter'}", f"score it: dude eval {config.output_dir}"]
        if (config.run_dir / "report.html").exists():
            shown.append(f"report: {config.run_dir / 'report.html'}")
        output.result("\n".join([*shown, *memory_line(summary)]), summary)
    part_ranks()


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
    from dude_cli.report import write_report_if_possible

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
    if result.finished:
        write_report_if_possible(result.finished, folder / "runs.html", output.say)
    recipes.check_result(result)


def reproduce_run(job: Job) -> None:
    """One run of a recipe, in a process of its own: `dude train`, then `dude eval` on the tasks that it lacks."""
    from dude_cli.scoring import EvalOptions, evaluate_tasks
    from dude_cli.target import find_target

    output = Output()
    if job.anew or not job.run.is_finished:
        train(
            job.config_path,
            [],
            smoke=job.run.is_smoke,
            overwrite=job.anew,
            allow_changes=False,
            num_processes=1,
            output=output,
        )
    missing = job.missing_tasks()
    if missing:
        options = EvalOptions(data_dir=job.data_dir, num_processes=1)
        evaluate_tasks(find_target(str(job.run.folder)), missing, options, compare_base=job.base, output=output)


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

        accelerator = make_accelerator(config.train.distributed_timeout_s)
        if accelerator.is_main_process:
            write_smoke_inputs(config)
        accelerator.wait_for_everyone()
        config = smoke_config(config)
    return resolve_init_from(config, overwrite=overwrite)
