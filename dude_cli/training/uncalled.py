"""Target layers that the model does not call: their adapters would never be trained, and nothing would say so.

Some models read a layer's weight instead (Mamba's `dt_proj`), or have parts that no text reaches (Gemma 3's vision
tower). DDP would wait for the gradients of such an adapter and fail in the second step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from dude_cli.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

# Names that a message has at most.
_SHOWN = 4


@contextmanager
def refusing_uncalled(layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Around a forward of the model that has the target `layers`. Raises UsageError if it does not call one of them."""
    called: set[str] = set()

    def watch(name: str, layer: nn.Module) -> Any:
        return layer.register_forward_hook(lambda *_: called.add(name))

    handles = [watch(name, layer) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    _refuse(layers, layers.keys() - called, "are not called by the model when it reads a row of the data")


def check_gradients(layers: Mapping[str, nn.Module]) -> None:
    """Raise UsageError if one of the adapter `layers` has no gradient after a backward pass.

    A model may leave out in training a layer that it calls in an evaluation, as Mamba's fused kernels do.
    """
    without = {
        name
        for name, layer in layers.items()
        if any(parameter.requires_grad and parameter.grad is None for parameter in layer.parameters())
    }
    _refuse(layers, without, "got no gradient in training: the model does not call them there")


def _refuse(layers: Mapping[str, nn.Module], found: Collection[str], why: str) -> None:
    # The rows decide which of its experts a model calls; in another step it may be these.
    uncalled = [name for name in layers if name in found and ".experts." not in name]
    if not uncalled:
        return
    shown = ", ".join(uncalled[:_SHOWN]) + (" ..." if len(uncalled) > _SHOWN else "")
    patterns = ", ".join(_patterns(uncalled, [name for name in layers if name not in found]))
    raise UsageError(
        f"{len(uncalled)} of {len(layers)} target layers {why}; their adapters would never be trained",
        where=f"adapter.target_modules: {shown}",
        fix=f"add to adapter.exclude_modules: {patterns}",
    )


def _patterns(uncalled: list[str], called: Iterable[str]) -> list[str]:
    """The `exclude_modules` that stand for `uncalled` alone: their last names, or the modules that they are under."""
    called = list(called)
    last = {name.rpartition(".")[2] for name in uncalled}
    if not any(name.rpartition(".")[2] in last for name in called):
        return sorted(last)
    found = set()
    for name in uncalled:
        parts = name.split(".")
        paths = (".".join(parts[:count]) for count in range(1, len(parts)))
        apart = (path for path in paths if not any(other.startswith(f"{path}.") for other in called))
        found.add(next((f"{path}.*" for path in apart), name))
    return sorted(found)
