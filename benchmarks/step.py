"""Time an optimizer step of a whole Llama: forward and backward of its micro-batches, then AdamW, beside PEFT's.

    python benchmarks/step.py [--short] [--only "r=16 accumulation=4 float32"] [--threads 2]

Hidden size 1024, 4 layers, micro-batches of 256 tokens, a vocabulary of 4096; the same loss for all.
"""

from __future__ import annotations

import functools
from typing import Any

import page
import torch
from candidates import Training, candidate_names, model_candidate
from measure import Case, interleave, pace, run

SHORT = (
    "r=16 accumulation=4 float32",
    "r=128 accumulation=4 float32",
    "r=16 accumulation=4 bfloat16",
    "r=16 accumulation=1 float32 checkpointing",
)
MANY = 8  # from here on a round would take minutes with every candidate
OF_MANY = ("PEFT lora", "dude", "dude, no autocast")
NOT_OF_STEP = ("pissa", "dora")  # beside the others in the table of one layer; without them there are more rounds


def cases() -> list[Case]:
    found = []
    for rank in (16, 128):
        for dtype in ("float32", "bfloat16"):
            for checkpointing in (False, True):
                for accumulation in (1, 4, 8, 16):
                    name = f"r={rank} accumulation={accumulation} {dtype}" + checkpointing * " checkpointing"
                    settings = {"hidden": 1024, "layers": 4, "tokens": 256, "rank": rank, "accumulation": accumulation}
                    settings |= {"dtype": dtype, "checkpointing": checkpointing}
                    found.append(Case(name, settings, name in SHORT))
    return found


def measure(case: Case, budget_s: float) -> dict[str, Any]:
    settings = case.settings
    found: dict[str, Any] = {"pace": pace(getattr(torch, settings["dtype"]))}
    names = [name for name in candidate_names(settings["dtype"]) if name not in NOT_OF_STEP]
    if settings["accumulation"] >= MANY:
        names = [name for name in names if name in OF_MANY]
    steps = {}
    for name in names:
        candidate = model_candidate(
            name,
            settings["dtype"],
            settings["rank"],
            layers=settings["layers"],
            hidden=settings["hidden"],
            checkpointing=settings["checkpointing"],
        )
        training = Training.of(candidate, settings["tokens"])
        steps[name] = functools.partial(training.step, settings["accumulation"])
    return found | {"seconds": interleave(steps, budget_s)}


if __name__ == "__main__":
    print(page.step(run("step", __doc__, cases(), measure)))
