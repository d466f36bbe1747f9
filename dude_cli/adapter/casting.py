"""Cast a model to another dtype as transformers would have loaded it in that dtype.

Not every tensor follows: a model class keeps some of its parameters in float32 (routers, and what else overflows or
loses too much), some have a dtype of their own, buffers of its files follow, and those that no file has are computed
in the dtype that the model is made in.
"""

from __future__ import annotations

import copy
import re

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel


def cast_model(model: PreTrainedModel, before: torch.dtype, after: torch.dtype) -> None:
    """Cast `model`, which was loaded in `before`, in place: then it is as loaded in `after`, config and buffers too.

    What somebody has put into another dtype than it was loaded in stays as it is.
    """
    Cast(model, before, after).apply(model)


class Cast:
    """What each tensor of a model that was loaded in `before` becomes in `after`, by its name in the plain model."""

    def __init__(self, model: PreTrainedModel, before: torch.dtype, after: torch.dtype) -> None:
        self._before, self._after = before, after
        self._dtypes_before: dict[str, torch.dtype] = {}
        self._dtypes_after: dict[str, torch.dtype] = {}
        self._computed: dict[str, Tensor] = {}
        if before != after:
            self._dtypes_before = _dtypes_as_loaded(_made_in(before, model), before)
            made = _made_in(after, model)
            self._dtypes_after, self._computed = _dtypes_as_loaded(made, after), _computed_buffers(made)

    def dtype(self, name: str, tensor: Tensor) -> torch.dtype:
        """The dtype that `tensor` gets; its own if it has none of a loaded model's."""
        if tensor.dtype != self._dtypes_before.get(name, self._before):
            return tensor.dtype
        return self._dtypes_after.get(name, self._after)

    def apply(self, model: PreTrainedModel) -> None:
        """Cast the plain `model`, in place."""
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            dtype = self.dtype(name, tensor)
            if dtype != tensor.dtype:
                tensor.data = self._computed.get(name, tensor.data).to(tensor.device, dtype)
        _set_dtype(model.config, self._after)


def _made_in(dtype: torch.dtype, model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same kind on the meta device, as transformers makes one before it loads its files in `dtype`."""
    with torch.device("meta"):
        made: PreTrainedModel = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    return made


def _dtypes_as_loaded(made: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of each tensor, by name, once the files are loaded in `dtype`."""
    dtypes = {name: tensor.dtype for name, tensor in [*made.named_parameters(), *made.named_buffers()]}
    for pattern, kept in made._get_dtype_plan(dtype).items():
        in_files = [name for name in made.state_dict() if re.search(pattern.replace("*", ".*"), name)]
        dtypes |= dict.fromkeys(in_files, kept)
    return dtypes


def _computed_buffers(made: PreTrainedModel) -> dict[str, Tensor]:
    """The buffers that no file has, by name, on the CPU: transformers computes them after the files are loaded."""
    for tensor in [*made.parameters(), *made.buffers()]:
        tensor._is_hf_initialized = True
    for name, buffer in list(made.named_non_persistent_buffers()):
        parent, _, own = name.rpartition(".")
        made.get_submodule(parent)._buffers[own] = torch.empty_like(buffer, device="cpu")
    for module in made.modules():
        module._is_hf_initialized = False
    made.initialize_weights()
    return dict(made.named_non_persistent_buffers())


def _set_dtype(config: PreTrainedConfig, dtype: torch.dtype) -> None:
    """Let `config` and those of its parts name `dtype`, which their weights have."""
    config.dtype = dtype
    for part in config.sub_configs:
        if isinstance(nested := getattr(config, part, None), PreTrainedConfig):
            _set_dtype(nested, dtype)
