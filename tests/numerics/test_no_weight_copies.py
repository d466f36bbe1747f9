"""No copy of a base weight is made in a training step, in any dtype."""

from __future__ import annotations

import pytest
import torch
from tiny_models import VOCABULARY, tiny_batch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from dude_cli.adapter import AdapterConfig, constant_adapters, patch_model, widened
from dude_cli.adapter import weight as weight_module
from dude_cli.config import TrainConfig
from dude_cli.training.loss import SummedLoss, with_targets
from dude_cli.training.step import make_optimizer


class NewTensors(TorchDispatchMode):
    """Names the operations that make a tensor of at least `size` values which is no view of what was there."""

    def __init__(self, model: torch.nn.Module, size: int) -> None:
        super().__init__()
        self.size = size
        self.existing = {p.untyped_storage() for p in (*model.parameters(), *model.buffers())}
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            is_new = isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.existing
            if is_new and tensor.untyped_storage().nbytes() >= self.size * min(tensor.element_size(), 2):
                self.found.append(f"{func}{tuple(tensor.shape)}")
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_slow", [False, True])
@pytest.mark.parametrize("method", ["dude", "dora", "pissa", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_makes_no_tensor_as_large_as_a_base_weight(dtype, is_slow, method, checkpointing, monkeypatch):
    monkeypatch.setattr(widened, "CPU_IS_SLOW", is_slow)
    # As the chunks of a real layer are small beside it.
    for module in (weight_module, widened):
        monkeypatch.setattr(module, "CHUNK_VALUES", 256 * 8)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = AutoConfig.for_model("llama", vocab_size=VOCABULARY, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    patch_model(model, AdapterConfig(method=method, rank=2)).train()
    if checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    summed_loss, optimizer = SummedLoss(model), make_optimizer(model, TrainConfig())
    ids = tiny_batch(rows=2, length=12)
    with NewTensors(model, size=256 * 256) as new:
        for _ in range(2):
            with constant_adapters(model):
                for _ in range(2):
                    summed_loss(with_targets({"input_ids": ids, "labels": ids})).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not new.found
