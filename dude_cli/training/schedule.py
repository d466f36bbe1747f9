"""The learning rate as a pure function of the step, and how many steps there are."""

from __future__ import annotations

import math

from dude_cli.config import TrainConfig


def total_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    """Optimizer steps of the run: `max_steps`, or the epochs' windows rounded up."""
    return config.max_steps or max(1, math.ceil(config.num_train_epochs * steps_per_epoch))


def warmup_steps(config: TrainConfig, steps: int) -> int:
    """The steps of the warm-up: a share of all, rounded up, but never the last one.

    The first step of a warm-up has the rate 0, so a run of one step would change nothing.
    """
    return min(math.ceil(config.warmup_ratio * steps), steps - 1)


def learning_rate_at(step: int, steps: int, config: TrainConfig) -> float:
    """The rate of optimizer step `step`, counted from 0, of `steps`.

    A linear rise from 0 over the warm-up, then cosine or linear to 0, or constant: the curves of transformers'
    `get_scheduler`, so that a published setting means the same here.
    """
    warmup = warmup_steps(config, steps)
    if step < warmup:
        return config.learning_rate * step / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    match config.lr_scheduler_type:
        case "constant":
            share = 1.0
        case "linear":
            share = max(0.0, 1.0 - progress)
        case "cosine":
            share = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.learning_rate * share
