"""The training loop."""

from __future__ import annotations

import functools
import json
import math
import time
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dude_cli.data import StepOrder, collate, longest_first
from dude_cli.errors import DivergedError, ResourceError, StoppedError, is_out_of_memory
from dude_cli.system import files
from dude_cli.system.ranks import on_main_rank
from dude_cli.system.runtime import StopSignal, process_age_s, seed_everything
from dude_cli.training.checkpoint import TrainState, load_checkpoint, save_checkpoint
from dude_cli.training.loss import SummedLoss, with_targets
from dude_cli.training.metrics import LAYERS_FILE, MEMORY_FILE, MetricsLog, TrainDisplay, run_summary
from dude_cli.training.model_card import model_card
from dude_cli.training.prepare import Prepared, evaluation_batch, packs_flat
from dude_cli.training.run_dir import BEST, RESULT
from dude_cli.training.schedule import learning_rate_at
from dude_cli.training.sharding import share_model
from dude_cli.training.step import (
    StepResult,
    accumulate_gradients,
    equal_batches,
    exchange_gradients,
    make_loss_scaler,
    make_optimizer,
)
from dude_cli.training.uncalled import check_gradients

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from accelerate import Accelerator
    from rich.console import Console
    from torch import nn

    from dude_cli.data.batches import EncodedRow, EncodedRows


def train(prepared: Prepared, accelerator: Accelerator, console: Console, stop: StopSignal) -> dict[str, Any]:
    """Train to the end, from the newest valid checkpoint if there is one, and write the result to `adapter/`.

    Returns the run's summary. Raises DivergedError for a loss or gradient that is not finite, ResourceError for
    memory, StoppedError after a signal, with a checkpoint saved.
    """
    run = _Run(prepared, accelerator, console)
    config, plan, state = prepared.config.train, prepared.plan, run.state
    with ExitStack() as stack:
        display = run.open(stack)
        if not run.evaluate(stop):
            raise run.stopped(stop)
        first_step = {"first_step_s": process_age_s()}
        while state.step < plan.total_steps and not run.is_out_of_patience():
            started = time.perf_counter()
            step = run.step(stop)
            state.step += 1
            state.total_tokens += step.tokens
            state.evaluation_is_due = state.step == plan.total_steps or is_due(config.eval_steps, state.step)
            tokens_per_s = step.tokens / (time.perf_counter() - started)
            display.step(state.step, step.loss, step.learning_rate, tokens_per_s)
            # An evaluation may be the last thing: its step has a line in the log too.
            if state.evaluation_is_due or is_due(config.logging_steps, state.step):
                speed = {"tokens_per_s": tokens_per_s, "elapsed_s": run.elapsed_s()}
                run.log(step.record() | {"total_tokens": state.total_tokens} | speed | first_step)
                first_step = {}
            stops = not run.evaluate(stop) or step.stops
            if stops or is_due(config.save_steps, state.step):
                run.save()
            if stops and (state.evaluation_is_due or state.step < plan.total_steps):
                raise run.stopped(stop)
    return run.finish()


def is_due(every: int | None, step: int) -> bool:
    """Whether something that is done every so many steps, or never, is done after this one."""
    return every is not None and step % every == 0


class _Run:
    """The parts of one training that the loop moves: model, optimizer, state, log."""

    def __init__(self, prepared: Prepared, accelerator: Accelerator, console: Console) -> None:
        self.prepared, self.accelerator, self.console = prepared, accelerator, console
        self.config = prepared.config
        self.run_dir = prepared.config.run_dir
        self.model = prepared.model
        if self.config.train.gradient_checkpointing:
            self.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        self.optimizer = make_optimizer(self.model, self.config.train)
        self.scaler = make_loss_scaler(accelerator.device, self.config.model.dtype)
        self.state = self._restore()
        prepared.peak_memory.restart()
        self.summed_loss = SummedLoss(self.model)
        self.wrapped: nn.Module = share_model(self.summed_loss, accelerator, self.config.train.distributed)
        pad_id = prepared.tokenizer.pad_token_id
        self.collate = functools.partial(
            collate, pad_id=pad_id if pad_id is not None else 0, flatten=packs_flat(self.config)
        )
        self.order = StepOrder(
            prepared.data.train.lengths,
            self.config.train.global_batch_size,
            self.config.seed,
            shuffle=self.config.data.shuffle,
            group_by_length=self.config.data.group_by_length,
        )
        self._metrics: MetricsLog | None = None
        self._started = time.perf_counter()

    def open(self, stack: ExitStack) -> TrainDisplay:
        """Open metrics.jsonl and the live line for the length of the run."""
        self.display = TrainDisplay(self.console, self.prepared.plan.total_steps, self.state.step)
        if self.accelerator.is_main_process:
            self._metrics = MetricsLog(
                self.run_dir,
                list(self.config.train.report_to),
                from_step=self.state.step,
                with_evaluation=not self.state.evaluation_is_due,
            )
            stack.callback(self._metrics.close)
        self._started = time.perf_counter() - self.state.elapsed_s
        return stack.enter_context(self.display)

    def step(self, stop: StopSignal) -> StepResult:
        """One optimizer step on the global batch that belongs to (seed, step)."""
        from torch.nn.utils import clip_grad_norm_

        data, step = self.prepared.data.train, self.state.step
        batch = self.order.rows(step)
        target_tokens = int(data.target_tokens[batch].sum())
        learning_rate = learning_rate_at(step, self.prepared.plan.total_steps, self.config.train)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        own = [data[int(row)] for row in self._share(batch)]
        total_loss, stops = self._gradients(own, self._most(batch), target_tokens, stop)
        loss = total_loss / target_tokens
        self.scaler.unscale_(self.optimizer)
        limit = self.config.train.max_grad_norm
        grad_norm = float(clip_grad_norm_(self._trainable(), math.inf if limit is None else limit))
        is_finite = self._check_finite(loss, grad_norm, batch)
        if is_finite:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        tokens = int(data.lengths[batch].sum())
        return StepResult(loss, grad_norm if is_finite else None, learning_rate, tokens, target_tokens, stops)

    def evaluate(self, stop: StopSignal) -> bool:
        """If it is due, log the mean loss over the validation rows, and keep the adapter if it is the best so far.

        Returns False if a signal to any rank ended it: it is still due then, when the run goes on.
        """
        rows = self.prepared.data.validation
        if rows is None or not self.state.evaluation_is_due:
            self.state.evaluation_is_due = False
            return True
        loss = self._validation_loss(rows, stop)
        if loss is None:
            return False
        self.state.evaluation_is_due = False
        if not math.isfinite(loss):
            raise DivergedError(
                f"the evaluation loss is {loss} after step {self.state.step}",
                where=str(self.run_dir),
                fix="lower train.learning_rate, or use model.dtype: bfloat16 or float32",
            )
        is_best = self.state.best_eval_loss is None or loss < self.state.best_eval_loss
        is_kept = is_best and self.config.train.early_stopping_patience is not None
        self.log({"eval_loss": loss} | ({"kept": True} if is_kept else {}))
        self.display.message(f"step {self.state.step}  eval_loss {loss:.4f}")
        if is_best:
            self.state.best_eval_loss, self.state.evaluations_since_best = loss, 0
        else:
            self.state.evaluations_since_best += 1
        if is_kept:
            on_main_rank(self.accelerator, lambda: self._save_adapter(BEST))
        return True

    def is_out_of_patience(self) -> bool:
        patience = self.config.train.early_stopping_patience
        return patience is not None and self.state.evaluations_since_best >= patience

    def save(self) -> None:
        self.state.elapsed_s = self.elapsed_s()
        self.state.loss_scaler = self.scaler.state_dict()
        on_main_rank(self.accelerator, self._save_checkpoint)

    def _save_checkpoint(self) -> None:
        if self._metrics is not None:
            self._metrics.sync()  # a checkpoint's steps have their lines, also after a power cut
        save_checkpoint(
            self.run_dir,
            self.model,
            self.optimizer,
            self.state,
            keep=self.config.train.save_total_limit,
            base_revision=self.prepared.model_revision,
        )

    def stopped(self, stop: StopSignal) -> StoppedError:
        name, total = stop.name or "a signal to another rank", self.prepared.plan.total_steps
        saved = "a checkpoint is saved" if self.state.step else "there is nothing to save yet"
        return StoppedError(
            f"stopped by {name} after step {self.state.step} of {total}; {saved}",
            where=str(self.run_dir),
            fix="the same command continues",
        )

    def finish(self) -> dict[str, Any]:
        """Write `adapter/`: the last step's, or with early stopping the best evaluation's."""
        from dude_cli.adapter import restore_adapter

        if self.config.train.early_stopping_patience is not None:
            restore_adapter(self.model, self.run_dir / BEST)
        on_main_rank(self.accelerator, self._save_result)
        return run_summary(self.config)

    def _save_result(self) -> None:
        self._save_memory()
        self._save_layers()
        self._save_adapter(RESULT)  # last: a run that has it is finished

    def log(self, record: dict[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.log({"step": self.state.step} | record)

    def elapsed_s(self) -> float:
        return time.perf_counter() - self._started

    def _restore(self) -> TrainState:
        plan, folder = self.prepared.plan, self.prepared.checkpoint
        if folder is None:
            return TrainState(self.prepared.origin, per_device_batch_size=plan.per_device_batch_size)
        state = load_checkpoint(folder, self.model, self.optimizer)
        state.origin = self.prepared.origin
        if self.config.train.early_stopping_patience is not None and not (self.run_dir / BEST).is_dir():
            # It had no patience so far, and kept no adapter: this step's is the first to compare with.
            state.best_eval_loss, state.evaluations_since_best, state.evaluation_is_due = None, 0, True
        self.console.print(f"continuing after step {state.step}, from {folder}", highlight=False)
        if self.config.train.per_device_batch_size != "auto":
            state.per_device_batch_size = plan.per_device_batch_size
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(state.loss_scaler)
        return state

    def _gradients(
        self, rows: list[EncodedRow], most_rows: int, target_tokens: int, stop: StopSignal
    ) -> tuple[float, bool]:
        """The summed loss of the global batch, and whether a rank has a signal to stop; the gradients are in place.

        A signal or a want of memory may reach one rank alone, and all must do the same: they share both with the loss,
        before any of them waits for the others' gradients. `auto` halves its batch on all when one runs out.
        """
        import torch

        from dude_cli.adapter import constant_adapters

        self.wrapped.train()
        while True:
            # The same for each attempt, so that dropout is that of a run which had the smaller batch from the start.
            seed_everything(self.config.seed, self.state.step, self.accelerator.process_index)
            # Between two optimizer steps A, B and m are constant: each layer's norm is computed once.
            with constant_adapters(self.model):
                own_loss, is_short = self._own_gradients(rows, most_rows, target_tokens)
                flags = [own_loss.new_tensor(float(flag)) for flag in (bool(stop), is_short)]
                loss, stopped_ranks, short_ranks = self._sum_over_ranks(own_loss, *flags)
                if not short_ranks:
                    self._check_all_trained()
                    exchange_gradients(self.wrapped, self.collate, self.accelerator.device, self._backward)
                    return loss, stopped_ranks > 0
            self._shrink_batch()
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()

    def _own_gradients(self, rows: list[EncodedRow], most_rows: int, target_tokens: int) -> tuple[torch.Tensor, bool]:
        """This rank's summed loss, with its gradients in place, and whether its memory was too small for that."""
        import torch

        try:
            return accumulate_gradients(
                self.wrapped,
                rows,
                per_device_batch_size=self.state.per_device_batch_size,
                most_rows=most_rows,
                target_tokens=target_tokens,
                collate=self.collate,
                device=self.accelerator.device,
                backward=self._backward,
                world_size=self.accelerator.num_processes,
            ), False
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if self.config.train.distributed == "fsdp" and self.accelerator.num_processes > 1:
                # The others wait in this rank's forward for its part of the base, and cannot be told.
                raise self._out_of_memory() from error
        return torch.zeros((), device=self.accelerator.device), True

    def _check_all_trained(self) -> None:
        """Raise UsageError for an adapter without a gradient; on all ranks, before one of them waits for it."""
        from dude_cli.adapter import adapter_layers

        if any(parameter.grad is None for parameter in self._trainable()):
            check_gradients(adapter_layers(self.model))

    def _share(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """This rank's part of `rows`, which all ranks share."""
        return rows[self.accelerator.process_index :: self.accelerator.num_processes]

    def _most(self, rows: npt.NDArray[np.int64]) -> int:
        """How many of `rows` the rank with the most of them has."""
        return -(-len(rows) // int(self.accelerator.num_processes))

    def _backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def _shrink_batch(self) -> None:
        size = self.state.per_device_batch_size
        if size == 1 or self.config.train.per_device_batch_size != "auto":
            raise self._out_of_memory()
        self.state.per_device_batch_size = size // 2
        self.display.message(f"out of memory: from now on {size // 2} rows per forward instead of {size}")

    def _out_of_memory(self) -> ResourceError:
        return ResourceError(
            f"out of memory with {self.state.per_device_batch_size} rows per forward at step {self.state.step + 1}",
            where=str(self.accelerator.device),
            fix="lower train.per_device_batch_size (the global batch stays), lower data.max_length, "
            "or set train.gradient_checkpointing: true",
        )

    def _check_finite(self, loss: float, grad_norm: float, batch: npt.NDArray[np.int64]) -> bool:
        """Whether the gradient can be used. Raises DivergedError if it cannot, and not for want of a lower scale."""
        is_finite = math.isfinite(grad_norm)
        may_overflow = self.scaler.is_enabled() and self.scaler.get_scale() >= 1.0
        if math.isfinite(loss) and (is_finite or may_overflow):
            return is_finite
        row_ids = [row for index in batch for row in self.prepared.data.train[int(index)].source_rows]
        raise DivergedError(
            f"step {self.state.step + 1} has loss {loss} and gradient norm {grad_norm}; no weight was changed by it",
            where=f"{self.run_dir}, training rows {', '.join(map(str, row_ids[:64]))}"
            + (" ..." if len(row_ids) > 64 else ""),
            fix="lower train.learning_rate, raise warmup_ratio, look at these rows, "
            "or use model.dtype: bfloat16 or float32",
        )

    def _validation_loss(self, rows: EncodedRows, stop: StopSignal) -> float | None:
        """The mean loss over the target tokens of `rows`; None once a rank has a signal, asked in each forward."""
        import numpy as np
        import torch

        from dude_cli.adapter import constant_adapters

        size = self.state.per_device_batch_size
        if self.config.train.per_device_batch_size == "auto":
            size = evaluation_batch(size, self.prepared.plan.per_device_batch_size, int(rows.lengths.max()))
        order = longest_first(np.arange(len(rows)), rows.lengths)  # for the least padding
        own = [rows[int(row)] for row in self._share(order)]
        total = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        self.model.eval()
        with torch.no_grad(), constant_adapters(self.model):
            for some in equal_batches(own, size, self._most(order)):
                if self._sum_over_ranks(total.new_tensor(float(stop.name is not None)))[0]:
                    return None
                batch = with_targets(self.collate(some))
                on_device = {key: value.to(self.accelerator.device) for key, value in batch.items()}
                total += self.summed_loss(on_device)
        return self._sum_over_ranks(total)[0] / int(rows.target_tokens.sum())

    def _sum_over_ranks(self, *values: torch.Tensor) -> list[float]:
        import torch

        total: list[float] = self.accelerator.reduce(torch.stack(values), reduction="sum").tolist()
        return total

    def _trainable(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _save_memory(self) -> None:
        """Predicted against measured, of this rank and of the part of the run that this process has done."""
        peak, forecast = self.prepared.peak_memory, self.prepared.memory
        record = {
            "device": str(self.accelerator.device),
            "predicted": None if forecast is None else forecast.report(),
            "predicted_training_bytes": None if forecast is None else forecast.training_bytes,
            "measured_training_bytes": peak.peak_bytes(),
            "measured": peak.definition,
        }
        files.write_text(self.run_dir / MEMORY_FILE, json.dumps(record, indent=2) + "\n")

    def _save_layers(self) -> None:
        """How far each layer has moved from the base, while the base's weights are at hand."""
        from dude_cli.adapter import movements

        record = {
            "trainable_parameters": self.prepared.trainable_parameters,
            "all_parameters": self.prepared.all_parameters,
            "layers": [asdict(layer) for layer in movements(self.model)],
        }
        files.write_text(self.run_dir / LAYERS_FILE, json.dumps(record, indent=2) + "\n")

    def _save_adapter(self, name: str) -> None:
        from dude_cli.adapter import save_adapter

        card = model_card(self.config, run_summary(self.config), self.prepared.source_sha256)
        save_adapter(
            self.model,
            self.run_dir / name,
            base_revision=self.prepared.model_revision,
            tokenizer=self.prepared.tokenizer,
            model_card=card,
        )
