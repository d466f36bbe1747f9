"""What `dude init` and `dude train` do, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dude_cli.config import Config, load_config
from dude_cli.console import Output
from dude_cli.errors import UsageError
from dude_cli.system.launch import ranks_to_start, run_ranks


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
    from dude_cli.system.runtime import make_accelerator, part_ranks
    from dude_cli.training.decompositions import check_decompositions
    from dude_cli.training.init_report import init_report
    from dude_cli.training.prepare import prepare
    from dude_cli.training.resume import is_finished_run
    from dude_cli.training.run_dir import alone_in_run_dir, check_run_dir

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
        output.warn(*prepared.warnings)
        if accelerator.is_main_process:
            checked = [] if config.adapter.init_from is not None else check_decompositions(prepared.model)
            document = prepared.report() | {"checked_decompositions": [asdict(layer) for layer in checked]}
            output.result(init_report(prepared, checked), document)
    part_ranks()


def _estimate(config: Config, count: int, output: Output) -> None:
    from dude_cli.system.memory import device_bytes
    from dude_cli.system.runtime import make_accelerator
    from dude_cli.training.forecast import estimate
    from dude_cli.training.init_report import memory_table

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
    from dude_cli.report import write_report_if_possible
    from dude_cli.system.ranks import stopping_together
    from dude_cli.system.runtime import make_accelerator, part_ranks, stop_signals
    from dude_cli.training.init_report import init_report, memory_line
    from dude_cli.training.loop import train as run_training
    from dude_cli.training.metrics import run_summary, summary_lines
    from dude_cli.training.prepare import prepare
    from dude_cli.training.resume import changed_settings, is_finished_run
    from dude_cli.training.run_dir import alone_in_run_dir, check_run_dir

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
            output.warn(*prepared.warnings)
            if not prepared.reused:
                output.progress.print(init_report(prepared))
            with stop_signals() as stop:
                summary = run_training(prepared, accelerator, output.progress, stop)
            if accelerator.is_main_process:
                write_report_if_possible([config.run_dir], config.run_dir / "report.html", output.say)
    if accelerator.is_main_process:
        shown = summary_lines(summary)
        shown += [f"adapter: {config.run_dir / 'adapter'}", f"score it: dude eval {config.output_dir}"]
        if (config.run_dir / "report.html").exists():
            shown.append(f"report: {config.run_dir / 'report.html'}")
        output.result("\n".join([*shown, *memory_line(summary)]), summary)
    part_ranks()


def _resolved(config: Config, *, smoke: bool, overwrite: bool = False) -> Config:
    """The config on the inputs of `--smoke`, and with what the adapter to continue from fixes."""
    from dude_cli.training.init_from import resolve_init_from

    if smoke:
        from dude_cli.system.runtime import make_accelerator
        from dude_cli.training.smoke import smoke_config, write_smoke_inputs

        accelerator = make_accelerator(config.train.distributed_timeout_s)
        if accelerator.is_main_process:
            write_smoke_inputs(config)
        accelerator.wait_for_everyone()
        config = smoke_config(config)
    return resolve_init_from(config, overwrite=overwrite)
