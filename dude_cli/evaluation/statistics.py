"""What can be said of scores: means over runs, differences over questions, how likely chance alone is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

CONFIDENCE = 0.95
RESAMPLES = 9999
# Random numbers that one chunk of a resampling may hold.
RESAMPLED_VALUES = 2**22


@dataclass(frozen=True)
class Summary:
    """The mean of n values and their standard deviation, sqrt(sum (x - mean)^2 / (n - 1)); None for one value."""

    mean: float
    sd: float | None
    n: int


@dataclass(frozen=True)
class PairedTest:
    """Two scores on the same n questions; `difference` is b minus a.

    `standard_error` is that of the difference (see `paired_difference`), None for one question. `interval` is the
    percentile interval of the paired bootstrap (Efron and Tibshirani 1993, chapter 13), None for one question.
    `gained` questions are better in b, `lost` ones better in a. `p_value` is two-sided, by `method`:
    exact McNemar where each score is 0 or 1, else the sign-flip permutation test of the mean difference.
    """

    n: int
    mean_a: float
    mean_b: float
    difference: float
    standard_error: float | None
    interval: tuple[float, float] | None
    gained: int
    lost: int
    p_value: float
    method: Literal["exact McNemar", "sign-flip permutation"]


def summarize(values: Sequence[float]) -> Summary | None:
    """Mean, standard deviation and number of `values`; None of none."""
    if not values:
        return None
    sd = statistics.stdev(values) if len(values) > 1 else None
    return Summary(statistics.fmean(values), sd, len(values))


def paired_difference(base: Sequence[float], tuned: Sequence[float]) -> tuple[float, float | None]:
    """The mean difference over the same questions, and its standard error.

    With d_i = tuned_i - base_i:   mean(d)   and   SE = sqrt(sum_i (d_i - mean(d))^2 / (n - 1)) / sqrt(n),
    the standard error of a paired t-test. Both models find the same questions hard, so it is smaller than
    sqrt(SE_base^2 + SE_tuned^2), which takes the two for independent. None for fewer than two questions.
    """
    if len(base) != len(tuned) or not base:
        raise ValueError(f"paired scores need the same questions: {len(base)} and {len(tuned)}")
    differences = [after - before for before, after in zip(base, tuned, strict=True)]
    n = len(differences)
    mean = math.fsum(differences) / n
    if n == 1:
        return mean, None
    variance = math.fsum((difference - mean) ** 2 for difference in differences) / (n - 1)
    return mean, math.sqrt(variance / n)


def weighted_standard_error(errors: Sequence[float], weights: Sequence[float]) -> float:
    """The standard error of a weighted mean of independent parts: sqrt(sum_k (w_k SE_k)^2) / sum_k w_k.

    With w_k the number of questions of subject k it belongs to mmlu's `acc`, which weights its subjects by size.
    """
    return math.sqrt(math.fsum((w * e) ** 2 for w, e in zip(weights, errors, strict=True))) / math.fsum(weights)


def paired_test(a: Sequence[float], b: Sequence[float], *, higher_is_better: bool = True) -> PairedTest:
    """Compare two scores on the same questions, in the same order. Raises ValueError if their numbers differ."""
    difference, error = paired_difference(a, b)
    higher = sum(after > before for before, after in zip(a, b, strict=True))
    lower = sum(after < before for before, after in zip(a, b, strict=True))
    gained, lost = (higher, lower) if higher_is_better else (lower, higher)
    is_right_or_wrong = all(value in (0, 1) for value in (*a, *b))
    changes = [after - before for before, after in zip(a, b, strict=True)]
    return PairedTest(
        n=len(a),
        mean_a=statistics.fmean(a),
        mean_b=statistics.fmean(b),
        difference=difference,
        standard_error=error,
        interval=bootstrap_interval(changes),
        gained=gained,
        lost=lost,
        p_value=mcnemar_p_value(gained, lost) if is_right_or_wrong else sign_flip_p_value(changes),
        method="exact McNemar" if is_right_or_wrong else "sign-flip permutation",
    )


def mcnemar_p_value(gained: int, lost: int) -> float:
    """The exact McNemar test of right and wrong answers: a binomial test of the discordant questions (McNemar 1947).

    Were both models equally good, each of them would be as likely gained as lost.
    """
    if gained + lost == 0:
        return 1.0
    from scipy.stats import binomtest

    return float(binomtest(gained, gained + lost, 0.5).pvalue)


def sign_flip_p_value(changes: Sequence[float]) -> float:
    """How often the mean of `changes` is as far from 0 when each one's sign is random (Fisher 1935, chapter 3).

    Questions that did not change have no sign. Exact for up to 13 others; above, of RESAMPLES seeded draws, the
    observed one counted in.
    """
    changed = [change for change in changes if change]
    if len(changed) < 2:
        return 1.0  # a single one is as far from 0 with either sign
    import numpy as np
    from scipy.stats import permutation_test

    result = permutation_test(
        (np.asarray(changed),),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, RESAMPLED_VALUES // len(changed)),
        rng=np.random.default_rng(0),
    )
    return float(result.pvalue)


def bootstrap_interval(changes: Sequence[float]) -> tuple[float, float] | None:
    """The percentile bootstrap's 95 % interval of the mean of `changes`, seeded; None for fewer than two."""
    if len(changes) < 2:
        return None
    import numpy as np
    from scipy.stats import bootstrap

    interval = bootstrap(
        (np.asarray(changes),),
        np.mean,
        confidence_level=CONFIDENCE,
        method="percentile",
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, RESAMPLED_VALUES // len(changes)),
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(interval.low), float(interval.high)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values of several tests that hold together: Holm's step-down adjustment (Holm 1979), in the given order.

    With p_(1) <= ... <= p_(m):   adjusted p_(i) = max over j <= i of min(1, (m - j + 1) p_(j)).
    """
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for position, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        highest = max(highest, min(1.0, (len(p_values) - position) * p_values[index]))
        adjusted[index] = highest
    return adjusted
