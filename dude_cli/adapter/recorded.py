"""What only an optimizer step changes, of all layers, as one CUDA graph: norms, ratios, factors in the base's dtype.

That is dozens of small kernels for each layer, and starting one takes the host longer than running it takes the GPU.
The graph is one start for all of them. It reads the tensors where they are: it holds as long as they stay there,
whatever is written to them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dude_cli.adapter.autocast import full_float32
from dude_cli.adapter.layer import AdapterLayer, RowNorms
from dude_cli.adapter.product import TORCH_ALONE, StepTensors
from dude_cli.adapter.weight import is_quantized, is_whole

# Branches of the graph: a kernel of one layer leaves most of a GPU idle.
BRANCHES = 4

Places = list[tuple[object, ...]]


class RecordedStep:
    """The graph of some layers on the current GPU, and the tensors that a replay writes; not the layers themselves."""

    @torch.no_grad()
    def __init__(self, layers: Sequence[AdapterLayer]) -> None:
        self._squared: list[Tensor | None] = []
        self._norms: list[Tensor | None] = []
        self._steps: list[StepTensors] = []
        self._graph = torch.cuda.CUDAGraph()
        checks = []
        branches = [torch.cuda.Stream() for _ in range(BRANCHES)]  # type: ignore[no-untyped-call]
        # Other threads, such as NCCL's, may go on using the device meanwhile.
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            trunk = torch.cuda.current_stream()
            for branch in branches:
                branch.wait_stream(trunk)
            for number, layer in enumerate(layers):
                with torch.cuda.stream(branches[number % BRANCHES]):
                    checks.append(self._record(layer))
            for branch in branches:
                trunk.wait_stream(branch)
            self._checks = torch.stack(checks)

    @torch.no_grad()
    def replay(self, layers: Sequence[AdapterLayer]) -> Iterator[tuple[RowNorms | None, StepTensors | None]]:
        """Each layer's norms and step tensors as A, B and m are now, valid until the next replay.

        None for norms without a magnitude, and for the step tensors where rows have to be summed densely.
        """
        self._graph.replay()
        has_norms = any(norm is not None for norm in self._norms)
        # Without norms there is nothing to wait for.
        checks = self._checks.tolist() if has_norms else [(False, False)] * len(layers)
        for layer, squared, norm, step, (cancels, has_zero) in zip(
            layers, self._squared, self._norms, self._steps, checks, strict=True
        ):
            if squared is None or norm is None:
                yield None, step
            elif cancels:
                exact = layer.without_cancellation(squared, *layer.difference())
                yield RowNorms(exact.clamp(min=0).sqrt(), has_zero), None
            else:
                yield RowNorms(norm, has_zero), step

    def _record(self, layer: AdapterLayer) -> Tensor:
        """Add a layer to the graph; whether a row of it cancels and whether it has a magnitude of zero, (2,)."""
        squared = norm = None
        P, Q = layer.factors.difference()
        checks = torch.zeros(2, dtype=torch.bool, device=layer.weight.device)
        if layer.magnitude is not None:
            with full_float32(layer.weight.device):
                squared = layer.factored_squared_norms(P, Q)
            norm, checks = squared.clamp(min=0).sqrt(), layer.norm_checks(squared)
        self._squared.append(squared)
        self._norms.append(norm)
        self._steps.append(layer.step_tensors(layer.weight.dtype, P, Q, norm, layer.magnitude))
        return checks


class _Known:
    """Where the tensors of a model's layers are, and from the second time on the graph that reads them there."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.recorded: RecordedStep | None = None
        self.is_impossible = False


_known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()


def recorded_step(model: nn.Module, layers: Sequence[AdapterLayer]) -> RecordedStep | None:
    """The graph of the layers of `model`; None the first time, as for one evaluation, and where there can be none."""
    if TORCH_ALONE or torch.is_inference_mode_enabled() or not layers or not all(map(_can_be_recorded, layers)):
        return None
    places = [_places(layer) for layer in layers]
    known = _known.get(model)
    if known is None or known.places != places:
        _known[model] = _Known(places)
        return None
    if known.recorded is None and not known.is_impossible:
        try:
            known.recorded = RecordedStep(layers)
        except RuntimeError:  # too little memory for one of its own, or something that cannot be recorded
            known.is_impossible = True
    return known.recorded


def forget_recorded(model: nn.Module) -> None:
    """Let go of the graph of `model` and of its memory: its adapters go."""
    _known.pop(model, None)


def _can_be_recorded(layer: AdapterLayer) -> bool:
    """Whether nothing of it depends on values, and all of it is on the current GPU and stays there."""
    device = layer.weight.device
    if device.type != "cuda" or device.index != torch.cuda.current_device() or layer.lora_A.device != device:
        return False
    if not is_whole(layer.base_layer) or layer.is_plain:
        return False
    # bitsandbytes has kernels on streams of its own choice; an exact norm has a gradient.
    return not is_quantized(layer.base_layer) and layer.config.norm_gradient != "exact"


def _places(layer: AdapterLayer) -> tuple[object, ...]:
    tensors = [layer.weight, layer.bias, *layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    found = [None if tensor is None else (tensor.data_ptr(), tensor.shape, tensor.dtype) for tensor in tensors]
    return (layer.scaling, *found)
