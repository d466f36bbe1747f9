"""Time an optimizer step of DuDe over one of PEFT's LoRA as rank, tokens and depth grow.

    python benchmarks/growth.py [--short] [--only rank] [--threads 2]

float32, hidden size 1024, four micro-batches per step; what does not grow is at 2 layers, 256 tokens and rank 16.
"""

from __future__ import annotations

import functools
from typing import Any

import page
from candidates import Training, model_candidate
from measure import Case, interleave, run

GROWN = {
    "rank": (8, 16, 32, 64, 128, 256),
    "tokens": (128, 256, 512, 1024, 2048, 4096),
    "layers": (1, 2, 4, 8),
}
SHORT = {"rank": (8, 64, 256), "tokens": (128, 1024), "layers": (1, 4)}


def cases() -> list[Case]:
    return [
        Case(
            f"{what}={value}",
            {"rank": 16, "tokens": 256, "layers": 2, "accumulation": 4, "dtype": "float32"} | {what: value},
            value in SHORT[what],
        )
        for what, values in GROWN.items()
        for value in values
    ]


def measure(case: Case, budget_s: float) -> dict[str, Any]:
    settings = case.settings
    steps = {}
    for name in ("PEFT lora", "dude"):
        candidate = model_candidate(name, settings["dtype"], settings["rank"], layers=settings["layers"])
        steps[name] = functools.partial(Training.of(candidate, settings["tokens"]).step, settings["accumulation"])
    return {"seconds": interleave(steps, budget_s)}


if __name__ == "__main__":
    print(page.growth(run("growth", __doc__, cases(), measure)))
