"""The memory that a training will take, from its config and its rows, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dude_cli import quickstart
from dude_cli.config import Config, DataSource
from dude_cli.data import prepare_data, set_chat_template
from dude_cli.errors import UsageError
from dude_cli.model import load_tokenizer
from dude_cli.training.plan import Plan, split_batch
from dude_cli.training.resume import refuse_moved_base

if TYPE_CHECKING:
    from dude_cli.training.estimate import MemoryEstimate

# A forecast reads the rows for their longest one if their file is no larger than this.
QUICK_DATA_BYTES = 32 * 2**20


def estimate(config: Config, world_size: int) -> tuple[MemoryEstimate, str]:
    """The memory that a training would take, before anything is loaded, and where its length of rows is from.

    The rows are read for their longest one where that is quick; else each may have `data.max_length` tokens.
    Raises DudeError as `prepare` does.
    """
    from dude_cli.training.estimate import Batch, estimate_memory

    refuse_moved_base(config)
    step_rows, length, source = config.train.global_batch_size, config.data.max_length, "data.max_length"
    if all(map(_is_quick, config.data.train)):
        tokenizer = load_tokenizer(config.model)
        set_chat_template(tokenizer, config.data.chat_template, config.data.chat_template_kwargs)
        data = prepare_data(config.data, tokenizer, config.seed)
        step_rows = min(step_rows, len(data.train))
        length, source = int(data.train.lengths.max()), "the longest row"
    rows, accumulation = split_batch(config.train, step_rows, length, world_size)
    return estimate_memory(config, Batch(rows, length, accumulation, world_size)), source


def _is_quick(source: DataSource) -> bool:
    path = Path(source.path).expanduser()
    return source.path == quickstart.NAME or (path.is_file() and path.stat().st_size <= QUICK_DATA_BYTES)


def forecast(config: Config, plan: Plan, length: int, say: Callable[[str], None]) -> MemoryEstimate | None:
    """The memory of a training as planned, with rows of up to `length` tokens; None, and a line, if it has none."""
    from dude_cli.training.estimate import Batch, estimate_memory

    batch = Batch(plan.per_device_batch_size, length, plan.gradient_accumulation_steps, plan.world_size)
    try:
        return estimate_memory(config, batch)
    except UsageError as error:  # a model without a forecast may well be trained
        say(f"no forecast: {error.what}")
        return None
