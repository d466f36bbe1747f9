"""Layers and small models that bitsandbytes has really quantised, on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import linear_layer, tiny_model
from torch import nn
from transformers import PreTrainedModel

from dude_cli.config import ModelConfig
from dude_cli.model import load_model

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

QUANTIZATIONS = ("nf4", "int8")
LAYERS = ("nf4", "nf4 with quantised scales", "int8")  # the second is how others save QLoRA's bases


def quantized_layer(
    out_features: int, in_features: int, kind: str, *, bias: bool, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """`linear_layer(out_features, in_features)` as one of LAYERS."""
    plain = linear_layer(out_features, in_features, bias=bias, dtype=dtype)
    layer: nn.Module
    if kind == "int8":
        layer = bitsandbytes.nn.Linear8bitLt(in_features, out_features, bias, has_fp16_weights=False, threshold=6.0)
        layer.weight = bitsandbytes.nn.Int8Params(plain.weight.data, requires_grad=False).to("cpu")
    else:
        layer = bitsandbytes.nn.Linear4bit(in_features, out_features, bias, compute_dtype=dtype, quant_type="nf4")
        layer.weight = bitsandbytes.nn.Params4bit(
            plain.weight.data, quant_type="nf4", compress_statistics=kind != "nf4", module=layer
        ).to("cpu")
        layer.support_avx512bf16_for_cpu = False
    layer.bias = plain.bias
    return layer.requires_grad_(False)


def quantized_model(
    kind: str, quantization: str | None, folder: Path, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """`tiny_model(kind)`, saved in float32 to `folder` if it is not there and loaded quantised."""
    if not (folder / "config.json").is_file():
        tiny_model(kind).save_pretrained(folder)
    name = str(dtype).removeprefix("torch.")
    return load_model(
        ModelConfig.model_validate({"name_or_path": str(folder), "dtype": name, "quantization": quantization})
    )
