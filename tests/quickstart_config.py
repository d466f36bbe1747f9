"""A config for the embedded model and generated rows: a training of seconds that is always there."""

from __future__ import annotations

from pathlib import Path


def quickstart_config(folder: Path, **changes: str) -> Path:
    """A config that fine-tunes the embedded model, written to `folder`; `changes` replace its values.

    `extra` is put under `train:`, as lines of its own.
    """
    lines = {
        "dtype": "float32",
        "adapter": "{method: dude, rank: 4}",
        "rows": "64",
        "max_steps": "12",
        "global_batch_size": "4",
        "per_device_batch_size": "4",
        "output_dir": str(folder / "run"),
        "extra": "",
    } | changes
    folder.mkdir(exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(
        """\
model: {{name_or_path: "embedded:quickstart", dtype: {dtype}}}
adapter: {adapter}
data:
  train: [{{path: "embedded:quickstart", split: "train[:{rows}]"}}]
  validation: [{{path: "embedded:quickstart", split: "dev[:16]"}}]
  max_length: 96
train:
  learning_rate: 1.0e-3
  max_steps: {max_steps}
  global_batch_size: {global_batch_size}
  per_device_batch_size: {per_device_batch_size}
  gradient_checkpointing: false
{extra}
output_dir: "{output_dir}"
seed: 3
""".format(**lines)
    )
    return path
