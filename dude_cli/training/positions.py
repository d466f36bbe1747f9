"""Rows that are longer than the model has positions for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dude_cli.data import PreparedData
from dude_cli.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_positions(model: PreTrainedModel, data: PreparedData, max_length: int, say: Callable[[str], None]) -> None:
    """Raise DataError for a row that is longer than the model's table of positions; warn where they are computed."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(rows.longest_encoded_row for rows in (data.train, data.validation) if rows is not None)
    if positions is None or longest <= positions:
        return
    what = f"the longest row has {longest:,} tokens, and {model.config.name_or_path} is made for {positions:,}"
    if _has_position_table(model, positions):
        raise DataError(what, where=f"data.max_length: {max_length}", fix=f"set data.max_length to at most {positions}")
    say(f"warning: {what}: beyond that its answers may be poor; data.max_length cuts the rows")


def _has_position_table(model: PreTrainedModel, positions: int) -> bool:
    """Whether the positions are rows of a table, which end: learned ones, or GPT-J's, which are computed once."""
    from torch import nn

    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    tables += [buffer for name, buffer in model.named_buffers() if name.endswith("embed_positions")]
    vocabulary = model.get_input_embeddings().weight
    # OPT's has two rows more than positions.
    return any(positions <= len(table) <= positions + 2 for table in tables if table is not vocabulary)
