"""Train in this process: faster than a command, and a test can look inside or stop it at a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from dude_cli.config import load_config
from dude_cli.system.runtime import StopSignal, make_accelerator
from dude_cli.training.init_from import resolve_init_from
from dude_cli.training.loop import train
from dude_cli.training.prepare import Prepared, prepare


class StopAfter(StopSignal):
    """Stands for a signal that arrives in a step: the training asks once a step, an evaluation without gradients."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.left = steps

    def __bool__(self) -> bool:
        if torch.is_grad_enabled():
            self.left -= 1
        if self.left == 0:
            self.name = "SIGTERM"
        return self.name is not None


def init_here(
    config_path: Path,
    *overrides: str,
    accelerator: Accelerator | None = None,
    say: Callable[[str], None] = lambda text: None,
    allow_changes: bool = False,
) -> Prepared:
    """What `dude init CONFIG` does, without the report; a begun run's checkpoint is looked for, as in `dude train`."""
    config = resolve_init_from(load_config(config_path, overrides))
    return prepare(config, accelerator or make_accelerator(), say, allow_changes=allow_changes)


def train_here(
    config_path: Path,
    *overrides: str,
    stop: StopSignal | None = None,
    say: Callable[[str], None] = lambda text: None,
    allow_changes: bool = False,
) -> dict[str, Any]:
    """What `dude train CONFIG` does; `stop` stops it as a signal would."""
    accelerator = make_accelerator()
    prepared = init_here(config_path, *overrides, accelerator=accelerator, say=say, allow_changes=allow_changes)
    return train(prepared, accelerator, Console(quiet=True), StopSignal() if stop is None else stop)
