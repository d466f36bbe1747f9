"""Peak memory of `dude export --format merged` beside the model's own size.

python benchmarks/export_memory.py 1b          # 1.1 billion random weights in bfloat16, about a minute on two cores
python benchmarks/export_memory.py 7b          # Llama-2-7B's shape: 13.5 GB of memory, 27 GB of disk, minutes

The export runs in a process of its own; its peak resident set, less that of a process that only imports the libraries,
is what the export takes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
}


def write_inputs(folder: Path, shape: dict[str, int]) -> int:
    """A random base in `folder`/base and a DoRA adapter on it in `folder`/adapter; the base's size in bytes."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from dude_cli import quickstart
    from dude_cli.adapter import AdapterConfig, adapter_layers, patch_model, save_adapter, unpatch_model

    architecture = AutoConfig.for_model("llama", vocab_size=32000, max_position_embeddings=4096, **shape)
    model = AutoModelForCausalLM.from_config(architecture, dtype=torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size="2GB")
    AutoTokenizer.from_pretrained(quickstart.MODEL_DIR).save_pretrained(folder / "base")
    model.config._name_or_path = str(folder / "base")
    patch_model(model, AdapterConfig(method="dora", rank=16))
    for layer in adapter_layers(model).values():
        layer.lora_B.data.normal_(std=1e-2)
        layer.magnitude.data *= 1.01
    save_adapter(model, folder / "adapter")
    return sum(parameter.nbytes for parameter in unpatch_model(model).parameters())


def peak_bytes() -> int:
    """The peak resident set of this process; getrusage would start from the parent's."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def export(adapter: str, out: str) -> None:
    """Run in the measured process: print its peak and the export's own report."""
    import peft  # noqa: F401  (all that an export imports, so that it is not counted as the export's)
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from dude_cli.export import export_merged
    from dude_cli.target import find_target, load_target

    before = peak_bytes()
    loaded = load_target(find_target(adapter))
    loaded_peak, started = peak_bytes(), time.perf_counter()
    report = export_merged(loaded, Path(out), loaded.config.dtype)
    found = {"loaded": loaded_peak - before, "exported": peak_bytes() - before, "s": time.perf_counter() - started}
    print(json.dumps(found | {"relative_difference": report.difference.relative, "tolerance": report.tolerance}))


def main() -> None:
    if len(sys.argv) == 4:
        export(sys.argv[2], sys.argv[3])
        return
    with tempfile.TemporaryDirectory() as folder:
        size = write_inputs(Path(folder), SHAPES[sys.argv[1]])
        command = [sys.executable, __file__, "--export", f"{folder}/adapter", f"{folder}/merged"]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"model {size / 1e9:.2f} GB; peak after loading {found['loaded'] / size:.2f}, ", end="")
        print(f"after the export {found['exported'] / size:.2f} of that; {found['s']:.0f} s; ", end="")
        print(f"logits {found['relative_difference']:.1e} off, {found['tolerance']:.1e} allowed")


if __name__ == "__main__":
    main()
