"""Time and accuracy of truncated decompositions: ours beside torch's full one and the one that PEFT's PiSSA start uses.

    python benchmarks/decomposition.py --short     # one matrix of 2048 x 2048, half a minute on two cores
    python benchmarks/decomposition.py             # the layers of Llama-2-7B, minutes, 3 GB

Each matrix has a Gaussian bulk and a head of singular values that decay as k^-1/2 and hardly rise above it, as trained
weights do; `decaying` has k^-0.3 all through. Accuracy is the sum of the singular values found over that of the r
largest ones, which the exact algorithm gives, and ||W - U S V^T||_F over that of the best approximation of rank r.
torch's full decomposition, whose time hardly depends on the values, takes turns with the others on `decaying` alone.
Prints a Markdown table and writes decomposition.json in benchmarks/results/, or in the folder that measure.py says.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import page
import torch
from measure import place_of_seconds, record, results
from torch import Tensor

from dude_cli.adapter.decompose import exact_singular_values, truncated_svd
from dude_cli.config import SvdConfig

Svd = Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]  # U (out, r), S (r,), Vh (r, in)

# Of Llama-2-7B: (out, in) and how many layers of each.
LLAMA_2_7B = {(4096, 4096): 4 * 32, (11008, 4096): 2 * 32, (4096, 11008): 32}


def full(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    return U[:, :rank], S[:rank], Vh[:rank]


def lowrank(iterations: int) -> Svd:
    """What PEFT 0.21 calls for `init_lora_weights="pissa_niter_<iterations>"`."""

    def svd(W: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        U, S, V = torch.svd_lowrank(W, q=rank, niter=iterations)
        return U, S, V.T

    return svd


def ours(algorithm: str) -> Svd:
    config = SvdConfig.model_validate({"algorithm": algorithm})
    return lambda W, rank: truncated_svd(W, rank, config)


CANDIDATES = {
    "svd_lowrank, niter 4": lowrank(4),
    "svd_lowrank, niter 16": lowrank(16),
    "randomized": ours("randomized"),
    "exact": ours("exact"),
}


def like_trained(out: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    head = min(out, width) // 16
    U, V = (torch.linalg.qr(torch.randn(side, head, generator=generator)).Q for side in (out, width))
    W = torch.randn(out, width, generator=generator).div_(out**0.5 + width**0.5)  # its largest singular value is 1
    return W.addmm_(U * 3 * torch.arange(1, head + 1) ** -0.5, V.T)


def decaying(out: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    short = min(out, width)
    U, V = (torch.linalg.qr(torch.randn(side, short, generator=generator)).Q for side in (out, width))
    return (U * torch.arange(1, short + 1) ** -0.3) @ V.T


def measure(kind: str, W: Tensor, rank: int, candidates: dict[str, Svd], repeats: int) -> list[dict[str, object]]:
    """One row for each candidate; they take turns, so that a change of the machine's pace hits all of them alike."""
    best = exact_singular_values(W, rank)
    total = float(W.double().square().sum())
    left_out = (total - float(best.square().sum())) ** 0.5
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    rows = {}
    for _ in range(repeats):
        for name, svd in candidates.items():
            start = time.perf_counter()
            U, S, Vh = svd(W, rank)
            seconds[name].append(time.perf_counter() - start)
            rows[name] = {
                "matrix": kind,
                "shape": list(W.shape),
                "rank": rank,
                "algorithm": name,
                "share": float(S.double().sum() / best.sum()),
                "residual": float(torch.linalg.vector_norm(W - (U * S) @ Vh, dtype=torch.float64)) / left_out,
            }
    for name, row in rows.items():
        row |= {"median_s": statistics.median(seconds[name]), "seconds": seconds[name]}
        print(kind, tuple(W.shape), rank, name, f"{row['median_s']:.2f} s", file=sys.stderr, flush=True)
    return list(rows.values())


def llama_totals(rows: list[dict[str, object]]) -> dict[str, dict[str, float]]:
    """Seconds for Llama-2-7B's 224 layers by rank and algorithm: the time of one layer of each shape, multiplied."""
    totals: dict[str, dict[str, float]] = {}
    for row in rows:
        number = LLAMA_2_7B[tuple(row["shape"])] if row["matrix"] == "like trained" else 0  # type: ignore[arg-type]
        of_rank = totals.setdefault(f"rank {row['rank']}", {})
        name = str(row["algorithm"])
        of_rank[name] = of_rank.get(name, 0.0) + number * float(row["median_s"])  # type: ignore[arg-type]
    return {
        rank: {name: s for name, s in of_rank.items() if s and name != "svd, full"} for rank, of_rank in totals.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="one matrix of 2048 x 2048")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    shapes = [(2048, 2048)] if arguments.short else list(LLAMA_2_7B)
    for shape in shapes:
        W = like_trained(*shape)
        for rank in (16, 128):
            rows += measure("like trained", W, rank, CANDIDATES, arguments.repeats)
        if shape == shapes[0]:
            rows += measure("decaying", decaying(*shape), 128, CANDIDATES | {"svd, full": full}, arguments.repeats)
        del W
    result = {"settings": vars(arguments)} | record() | {"rows": rows}
    if not arguments.short:  # with a layer of each shape
        result["llama_2_7b_extrapolated_s"] = llama_totals(rows)
    place = "cpu" if arguments.short else place_of_seconds("cpu")
    path = results(place, short=arguments.short) / "decomposition.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(page.decomposition(path))


if __name__ == "__main__":
    main()
