"""The loss on the validation rows, the best adapter so far, and when patience with it ends."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dude_cli.data import longest_first
from dude_cli.errors import DivergedError
from dude_cli.system.ranks import on_main_rank
from dude_cli.system.runtime import StopSignal
from dude_cli.training.checkpoint import BEST
from dude_cli.training.gradients import equal_batches
from dude_cli.training.plan import evaluation_batch
from dude_cli.training.result import write_adapter
from dude_cli.training.run import Run

if TYPE_CHECKING:
    from dude_cli.data.batches import EncodedRows


def evaluate(run: Run, stop: StopSignal) -> bool:
    """If it is due, log the mean loss over the validation rows, and keep the adapter if it is the best so far.

    Returns False if a signal to any rank ended it: it is still due then, when the run goes on.
    """
    rows, state = run.prepared.data.validation, run.state
    if rows is None or not state.evaluation_is_due:
        state.evaluation_is_due = False
        return True
    loss = _validation_loss(run, rows, stop)
    if loss is None:
        return False
    state.evaluation_is_due = False
    if not math.isfinite(loss):
        raise DivergedError(
            f"the evaluation loss is {loss} after step {state.step}",
            where=str(run.run_dir),
            fix=f"lower train.learning_rate, or raise train.warmup_ratio{run.or_wider_dtype}",
        )
    is_best = state.best_eval_loss is None or loss < state.best_eval_loss
    is_kept = is_best and run.config.train.keeps_best
    marks = {"kept": is_kept, "new_rows": state.validation_is_new}
    run.log({"eval_loss": loss} | {name: True for name, is_set in marks.items() if is_set})
    state.evaluated_step, state.validation_is_new = state.step, False
    run.display.message(f"step {state.step}  eval_loss {loss:.4f}")
    if is_best:
        state.best_eval_loss, state.evaluations_since_best = loss, 0
    else:
        state.evaluations_since_best += 1
    if is_kept:
        on_main_rank(run.accelerator, lambda: write_adapter(run, BEST))
    return True


def is_out_of_patience(run: Run) -> bool:
    patience = run.config.train.early_stopping_patience
    return patience is not None and run.state.evaluations_since_best >= patience


def _validation_loss(run: Run, rows: EncodedRows, stop: StopSignal) -> float | None:
    """The mean loss over the target tokens of `rows`; None once a rank has a signal, asked in each forward."""
    import numpy as np
    import torch

    from dude_cli.adapter import constant_adapters

    size = run.state.per_device_batch_size
    if run.config.train.per_device_batch_size == "auto":
        size = evaluation_batch(size, run.prepared.plan.per_device_batch_size, int(rows.lengths.max()))
    own, most_rows = run.own_rows(rows, longest_first(np.arange(len(rows)), rows.lengths))  # for the least padding
    total = torch.zeros((), dtype=torch.float64, device=run.accelerator.device)
    run.model.eval()
    with torch.no_grad(), constant_adapters(run.model):
        for some in equal_batches(own, size, most_rows):
            if run.sum_over_ranks(float(bool(stop)))[0]:
                return None
            total += run.summed_loss(run.make_batch(some))
    return run.sum_over_ranks(total)[0] / int(rows.target_tokens.sum())
