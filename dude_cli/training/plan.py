"""How many steps a training has, and how the rows of a step are split over ranks and micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from dude_cli.config import Config, TrainConfig
from dude_cli.data import PreparedData, steps_per_epoch
from dude_cli.model import is_flash
from dude_cli.training.schedule import total_steps, warmup_steps

# Rows times longest row that `per_device_batch_size: auto` starts with.
AUTO_BATCH_TOKENS = 16_384


@dataclass(frozen=True)
class Plan:
    """What the run will do. Batch sizes in rows, over all ranks where they are called global.

    The global one is that of a full step: with fewer rows than `train.global_batch_size`, all of them.
    """

    total_steps: int
    warmup_steps: int
    steps_per_epoch: int
    global_batch_size: int
    per_device_batch_size: int
    gradient_accumulation_steps: int
    world_size: int


def make_plan(config: Config, data: PreparedData, world_size: int) -> Plan:
    """The number of steps, and how a global batch is split over ranks and micro-batches."""
    train = config.train
    per_epoch = steps_per_epoch(len(data.train), train.global_batch_size)
    steps = total_steps(train, per_epoch)
    rows = min(train.global_batch_size, len(data.train))
    per_device, accumulation = split_batch(train, rows, int(data.train.lengths.max()), world_size)
    return Plan(
        total_steps=steps,
        warmup_steps=warmup_steps(train, steps),
        steps_per_epoch=per_epoch,
        global_batch_size=rows,
        per_device_batch_size=per_device,
        gradient_accumulation_steps=accumulation,
        world_size=world_size,
    )


def split_batch(train: TrainConfig, rows: int, longest_row: int, world_size: int) -> tuple[int, int]:
    """The rows of a micro-batch on one device, and how many of them make its part of a step of so many `rows`."""
    rows_per_rank = -(-rows // world_size)
    if train.per_device_batch_size == "auto":
        per_device = max(1, min(rows_per_rank, AUTO_BATCH_TOKENS // longest_row))
    else:
        per_device = min(train.per_device_batch_size, rows_per_rank)
    return per_device, -(-rows_per_rank // per_device)


def evaluation_batch(rows: int, planned: int, longest_row: int) -> int:
    """The rows of a forward of an evaluation under `auto`: the training's, or fewer where rows are longer than there.

    `rows` is what memory has left of the `planned` ones, and its share of the tokens is what a forward may have.
    """
    return max(1, min(rows, AUTO_BATCH_TOKENS * rows // (planned * longest_row)))


def packs_flat(config: Config) -> bool:
    """Flash attention finds the borders of packed rows only in a batch of one sequence."""
    return config.data.packing and is_flash(config.model)
