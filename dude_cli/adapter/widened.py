"""Half-precision products of the backward pass on a CPU that has no instructions for them: computed in float32.

torch multiplies bfloat16 and float16 there one number at a time: dy W0 takes fifty times as long as in float32, and
more. It differs from that by a rounding, so here the weight is widened, in chunks of rows so that no copy of it exists,
and the sums are float32. The forward pass is less slow, and has to be the base's own bit for bit: it is left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dude_cli.adapter.weight import CHUNK_VALUES
from dude_cli.system.gpu import gpu_kind

# From AVX-512 on oneDNN has kernels for both dtypes.
CPU_IS_SLOW = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
_HALF = (torch.bfloat16, torch.float16)


def is_slow(tensor: Tensor) -> bool:
    """Whether a product with this tensor on the right, as dy W0 is one, is slow here for its dtype.

    The tensors of a forecast, on the meta device, stand for those of the device that would train.
    """
    if not CPU_IS_SLOW or tensor.dtype not in _HALF:
        return False
    return tensor.device.type == "cpu" or (tensor.is_meta and gpu_kind() is None)


def times(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, (t, n) by (n, k): in their dtype, or in float32 where that is slow.

    At most `CHUNK_VALUES` values of `right` are float32 at once.
    """
    if not is_slow(right):
        return left @ right
    step = max(1, CHUNK_VALUES // right.shape[1])
    product = left[:, :step].float() @ right[:step].float()
    for start in range(step, len(right), step):
        rows = slice(start, start + step)
        product.addmm_(left[:, rows].float(), right[rows].float())
    return product
