"""How a model reads rows of the user's own, and which of them it knows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dude_cli.config import DataConfig


@dataclass(frozen=True)
class RowReader:
    """How a model reads rows: its tokenizer, what it was trained on, if that is known, and the length of its context.

    Such rows are in the form of the training's, and are cut as they are, or to the context if that is shorter.
    `trained_rows` are the hashes of the training's (`EncodedRows.row_hashes`), if they are known.
    """

    tokenizer: Any
    trained: DataConfig | None
    context: int
    trained_rows: npt.NDArray[np.uint64] | None = None
