"""Train a random Llama of Llama-2-7B's shapes with `dude train`: memory, foreseen and measured, pace, time to start.

    python benchmarks/large.py FOLDER --data gsm8k/train.jsonl [--layers 32] [--steps 6]

FOLDER gets the model (13.5 GB with 32 layers), the config and the run; /dev/shm is a good place where a disk is slow.
The rows are GSM8K's or any with `question` and `answer`; the tokenizer is the embedded one, whose tokens are short, so
rows are long. Writes benchmarks/results/cuda/large.json, or results/large.json without a GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import measure
import page
import torch
from candidates import llama
from transformers import AutoTokenizer

from dude_cli import quickstart

CONFIG = """\
model: {{name_or_path: "{folder}/model", dtype: bfloat16}}
adapter: {{method: dude, rank: 128, alpha: 128}}
data:
  train: [{{path: "{data}", split: "train[:2000]"}}]
  prompt: "Question: {{question}}\\nAnswer:"
  completion: " {{answer}}"
  max_length: 512
train:
  learning_rate: 2.0e-5
  max_steps: {steps}
  global_batch_size: 128
  per_device_batch_size: 16
  save_steps: {steps}
output_dir: "{folder}/run"
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=6)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = options.folder.resolve()
    save_model(folder / "model", options.layers, device)
    config = folder / "config.yaml"
    config.write_text(CONFIG.format(folder=folder, data=options.data.resolve(), steps=options.steps), encoding="utf-8")
    # In a process of its own: the pace is that of the command, and this one holds memory.
    subprocess.run(
        [sys.executable, "-m", "dude_cli", "train", config, "--quiet", "--overwrite"],
        cwd=measure.REPOSITORY,
        check=True,
    )
    path = measure.results(device) / "large.json"
    name = f"Llama-2-7B's shapes, {options.layers} layers"
    measure.write(path, measure.read(path) | {name: found(folder / "run")})
    print(page.large(path))


def save_model(folder: Path, layers: int, device: str) -> None:
    """Random bfloat16 weights as files, and the embedded tokenizer."""
    with torch.device(device):
        llama("bfloat16", layers, hidden=4096, checkpointing=False, vocabulary=32000).save_pretrained(folder)
    AutoTokenizer.from_pretrained(quickstart.MODEL_DIR).save_pretrained(folder)


def found(run: Path) -> dict[str, object]:
    """What the run folder says, as it is there."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {
        "environment": json.loads((run / "environment.json").read_text(encoding="utf-8")),
        "memory": json.loads((run / "memory.json").read_text(encoding="utf-8")),
        "metrics": [json.loads(line) for line in lines],
    }


if __name__ == "__main__":
    main()
