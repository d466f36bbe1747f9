"""What the parts of a training share: model, optimizer, the loss on all ranks, where the run stands, its log."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dude_cli.config import Config
from dude_cli.data import StepOrder, collate
from dude_cli.system.ranks import on_main_rank
from dude_cli.training.checkpoint import BEST, TrainState, load_checkpoint, restore_best
from dude_cli.training.gradients import MakeBatch
from dude_cli.training.loss import SummedLoss, with_targets
from dude_cli.training.metrics import MetricsLog, TrainDisplay
from dude_cli.training.optimizer import make_loss_scaler, make_optimizer
from dude_cli.training.plan import packs_flat
from dude_cli.training.prepare import Prepared
from dude_cli.training.sharding import share_model
from dude_cli.training.trackers import Trackers

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from accelerate import Accelerator
    from rich.console import Console
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from dude_cli.data.batches import EncodedRow, EncodedRows


@dataclass(frozen=True)
class Run:
    """One training; what moves in it is `state`, beside the tensors."""

    prepared: Prepared
    accelerator: Accelerator
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    state: TrainState
    summed_loss: SummedLoss
    shared_loss: nn.Module  # the same, as the ranks call it together
    make_batch: MakeBatch
    order: StepOrder
    display: TrainDisplay
    metrics: MetricsLog | None  # on the main rank
    started_s: float  # of time.perf_counter, less the seconds of the run's earlier parts

    @property
    def config(self) -> Config:
        return self.prepared.config

    @property
    def run_dir(self) -> Path:
        return self.config.run_dir

    @property
    def model(self) -> PreTrainedModel:
        return self.prepared.model

    @property
    def trainable(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @property
    def or_wider_dtype(self) -> str:
        """What may help too where values become infinite, as a part of a sentence: nothing but float16 overflows."""
        return ", use model.dtype: bfloat16 or float32" if self.config.model.dtype == "float16" else ""

    @property
    def elapsed_s(self) -> float:
        return time.perf_counter() - self.started_s

    def own_rows(self, data: EncodedRows, chosen: npt.NDArray[np.int64]) -> tuple[list[EncodedRow], int]:
        """This rank's part of the `chosen` rows, and how many of them the rank with the most has."""
        rank, world_size = self.accelerator.process_index, int(self.accelerator.num_processes)
        return [data[int(row)] for row in chosen[rank::world_size]], -(-len(chosen) // world_size)

    def sum_over_ranks(self, *values: Tensor | float) -> list[float]:
        import torch

        own = torch.stack([torch.as_tensor(value, device=self.accelerator.device) for value in values])
        total: list[float] = self.accelerator.reduce(own, reduction="sum").tolist()
        return total

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def log(self, record: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.log({"step": self.state.step} | record)


@contextmanager
def open_run(prepared: Prepared, accelerator: Accelerator, console: Console) -> Iterator[Run]:
    """The run at step 0, or as its checkpoint has it; within, metrics.jsonl and the live line are open."""
    config, model = prepared.config, prepared.model
    if config.train.gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    optimizer = make_optimizer(model, config.train)
    scaler = make_loss_scaler(accelerator.device, config.model.dtype)
    state = _state(prepared, accelerator, optimizer, scaler, console)
    prepared.peak_memory.restart()
    summed_loss = SummedLoss(model)
    shared_loss = share_model(summed_loss, accelerator, config.train.distributed)
    order = StepOrder(
        prepared.data.train.lengths,
        config.train.global_batch_size,
        config.seed,
        shuffle=config.data.shuffle,
        group_by_length=config.data.group_by_length,
    )
    with ExitStack() as stack:
        metrics = None
        if accelerator.is_main_process:
            say = functools.partial(console.print, highlight=False)
            metrics = MetricsLog(
                config.run_dir,
                Trackers(config, state.step, say),
                from_step=state.step,
                with_evaluation=not state.evaluation_is_due,
            )
            stack.push(lambda kind, *_: metrics.close(failed=kind is not None))
        display = stack.enter_context(TrainDisplay(console, prepared.plan.total_steps, state.step))
        yield Run(
            prepared=prepared,
            accelerator=accelerator,
            optimizer=optimizer,
            scaler=scaler,
            state=state,
            summed_loss=summed_loss,
            shared_loss=shared_loss,
            make_batch=_batches_on(accelerator.device, prepared),
            order=order,
            display=display,
            metrics=metrics,
            started_s=time.perf_counter() - state.elapsed_s,
        )


def _batches_on(device: torch.device, prepared: Prepared) -> MakeBatch:
    pad_id, flatten = prepared.tokenizer.pad_token_id or 0, packs_flat(prepared.config)

    def make_batch(rows: Sequence[EncodedRow]) -> dict[str, Tensor]:
        batch = with_targets(collate(rows, pad_id, flatten=flatten))
        return {key: value.to(device) for key, value in batch.items()}

    return make_batch


def _state(
    prepared: Prepared,
    accelerator: Accelerator,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    console: Console,
) -> TrainState:
    """Where the run stands; what the tensors were at its checkpoint, if there is one, is put back."""
    train, plan, folder = prepared.config.train, prepared.plan, prepared.checkpoint
    if folder is None:
        return TrainState(prepared.origin, per_device_batch_size=plan.per_device_batch_size)
    state = load_checkpoint(folder, prepared.model, optimizer)
    on_main_rank(accelerator, lambda: restore_best(folder, prepared.config.run_dir, keeps_best=train.keeps_best))
    state.validation_is_new = not state.origin.has_validation_of(prepared.origin)
    state.origin = prepared.origin
    is_at_the_end = state.step >= plan.total_steps and state.evaluated_step != state.step
    # It was to end with its last step so far: this step's adapter is the first to compare with.
    is_without_best = train.keeps_best and not (folder / BEST).is_dir()
    if state.validation_is_new or is_without_best:
        state.best_eval_loss, state.evaluations_since_best = None, 0
    state.evaluation_is_due |= state.validation_is_new or is_without_best or is_at_the_end
    console.print(f"continuing after step {state.step}, from {folder}", highlight=False)
    if train.per_device_batch_size != "auto":
        state.per_device_batch_size = plan.per_device_batch_size
    if scaler.is_enabled():
        scaler.load_state_dict(state.loss_scaler)
    return state
