"""The loss of a batch without its logits: a large vocabulary's never exist at once.

Logits of n tokens take 4 n V bytes in float32 and their gradient as much again: 4 GB for 16 thousand tokens of a
32 thousand vocabulary. Here a chunk of tokens has its logits, its loss and its gradient computed and is forgotten, as
in Liger's FusedLinearCrossEntropy (arXiv 2410.10989, section 3.2), whose kernels need Triton; this is torch alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dude_cli.adapter.widened import is_slow, times
from dude_cli.data.batches import NOT_LEARNED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_CHUNK_VALUES = 16 * 2**20  # 64 MiB of float32


class SummedLoss(nn.Module):
    """The sum of the cross-entropies of a batch's target tokens, in nats, float32, as the forward of a module.

    A module, because DDP averages the gradients of what its own forward has computed. `model` is a causal language
    model whose base is frozen. Its logits are never whole where `head_of` has seen that they are its head's output and
    nothing more.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self._head = head_of(model)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The loss of a batch from `with_targets`, a scalar. Only positions that have a target get logits."""
        inputs = dict(batch)
        positions, target_ids = inputs.pop("target_positions"), inputs.pop("target_ids")
        if self._head is None:
            logits: Tensor = self.model(**inputs, use_cache=False).logits
            chosen = logits.flatten(0, 1).index_select(0, positions)
            return F.cross_entropy(chosen.float(), target_ids, reduction="sum")
        hidden: Tensor = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        chosen = hidden.flatten(0, 1).index_select(0, positions)
        return linear_cross_entropy(chosen, self._head.weight, self._head.bias, target_ids)


def with_targets(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch of `collate` with `labels` replaced by the n positions that a target follows, and the targets' ids.

    Token i is predicted from the tokens before it: `target_positions` (n,) are places in the flattened (rows, length)
    one to the left of a label, `target_ids` (n,) the labels. Called before the batch goes to a GPU, which would have
    to wait for a result of such a size that only the values tell.
    """
    batch = dict(batch)
    following = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=NOT_LEARNED).flatten()
    positions = (following != NOT_LEARNED).nonzero().squeeze(1)
    return batch | {"target_positions": positions, "target_ids": following[positions]}


def linear_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, target_ids: Tensor) -> Tensor:
    """sum_t logsumexp(z_t) - z_t[target_t] with z = hidden W^T + bias, a float32 scalar.

    `hidden` (n, d), a frozen `weight` (V, d) and `bias` (V,), `target_ids` (n,) int64. z has the dtype of a plain
    product and is then taken to float32, as in `F.cross_entropy(logits.float(), ...)`. Differentiable in `hidden`.
    """
    loss: Tensor = _LinearCrossEntropy.apply(hidden, weight, bias, target_ids)  # type: ignore[no-untyped-call]
    return loss


def chunk_tokens(tokens: int, vocabulary: int) -> int:
    """How many of a batch's tokens have their logits at once.

    An eighth of them, so that their logits stay small beside the activations; in a large batch those of
    `MAX_CHUNK_VALUES`, or 256. Never less than 128: the head's weight is read for each chunk, which would then take
    longer than the product.
    """
    return max(128, min(tokens // 8, max(256, MAX_CHUNK_VALUES // vocabulary)))


class _LinearCrossEntropy(torch.autograd.Function):
    """Computes the gradient with the loss, when a chunk's logits are there: (softmax(z) - onehot) W, (n, d).

    A recomputation in the backward pass, as `torch.utils.checkpoint` would do it, costs a third product with W and
    saves no memory: what is kept either way is one (n, d) tensor. `benchmarks/loss.py` measures the three.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target_ids: Tensor) -> Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if needs_gradient else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        size = chunk_tokens(len(hidden), weight.shape[0])
        for start in range(0, len(hidden), size):
            rows = slice(start, start + size)
            into = None if gradient is None else gradient[rows]
            loss += _chunk_loss(hidden[rows], weight, bias, target_ids[rows], into)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None, None


def _chunk_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, target_ids: Tensor, into: Tensor | None) -> Tensor:
    """The sum over some tokens, and its gradient into `into`. Every step is in the memory of the logits."""
    logits = F.linear(hidden, weight, bias)
    targets = target_ids[:, None]
    values = logits.float()  # the logits themselves if they are float32
    values -= values.amax(1, keepdim=True)
    at_targets = values.gather(1, targets)
    sums = values.exp_().sum(1, keepdim=True)
    if into is not None:
        values /= sums
        values.scatter_(1, targets, at_targets.exp() / sums - 1)
        if is_slow(weight):
            into.copy_(times(values, weight))
        else:
            torch.mm(logits.copy_(values), weight, out=into)
    return (sums.log() - at_targets).sum()


def head_of(model: PreTrainedModel) -> nn.Linear | None:
    """The layer whose output is the model's logits, exactly; None if it cannot stand for them.

    It must be a plain frozen `nn.Linear`, with no adapter and not quantised. Many models change their logits after
    it (Gemma 2 caps them, Cohere and Granite scale them) or their hidden states before. So one short forward asks:
    the head must get what the model without head returns, and what a hook puts in the place of its output must
    come out as the logits, bit for bit.
    """
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or any(parameter.requires_grad for parameter in head.parameters()):
        return None
    if model.base_model is model or head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head):
        return None
    return head if _is_last(model, head) else None


def _is_last(model: PreTrainedModel, head: nn.Linear) -> bool:
    ids = torch.arange(8, device=head.weight.device)[None] % model.config.get_text_config().vocab_size
    seen: list[Tensor] = []
    # Of every size that logits may have: a cap that changes large values alone is noticed too.
    planted = torch.linspace(-1000.0, 1000.0, ids.shape[1] * head.out_features, device=ids.device)

    def plant(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.extend((inputs[0], planted.view_as(output).to(output.dtype)))
        return seen[-1]

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            with head.register_forward_hook(plant):
                logits = model(input_ids=ids, use_cache=False).logits
    finally:
        model.train(was_training)
    if len(seen) != 2:
        return False
    if logits.is_meta:  # a forecast, without values: what was put there must be what comes out
        return bool(logits.untyped_storage()._cdata == seen[1].untyped_storage()._cdata)
    return torch.equal(seen[0], hidden) and torch.equal(logits, seen[1].to(logits.dtype))
