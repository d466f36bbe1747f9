"""Means over runs and tests over questions, against scipy, numpy, exact sums, and values that statsmodels gives."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dude_cli.evaluation.statistics import (
    bootstrap_interval,
    holm,
    mcnemar_p_value,
    paired_test,
    sign_flip_p_value,
    summarize,
)

finite = st.floats(-1e3, 1e3, allow_nan=False).map(lambda value: round(value, 3))


@given(st.lists(finite, min_size=2, max_size=12))
def test_the_standard_deviation_divides_by_n_minus_one(values: list[float]) -> None:
    summary = summarize(values)
    assert summary is not None
    assert summary.n == len(values)
    assert summary.mean == pytest.approx(np.mean(values), abs=1e-9)
    assert summary.sd == pytest.approx(np.std(values, ddof=1), abs=1e-9)


def test_one_run_has_no_standard_deviation_and_none_has_no_mean() -> None:
    assert summarize([]) is None
    summary = summarize([3.0])
    assert summary is not None
    assert (summary.mean, summary.sd, summary.n) == (3.0, None, 1)


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_the_exact_binomial_sum(gained: int, lost: int) -> None:
    n, fewer = gained + lost, min(gained, lost)
    tail = sum(Fraction(math.comb(n, k), 2**n) for k in range(fewer + 1))
    assert mcnemar_p_value(gained, lost) == pytest.approx(float(min(Fraction(1), 2 * tail)), rel=1e-9)


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"),
    [
        (121, 59, 4.4344492637551645e-06),
        (5, 15, 0.04138946533203125),
        (3, 3, 1.0),
        (0, 7, 0.015625),
    ],
)
def test_mcnemar_agrees_with_statsmodels(gained: int, lost: int, p_value: float) -> None:
    """`statsmodels.stats.contingency_tables.mcnemar(table, exact=True).pvalue` of statsmodels 0.15."""
    assert mcnemar_p_value(gained, lost) == pytest.approx(p_value, rel=1e-12)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8))
@settings(max_examples=40)
def test_sign_flips_are_enumerated_where_that_can_be_done(changes: list[int]) -> None:
    observed = abs(sum(changes))
    signs = itertools.product((1, -1), repeat=len(changes))
    flips = [sum(sign * change for sign, change in zip(flip, changes, strict=True)) for flip in signs]
    expected = sum(abs(total) >= observed for total in flips) / len(flips)
    assert sign_flip_p_value([float(change) for change in changes]) == pytest.approx(expected)


def test_drawn_sign_flips_are_near_the_paired_t_test() -> None:
    """For many questions the two agree (Fisher 1935)."""
    changes = np.random.default_rng(5).normal(0.1, 1.0, 400)
    assert sign_flip_p_value(changes.tolist()) == pytest.approx(stats.ttest_1samp(changes, 0).pvalue, abs=0.01)
    assert sign_flip_p_value(changes.tolist()) == sign_flip_p_value(changes.tolist())


def test_the_bootstrap_interval_is_that_of_the_mean() -> None:
    changes = np.random.default_rng(6).normal(0.3, 2.0, 500)
    interval = bootstrap_interval(changes.tolist())
    assert interval is not None
    error = stats.sem(changes)
    assert interval == pytest.approx((changes.mean() - 1.96 * error, changes.mean() + 1.96 * error), abs=0.1 * error)


def test_right_and_wrong_answers_are_counted_and_tested_by_mcnemar() -> None:
    a = [1.0] * 4 + [0.0] * 16
    b = [0.0] * 1 + [1.0] * 12 + [0.0] * 7
    test = paired_test(a, b)
    assert (test.n, test.gained, test.lost, test.method) == (20, 9, 1, "exact McNemar")
    assert test.difference == pytest.approx(0.4)
    assert test.p_value == pytest.approx(mcnemar_p_value(9, 1))
    assert test.standard_error == pytest.approx(stats.sem(np.subtract(b, a)))


def test_other_scores_are_tested_by_sign_flips() -> None:
    test = paired_test([0.0, 0.5, 1.0, 0.5], [0.5, 1.0, 1.0, 0.0])
    assert test.method == "sign-flip permutation"
    assert (test.gained, test.lost) == (2, 1)
    assert test.p_value == 1.0
    with pytest.raises(ValueError, match="same questions"):
        paired_test([1.0], [1.0, 0.0])


def test_of_a_loss_the_lower_number_is_the_better_one() -> None:
    a, b = [0.5, 0.5, 0.5], [0.1, 0.7, 0.2]
    up, down = paired_test(a, b), paired_test(a, b, higher_is_better=False)
    assert (up.gained, up.lost) == (1, 2)
    assert (down.gained, down.lost) == (2, 1)
    assert (down.difference, down.p_value) == (up.difference, up.p_value)


def test_holm_agrees_with_statsmodels() -> None:
    """`multipletests(p, method="holm")` of statsmodels 0.15."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.6, 0.9]) == [1.0, 1.0, 1.0]
    assert holm([]) == []
