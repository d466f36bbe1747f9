"""Target layers whose output the model writes over: the gradient of a magnitude needs what stood there.

A plain linear layer keeps nothing of its output, so a model may: Falcon adds the attention's to the MLP's in place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

# Outputs that are held to be looked at again; a model writes over one before it has called so many other layers.
_HELD = 8


@contextmanager
def finding_overwritten(layers: Mapping[str, nn.Module]) -> Iterator[set[str]]:
    """Around a forward of the model that has the target `layers`, not in inference mode.

    Yields a set that has, at the end, the names of those whose output was written over.
    """
    found: set[str] = set()
    recent: deque[tuple[str, Tensor, int]] = deque()

    def look_at_oldest() -> None:
        name, output, version = recent.popleft()
        if output._version != version:
            found.add(name)

    def watch(name: str, layer: nn.Module) -> RemovableHandle:
        def hold(_layer: nn.Module, _inputs: object, output: Tensor) -> None:
            recent.append((name, output, output._version))
            if len(recent) > _HELD:
                look_at_oldest()

        return layer.register_forward_hook(hold)

    handles = [watch(name, layer) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    while recent:
        look_at_oldest()
