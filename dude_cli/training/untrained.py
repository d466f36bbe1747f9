"""Ends of answers that the base cannot say: tokens that its own training never met.

Such tokens are left as they were initialised, or alike, in the output head, and an adapter does not change the head.
Whatever it does to the hidden states, they all get the same logit. A base model's `<|eot_id|>` can be one.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

from dude_cli.config import Config
from dude_cli.data import prompt_form
from dude_cli.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Of a trained head no two rows are as near as this, as a share of the median row's norm.
NEAR = 0.01
_ROWS_OF_HEAD = 4096  # made float32 at once


def untrained_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: Config) -> list[str]:
    """What to say of each token at the end of an answer that the head cannot tell from others."""
    from dude_cli.adapter import find_targets

    head = model.get_output_embeddings()
    if head is None or any(head is layer for layer in find_targets(model, config.adapter).values()):
        return []
    found = {token: rows_like(head.weight, token) for token in sorted(_taught_ends(tokenizer, config))}
    return [
        f"{tokenizer.convert_ids_to_tokens(token)!r}, which ends answers, is like {count:,} other tokens in the base's "
        "output head, which adapters leave as it is: it was never trained, so answers may not end. Choose a base that "
        "knows it, or another end: a `data.chat_template`, or `eos_token` in tokenizer_config.json"
        for token, count in found.items()
        if count
    ]


def _taught_ends(tokenizer: PreTrainedTokenizerBase, config: Config) -> set[int]:
    """The tokens with which the rows of a training end."""
    ends: set[int] = set()
    form = prompt_form(tokenizer, config.data, raw=False)
    if form.chat is not None:
        with suppress(DataError):  # what the template says of a conversation is told of the rows
            ends = form.chat.ends_of_turns()
    is_all_chats = all(config.data.form(source).format == "chat" for source in config.data.train)
    return ends if ends and is_all_chats else ends | {form.encoder.eos_id}


def rows_like(head: Tensor, row: int) -> int:
    """How many other rows of a head (vocabulary x width) are nearer to this one than `NEAR` median norms."""
    import torch

    with torch.no_grad():
        one = head[row].float()
        norms, distances = [], []
        for part in torch.split(head, _ROWS_OF_HEAD):
            wide = part.float()
            norms.append(wide.norm(dim=1))
            distances.append((wide - one).norm(dim=1))
        near = torch.cat(distances) < NEAR * torch.cat(norms).median()
        near[row] = False
        return int(near.sum())
