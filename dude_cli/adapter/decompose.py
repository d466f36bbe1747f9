"""Truncated singular value decomposition of one weight matrix: the start of `dude` and `pissa`."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from dude_cli.config import SvdConfig

# Up to this short side the exact algorithm takes about a second on a CPU.
EXACT_UP_TO = 1024


class TruncatedSvd(NamedTuple):
    """The r largest singular triplets of a (out, in) matrix, float32, largest first."""

    U: Tensor  # (out, r), orthonormal columns
    S: Tensor  # (r,)
    Vh: Tensor  # (r, in), orthonormal rows


def truncated_svd(W: Tensor, rank: int, config: SvdConfig, seed: int) -> TruncatedSvd:
    """The `rank` largest singular triplets of `W` (out, in), computed in float32 on the device of `W`.

    `exact` is LAPACK's full decomposition, cut. `randomized` is Halko, Martinsson and Tropp's algorithm 4.4
    (arXiv 0909.4061): a Gaussian sketch of rank + oversample columns, `iterations` power iterations with a QR after
    each product, then the exact decomposition of the projected matrix; its sketch depends on `seed` alone.
    """
    W = W.to(torch.float32)
    short_side = min(W.shape)
    if config.algorithm == "exact" or (config.algorithm == "auto" and short_side <= EXACT_UP_TO):
        return _cut(torch.linalg.svd(W, full_matrices=False), rank)
    oversample = rank if config.oversample is None else config.oversample
    return _randomized(W, rank, min(rank + oversample, short_side), config.iterations, seed)


def initial_factors(W: Tensor, rank: int, scaling: float, config: SvdConfig, seed: int) -> tuple[Tensor, Tensor]:
    """A0 = sqrt(S_r / s) V_r^T (r, in) and B0 = U_r sqrt(S_r / s) (out, r): s B0 A0 is the best rank-r part of `W`.

    PiSSA's start (arXiv 2404.02948, equations 2 and 3), shared by DuDe (arXiv 2505.14367), with the scaling s taken
    out so that it holds for any alpha. Contiguous float32.
    """
    U, S, Vh = truncated_svd(W, rank, config, seed)
    root = (S / scaling).sqrt()
    return (root[:, None] * Vh).contiguous(), (U * root).contiguous()


def seed_for(seed: int, name: str) -> int:
    """A seed of its own for each layer, so that the result does not depend on which layers come before it."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "big")


def _randomized(W: Tensor, rank: int, columns: int, iterations: int, seed: int) -> TruncatedSvd:
    # Drawn on the CPU: the sketch is then the same on every device.
    sketch = torch.randn(W.shape[1], columns, generator=torch.Generator().manual_seed(seed)).to(W.device)
    Q = torch.linalg.qr(W @ sketch).Q
    for _ in range(iterations):
        Q = torch.linalg.qr(W.T @ Q).Q
        Q = torch.linalg.qr(W @ Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
    return _cut((Q @ U, S, Vh), rank)


def _cut(svd: tuple[Tensor, Tensor, Tensor], rank: int) -> TruncatedSvd:
    U, S, Vh = svd
    return TruncatedSvd(U[:, :rank], S[:rank], Vh[:rank])
