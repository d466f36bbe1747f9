"""Pack several rows into one sequence, and make sure that a model keeps them apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dude_cli.data.batches import EncodedRow, collate
from dude_cli.errors import DataError

if TYPE_CHECKING:
    from torch import nn

OPEN_SEQUENCES = 256


def pack(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Return the rows of each sequence: first fit, in the rows' own order, over the last 256 sequences opened.

    Each row goes into the oldest open sequence with room for it, so no sequence is longer than `max_length`, no row
    is cut or lost, and the sequences follow the order of the rows closely. Packing the longest rows first would
    waste a little less, but would tear that order apart and make all sequences of one kind neighbours.
    """
    groups: list[list[int]] = []
    room = np.zeros(OPEN_SEQUENCES, np.int64)  # of the open sequences, oldest first
    open_groups: list[list[int]] = []
    for row, length in enumerate(lengths):
        count = len(open_groups)
        fits = room[:count] >= length
        place = int(fits.argmax()) if count else 0
        if count == 0 or not fits[place]:
            if count == OPEN_SEQUENCES:
                open_groups.pop(0)
                room[:-1] = room[1:]
            open_groups.append([])
            groups.append(open_groups[-1])
            place = len(open_groups) - 1
            room[place] = max_length
        open_groups[place].append(row)
        room[place] -= length
    return groups


def check_packing(model: nn.Module, *, flatten: bool = False) -> None:
    """Raise DataError unless `model` keeps packed rows apart: run once before training on packed rows.

    A packed pair of rows must give the logits of each row alone. transformers does that for models that build
    their mask from position ids (Llama, Mistral, Qwen, Gemma, GPT-2, GPT-NeoX, ...); others ignore the restarts
    (seen with transformers 5.23: OPT, Bloom, Falcon, Mamba), and then rows would silently see each other.
    """
    import torch

    first, second, third = ([*range(start, start + 8)] for start in (3, 19, 35))
    device = next(model.parameters()).device

    def last_logits(rows: list[list[int]]) -> torch.Tensor:
        ids = [token for row in rows for token in row]
        sequence = EncodedRow(ids, ids, [len(row) for row in rows], list(range(len(rows))))
        batch = collate([sequence], pad_id=0, flatten=flatten)
        del batch["labels"]
        output = model(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False)
        logits: torch.Tensor = output.logits[0, -len(third) :].double()
        return logits

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            alone = last_logits([third])
            packed = last_logits([first, second, third])
            neighbours_changed = last_logits([second, first, third])
    except TypeError as error:  # a forward without position_ids
        raise _not_apart(model) from error
    finally:
        model.train(was_training)
    scale = float(alone.abs().max())
    # Same shapes, and what is masked adds exact zeros: tight in every dtype. Alone, the kernels differ: loose.
    leak = float((packed - neighbours_changed).abs().max())
    shift = float((packed - alone).abs().max())
    if not (leak <= 1e-5 * scale and shift <= 0.05 * scale):
        raise _not_apart(model)


def _not_apart(model: nn.Module) -> DataError:
    return DataError(
        f"{type(model).__name__} lets packed rows see each other",
        where="data.packing",
        fix="set `data.packing: false`: this architecture ignores position ids that restart",
    )
