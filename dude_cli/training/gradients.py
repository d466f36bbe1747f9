"""The parts of one optimizer step: the gradient of a global batch, however it is split, and what applies it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dude_cli.config import TrainConfig
from dude_cli.data.batches import NOT_LEARNED, EncodedRow
from dude_cli.training.loss import with_targets

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

Collate = Callable[[Sequence[EncodedRow]], "dict[str, Tensor]"]

INITIAL_LOSS_SCALE = 2.0**12


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


def accumulate_gradients(
    summed_loss: nn.Module,
    rows: Sequence[EncodedRow],
    *,
    per_device_batch_size: int,
    target_tokens: int,
    collate: Collate,
    device: torch.device,
    backward: Callable[[Tensor], None],
    world_size: int = 1,
    most_rows: int = 0,
) -> Tensor:
    """Add to `.grad` this rank's part of the gradient of the mean loss over the global batch; return its summed loss.

    `summed_loss` is a `SummedLoss`, or DDP around it. `rows` are this rank's, `target_tokens` the number over the
    whole global batch and all ranks. Each micro-batch contributes its *summed* loss divided by that number, so the
    split does not matter, and a rank or a last window with fewer tokens has just its share. DDP averages over ranks,
    hence the factor `world_size`; nothing is exchanged before `exchange_gradients`. All ranks have as many
    micro-batches as `most_rows` take, the rows of the rank with most of them, because a sharded base is gathered in
    each; those for which a rank has no rows have a loss of zero.
    """
    import torch

    total = torch.zeros((), device=device)
    no_sync = getattr(summed_loss, "no_sync", nullcontext)
    for micro_batch in equal_batches(rows, per_device_batch_size, most_rows):
        batch = {key: value.to(device) for key, value in with_targets(collate(micro_batch)).items()}
        with no_sync():
            loss = summed_loss(batch)
            backward(loss * (world_size / max(1, target_tokens)))
        total += loss.detach()
    return total


def equal_batches(rows: Sequence[EncodedRow], size: int, most_rows: int) -> Iterator[Sequence[EncodedRow]]:
    """`rows` in batches of up to `size`: as many as `most_rows` would take, the last ones with nothing to learn."""
    for start in range(0, max(1, len(rows), most_rows), size):
        yield rows[start : start + size] or [_nothing()]


def exchange_gradients(
    summed_loss: nn.Module, collate: Collate, device: torch.device, backward: Callable[[Tensor], None]
) -> None:
    """Let DDP exchange what the ranks have accumulated: in a backward pass of two tokens with a loss of zero.

    A rank that has no rows takes part, and none can run out of memory in it while the others wait.
    """
    if hasattr(summed_loss, "no_sync"):
        batch = with_targets(collate([_nothing()]))
        backward(summed_loss({key: value.to(device) for key, value in batch.items()}))


def _nothing() -> EncodedRow:
    return EncodedRow(input_ids=[0, 0], labels=[NOT_LEARNED] * 2, segment_lengths=[2], source_rows=[])


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


def make_loss_scaler(device: torch.device, dtype: str) -> torch.amp.GradScaler:
    """A scale for the loss with a float16 base, whose gradients underflow; bfloat16 has float32's range."""
    import torch

    return torch.amp.GradScaler(device.type, enabled=dtype == "float16", init_scale=INITIAL_LOSS_SCALE)
