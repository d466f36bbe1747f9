"""Count the bytes of a computation's tensors without computing anything: on the meta device, where they have no data.

The model's real code runs, forward and backward; what exists at once is what a device would have to hold, beside the
scratch space inside of kernels. So a forecast follows the code, and no formula has to.
"""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten


@dataclass
class _Storage:
    nbytes: int
    category: str


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the tensors made within that still exist (`now`), and at the moment of the most (`peak`), by category.

    A storage counts once, whatever views it has, and those of `existing` not at all. Tensors made while `category`
    has a value belong to it; `move` gives one another category.

    Code that looks at values gets answers, since there are none: of `nonzero` that there is nothing, of `all` what
    `all_is` says, of anything else zero or False. So no adapter row cancels, and `all_is` says whether position ids
    count up without a restart, as transformers asks in order to find packed rows.
    """

    def __init__(self, existing: nn.Module, *, all_is: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.category = "activations"
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._all_is = all_is
        self._answers = WeakTensorKeyDictionary()
        self._existing = {tensor.untyped_storage() for tensor in (*existing.parameters(), *existing.buffers())}
        self._made: weakref.WeakKeyDictionary[Any, _Storage] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = self._answer(func, args, kwargs)
        if result is NotImplemented:
            result = _result(func, args, kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        if func.overloadpacket is aten.all:
            self._answers[result] = self._all_is
        return result

    def _answer(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What is said of the values of a tensor without any; NotImplemented for an operation that needs none."""
        if not (args and isinstance(args[0], Tensor) and args[0].is_meta):
            return NotImplemented
        values = args[0]
        if func is aten._local_scalar_dense.default:
            return self._answers.get(values, 0)  # type: ignore[no-untyped-call]
        if func is aten.nonzero.default:
            return torch.empty(0, values.dim(), dtype=torch.int64, device="meta")
        if func is aten._to_copy.default and kwargs.get("device", values.device).type == "cpu":
            return torch.zeros(values.shape, dtype=kwargs.get("dtype", values.dtype))
        return NotImplemented

    def move(self, tensor: Tensor, category: str) -> None:
        """Count the bytes of `tensor` under another category from now on."""
        made = self._made.get(tensor.untyped_storage())
        if made is not None:
            self.now[made.category] -= made.nbytes
            self.now[category] += made.nbytes
            made.category = category

    def _count(self, storage: Any) -> None:
        if storage in self._made or storage in self._existing:
            return
        made = self._made[storage] = _Storage(storage.nbytes(), self.category)
        weakref.finalize(storage, self._forget, made)
        self.now[made.category] += made.nbytes
        if self.now.total() > self.peak.total():
            self.peak = Counter(self.now)

    def _forget(self, made: _Storage) -> None:
        self.now[made.category] -= made.nbytes


# What operations gave for operands of some shapes and strides: the layers of a model are alike, and torch works out
# each result on the meta device in Python, in a third of a millisecond.
MAX_KNOWN = 20_000  # more than a few models have
_known: dict[Any, Any] = {}


def _result(func: Any, args: Any, kwargs: Any) -> Any:
    """`func(*args, **kwargs)`, or a result like the one that it had for operands like these."""
    is_written = _writes_first(func) and args[0].is_meta
    if not (is_written or _makes_new(func)):
        return func(*args, **kwargs)
    try:
        key = (func, *map(_shape_of, args), *((name, _shape_of(value)) for name, value in kwargs.items()))
        known = _known.get(key)
    except TypeError:  # an operand that has no hash
        return func(*args, **kwargs)
    if known is None:
        result = func(*args, **kwargs)
        if len(_known) < MAX_KNOWN and (is_written or _are_apart(result)):
            layouts = [(each.shape, each.stride(), each.dtype) for each in tree_leaves(result)]
            _known[key] = layouts, None if isinstance(result, Tensor) else type(result)
        return result
    if is_written:
        return args[0]
    layouts, kind = known
    tensors = [torch.empty_strided(size, stride, dtype=dtype, device="meta") for size, stride, dtype in layouts]
    return tensors[0] if kind is None else kind(tensors)


def _shape_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device.type
    if isinstance(value, (list, tuple)):
        return tuple(map(_shape_of, value))
    return type(value), value


@functools.cache
def _makes_new(func: Any) -> bool:
    """Whether no result is, or is a view of, an operand, and none is written to."""
    return all(each.alias_info is None for each in (*func._schema.arguments, *func._schema.returns))


@functools.cache
def _writes_first(func: Any) -> bool:
    """Whether it writes to its first operand, returns that and does not change its shape."""
    first, *others = func._schema.arguments or [None]
    is_first = first is not None and first.alias_info is not None and first.alias_info.is_write
    returned = [each.alias_info for each in func._schema.returns]
    return (
        is_first
        and all(each.alias_info is None for each in others)
        and len(returned) == 1
        and returned[0] is not None
        and torch.Tag.inplace_view not in func.tags
    )


def _are_apart(result: Any) -> bool:
    """Whether a result is nothing but tensors on the meta device, each with a storage of its own."""
    tensors = tree_leaves(result)
    storages = {each.untyped_storage() for each in tensors if isinstance(each, Tensor) and each.is_meta}
    return len(storages) == len(tensors)


@contextmanager
def counted(existing: nn.Module, *, all_is: bool = True) -> Iterator[LiveBytes]:
    """Within, tensors on the meta device are counted; see `LiveBytes`."""
    # Put in its place by name: a TorchFunctionMode is not asked by what checkpointing runs again.
    original = F.scaled_dot_product_attention

    def attention(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return (_flash_attention if query.is_meta else original)(query, *args, **kwargs)

    F.scaled_dot_product_attention = attention
    try:
        with LiveBytes(existing, all_is=all_is) as live:
            yield live
    finally:
        F.scaled_dot_product_attention = original


def _flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention without the (length, length) matrix, as CPUs and GPUs compute it; on meta torch would make one.

    It is a CPU's kernel and keeps what a GPU's keeps: query, key, value, output and a float32 for each row.
    """
    if attn_mask is not None and attn_mask.dtype == torch.bool:  # torch adds a mask to the scores
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
    output: Tensor = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return output
