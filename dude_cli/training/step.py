"""One optimizer step, and what can go wrong in it: memory that runs out, a number that is not finite."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dude_cli.errors import DivergedError, ResourceError, is_out_of_memory
from dude_cli.system.runtime import StopSignal, seed_everything
from dude_cli.training.gradients import accumulate_gradients, exchange_gradients
from dude_cli.training.run import Run
from dude_cli.training.schedule import learning_rate_at
from dude_cli.training.uncalled import check_gradients

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from dude_cli.data.batches import EncodedRow


@dataclass(frozen=True)
class StepResult:
    """One optimizer step. `loss` is the mean over the global batch's target tokens, in nats; `tokens` all tokens.

    `grad_norm` is None for a step that float16's loss scale made overflow, which changes nothing. `stops` says that
    any rank has a signal to stop.
    """

    loss: float
    grad_norm: float | None
    learning_rate: float
    tokens: int
    target_tokens: int
    stops: bool

    def record(self) -> dict[str, Any]:
        """The step's line in metrics.jsonl."""
        record = {
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
            "target_tokens": self.target_tokens,
        }
        return record if self.grad_norm is not None else record | {"skipped": True}


def take_step(run: Run, stop: StopSignal) -> StepResult:
    """One optimizer step on the global batch that belongs to (seed, step).

    Raises DivergedError for a loss or gradient that is not finite, ResourceError for memory.
    """
    from torch.nn.utils import clip_grad_norm_

    data, step, train = run.prepared.data.train, run.state.step, run.config.train
    batch = run.order.rows(step)
    target_tokens = int(data.target_tokens[batch].sum())
    learning_rate = learning_rate_at(step, run.prepared.plan.total_steps, train)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate
    total_loss, stops = _gradients(run, *run.own_rows(data, batch), target_tokens, stop)
    loss = total_loss / target_tokens
    run.scaler.unscale_(run.optimizer)
    limit = math.inf if train.max_grad_norm is None else train.max_grad_norm
    grad_norm = float(clip_grad_norm_(run.trainable, limit))
    is_finite = _check_finite(run, loss, grad_norm, batch)
    if is_finite:
        run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    tokens = int(data.lengths[batch].sum())
    return StepResult(loss, grad_norm if is_finite else None, learning_rate, tokens, target_tokens, stops)


def _gradients(
    run: Run, rows: list[EncodedRow], most_rows: int, target_tokens: int, stop: StopSignal
) -> tuple[float, bool]:
    """The summed loss of the global batch, and whether a rank has a signal to stop; the gradients are in place.

    A signal or a want of memory may reach one rank alone, and all must do the same: they share both with the loss,
    before any of them waits for the others' gradients. `auto` halves its batch on all when one runs out.
    """
    import torch

    from dude_cli.adapter import adapter_layers, constant_adapters

    run.shared_loss.train()
    while True:
        # The same for each attempt, so that dropout is that of a run which had the smaller batch from the start.
        seed_everything(run.config.seed, run.state.step, run.accelerator.process_index)
        # Between two optimizer steps A, B and m are constant: each layer's norm is computed once.
        with constant_adapters(run.model):
            own = _own_gradients(run, rows, most_rows, target_tokens)
            flags = float(bool(stop)), float(own is None)
            loss, stopped_ranks, short_ranks = run.sum_over_ranks(0.0 if own is None else own, *flags)
            if not short_ranks:
                # An adapter without a gradient is told on all ranks, before one of them waits for it.
                if any(parameter.grad is None for parameter in run.trainable):
                    check_gradients(adapter_layers(run.model))
                exchange_gradients(run.shared_loss, run.make_batch, run.backward)
                return loss, stopped_ranks > 0
        _shrink_batch(run)
        run.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


def _own_gradients(run: Run, rows: list[EncodedRow], most_rows: int, target_tokens: int) -> Tensor | None:
    """This rank's summed loss, with its gradients in place; None if its memory was too small for that."""
    try:
        return accumulate_gradients(
            run.shared_loss,
            rows,
            per_device_batch_size=run.state.per_device_batch_size,
            most_rows=most_rows,
            target_tokens=target_tokens,
            make_batch=run.make_batch,
            backward=run.backward,
            world_size=run.accelerator.num_processes,
        )
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if run.config.train.distributed == "fsdp" and run.accelerator.num_processes > 1:
            # The others wait in this rank's forward for its part of the base, and cannot be told.
            raise _out_of_memory(run) from error
    return None


def _shrink_batch(run: Run) -> None:
    size = run.state.per_device_batch_size
    if size == 1 or run.config.train.per_device_batch_size != "auto":
        raise _out_of_memory(run)
    run.state.per_device_batch_size = size // 2
    run.display.message(f"out of memory: from now on {size // 2} rows per forward instead of {size}")


def _out_of_memory(run: Run) -> ResourceError:
    return ResourceError(
        f"out of memory with {run.state.per_device_batch_size} rows per forward at step {run.state.step + 1}",
        where=str(run.accelerator.device),
        fix="lower train.per_device_batch_size (the global batch stays), lower data.max_length, "
        "or set train.gradient_checkpointing: true",
    )


def _check_finite(run: Run, loss: float, grad_norm: float, batch: npt.NDArray[np.int64]) -> bool:
    """Whether the gradient can be used. Raises DivergedError if it cannot, and not for want of a lower scale."""
    is_finite = math.isfinite(grad_norm)
    may_overflow = run.scaler.is_enabled() and run.scaler.get_scale() >= 1.0
    if math.isfinite(loss) and (is_finite or may_overflow):
        return is_finite
    row_ids = [row for index in batch for row in run.prepared.data.train[int(index)].source_rows]
    raise DivergedError(
        f"step {run.state.step + 1} has loss {loss} and gradient norm {grad_norm}; no weight was changed by it",
        where=f"{run.run_dir}, training rows {', '.join(map(str, row_ids[:64]))}"
        + (" ..." if len(row_ids) > 64 else ""),
        fix=f"lower train.learning_rate, raise train.warmup_ratio{run.or_wider_dtype}, or look at these rows",
    )
