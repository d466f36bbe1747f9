"""The one place that reads a base layer's weight, for the SVD, the row norms, the fingerprint and the merge.

Everything here speaks the orientation of `torch.nn.Linear`: a weight is (out, in), whatever the layer stores.
A weight that bitsandbytes has quantised is dequantised when it is read, one layer at a time, and never kept.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dude_cli.errors import AdapterError, UsageError

# Float32 values that one chunk of rows may hold: 8 MiB stays in a CPU's cache (a bfloat16 weight of 4096 x 4096 is read
# four times as fast as in chunks of 64 MiB), and 64 MiB is few launches on a GPU.
CHUNK_VALUES = 2 * 2**20
GPU_CHUNK_VALUES = 16 * 2**20

# What a plain layer's weight may be stored in; another dtype has its scales elsewhere.
PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_readable(model: PreTrainedModel) -> None:
    """Raise UsageError for a base that others than bitsandbytes have quantised, AdapterError for an offloaded one.

    There a layer's weight is not what it multiplies with, which the SVD and the norms need.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and quantization(model) is None:
        method = quantizer.quantization_config.quant_method
        raise _unreadable(
            f"the base model is quantised by {getattr(method, 'value', method)}", model.config.name_or_path
        )
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook") and any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            raise AdapterError(
                "the base model is offloaded: its weights come to the device for a forward alone",
                where=name,
                fix="load it onto one device; model.quantization: nf4 takes a quarter of bfloat16's memory",
            )
        if isinstance(module, nn.Linear) and not is_quantized(module) and module.weight.dtype not in PLAIN_DTYPES:
            raise _unreadable(f"the base model has a weight in {module.weight.dtype}", name)


def _unreadable(what: str, where: str) -> UsageError:
    return UsageError(
        f"{what}, and adapters need one in float32, bfloat16 or float16, or in nf4, fp4 or int8 of bitsandbytes",
        where=where,
        fix="use the model that it was made from, or save a dequantised copy of it",
    )


def is_linear(module: nn.Module) -> bool:
    """Whether an adapter can sit on `module`: an `nn.Linear`, or GPT-2's `Conv1D`, which stores (in, out).

    bitsandbytes' layers are of the first kind; transformers quantises a `Conv1D` into one of them. What a subclass with
    a forward of its own computes is not known: some routers of experts are one. Falcon's is the same product.
    """
    if not isinstance(module, nn.Linear | Conv1D):
        return False
    kind = type(module)
    is_own = kind.forward is not nn.Linear.forward and kind.forward is not Conv1D.forward
    return not is_own or kind.__name__ == "FalconLinear" or is_quantized(module)


def weight_shape(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer."""
    if is_quantized(layer):
        return int(layer.out_features), int(layer.in_features)  # type: ignore[arg-type]
    out_features, in_features = in_stored_orientation(layer, stored_weight(layer)).shape
    return out_features, in_features


def dense_weight(layer: nn.Module) -> Tensor:
    """The whole (out, in) weight in its own dtype, without gradient: a view of what is stored, or what it stands for.

    That of a quantised layer is a new tensor, in the dtype that the layer multiplies in.
    """
    weight = stored_weight(layer).detach()
    if not is_quantized(layer):
        return in_stored_orientation(layer, weight)
    from bitsandbytes import functional

    if quantization(layer) == "int8":
        dense = functional.int8_vectorwise_dequant(weight, _int8_scales(layer))
    else:
        # In the dtype that the layer itself multiplies in.
        dense = functional.dequantize_4bit(weight, _four_bit_state(layer))
    assert isinstance(dense, Tensor)
    return dense


def weight_rows(layer: nn.Module, rows: slice | Tensor) -> Tensor:
    """Rows of the (out, in) weight, float32, without gradient. A float32 `Linear` gives a view: do not write to it."""
    return dense_weight(layer)[rows].to(torch.float32)


def weight_chunks(layer: nn.Module, weight: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
    """The whole weight as (row range, float32 rows), in bounded chunks; from `weight` where it is dense already."""
    out_features, in_features = weight_shape(layer)
    weight = dense_weight(layer) if weight is None else weight
    step = max(1, (CHUNK_VALUES if weight.device.type == "cpu" else GPU_CHUNK_VALUES) // in_features)
    for start in range(0, out_features, step):
        rows = slice(start, min(start + step, out_features))
        yield rows, weight[rows].to(torch.float32)


def is_whole(layer: nn.Module) -> bool:
    """Whether the weight is here outside of a forward, and not sharded over ranks; a forecast's has no values."""
    weight = stored_weight(layer)
    return not weight.is_meta and not hasattr(weight, "device_mesh")


def is_only_a_product(layer: nn.Module) -> bool:
    """Whether calling `layer` is F.linear with its weight and bias and nothing else, and neither is trained."""
    if type(layer) is not nn.Linear or type(layer.weight) is not nn.Parameter or layer.weight.requires_grad:
        return False
    if layer.bias is not None and layer.bias.requires_grad:
        return False
    # accelerate moves a weight to its device in a `forward` of the instance.
    return "forward" not in layer.__dict__ and not (
        layer._forward_pre_hooks or layer._forward_hooks or layer._backward_pre_hooks or layer._backward_hooks
    )


def in_stored_orientation(layer: nn.Module, W: Tensor) -> Tensor:
    """A (out, in) weight as the layer stores it: a `Conv1D` transposed. Its own inverse; a view."""
    return W.T if isinstance(layer, Conv1D) else W


def squared_row_norms(layer: nn.Module) -> Tensor:
    """||W0_i||^2 of each output row, (out,), summed in float64 and rounded once to float32."""
    parts = [chunk.to(torch.float64).square().sum(dim=1) for _, chunk in weight_chunks(layer)]
    return torch.cat(parts).to(torch.float32)


def stored_weight(layer: nn.Module) -> Tensor:
    """The weight as the layer stores it, in its own dtype and orientation; packed bytes if it is quantised."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def quantization(module: nn.Module) -> str | None:
    """`nf4`, `fp4` or `int8` if bitsandbytes has quantised `module`, a layer or a whole model; else None."""
    # It cannot have done so without being imported, and it is optional.
    bitsandbytes: Any = sys.modules.get("bitsandbytes")
    if bitsandbytes is None:
        return None
    for layer in module.modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            return str(layer.weight.quant_type)
        if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            return "int8"
    return None


def is_quantized(layer: nn.Module) -> bool:
    """Whether `layer` is one of bitsandbytes' linear layers, whose weight is packed."""
    return isinstance(layer, nn.Linear) and quantization(layer) is not None


def quantization_state(layer: nn.Module) -> dict[str, Tensor]:
    """What the packed weight means beside its bytes, as bitsandbytes has it: scales and code book; {} for others."""
    if not is_quantized(layer):
        return {}
    if quantization(layer) == "int8":
        return {"SCB": _int8_scales(layer)}
    state = _four_bit_state(layer)
    found = {"absmax": state.absmax, "quant_map": state.code}
    if state.nested:
        found |= {"nested_absmax": state.state2.absmax, "nested_quant_map": state.state2.code, "offset": state.offset}
    return found


def content_sha256(layer: nn.Module) -> str:
    """SHA-256 of all that the (out, in) weight is computed from: stored bytes, dtype, layout, quantisation."""
    weight, kind = stored_weight(layer).detach(), quantization(layer)
    dtypes = [weight.dtype] if kind != "nf4" and kind != "fp4" else [weight.dtype, _four_bit_state(layer).dtype]
    meaning = [kind, isinstance(layer, Conv1D), weight_shape(layer), [str(dtype) for dtype in dtypes]]
    total = hashlib.sha256(json.dumps(meaning).encode())
    for tensor in (weight, *quantization_state(layer).values()):
        for values in torch.split(tensor.reshape(-1), CHUNK_VALUES):
            total.update(values.contiguous().cpu().view(torch.uint8).numpy().data)
    return total.hexdigest()


def dequantized(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A plain frozen layer on the same device with the dequantised weight and the bias, both rounded to `dtype`.

    It is of the class that transformers quantised, `nn.Linear` or `Conv1D`, so the model's files keep their layout.
    """
    out_features, in_features = weight_shape(layer)
    weight, bias = dense_weight(layer).to(dtype), layer.bias
    plain: nn.Module
    with torch.device("meta"):
        if issubclass(getattr(layer, "source_cls", nn.Linear), Conv1D):
            plain = Conv1D(out_features, in_features)
        else:
            plain = nn.Linear(in_features, out_features, bias=bias is not None)
    plain.weight = nn.Parameter(in_stored_orientation(plain, weight).contiguous(), requires_grad=False)
    if isinstance(bias, Tensor):
        plain.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return plain.train(layer.training)


def keep_packing(model: nn.Module) -> None:
    """Keep each 4-bit weight in the one layout that it was quantised into.

    On CPUs with AVX512-BF16, bitsandbytes repacks a weight in the first forward in evaluation mode and rounds its
    scales to bfloat16 for good: the base would change, and rows that are no multiple of 32 stop with an assertion.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _int8_scales(layer: Any) -> Tensor:
    """127 times the scale of each row, (out,), float32: the first forward moves it from the weight to the layer."""
    scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    assert isinstance(scales, Tensor)
    return scales


def _four_bit_state(layer: Any) -> Any:
    state = layer.weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        raise AdapterError(
            "bitsandbytes has repacked the 4-bit base for inference on this CPU, which rounds its scales",
            fix="load the base model anew, and put the adapter on it before its first forward",
        )
    return state
