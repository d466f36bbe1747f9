"""How far rounding alone drives the logits of an exported adapter from those of the model in memory.

python benchmarks/export_error.py        # ten minutes on two cores, 10 GB; no figure depends on the machine's speed

Random Llamas of several depths, a moved DuDe adapter, both exact formats, in each dtype. The last column divides by
u sqrt(layers), with u the unit roundoff: `dude_cli/export/probe.py` allows 8 of it, and at least 1e-5.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dude_cli import quickstart
from dude_cli.adapter import AdapterConfig, adapter_layers, patch_model, save_adapter
from dude_cli.config import DTYPES, DType
from dude_cli.export import export_merged, export_peft
from dude_cli.export.probe import UNIT_ROUNDOFF
from dude_cli.target import find_target, load_target

# (layers, hidden size, vocabulary): the largest of more logits differs more.
SHAPES = ((2, 64, 2000), (8, 256, 2000), (32, 256, 2000), (80, 256, 2000), (32, 1024, 2000), (4, 4096, 32_000))


def save_moved_adapter(folder: Path, layers: int, hidden_size: int, vocabulary: int, dtype: DType) -> Path:
    """A base in `folder`/base, and an adapter on it whose tensors are away from their start."""
    architecture = AutoConfig.for_model(
        "llama",
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        intermediate_size=int(2.7 * hidden_size),
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 64,
    )
    torch.manual_seed(0)
    torch_dtype = getattr(torch, dtype)
    AutoModelForCausalLM.from_config(architecture, dtype=torch_dtype).save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(quickstart.MODEL_DIR).save_pretrained(folder / "base")
    model = patch_model(
        AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch_dtype), AdapterConfig(method="dude", rank=8)
    )
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            for factor in (layer.lora_A, layer.lora_B):
                factor.add_(0.5 * factor.abs().mean() * torch.randn_like(factor))
            layer.magnitude.mul_(1 + 0.05 * torch.randn_like(layer.magnitude))
    save_adapter(model, folder / "adapter")
    return folder / "adapter"


def main() -> None:
    print(f"{'layers':>6} {'hidden':>6} {'dtype':>9} {'format':>7} {'relative':>9} {'/ u sqrt(layers)':>17}")
    for layers, hidden_size, vocabulary in SHAPES:
        for dtype in DTYPES:
            with tempfile.TemporaryDirectory() as folder:
                adapter = save_moved_adapter(Path(folder), layers, hidden_size, vocabulary, dtype)
                loaded = load_target(find_target(str(adapter)))
                for report in (
                    export_peft(loaded, Path(folder) / "peft"),
                    export_merged(loaded, Path(folder) / "merged", dtype),
                ):
                    found = report.difference.relative
                    share = found / (UNIT_ROUNDOFF[dtype] * math.sqrt(layers))
                    print(
                        f"{layers:6} {hidden_size:6} {dtype:>9} {report.format:>7} {found:9.1e} {share:17.2f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
