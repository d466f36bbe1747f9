"""Time an optimizer step of a whole Llama: forward and backward of its micro-batches, then AdamW, beside PEFT's.

    python benchmarks/step.py [--short] [--only "r=16 accumulation=4 float32"] [--threads 2] [--device cuda]

Hidden size 1024, 4 layers, micro-batches of 256 tokens, a vocabulary of 4096; the same loss for all. On a GPU
Llama-2-7B's shapes, micro-batches of 4096 tokens, a vocabulary of 32000, and the peak of allocated memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import page
import torch
from candidates import VOCABULARY, Training, model_candidate, timed_candidate_names
from measure import Case, interleave, pace, results, run, synchronize

SHORT = (
    "r=16 accumulation=4 float32",
    "r=128 accumulation=4 float32",
    "r=16 accumulation=4 bfloat16",
    "r=16 accumulation=1 float32 checkpointing",
)
MANY = 8  # from here on a round would take minutes with every candidate
PAIR = ("PEFT lora", "dude", "dude, no autocast")
NOT_OF_STEP = ("pissa", "dora")  # beside the others in the table of one layer; without them there are more rounds


# Four models of 13.5 GB at once; `lora` and `dude` as `dude train` runs them.
ON_A_GPU = ("PEFT lora", "PEFT dora + pissa", "lora, no autocast", "dude, no autocast")
LLAMA_2_7B = {"hidden": 4096, "layers": 32, "vocabulary": 32000, "tokens": 4096, "dtype": "bfloat16"}


def cases() -> list[Case]:
    found = [
        _on_a_gpu(16, accumulation=1),
        _on_a_gpu(16, accumulation=4),
        _on_a_gpu(128, accumulation=4),
        _on_a_gpu(16, accumulation=4, checkpointing=True),
    ]
    for rank in (16, 128):
        for dtype in ("float32", "bfloat16"):
            for checkpointing in (False, True):
                for accumulation in (1, 4, 8, 16):
                    name = f"r={rank} accumulation={accumulation} {dtype}" + checkpointing * " checkpointing"
                    settings = {"hidden": 1024, "layers": 4, "tokens": 256, "rank": rank, "accumulation": accumulation}
                    settings |= {"dtype": dtype, "checkpointing": checkpointing}
                    found.append(Case(name, settings, name in SHORT))
                    if name == "r=16 accumulation=4 float32":
                        # For a difference smaller than those of a machine's pace: right after each other, more rounds.
                        found.append(Case(f"{name} pair", settings | {"pair": True}, False))
    return found


def _on_a_gpu(rank: int, accumulation: int, *, checkpointing: bool = False) -> Case:
    settings = LLAMA_2_7B | {"rank": rank, "accumulation": accumulation, "checkpointing": checkpointing}
    name = f"Llama-2-7B r={rank} accumulation={accumulation}" + checkpointing * " checkpointing"
    return Case(name, settings, is_short=False, device="cuda")


def measure(case: Case, budget_s: float) -> dict[str, Any]:
    settings = case.settings
    found: dict[str, Any] = {"pace": pace(getattr(torch, settings["dtype"]))}
    steps = {}
    for name in _names(case):
        candidate = model_candidate(
            name,
            settings["dtype"],
            settings["rank"],
            layers=settings["layers"],
            hidden=settings["hidden"],
            checkpointing=settings["checkpointing"],
            vocabulary=settings.get("vocabulary", VOCABULARY),
        )
        training = Training.of(candidate, settings["tokens"])
        steps[name] = functools.partial(training.step, settings["accumulation"])
    found["seconds"] = interleave(steps, budget_s)
    if case.device == "cuda":
        found["peak_bytes"] = {name: _peak_bytes(step) for name, step in steps.items()}
    return found


def _names(case: Case) -> list[str]:
    if case.device == "cuda":
        return list(ON_A_GPU)
    names = [name for name in timed_candidate_names(case.settings["dtype"]) if name not in NOT_OF_STEP]
    is_pair = case.settings["accumulation"] >= MANY or "pair" in case.settings
    return [name for name in names if name in PAIR or not is_pair]


def _peak_bytes(step: Callable[[], object]) -> int:
    """The most that torch has allocated on the GPU during a step, above what there is between steps."""
    synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    synchronize()
    return torch.cuda.max_memory_allocated() - before


if __name__ == "__main__":
    path = run("step", __doc__, cases(), measure)
    print(page.step_on_a_gpu(path) if path.parent == results("cuda") else page.step(path))
