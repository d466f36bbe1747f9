"""Both algorithms against numpy's decomposition in float64: accuracy, matrices at the edge, memory."""

from __future__ import annotations

import subprocess
import sys

import numpy
import pytest
import torch
from command import environment
from hypothesis import given, settings
from hypothesis import strategies as st

from dude_cli.adapter.decompose import (
    PrincipalFactors,
    _converged_svd,
    exact_singular_values,
    is_exact,
    krylov_dimension,
    principal_factors,
    truncated_svd,
)
from dude_cli.config import SvdConfig
from dude_cli.errors import AdapterError

EXACT, RANDOMIZED = SvdConfig(algorithm="exact"), SvdConfig(algorithm="randomized")
both = pytest.mark.parametrize("config", [EXACT, RANDOMIZED], ids=["exact", "randomized"])


def with_spectrum(out: int, width: int, S: torch.Tensor) -> torch.Tensor:
    """A random float32 matrix with the singular values `S`."""
    generator = torch.Generator().manual_seed(0)
    U, V = (
        torch.linalg.qr(torch.randn(side, len(S), generator=generator, dtype=torch.float64)).Q for side in (out, width)
    )
    return ((U * S) @ V.T).float()


def powers(count: int, power: float) -> torch.Tensor:
    return torch.arange(1, count + 1, dtype=torch.float64) ** -power


def check(W: torch.Tensor, rank: int, config: SvdConfig, tolerance: float = 1e-6) -> None:
    """Orthonormal vectors, and singular values and error within `tolerance` of the largest singular value of W."""
    found = truncated_svd(W, rank, config)
    S = torch.from_numpy(numpy.linalg.svd(W.double().numpy(), compute_uv=False))
    allowed = tolerance * float(S[0])
    identity = torch.eye(rank)
    torch.testing.assert_close(found.U.T @ found.U, identity, rtol=0, atol=2e-6)
    torch.testing.assert_close(found.Vh @ found.Vh.T, identity, rtol=0, atol=2e-6)
    torch.testing.assert_close(found.S.double(), S[:rank], rtol=0, atol=allowed)
    error = ((found.U.double() * found.S) @ found.Vh.double() - W.double()).norm()
    assert float(error) <= float(S[rank:].norm()) + allowed * len(S) ** 0.5
    assert bool((found.S.diff() <= 0).all())


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 60), st.integers(1, 60), st.floats(0, 1), st.integers(0, 60), st.sampled_from([EXACT, RANDOMIZED])
)
def test_it_is_the_best_approximation_of_any_shape_rank_and_number_of_zero_rows(out, width, share, zero_rows, config):
    W = torch.randn(out, width, generator=torch.Generator().manual_seed(out * 61 + width))
    W[:zero_rows] = 0
    check(W, max(1, round(share * min(out, width))), config)


@both
@pytest.mark.parametrize("shape", [(260, 200), (200, 260)])
@pytest.mark.parametrize(
    "spectrum",
    [
        powers(200, 0.4),
        powers(200, 6.0),
        torch.full((200,), 3.0, dtype=torch.float64),
        torch.tensor([5.0, 5.0, 5.0, 1.0, 1.0], dtype=torch.float64),
        1e-25 * 0.9 ** torch.arange(200, dtype=torch.float64),
    ],
    ids=["slow", "fast", "all equal", "repeated, rank 5", "tiny"],
)
def test_spectra_at_the_edge(config, shape, spectrum):
    check(with_spectrum(*shape, spectrum), 24, config, tolerance=2e-6)


@both
def test_a_single_value_and_an_identity(config):
    W = torch.zeros(300, 250)
    W[3, 7] = -2
    check(W, 20, config)
    check(torch.eye(300, 250), 20, config)


@both
def test_a_zero_matrix_has_zero_factors_and_orthonormal_vectors(config):
    W = torch.zeros(80, 60)
    A, B = principal_factors(W, 30, config)
    assert float((B @ A).abs().max()) == 0
    found = truncated_svd(W, 30, config)
    torch.testing.assert_close(found.Vh @ found.Vh.T, torch.eye(30))


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_lose_nothing_more(config, dtype):
    check(torch.randn(90, 70, generator=torch.Generator().manual_seed(0)).to(dtype), 9, config)


@both
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused(config, value):
    W = torch.ones(9, 7)
    W[4, 5] = value
    with pytest.raises(AdapterError, match="infinite or NaN"):
        truncated_svd(W, 2, config)


@both
def test_equal_matrices_have_equal_decompositions_whatever_else_was_drawn(config):
    W = with_spectrum(120, 90, powers(90, 0.5))
    first = truncated_svd(W, 6, config)
    torch.manual_seed(99)
    again = truncated_svd(W.clone(), 6, config)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@both
def test_the_signs_are_those_of_the_largest_entries(config):
    found = truncated_svd(with_spectrum(120, 90, powers(90, 0.5)), 6, config)
    assert bool((found.U.gather(0, found.U.abs().argmax(dim=0, keepdim=True)) > 0).all())


def test_both_factors_carry_the_square_root_of_the_singular_values_and_of_the_scaling():
    S = powers(20, 0.5)
    factors = principal_factors(with_spectrum(30, 20, S), 5, EXACT)
    A, B = factors.scaled(0.5)
    torch.testing.assert_close(A.norm(dim=1).double(), (S[:5] / 0.5).sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(B.norm(dim=0).double(), (S[:5] / 0.5).sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(0.5 * B @ A, factors.B @ factors.A)
    assert A.is_contiguous()
    assert B.is_contiguous()
    assert isinstance(factors.to(torch.device("cpu")), PrincipalFactors)


def test_auto_is_exact_where_that_costs_little():
    assert is_exact((1024, 9000), 8, SvdConfig())
    assert not is_exact((1025, 9000), 8, SvdConfig())
    assert is_exact((9000, 12 * 256), 256, SvdConfig())
    assert not is_exact((9000, 12 * 256 + 1), 256, SvdConfig())
    assert krylov_dimension(256, 12) == 12 * 128


def test_exact_singular_values_are_those_of_float64():
    W = with_spectrum(150, 170, powers(150, 2.0))
    S = torch.from_numpy(numpy.linalg.svd(W.double().numpy(), compute_uv=False))
    torch.testing.assert_close(exact_singular_values(W, 150), S, rtol=0, atol=1e-9)
    torch.testing.assert_close(exact_singular_values(W.T, 4), S[:4], rtol=1e-12, atol=0)


def hard_matrix(size: int) -> torch.Tensor:
    """What trained weights look like: a Gaussian bulk, out of which a head of decaying singular values hardly rises."""
    generator = torch.Generator().manual_seed(0)
    head = size // 16
    U, V = (torch.linalg.qr(torch.randn(size, head, generator=generator)).Q for _ in range(2))
    bulk = torch.randn(size, size, generator=generator) / size**0.5  # its largest singular value is 2
    return bulk + (U * (6 * powers(head, 0.5)).float()) @ V.T


@pytest.mark.parametrize(("rank", "iterations"), [(16, 12), (64, 12), (64, 16)])
def test_randomized_reaches_99_8_percent_where_the_power_iterations_of_peft_do_not(rank, iterations):
    W = hard_matrix(1536)
    exact = float(exact_singular_values(W, rank).sum())
    found = truncated_svd(W, rank, RANDOMIZED.model_copy(update={"iterations": iterations}))
    torch.manual_seed(0)
    power_iterations = torch.svd_lowrank(W, q=rank, niter=16)[1]
    assert 0.9985 < float(found.S.sum()) / exact <= 1 + 1e-6
    assert float(power_iterations.sum()) / exact < 0.9985
    orthonormal = torch.eye(rank)
    torch.testing.assert_close(found.U.T @ found.U, orthonormal, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "W",
    [
        hard_matrix(1100),
        torch.randn(1300, 1100, generator=torch.Generator().manual_seed(0)),
        with_spectrum(1100, 1150, powers(1100, 3.0)),
        torch.cat([torch.eye(1100), torch.zeros(3, 1100)]),
    ],
    ids=["like trained", "Gaussian", "fast decay", "identity"],
)
def test_a_large_matrix_is_decomposed_to_roundings_by_a_space_that_grows(monkeypatch, W):
    monkeypatch.setattr("dude_cli.adapter.decompose.GRAM_UP_TO", 1000)
    assert _converged_svd(W if W.shape[0] >= W.shape[1] else W.T, 8) is not None
    check(W, 8, EXACT, tolerance=5e-7)


def test_the_space_grows_until_the_values_stand_still(monkeypatch):
    W = hard_matrix(2000)
    exact = exact_singular_values(W, 64)
    monkeypatch.setattr("dude_cli.adapter.decompose.GRAM_UP_TO", 1000)
    error = (truncated_svd(W, 64, EXACT).S.double() - exact).abs().max() / exact[0]
    after_as_many_steps = (truncated_svd(W, 64, RANDOMIZED).S.double() - exact).abs().max() / exact[0]
    assert float(error) <= 5e-7 < 1e-4 < float(after_as_many_steps)


def test_one_that_does_not_converge_early_goes_through_the_gram_matrix(monkeypatch):
    monkeypatch.setattr("dude_cli.adapter.decompose.GRAM_UP_TO", 100)
    check(torch.randn(500, 400, generator=torch.Generator().manual_seed(0)), 16, EXACT)
    assert _converged_svd(torch.randn(500, 400, generator=torch.Generator().manual_seed(0)), 16) is None


PEAK = """
import sys
import torch
from scipy import linalg  # not the decomposition's own memory
from dude_cli.adapter import decompose
from dude_cli.adapter.decompose import decompose_layer
from dude_cli.config import AdapterConfig

decompose.GRAM_UP_TO = int(sys.argv[5])

def peak():
    return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) * 1024

out, width, dtype, algorithm = int(sys.argv[1]), int(sys.argv[2]), getattr(torch, sys.argv[3]), sys.argv[4]
config = AdapterConfig(rank=64, svd={"algorithm": algorithm})
decompose_layer("warm", torch.nn.Linear(300, 300), config)
layer = torch.nn.Linear(width, out, bias=False, dtype=dtype)
before = peak()
decompose_layer("layer", layer, config)
print((peak() - before) / (4 * out * width))
"""


@pytest.mark.parametrize(
    ("algorithm", "gram_up_to", "out", "width", "dtype"),
    [
        ("exact", 9999, 2304, 2304, "float32"),
        ("exact", 9999, 1536, 4096, "float16"),
        ("exact", 1000, 2304, 2304, "bfloat16"),
        ("randomized", 1000, 2304, 2304, "bfloat16"),
    ],
    ids=["Gram matrix, square", "Gram matrix, wide", "growing space", "randomized"],
)
def test_it_takes_at_most_three_float32_copies_of_the_weight(algorithm, gram_up_to, out, width, dtype):
    arguments = [str(out), str(width), dtype, algorithm, str(gram_up_to)]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *arguments], env=environment(), capture_output=True, text=True, check=True
    )
    assert 0.1 < float(done.stdout) <= 3
