"""Truncated singular value decomposition of one weight matrix: the start of `dude` and `pissa`.

The matrix is looked at as (long side m, short side n), and everything ends in the same step: eigenvectors of a Gram
matrix, summed in float64. There an eigenvalue is off by about 1e-16 of the largest, so a singular value by about 1e-8
of the largest at most: less than the rounding of LAPACK's own decomposition in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dude_cli.adapter.autocast import full_float32
from dude_cli.adapter.weight import dense_weight
from dude_cli.config import AdapterConfig, SvdConfig
from dude_cli.errors import AdapterError

# Up to this short side `exact` always goes through the Gram matrix of the weight itself: no second for it on a CPU.
GRAM_UP_TO = 2048

# Above it, what the last Krylov steps may still have moved a singular value by, as a share of the largest. The next
# ones moved it by a tenth of that or less in all spectra that were tried, which is the rounding of float32.
CONVERGED = 1e-6

# Up to this short side the exact algorithm takes a fraction of a second on a CPU.
EXACT_UP_TO = 1024

# Columns that each step of the randomized algorithm adds at least: thinner matrix products are no cheaper.
MIN_BLOCK = 16

# The most values of a float64 slab of rows: 16 MiB.
_SLAB_VALUES = 2 * 2**20


class TruncatedSvd(NamedTuple):
    """The r largest singular triplets of a (out, in) matrix, float32, largest first."""

    U: Tensor  # (out, r), orthonormal columns; the entry of largest magnitude in each is positive
    S: Tensor  # (r,)
    Vh: Tensor  # (r, in), orthonormal rows


class PrincipalFactors(NamedTuple):
    """A = sqrt(S_r) V_r^T and B = U_r sqrt(S_r), contiguous float32: B A is the best rank-r part of the matrix.

    PiSSA's start (arXiv 2404.02948, equations 2 and 3), shared by DuDe (arXiv 2505.14367).
    """

    A: Tensor  # (r, in)
    B: Tensor  # (out, r)

    def scaled(self, scaling: float) -> PrincipalFactors:
        """A0 = A / sqrt(s), B0 = B / sqrt(s): s B0 A0 is the same matrix, whatever alpha is."""
        root = math.sqrt(scaling)
        return PrincipalFactors(self.A / root, self.B / root)

    def to(self, device: torch.device) -> PrincipalFactors:
        return PrincipalFactors(self.A.to(device), self.B.to(device))


def decompose_layer(name: str, layer: nn.Module, config: AdapterConfig) -> PrincipalFactors:
    """The principal factors of a linear layer's weight, on its device. Raises AdapterError, which has its name."""
    with errors_of(name):
        return principal_factors(dense_weight(layer), config.rank, config.svd)


@contextmanager
def errors_of(name: str) -> Iterator[None]:
    """Within, an AdapterError gets the layer's name."""
    try:
        yield
    except AdapterError as error:
        raise AdapterError(error.what, where=name, fix=error.fix) from None


def principal_factors(W: Tensor, rank: int, config: SvdConfig) -> PrincipalFactors:
    """The factors of the best approximation of `W` (out, in) of the given rank, on its device; see `truncated_svd`."""
    U, S, Vh = truncated_svd(W, rank, config)
    root = S.sqrt()
    return PrincipalFactors((root[:, None] * Vh).contiguous(), (U * root).contiguous())


def truncated_svd(W: Tensor, rank: int, config: SvdConfig) -> TruncatedSvd:
    """The `rank` largest singular triplets of `W` (out, in), of any floating dtype, on its device.

    `randomized` projects the matrix onto a block Krylov space (Musco and Musco 2015, arXiv 1504.05477, algorithm 2).
    `exact` is accurate to float32's rounding, about 2e-7 of the largest singular value: by the Gram matrix of the short
    side, and where that is long, by a Krylov space that grows until nothing moves any more, if that happens early. The
    sketch is always the same: on one machine with one number of threads equal matrices have equal decompositions.
    Raises AdapterError if `W` has a value that is not finite.
    """
    check_finite(W)
    is_wide = W.shape[0] < W.shape[1]
    tall = W.T if is_wide else W
    exact = is_exact((W.shape[0], W.shape[1]), rank, config)
    with full_float32(W.device):
        found = _exact_svd(tall, rank) if exact else _krylov_svd(tall.to(torch.float32), rank, config.iterations)
    left, S, right = found
    U, V = (right, left) if is_wide else (left, right)
    sign = U.gather(0, U.abs().argmax(dim=0, keepdim=True)).sign()
    return TruncatedSvd(U * sign, S, (V * sign).T)


def is_exact(shape: tuple[int, int], rank: int, config: SvdConfig) -> bool:
    """Whether `config` decomposes a matrix of this shape exactly; `auto` where that is no slower by much."""
    if config.algorithm != "auto":
        return config.algorithm == "exact"
    return min(shape) <= max(EXACT_UP_TO, 2 * krylov_dimension(rank, config.iterations))


def krylov_dimension(rank: int, iterations: int) -> int:
    """Columns of the randomized algorithm's basis: half the rank, at least 16, in each iteration."""
    return iterations * _block_size(rank)


def exact_singular_values(W: Tensor, count: int) -> Tensor:
    """The `count` largest singular values of `W` (out, in), float64, largest first, as `exact` has them."""
    check_finite(W)
    return _top_eigenvalues(_gram(W.T if W.shape[0] < W.shape[1] else W), count).sqrt()


def _gram_svd(tall: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The largest triplets (m, r), (r,), (n, r) of `tall` (m, n), from the eigenvectors V of `tall`^T `tall`.

    The left vectors are the Q of `tall` V = Q R, and the singular values the diagonal of R: orthonormal however small
    the singular values are, where dividing by them would not be. R is diagonal up to 1e-8 of the largest one.
    """
    V = _top_eigenvectors(_gram(tall), rank)
    Q, R = torch.linalg.qr(torch.cat([slab @ V for slab in _slabs(tall)]))
    S, order = R.diagonal().abs().sort(descending=True, stable=True)
    sign = torch.where(R.diagonal() < 0, -1.0, 1.0)
    return (Q * sign)[:, order].float(), S.float(), V[:, order].float()


class _KrylovSpace:
    """An orthonormal basis of a block Krylov space of the rows of `tall` (m, n) float32, and `tall` times it.

    With a Gaussian X and M = `tall` it spans M^T X, (M^T M) M^T X, ...: all of it is kept, unlike the power iterations
    of svd_lowrank, which keep the last block. The best triplets in it are those of M basis.
    """

    def __init__(self, tall: Tensor, block: int, most_columns: int) -> None:
        m, n = tall.shape
        self._tall = tall
        self._block = min(block, most_columns)
        self.columns = 0
        # Columns are contiguous: each step reads and writes whole ones.
        self._basis, self._projected = (torch.empty(most_columns, side, device=tall.device).T for side in (n, m))
        # Drawn on the CPU: the sketch is then the same on every device.
        self._generator = torch.Generator().manual_seed(0)
        self._left = torch.randn(m, self._block, generator=self._generator, device="cpu").to(tall.device)

    def extend(self, columns: int) -> None:
        """Add blocks until there are `columns`."""
        while self.columns < columns:
            start, stop = self.columns, min(self.columns + self._block, columns)
            new = self._tall.T @ self._left[:, : stop - start]
            self._basis[:, start:stop] = _next_block(new, self._basis[:, :start], self._generator)
            self._projected[:, start:stop] = self._tall @ self._basis[:, start:stop]
            self._left = torch.linalg.qr(self._projected[:, start:stop]).Q
            self.columns = stop

    def singular_values(self, count: int) -> Tensor:
        return _top_eigenvalues(_gram(self._projected[:, : self.columns]), count).sqrt()

    def triplets(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        U, S, V = _gram_svd(self._projected[:, : self.columns], rank)
        return U, S, self._basis[:, : self.columns] @ V


def _krylov_svd(tall: Tensor, rank: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Approximate largest triplets of `tall` (m, n) float32, as of `_gram_svd`, from `iterations` Krylov steps."""
    columns = max(rank, min(krylov_dimension(rank, iterations), tall.shape[1]))
    space = _KrylovSpace(tall, _block_size(rank), columns)
    space.extend(columns)
    return space.triplets(rank)


def _exact_svd(tall: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    found = _converged_svd(tall.to(torch.float32), rank) if tall.shape[1] > GRAM_UP_TO else None
    return found or _gram_svd(tall, rank)


def _converged_svd(tall: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The largest triplets of `tall` (m, n) float32 to its rounding, from as many Krylov steps as that takes.

    From six times the rank on it is looked at how far the singular values have moved, which only grow and converge
    faster than linearly. Blocks are half as wide as the randomized algorithm's: more steps for as many columns.
    None if half of the short side is not enough: then the Gram matrix costs less.
    """
    block = max(MIN_BLOCK, -(-rank // 4))
    step, most = 4 * block, tall.shape[1] // 2
    space = _KrylovSpace(tall, block, most)
    before = None
    for columns in range(6 * step, most + 1, step):
        space.extend(columns)
        S = space.singular_values(rank)
        if before is not None and float((S - before).abs().max()) <= CONVERGED * float(S[0]):
            return space.triplets(rank)
        before = S
    return None


def _next_block(Z: Tensor, basis: Tensor, generator: torch.Generator) -> Tensor:
    """Orthonormal columns for `Z`, orthogonal to `basis`, by repeated Gram-Schmidt.

    Noise as small as rounding goes in first, so that columns with nothing new in them, as of a matrix of low rank, are
    in general position: a QR alone would complete them with unit vectors, which may lie in the basis. What is left of
    such columns is rounding, half of it in the basis, hence a second projection before the QR and a third after it.
    """
    noise = torch.randn(Z.shape, generator=generator, device="cpu").to(Z.device)
    size = torch.linalg.vector_norm(Z, dtype=torch.float64).float() / math.sqrt(Z.numel())
    Z = Z + noise * torch.finfo(Z.dtype).eps * torch.where(size > 0, size, 1.0)
    Z = Z - basis @ (basis.T @ Z)
    for _ in range(2):
        Z = torch.linalg.qr(Z - basis @ (basis.T @ Z)).Q
    return Z


def _block_size(rank: int) -> int:
    return max(MIN_BLOCK, -(-rank // 2))


def _gram(tall: Tensor) -> Tensor:
    """The lower triangle of `tall`^T `tall` (n, n), float64, summed slab by slab: no float64 copy of `tall` exists."""
    n = tall.shape[1]
    gram = torch.zeros(n, n, dtype=torch.float64, device=tall.device)
    width = max(128, -(-n // 8))  # of the block columns, whose upper parts are left out: half of the work
    for slab in _slabs(tall):
        for start in range(0, n, width):
            columns = slab[:, start : start + width]
            gram[start:, start : start + width].addmm_(slab[:, start:].T, columns)
    return gram


def _slabs(tall: Tensor) -> Iterator[Tensor]:
    """`tall` as float64 slabs of rows, each an eighth of its float32 size at most: two are alive at a time."""
    m, n = tall.shape
    rows = max(1, min(-(-m // 16), _SLAB_VALUES // n))
    for start in range(0, m, rows):
        yield tall[start : start + rows].to(torch.float64)


def _top_eigenvectors(gram: Tensor, rank: int) -> Tensor:
    """Eigenvectors (n, rank) of the largest eigenvalues of a symmetric matrix, largest first; overwrites it.

    On a CPU LAPACK's `syevr` computes only those that are wanted, in the matrix's own memory; torch computes all.
    """
    if gram.device.type != "cpu":
        vectors: Tensor = torch.linalg.eigh(gram, UPLO="L").eigenvectors[:, -rank:]
    else:
        vectors = torch.from_numpy(_syevr(gram, rank, eigvals_only=False)[1])
    return vectors.flip(1)


def _top_eigenvalues(gram: Tensor, count: int) -> Tensor:
    """The largest eigenvalues (count,) of a symmetric matrix, largest first, none below zero; overwrites it."""
    if gram.device.type != "cpu":
        values = torch.linalg.eigvalsh(gram, UPLO="L")[-count:]
    else:
        values = torch.from_numpy(_syevr(gram, count, eigvals_only=True))
    largest_first: Tensor = values.flip(0).clamp(min=0)
    return largest_first


def _syevr(gram: Tensor, count: int, *, eigvals_only: bool) -> Any:
    from scipy.linalg import eigh

    n = gram.shape[0]
    # Column-major, as the transpose is, and without a check for NaN, which needs a copy: LAPACK then works in place.
    return eigh(
        gram.numpy().T,
        lower=False,
        subset_by_index=(n - count, n - 1),
        driver="evr",
        eigvals_only=eigvals_only,
        overwrite_a=True,
        check_finite=False,
    )


def check_finite(W: Tensor) -> None:
    """Raise AdapterError unless all of `W` is finite."""
    low, high = W.aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise AdapterError(
            "a weight that has infinite or NaN values cannot be decomposed",
            fix="check the files of the base model; in float16, values above 65504 become infinite",
        )
