"""Time and memory of a large vocabulary's loss: plain, with each chunk recomputed, and as `training/loss.py` has it.

    python benchmarks/loss.py --tokens 2048 --hidden 1024 --vocabulary 32000

Forward and backward from the hidden states to their gradient, interleaved, medians; bytes are those of the tensors that
exist at once beside the hidden states and the head. Prints a Markdown table, `--json FILE` writes the numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dude_cli.training.live_bytes import counted
from dude_cli.training.loss import chunk_tokens, linear_cross_entropy


def plain(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="sum")


def recomputed(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    size = chunk_tokens(len(hidden), head.out_features)
    parts = zip(hidden.split(size), targets.split(size), strict=True)
    return torch.stack([checkpoint(plain, part, head, ids, use_reentrant=False) for part, ids in parts]).sum()


def chunked(hidden: Tensor, head: nn.Linear, targets: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, head.weight, head.bias, targets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    head = nn.Linear(options.hidden, options.vocabulary, bias=False, dtype=dtype).requires_grad_(False)
    hidden = torch.randn(options.tokens, options.hidden, dtype=dtype, requires_grad=True)
    targets = torch.randint(options.vocabulary, (options.tokens,))
    ways: list[Callable[[Tensor, nn.Linear, Tensor], Tensor]] = [plain, recomputed, chunked]
    seconds: dict[str, list[float]] = {way.__name__: [] for way in ways}
    for _ in range(options.repeats):
        for way in ways:
            started = time.perf_counter()
            way(hidden, head, targets).backward()
            seconds[way.__name__].append(time.perf_counter() - started)
            hidden.grad = None
    peaks = {}
    for way in ways:
        with counted(head) as live:
            way(hidden, head, targets).backward()
        peaks[way.__name__] = live.peak.total()
        hidden.grad = None
    print(f"{options.tokens} tokens, hidden {options.hidden}, vocabulary {options.vocabulary}, {options.dtype}, "
          f"{torch.get_num_threads()} threads\n")  # fmt: skip
    print("| loss | seconds | MiB |\n| --- | ---: | ---: |")
    results = {name: {"seconds": statistics.median(times), "bytes": peaks[name]} for name, times in seconds.items()}
    for name, result in results.items():
        print(f"| {name} | {result['seconds']:.2f} | {result['bytes'] / 2**20:.0f} |")
    if options.json is not None:
        record = {"options": vars(options) | {"json": None}, "threads": torch.get_num_threads(), "results": results}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
