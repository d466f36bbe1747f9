"""The training loop."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from dude_cli.errors import StoppedError
from dude_cli.system.ranks import on_main_rank
from dude_cli.system.runtime import StopSignal, process_age_s
from dude_cli.training.checkpoint import save_checkpoint
from dude_cli.training.prepare import Prepared
from dude_cli.training.result import finish
from dude_cli.training.run import Run, open_run
from dude_cli.training.step import take_step
from dude_cli.training.validation import evaluate, is_out_of_patience

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.console import Console


def train(prepared: Prepared, accelerator: Accelerator, console: Console, stop: StopSignal) -> dict[str, Any]:
    """Train to the end, from the newest valid checkpoint if there is one, and write the result to `adapter/`.

    Returns the run's summary. Raises DivergedError for a loss or gradient that is not finite, ResourceError for
    memory, StoppedError after a signal, with a checkpoint saved.
    """
    config, plan = prepared.config.train, prepared.plan
    with open_run(prepared, accelerator, console) as run:
        state = run.state
        if not evaluate(run, stop):
            raise _stopped(run, stop)
        first_step = {"first_step_s": process_age_s()}
        while state.step < plan.total_steps and not is_out_of_patience(run):
            started = time.perf_counter()
            step = take_step(run, stop)
            state.step += 1
            state.total_tokens += step.tokens
            state.evaluation_is_due = state.step == plan.total_steps or is_due(config.eval_steps, state.step)
            tokens_per_s = step.tokens / (time.perf_counter() - started)
            run.display.step(state.step, step.loss, step.learning_rate, tokens_per_s)
            # An evaluation may be the last thing: its step has a line in the log too.
            if state.evaluation_is_due or is_due(config.logging_steps, state.step):
                speed = {"tokens_per_s": tokens_per_s, "elapsed_s": run.elapsed_s}
                run.log(step.record() | {"total_tokens": state.total_tokens} | speed | first_step)
                first_step = {}
            stops = not evaluate(run, stop) or step.stops
            if stops or is_due(config.save_steps, state.step):
                _save(run)
            if stops and (state.evaluation_is_due or state.step < plan.total_steps):
                raise _stopped(run, stop)
        if state.step < plan.total_steps:
            where, since = f"step {state.step} of {plan.total_steps}", state.evaluations_since_best
            run.display.message(f"stopped early after {where}: evaluations since the lowest loss: {since}")
        return finish(run)


def is_due(every: int | None, step: int) -> bool:
    """Whether something that is done every so many steps, or never, is done after this one."""
    return every is not None and step % every == 0


def _save(run: Run) -> None:
    run.state.elapsed_s = run.elapsed_s
    run.state.loss_scaler = run.scaler.state_dict()
    on_main_rank(run.accelerator, lambda: _write_checkpoint(run))


def _write_checkpoint(run: Run) -> None:
    if run.metrics is not None:
        run.metrics.sync()  # a checkpoint's steps have their lines, also after a power cut
    keep = run.config.train.save_total_limit
    save_checkpoint(run.run_dir, run.model, run.prepared.tokenizer, run.optimizer, run.state, keep=keep)


def _stopped(run: Run, stop: StopSignal) -> StoppedError:
    name = stop.name or "a signal to another rank"
    saved = "a checkpoint is saved" if run.state.step else "there is nothing to save yet"
    return StoppedError(
        f"stopped by {name} after step {run.state.step} of {run.prepared.plan.total_steps}; {saved}",
        where=str(run.run_dir),
        fix="the same command continues",
    )
