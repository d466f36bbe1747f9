"""The gradient of one global batch, however it is split over ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from dude_cli.data.batches import NOT_LEARNED, EncodedRow

if TYPE_CHECKING:
    from torch import Tensor, nn

# A batch for `SummedLoss`, on this rank's device, of some rows.
MakeBatch = Callable[[Sequence[EncodedRow]], "dict[str, Tensor]"]


def accumulate_gradients(
    summed_loss: nn.Module,
    rows: Sequence[EncodedRow],
    *,
    per_device_batch_size: int,
    target_tokens: int,
    make_batch: MakeBatch,
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
    losses: list[Tensor] = []
    no_sync = getattr(summed_loss, "no_sync", nullcontext)
    for micro_batch in equal_batches(rows, per_device_batch_size, most_rows):
        with no_sync():
            loss = summed_loss(make_batch(micro_batch))
            backward(loss * (world_size / target_tokens))
        losses.append(loss.detach())
    return sum(losses[1:], losses[0])


def equal_batches(rows: Sequence[EncodedRow], size: int, most_rows: int) -> Iterator[Sequence[EncodedRow]]:
    """`rows` in batches of up to `size`: as many as `most_rows` would take, the last ones with nothing to learn."""
    for start in range(0, max(1, len(rows), most_rows), size):
        yield rows[start : start + size] or [_nothing()]


def exchange_gradients(summed_loss: nn.Module, make_batch: MakeBatch, backward: Callable[[Tensor], None]) -> None:
    """Let DDP exchange what the ranks have accumulated: in a backward pass of two tokens with a loss of zero.

    A rank that has no rows takes part, and none can run out of memory in it while the others wait.
    """
    if hasattr(summed_loss, "no_sync"):
        backward(summed_loss(make_batch([_nothing()])))


def _nothing() -> EncodedRow:
    return EncodedRow(input_ids=[0, 0], labels=[NOT_LEARNED] * 2, segment_lengths=[2], source_rows=[])
