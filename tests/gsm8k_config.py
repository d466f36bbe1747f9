"""A config for the real small model and real text."""

from __future__ import annotations

from pathlib import Path


def gsm8k_config(test_data: Path, folder: Path, **changes: str) -> Path:
    """A config that fine-tunes stories260K on GSM8K text, written to `folder`; `changes` replace its lines."""
    lines = {
        "name_or_path": str(test_data / "models/stories260K"),
        "method": "dude",
        "dtype": "float32",
        "train_split": "train[:400]",
        "validation_split": "train[7000:7040]",
        "max_steps": "20",
        "global_batch_size": "8",
        "per_device_batch_size": "8",
        "output_dir": str(folder / "run"),
        "extra": "",
    } | changes
    path = folder / "config.yaml"
    path.write_text(
        """\
model: {{name_or_path: "{name_or_path}", dtype: {dtype}}}
adapter: {{method: {method}, rank: 8}}
data:
  train: [{{path: "{data}/train.jsonl", split: "{train_split}"}}]
  validation: [{{path: "{data}/train.jsonl", split: "{validation_split}"}}]
  prompt: "Question: {{question}}\\nAnswer:"
  completion: " {{answer}}"
  max_length: 256
train:
  learning_rate: 2.0e-3
  max_steps: {max_steps}
  global_batch_size: {global_batch_size}
  per_device_batch_size: {per_device_batch_size}
  gradient_checkpointing: false
{extra}
eval: {{tasks: [{{name: gsm8k, num_fewshot: 1, limit: 2}}]}}
output_dir: "{output_dir}"
seed: 3
""".format(data=test_data / "gsm8k", **lines)
    )
    return path
