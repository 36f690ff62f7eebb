"""Student's t for small samples: intervals of (weighted) means, and who is ahead among many.

An interval answers for one figure: 95 % of such intervals hold the true value. Which of many
figures is ahead of which is another question: 13 equal models make 78 pairs, of which four would
differ at the 5 % level by chance. `ahead` corrects for all pairs (Holm, Scandinavian Journal of
Statistics 1979), so that at most 5 % of tables of equal models call any of them ahead.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import atan, exp, inf, lgamma, pi, sqrt

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEVEL = 0.95
#: Gauss and Legendre's nodes and weights on -1..1.
NODES, WEIGHTS = np.polynomial.legendre.leggauss(64)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its 95 % interval over `n` units."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean, its standard error and the degrees of freedom of that."""

    value: float
    error: float
    freedom: float

    @property
    def half(self) -> float:
        """Half the width of the 95 % interval."""
        return student_t_quantile((1 + LEVEL) / 2, self.freedom) * self.error


def student_t_mean(values: Sequence[float]) -> Mean:
    """The mean of two and more independent values."""
    n = len(values)
    mean = sum(values) / n
    variance = sum((x - mean) ** 2 for x in values) / (n - 1)
    return Mean(mean, sqrt(variance / n), n - 1)


def weighted_mean(values: Array, weights: Array) -> Mean:
    """Σ w x / Σ w of two and more independent values, such as documents of unlike sizes.

    The error makes no assumption on how a value's variance depends on its weight; it is free of
    bias and its degrees of freedom are Satterthwaite's where variances are equal (Bell and
    McCaffrey, Survey Methodology 2002). With equal weights it is `student_t_mean`.
    """
    w = weights / weights.sum()
    total = float(w @ w)
    mean = float(w @ values)
    c = w**2 / (1 - 2 * w + total)
    variance = float(c @ (values - mean) ** 2)
    # The trace of the square of the quadratic form, in sums of c, c w and c w².
    s0, s1, s2 = float(c.sum()), float(c @ w), float(c @ w**2)
    across = total**2 * s0**2 + 2 * s0 * s2 - 4 * total * s0 * s1 + 2 * s1**2
    within = float(c**2 @ (1 + 2 * (total - 2 * w)))
    return Mean(mean, sqrt(variance), max(1.0, total**2 / (across + within)))


@dataclass(frozen=True, slots=True)
class Difference:
    """What one of two names has more than the other, with its standard error."""

    first: str
    second: str
    value: float
    error: float
    freedom: float

    @property
    def p(self) -> float:
        """Two-sided p-value of no difference."""
        if self.value == 0:
            return 1.0
        t = abs(self.value) / self.error if self.error > 0 else inf
        return 2 * (1 - student_t_cdf(t, self.freedom))


def ahead(differences: Sequence[Difference], *, higher: bool) -> list[tuple[str, str]]:
    """Pairs (better, worse) among all pairs of a table, with at most 5 % tables of false ones.

    higher: the larger value is the better one.
    """
    found = []
    for place, pair in enumerate(sorted(differences, key=lambda d: d.p)):
        if pair.p > (1 - LEVEL) / (len(differences) - place):
            break
        names = (pair.first, pair.second)
        found.append(names if (pair.value > 0) == higher else names[::-1])
    return found


def student_t_cdf(t: float, freedom: float) -> float:
    """P(T <= t) for t >= 0 and freedom >= 1, whole or not, to 1e-9."""
    # With t = √freedom · tan θ the density is a power of cos θ, negligible past 12 / √freedom.
    angle = min(atan(t / sqrt(freedom)), 12 / sqrt(freedom))
    integral = float(WEIGHTS @ np.cos(angle * (NODES + 1) / 2) ** (freedom - 1)) * angle / 2
    scale = exp(lgamma((freedom + 1) / 2) - lgamma(freedom / 2)) / sqrt(pi)
    return min(1.0, 0.5 + scale * integral)


@cache
def student_t_quantile(p: float, freedom: float) -> float:
    """The t with P(T <= t) = p, for 0.5 < p < 1, by bisection."""
    if freedom < 1 or not 0.5 < p < 1:
        raise ValueError(f"p={p} and freedom={freedom}: need 0.5 < p < 1 and freedom >= 1")
    low, high = 0.0, 1.0
    while student_t_cdf(high, freedom) < p:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_t_cdf(middle, freedom) < p else (low, middle)
    return (low + high) / 2


def clustered_share(right: Array, asked: Array) -> Estimate:
    """A proportion of what was asked in clusters, by cluster, with its Wilson interval.

    The queries of one cluster may succeed and fail together: they count as fewer by the design
    effect, their mean's variance over that of independent queries.
    """
    total = float(asked.sum())
    p = float(right.sum()) / total
    effect = 1.0
    if 0 < p < 1 and len(asked) > 1:
        error = weighted_mean(right / asked, asked).error
        effect = max(1.0, error**2 * total / (p * (1 - p)))
    return replace(wilson(p * total / effect, total / effect), n=int(total))


def wilson(right: float, asked: float) -> Estimate:
    """A proportion of independent trials with its Wilson score interval (95 %)."""
    z = 1.959964
    p = right / asked
    middle = (p + z * z / (2 * asked)) / (1 + z * z / asked)
    half = z / (1 + z * z / asked) * sqrt(p * (1 - p) / asked + z * z / (4 * asked**2))
    return Estimate(p, max(0.0, middle - half), min(1.0, middle + half), int(asked))
