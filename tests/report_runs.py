"""Run folders as a training and an evaluation leave them, written without either: a report only reads."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dude_cli.evaluation import write_results


def write_run(
    folder: Path,
    *,
    method: str = "dude",
    seed: int = 1,
    learning_rate: float = 1e-3,
    steps: int = 40,
    final_loss: float = 0.5,
    right: Sequence[float] = (),
    base_right: Sequence[float] | None = None,
    **results: Any,
) -> Path:
    """A finished run whose loss goes from 3 towards `final_loss`; with `right`, each question's score is kept too."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"""\
model: {{name_or_path: "embedded:quickstart", dtype: float32}}
adapter: {{method: {method}, rank: 4}}
data: {{train: [{{path: "embedded:quickstart"}}]}}
train: {{learning_rate: {learning_rate}, max_steps: {steps}, global_batch_size: 8}}
eval: {{tasks: [{{name: sums}}]}}
output_dir: "{folder}"
seed: {seed}
"""
    )
    write_json(folder / "environment.json", {"git_commit": "abc", "device": "cpu", "gpus": [], "world_size": 1})
    rng = random.Random(f"{method} {seed} {learning_rate}")
    lines: list[dict[str, Any]] = [{"step": 0, "eval_loss": 3.0}]
    for step in range(1, steps + 1):
        loss = final_loss + (3 - final_loss) * math.exp(-4 * step / steps)
        line = {"loss": loss + rng.gauss(0, 0.01), "grad_norm": 1 + rng.random(), "learning_rate": learning_rate}
        speed = {"tokens_per_s": 1000.0, "elapsed_s": step / 10}
        lines.append({"step": step} | line | {"target_tokens": 50, "total_tokens": 100 * step} | speed)
        if step % 10 == 0:
            lines.append({"step": step, "eval_loss": loss})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    memory = {"predicted_training_bytes": 2**20, "measured_training_bytes": 2**21, "measured": "by hand"}
    write_json(folder / "memory.json", memory)
    layers = [
        layer(f"model.layers.{depth}.{kind}", 0.001 * (depth + 1)) for depth in (0, 1) for kind in ("q_proj", "up")
    ]
    write_json(folder / "layers.json", {"trainable_parameters": 480, "all_parameters": 4800, "layers": layers})
    sha256 = f"{method}{seed}".ljust(64, "0")
    write_json(folder / "adapter" / "adapter_config.json", {"sha256": sha256})
    if right:
        write_results(scored(right, base_right, **{"adapter_sha256": sha256} | results), folder / "eval")
    return folder


def scored(
    right: Sequence[float], base_right: Sequence[float] | None = None, *, task: str = "sums", **changes: Any
) -> Any:
    """Results of one task, in lm-eval's layout, from each question's score."""
    document: dict[str, Any] = part(task, right) | {
        "group_subtasks": {},
        "versions": {task: 1.0},
        "n-shot": {task: 0},
        "higher_is_better": {task: {"acc": True}},
        "n-samples": {task: {"original": len(right), "effective": len(right)}},
        "task_hashes": {task: "t" * 64},
        "prompt_hashes": {task: "p" * 64},
        "max_gen_toks": {},
        "requested": {task: {"names": [task], "limit": None}},
        "config": {"limit": None, "batch_size": 8, "model_dtype": "torch.float32", "device": "cpu"},
        "max_length": 64,
        "lm_eval_version": "0.4.13",
        "adapter_sha256": "a" * 64,
        "base_fingerprint": "b" * 64,
    }
    if base_right is not None:
        mean = sum(right) / len(right) - sum(base_right) / len(base_right)
        document["base"] = part(task, base_right)
        document["difference"] = {task: {"acc,none": mean, "acc_stderr,none": 0.05}}
    return document | changes


def part(task: str, right: Sequence[float]) -> dict[str, Any]:
    row = {"alias": task, "sample_len": len(right), "acc,none": sum(right) / len(right), "acc_stderr,none": 0.04}
    samples = [
        {
            "doc_id": index,
            "doc": {"question": f"{index} + {index}?"},
            "target": str(2 * index),
            "filtered_resps": [str(2 * index if value == 1 else 7)],
            "filter": "none",
            "acc": value,
        }
        for index, value in enumerate(right)
    ]
    return {"results": {task: row}, "samples": {task: samples}}


def layer(name: str, change: float) -> dict[str, Any]:
    shape = {"out_features": 8, "in_features": 8, "rank": 4, "trainable_parameters": 120}
    gains = {"mean_gain_change": change, "lowest_gain": 1 - change, "highest_gain": 1 + change}
    moved = {"magnitude_change": change, "relative_magnitude_change": 2 * change, "direction_change": change / 2}
    return {"name": name, "energy_captured": 0.4, "relative_change": 3 * change} | shape | gains | moved


def write_json(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
