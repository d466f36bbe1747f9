"""Time one adapted linear layer, forward and backward of one micro-batch, beside PEFT's and beside the frozen layer.

    python benchmarks/layer.py [--short] [--only "4096x4096 r=16"] [--threads 2] [--device cuda]

The input requires a gradient, as inside a model. Ours are timed in the middle of an optimizer step, so what they do
once per step is not in that time. It is measured apart: the forward pass of a single token, which costs little else,
in a new scope less the same in a held one. `page.py` adds it up for any number of micro-batches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import page
import torch
from candidates import Candidate, layer_candidate, timed_candidate_names
from measure import Case, interleave, pace, run
from torch import Tensor, nn

from dude_cli.adapter.widened import is_slow

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))  # (out, in): Llama-2-7B's
FROZEN = "frozen base"


def cases() -> list[Case]:
    """A GPU needs many tokens to have more to do than to start kernels, and nobody trains on one in float32."""
    found = []
    for (out_features, in_features), rank in itertools.product(SHAPES, (16, 128)):
        kinds = [("cpu", tokens, dtype) for tokens in (512, 2048) for dtype in ("float32", "bfloat16")]
        kinds += [("cuda", tokens, "bfloat16") for tokens in (2048, 16384)]
        for device, tokens, dtype in kinds:
            settings = {"out": out_features, "in": in_features, "rank": rank, "tokens": tokens, "dtype": dtype}
            name = f"{out_features}x{in_features} r={rank} tokens={tokens} {dtype}"
            is_square = out_features == in_features
            is_short = is_square and (tokens == 512 or device == "cuda" or (rank, dtype) == (128, "float32"))
            found.append(Case(name, settings, is_short, device))
    return found


def measure(case: Case, budget_s: float) -> dict[str, Any]:
    """Seconds of a micro-batch of each candidate and of the frozen layer; of one token in new and held scopes."""
    out_features, in_features = case.settings["out"], case.settings["in"]
    dtype = getattr(torch, case.settings["dtype"])
    found: dict[str, Any] = {"pace": pace(dtype)}
    torch.manual_seed(0)
    weight = (torch.randn(out_features, in_features) / in_features**0.5).to(dtype)
    x, dy = torch.randn(case.settings["tokens"], in_features), torch.randn(case.settings["tokens"], out_features)
    layers = {
        name: layer_candidate(name, weight, case.settings["rank"])
        for name in timed_candidate_names(case.settings["dtype"])
    }
    if not is_slow(weight):
        frozen = nn.Linear(in_features, out_features, bias=False, device="meta")
        frozen.weight = nn.Parameter(weight, requires_grad=False)
        layers[FROZEN] = Candidate(frozen, is_ours=False, autocast=False)
    x, dy = x.to(dtype).requires_grad_(), dy.to(dtype)
    ours = {name: layer for name, layer in layers.items() if layer.is_ours}
    new = interleave({name: _new_scope(layer, x[:1].detach()) for name, layer in ours.items()}, budget_s / 8)
    with ExitStack() as scopes:
        for layer in layers.values():
            scopes.enter_context(layer.step_scope())
        held = interleave({name: _forward(layer, x[:1].detach()) for name, layer in ours.items()}, budget_s / 8)
        seconds = interleave({name: _micro_batch(layer, x, dy) for name, layer in layers.items()}, budget_s)
    return found | {"seconds": seconds, "one_token_new_scope": new, "one_token_held_scope": held}


def _micro_batch(layer: Candidate, x: Tensor, dy: Tensor) -> Callable[[], None]:
    def run_once() -> None:
        with layer.precision():
            y = layer.module(x)
        y.backward(dy.to(y.dtype))
        x.grad = None

    return run_once


def _forward(layer: Candidate, x: Tensor) -> Callable[[], None]:
    def run_once() -> None:
        with layer.precision():
            layer.module(x)

    return run_once


def _new_scope(layer: Candidate, x: Tensor) -> Callable[[], None]:
    forward = _forward(layer, x)

    def run_once() -> None:
        with layer.step_scope():
            forward()

    return run_once


if __name__ == "__main__":
    print(page.layer(run("layer", __doc__, cases(), measure)))
