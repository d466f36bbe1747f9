"""How a model reads rows of the user's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dude_cli.config import DataConfig


@dataclass(frozen=True)
class RowReader:
    """How a model reads rows: its tokenizer, what it was trained on, if that is known, and the length of its context.

    Such rows are in the form of the training's, and are cut as they are, or to the context if that is shorter.
    """

    tokenizer: Any
    trained: DataConfig | None
    context: int
