"""The training loop."""

from __future__ import annotations

import functools
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dude_cli.checkpoint import TrainState, load_checkpoint, newest_checkpoint, save_checkpoint
from dude_cli.config import TrainConfig
from dude_cli.data import collate, step_rows
from dude_cli.errors import DivergedError, ResourceError, StoppedError
from dude_cli.metrics import MetricsLog, TrainDisplay, run_summary
from dude_cli.model_card import model_card
from dude_cli.prepare import BEST, RESULT, Prepared, packs_flat
from dude_cli.runtime import StopSignal, seed_everything
from dude_cli.schedule import learning_rate_at
from dude_cli.train_step import accumulate_gradients, summed_loss

if TYPE_CHECKING:
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
        if state.step == 0:
            run.evaluate()
        while state.step < plan.total_steps and not run.is_out_of_patience():
            started = time.perf_counter()
            step = run.step()
            state.step += 1
            tokens_per_s = step.tokens / (time.perf_counter() - started)
            display.step(state.step, step.loss, step.learning_rate, tokens_per_s)
            if state.step % config.logging_steps == 0 or state.step == plan.total_steps:
                run.log(step.record() | {"tokens_per_s": tokens_per_s, "elapsed_s": run.elapsed_s()})
            if state.step == plan.total_steps or (config.eval_steps and state.step % config.eval_steps == 0):
                run.evaluate()
            if stop or (config.save_steps and state.step % config.save_steps == 0):
                run.save()
            if stop and state.step < plan.total_steps:
                raise StoppedError(
                    f"stopped by {stop.name} after step {state.step} of {plan.total_steps}; a checkpoint is saved",
                    where=str(prepared.config.run_dir),
                    fix="the same command continues",
                )
    return run.finish()


@dataclass(frozen=True)
class StepResult:
    """One optimizer step. `loss` is the mean over the global batch's target tokens, in nats; `tokens` all tokens."""

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    target_tokens: int

    def record(self) -> dict[str, Any]:
        return {
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "learning_rate": self.learning_rate,
            "target_tokens": self.target_tokens,
        }


class _Run:
    """The parts of one training that the loop moves: model, optimizer, state, log."""

    def __init__(self, prepared: Prepared, accelerator: Accelerator, console: Console) -> None:
        import torch

        self.prepared, self.accelerator, self.console = prepared, accelerator, console
        self.config = prepared.config
        self.run_dir = prepared.config.run_dir
        self.model = prepared.model
        if self.config.train.gradient_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.optimizer = make_optimizer(self.model, self.config.train)
        self.state = self._restore()
        self.wrapped: nn.Module = accelerator.prepare_model(self.model)
        # float16 gradients underflow without a loss scale; bfloat16 has float32's range.
        self.scaler = torch.amp.GradScaler(
            accelerator.device.type, enabled=self.config.model.dtype == "float16", init_scale=2.0**12
        )
        pad_id = prepared.tokenizer.pad_token_id
        self.collate = functools.partial(
            collate, pad_id=pad_id if pad_id is not None else 0, flatten=packs_flat(self.config)
        )
        self._metrics: MetricsLog | None = None
        self._started = time.perf_counter()

    def open(self, stack: ExitStack) -> TrainDisplay:
        """Open metrics.jsonl and the live line for the length of the run."""
        self.display = TrainDisplay(self.console, self.prepared.plan.total_steps, self.state.step)
        if self.accelerator.is_main_process:
            self._metrics = MetricsLog(self.run_dir, list(self.config.train.report_to), from_step=self.state.step)
            stack.callback(self._metrics.close)
        self._started = time.perf_counter() - self.state.elapsed_s
        return stack.enter_context(self.display)

    def step(self) -> StepResult:
        """One optimizer step on the global batch that belongs to (seed, step)."""
        from torch.nn.utils import clip_grad_norm_

        seed_everything(self.config.seed, self.state.step, self.accelerator.process_index)
        data, step = self.prepared.data.train, self.state.step
        batch = step_rows(
            len(data), step, self.config.train.global_batch_size, self.config.seed, self.config.data.shuffle
        )
        target_tokens = int(data.target_tokens[batch].sum())
        learning_rate = learning_rate_at(step, self.prepared.plan.total_steps, self.config.train)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        own = [data[int(row)] for row in batch[self.accelerator.process_index :: self.accelerator.num_processes]]
        loss = self._sum_over_ranks(self._gradients(own, target_tokens)) / target_tokens
        self.scaler.unscale_(self.optimizer)
        limit = self.config.train.max_grad_norm
        grad_norm = float(clip_grad_norm_(self._trainable(), math.inf if limit is None else limit))
        self._check_finite(loss, grad_norm, [data[int(row)] for row in batch])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.state.target_tokens += target_tokens
        return StepResult(loss, grad_norm, learning_rate, int(data.lengths[batch].sum()), target_tokens)

    def evaluate(self) -> None:
        """Log the mean loss over the validation rows, and keep the adapter if early stopping wants the best."""
        rows = self.prepared.data.validation
        if rows is None:
            return
        loss = self._validation_loss(rows)
        if not math.isfinite(loss):
            raise DivergedError(
                f"the evaluation loss is {loss} after step {self.state.step}",
                where=str(self.run_dir),
                fix="lower train.learning_rate, or use model.dtype: bfloat16 or float32",
            )
        self.log({"eval_loss": loss})
        self.display.message(f"step {self.state.step}  eval_loss {loss:.4f}")
        if self.state.best_eval_loss is None or loss < self.state.best_eval_loss:
            self.state.best_eval_loss, self.state.evaluations_since_best = loss, 0
            if self.config.train.early_stopping_patience is not None and self.accelerator.is_main_process:
                self._save_adapter(BEST)
        else:
            self.state.evaluations_since_best += 1

    def is_out_of_patience(self) -> bool:
        patience = self.config.train.early_stopping_patience
        return patience is not None and self.state.evaluations_since_best >= patience

    def save(self) -> None:
        self.state.elapsed_s = self.elapsed_s()
        if self.accelerator.is_main_process:
            save_checkpoint(self.run_dir, self.model, self.optimizer, self.state, self.config.train.save_total_limit)
        self.accelerator.wait_for_everyone()

    def finish(self) -> dict[str, Any]:
        """Write `adapter/`: the last step's, or with early stopping the best evaluation's."""
        from dude_cli.adapter import restore_adapter

        if self.config.train.early_stopping_patience is not None:
            restore_adapter(self.model, self.run_dir / BEST)
        if self.accelerator.is_main_process:
            self._save_adapter(RESULT)
        self.accelerator.wait_for_everyone()
        return run_summary(self.run_dir)

    def log(self, record: dict[str, Any]) -> None:
        if self._metrics is not None:
            self._metrics.log({"step": self.state.step} | record)

    def elapsed_s(self) -> float:
        return time.perf_counter() - self._started

    def _restore(self) -> TrainState:
        folder = newest_checkpoint(self.run_dir, self.console.print)
        if folder is None:
            return TrainState(per_device_batch_size=self.prepared.plan.per_device_batch_size)
        state = load_checkpoint(folder, self.model, self.optimizer)
        self.console.print(f"continuing after step {state.step}, from {folder}", highlight=False)
        return state

    def _gradients(self, rows: list[EncodedRow], target_tokens: int) -> torch.Tensor:
        """This rank's summed loss, with the gradients in place; `auto` halves its batch when memory runs out."""
        import torch

        from dude_cli.adapter import constant_adapters

        self.wrapped.train()
        while True:
            try:
                # Between two optimizer steps A, B and m are constant: each layer's norm is computed once.
                with constant_adapters(self.model):
                    return accumulate_gradients(
                        self.wrapped,
                        rows,
                        per_device_batch_size=self.state.per_device_batch_size,
                        target_tokens=target_tokens,
                        collate=self.collate,
                        device=self.accelerator.device,
                        backward=self._backward,
                        world_size=self.accelerator.num_processes,
                    )
            except torch.OutOfMemoryError as error:
                self._shrink_batch(error)
                self.optimizer.zero_grad(set_to_none=True)
                torch.cuda.empty_cache()

    def _backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def _shrink_batch(self, error: Exception) -> None:
        size = self.state.per_device_batch_size
        may_shrink = self.config.train.per_device_batch_size == "auto" and self.accelerator.num_processes == 1
        if size == 1 or not may_shrink:
            raise ResourceError(
                f"out of memory with {size} rows per forward at step {self.state.step + 1}",
                where=str(self.accelerator.device),
                fix="lower train.per_device_batch_size (the global batch stays), lower data.max_length, "
                "or set train.gradient_checkpointing: true",
            ) from error
        self.state.per_device_batch_size = size // 2
        self.display.message(f"out of memory: from now on {size // 2} rows per forward instead of {size}")

    def _check_finite(self, loss: float, grad_norm: float, rows: list[EncodedRow]) -> None:
        # With a loss scale, a gradient that overflowed is expected now and then: the scaler skips that step.
        scale_is_spent = self.scaler.is_enabled() and self.scaler.get_scale() < 1.0
        gradient_is_bad = not math.isfinite(grad_norm) and (not self.scaler.is_enabled() or scale_is_spent)
        if math.isfinite(loss) and not gradient_is_bad:
            return
        row_ids = [row for sequence in rows for row in sequence.source_rows]
        raise DivergedError(
            f"step {self.state.step + 1} has loss {loss} and gradient norm {grad_norm}; no weight was changed by it",
            where=f"{self.run_dir}, training rows {', '.join(map(str, row_ids[:64]))}"
            + (" ..." if len(row_ids) > 64 else ""),
            fix="lower train.learning_rate, raise warmup_ratio, look at these rows, "
            "or use model.dtype: bfloat16 or float32",
        )

    def _validation_loss(self, rows: EncodedRows) -> float:
        import torch

        from dude_cli.adapter import constant_adapters

        size = self.state.per_device_batch_size
        own = range(self.accelerator.process_index, len(rows), self.accelerator.num_processes)
        total = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        self.model.eval()
        with torch.no_grad(), constant_adapters(self.model):
            for start in range(0, len(own), size):
                batch = self.collate([rows[row] for row in own[start : start + size]])
                on_device = {key: value.to(self.accelerator.device) for key, value in batch.items()}
                total += summed_loss(self.model, on_device)
        return self._sum_over_ranks(total) / int(rows.target_tokens.sum())

    def _sum_over_ranks(self, value: torch.Tensor) -> float:
        return float(self.accelerator.reduce(value, reduction="sum"))

    def _trainable(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def _save_adapter(self, name: str) -> None:
        from dude_cli.adapter import save_adapter

        card = model_card(self.config, run_summary(self.run_dir))
        save_adapter(
            self.model,
            self.run_dir / name,
            base_revision=self.prepared.model_revision,
            tokenizer=self.prepared.tokenizer,
            model_card=card,
        )


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over A, B and the magnitudes; the magnitudes have no weight decay."""
    import torch

    from dude_cli.adapter import trainable_parameters

    named = trainable_parameters(model)
    magnitudes = [parameter for name, parameter in named.items() if name.endswith(".magnitude")]
    factors = [parameter for name, parameter in named.items() if not name.endswith(".magnitude")]
    groups = [{"params": factors, "weight_decay": config.weight_decay}, {"params": magnitudes, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=next(iter(named.values())).device.type == "cuda",
    )
