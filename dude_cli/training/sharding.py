"""How the ranks share a training: each has the whole base (DDP), or a part of each block of it (FSDP2).

Either way DDP averages the adapters' gradients, which are small beside the base, and each rank has all of A, B and m in
float32: what is summed is the same, and a checkpoint needs nothing from the other ranks. `fully_shard` (Zhao et al.
2023, arXiv 2304.11277, in its second form) is called alike on a CPU and on GPUs; accelerate's own plug-in does nothing
on a CPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dude_cli.errors import UsageError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn
    from transformers import PreTrainedModel

    from dude_cli.config import Distributed
    from dude_cli.training.loss import SummedLoss


def share_model(summed_loss: SummedLoss, accelerator: Accelerator, strategy: Distributed) -> nn.Module:
    """`summed_loss` as each rank is to call it; with `fsdp` its frozen base is sharded from then on, in place.

    All ranks then have to run equally many forward passes, those of an evaluation too: each gathers the weights.
    Raises UsageError for a base that cannot be sharded.
    """
    from torch.nn.parallel import DistributedDataParallel

    frozen = [name for name, parameter in summed_loss.named_parameters() if not parameter.requires_grad]
    # All ranks have loaded the same base: DDP need not send it around, and must not look at the shards.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(summed_loss, frozen)  # type: ignore[no-untyped-call]
    # The model is where it was loaded, and bitsandbytes' layers cannot be moved from there.
    wrapped: nn.Module = accelerator.prepare_model(summed_loss, device_placement=False)
    if strategy == "fsdp" and accelerator.num_processes > 1:
        _shard_base(summed_loss, accelerator)
    return wrapped


def _shard_base(summed_loss: SummedLoss, accelerator: Accelerator) -> None:
    """Shard each block, and what is around the blocks, over all ranks; the adapters stay whole on each."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from dude_cli.adapter import keep_fingerprint

    keep_fingerprint(summed_loss.model)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    adapters = {parameter for parameter in summed_loss.parameters() if parameter.requires_grad}
    for block in blocks_of(summed_loss.model):
        fully_shard(block, mesh=mesh, ignored_params=adapters)
    # The loss calls parts of the model, so it is the root: its forward gathers embedding, last norm and head.
    fully_shard(summed_loss, mesh=mesh, ignored_params=adapters)


def blocks_of(model: PreTrainedModel) -> list[nn.Module]:
    """The model's blocks as transformers knows them, inner ones first. Raises UsageError if they cannot be sharded."""
    from dude_cli.adapter.weight import quantization

    names = set(model._no_split_modules or ())
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    if quantization(model) is not None or not blocks:
        why = "its weights are quantised" if blocks else "transformers does not say what its blocks are"
        raise UsageError(
            f"{type(model).__name__} cannot be sharded: {why}",
            where="train.distributed: fsdp",
            fix="use train.distributed: ddp",
        )
    return blocks[::-1]
