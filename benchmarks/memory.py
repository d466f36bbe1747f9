"""Count the memory of a training step in bytes, beside PEFT's: exact, and the same on each run.

    python benchmarks/memory.py [--short] [--only "r=16 tokens=256 float32"]

torch's profiler records each allocation and each release of the CPU allocator, so the live bytes at each moment are
known. Resident sets are not: they hold what the allocator keeps, and pages that were never given back. The buffers that
the matrix libraries take for themselves are not counted; they are the same for all.
"""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import page
import torch
from candidates import VOCABULARY, Training, candidate_names, model_candidate, own_loss
from measure import Case, run
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler prints two lines for each use


class LiveBytes(NamedTuple):
    """Bytes above what was live before."""

    peak: int
    end: int


SHORT = ("r=16 tokens=256 float32", "r=16 tokens=256 float32 checkpointing", "r=16 tokens=256 bfloat16")


def cases() -> list[Case]:
    found = []
    for rank in (16, 128):
        for tokens in (256, 2048):
            for dtype in ("float32", "bfloat16"):
                for checkpointing in (False, True):
                    name = f"r={rank} tokens={tokens} {dtype}" + checkpointing * " checkpointing"
                    settings = {"hidden": 1024, "layers": 4, "accumulation": 2, "rank": rank, "tokens": tokens}
                    settings |= {"dtype": dtype, "checkpointing": checkpointing}
                    found.append(Case(name, settings, name in SHORT))
                    if rank == 16 and not checkpointing:
                        # Llama-2's vocabulary, and the loss that each tool's user gets.
                        of_users = settings | {"vocabulary": 32000, "own_loss": True}
                        found.append(Case(f"{name} own loss, vocabulary of 32000", of_users, False))
    return found


def measure(case: Case, budget_s: float) -> dict[str, Any]:
    """Bytes of each candidate; `budget_s` does not matter, because nothing is repeated."""
    return {"bytes": {name: measure_candidate(name, case.settings) for name in candidate_names(case.settings["dtype"])}}


def measure_candidate(name: str, settings: dict[str, Any]) -> dict[str, int]:
    """Live bytes in one optimizer step, after a first one in which the optimizer's state is made.

    between_steps: weights, adapter, optimizer and what a layer keeps; peak: above that, at the worst moment of a step
    (activations, gradients, temporaries); after_forward: above that, between a forward and its backward pass;
    saved: what autograd keeps for the backward pass in it, without the parameters.
    """
    before = tensor_bytes()
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
    if settings.get("own_loss"):
        training = replace(training, loss_of=own_loss)
    training.step(settings["accumulation"])
    between_steps = tensor_bytes() - before
    with candidate.step_scope():
        after_forward = live_bytes(training.loss).end
    with candidate.step_scope():
        saved = saved_bytes(candidate.module, training.loss)
    peak = live_bytes(lambda: training.step(settings["accumulation"])).peak
    return {"between_steps": between_steps, "peak": peak, "after_forward": after_forward, "saved": saved}


def live_bytes(function: Callable[[], object]) -> LiveBytes:
    """The most that `function` has live at once, and what is live when it returns, its result included."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = function()
    assert recorded.profiler is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del result
    return LiveBytes(peak, live)


def saved_bytes(module: torch.nn.Module, forward: Callable[[], Tensor]) -> int:
    """The storages that autograd holds for the backward pass, each once; `module`'s parameters and buffers excepted.

    What a part of the graph saved that is gone at the end of the forward pass is not held: PEFT's DoRA detaches its
    dense product. Under gradient checkpointing the inputs of the checkpointed blocks are kept without being saved in
    this sense: there `after_forward` of `measure_candidate` is the number to look at.
    """
    held: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor.detach())  # an output would hold its own graph
        held.add(saved)
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved.tensor):
        loss = forward()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    gc.collect()
    storages = [saved.tensor.untyped_storage() for saved in held]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in own}
    del loss
    return sum(sizes.values())


def tensor_bytes() -> int:
    """The bytes of all tensors that exist, each storage once."""
    gc.collect()
    # By type: isinstance would ask modules' lazy attributes, which warn.
    storages = [thing.untyped_storage() for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class _Saved:
    """One tensor in the graph: it lives as long as the graph's node does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


if __name__ == "__main__":
    print(page.memory(run("memory", __doc__, cases(), measure, is_timed=False)))
