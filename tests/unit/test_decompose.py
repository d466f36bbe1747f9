from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dude_cli.adapter.decompose import initial_factors, seed_for, truncated_svd
from dude_cli.config import SvdConfig


def slowly_decaying(out: int, width: int, power: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """A random matrix whose singular values are 1 / k^power, and those values."""
    generator = torch.Generator().manual_seed(0)
    short = min(out, width)
    U = torch.linalg.qr(torch.randn(out, short, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(width, short, generator=generator)).Q
    S = torch.arange(1, short + 1).float() ** -power
    return (U * S) @ V.T, S


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 20), st.floats(0, 1), st.sampled_from(["exact", "randomized"]))
def test_factors_are_the_best_approximation_of_their_rank(out, width, share, algorithm):
    rank = max(1, round(share * min(out, width)))
    W = torch.randn(out, width, generator=torch.Generator().manual_seed(out * 31 + width))
    A, B = initial_factors(W, rank, 2.0, SvdConfig(algorithm=algorithm, iterations=30), seed=1)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    error = (2.0 * B.double() @ A.double() - W.double()).norm()
    best_error = (best - W.double()).norm()
    assert float(error) <= float(best_error) * (1 + 1e-3) + 1e-5 * float(W.norm())
    assert A.is_contiguous()
    assert B.is_contiguous()


def test_both_factors_carry_the_square_root_of_the_singular_values():
    W, S = slowly_decaying(30, 20)
    A, B = initial_factors(W, 5, 0.5, SvdConfig(algorithm="exact"), seed=0)
    torch.testing.assert_close(A.norm(dim=1), (S[:5] / 0.5).sqrt(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(B.norm(dim=0), (S[:5] / 0.5).sqrt(), rtol=1e-5, atol=1e-6)


def test_auto_is_exact_on_small_layers():
    W, S = slowly_decaying(300, 200)
    found = truncated_svd(W, 40, SvdConfig(), seed=0)
    torch.testing.assert_close(found.S, S[:40], rtol=1e-5, atol=1e-6)


def test_the_default_captures_a_slowly_decaying_spectrum_of_4096():
    """At least 99.5 % of the exact top-r sum; here S_k = k^-0.5 is known, so nothing has to be decomposed twice."""
    # A product of Householder-like reflections would do; two thin QRs of 4096 x 512 keep the test short: the spectrum
    # beyond 512 is a flat tail of noise of the size that k^-0.5 would have there.
    generator = torch.Generator().manual_seed(0)
    size, known, rank = 4096, 512, 128
    U = torch.linalg.qr(torch.randn(size, known, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(size, known, generator=generator)).Q
    S = torch.arange(1, known + 1).float() ** -0.5
    noise = torch.randn(size, size, generator=generator) * (0.25 * float(S[-1]) / size**0.5)
    W = (U * S) @ V.T + noise
    found = truncated_svd(W, rank, SvdConfig(), seed=0)
    assert float(found.S.sum() / S[:rank].sum()) >= 0.995


def test_the_sketch_depends_on_the_seed_alone():
    W, _ = slowly_decaying(80, 60)
    config = SvdConfig(algorithm="randomized", iterations=1, oversample=2)
    first = truncated_svd(W, 6, config, seed=3)
    torch.manual_seed(99)
    assert torch.equal(truncated_svd(W, 6, config, seed=3).U, first.U)
    assert not torch.equal(truncated_svd(W, 6, config, seed=4).U, first.U)
    assert seed_for(1, "a") != seed_for(1, "b") != seed_for(2, "b")


@pytest.mark.parametrize("algorithm", ["exact", "randomized"])
def test_a_zero_matrix_has_zero_factors(algorithm):
    A, B = initial_factors(torch.zeros(8, 6), 3, 1.0, SvdConfig(algorithm=algorithm), seed=0)
    assert float((B @ A).abs().max()) == 0
