"""Several seeds as one figure: the mean and Student's 95 % interval, with exact quantiles.

One seed keeps the interval that was measured in it (over documents, queries or steps).
"""

from collections.abc import Hashable, Sequence
from math import atan, comb, cos, nan, pi, sin, sqrt
from typing import Any

import pandas as pd

FIGURES = ("value", "low", "high", "n", "status")


def over_seeds(long: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """One row for each combination of `keys`: the mean over its rows that are ok.

    Two and more rows (seeds) get Student's t interval; one keeps the interval measured in it.
    Without an ok row the value is NaN and `status` the last failure.
    """
    groups: dict[tuple[Hashable, ...], list[tuple[Any, ...]]] = {}
    figures = long[["value", "low", "high", "status"]].itertuples(index=False, name=None)
    for key, row in zip(keys_of(long, keys), figures, strict=True):
        groups.setdefault(key, []).append(row)
    records = [(*key, *_one_figure(rows)) for key, rows in groups.items()]
    return pd.DataFrame.from_records(records, columns=[*keys, *FIGURES])


def keys_of(table: pd.DataFrame, names: Sequence[str]) -> "pd.Series[Any]":
    """The values of some columns as one tuple a row, None where a value is missing."""
    rows = table[list(names)].itertuples(index=False, name=None)
    keys = [tuple(None if pd.isna(value) else value for value in row) for row in rows]
    return pd.Series(keys, index=table.index, dtype="object")


def _one_figure(rows: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """`FIGURES` of rows (value, low, high, status)."""
    good = [row for row in rows if row[3] == "ok"]
    if not good:
        return nan, nan, nan, 0, rows[-1][3]
    if len(good) == 1:
        return *good[0][:3], 1, "ok"
    mean, half = student_t_interval([row[0] for row in good])
    return mean, mean - half, mean + half, len(good), "ok"


def student_t_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % interval, for two and more values."""
    n = len(values)
    mean = sum(values) / n
    variance = sum((x - mean) ** 2 for x in values) / (n - 1)
    return mean, student_t_quantile(0.975, n - 1) * sqrt(variance / n)


def student_t_cdf(t: float, freedom: int) -> float:
    """P(T <= t), exactly: Abramowitz and Stegun 26.7.3 and 26.7.4, for whole degrees."""
    angle = atan(t / sqrt(freedom))
    if freedom % 2:
        terms = [
            4.0**k * cos(angle) ** (2 * k + 1) / ((2 * k + 1) * comb(2 * k, k))
            for k in range((freedom - 1) // 2)
        ]
        inside = 2 / pi * (angle + sin(angle) * sum(terms))
    else:
        terms = [comb(2 * k, k) / 4.0**k * cos(angle) ** (2 * k) for k in range(freedom // 2)]
        inside = sin(angle) * sum(terms)
    return (1 + inside) / 2


def student_t_quantile(p: float, freedom: int) -> float:
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
