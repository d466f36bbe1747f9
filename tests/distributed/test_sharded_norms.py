"""FSDP2 on two gloo ranks: norms of weights that are whole in a forward only, held within the scope and never stale."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from forked import dude_forked
from tiny_models import tiny_batch, tiny_model
from torch.distributed.fsdp import fully_shard

from dude_cli.adapter import AdapterConfig, adapter_layers, constant_adapters, patch_model, trainable_parameters

STEPS = 3


def test_a_sharded_model_trains_as_a_whole_one(tmp_path):
    done = dude_forked(tmp_path, count=2, command=train_sharded)
    assert done.returncode == 0, done.stderr
    model = patched_model()
    expected = train(model)
    found = torch.load(tmp_path / "found.pt")
    assert len(found["losses"]) == STEPS
    assert expected["losses"][-1] < expected["losses"][0]
    for name in ("losses", "gradients"):
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(expected[name]), rtol=1e-4, atol=1e-6)


def patched_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return patch_model(tiny_model("llama"), AdapterConfig(method="dude", rank=4)).train()


def train(model: torch.nn.Module) -> dict[str, list[float]]:
    """Steps of two equal micro-batches within the scope, by AdamW, fused: it leaves no mark on the tensors."""
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2, fused=True)
    ids, losses, gradients = tiny_batch(), [], []
    for _ in range(STEPS):
        with constant_adapters(model):
            for _ in range(2):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                loss.backward()
        gradients += [gradient_norm(parameter) for parameter in trainable_parameters(model).values()]
        losses.append(float(loss))
        optimizer.step()
        optimizer.zero_grad()
    return {"losses": losses, "gradients": gradients}


def gradient_norm(parameter: torch.Tensor) -> float:
    gradient = parameter.grad
    return float(gradient.full_tensor().norm() if hasattr(gradient, "full_tensor") else gradient.norm())


def train_sharded(arguments: list[str]) -> None:
    dist.init_process_group("gloo")
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    model = patched_model()
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(hasattr(layer.base_layer.weight, "device_mesh") for layer in adapter_layers(model).values())
    found = train(model)
    if dist.get_rank() == 0:
        torch.save(found, Path(arguments[0]) / "found.pt")
    dist.destroy_process_group()
