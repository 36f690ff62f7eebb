"""Several seeds as one figure: the mean and Student's 95 % interval, with exact quantiles.

One seed keeps the interval that was measured in it (over documents, queries or steps).
"""

from collections.abc import Sequence
from math import atan, comb, cos, nan, pi, sin, sqrt

import pandas as pd


def over_seeds(long: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """One row for each combination of `keys`: the mean over its rows that are ok.

    Two and more rows (seeds) get Student's t interval; one keeps the interval measured in it.
    Without an ok row the value is NaN and `status` the last failure.
    """
    records = []
    for values, rows in long.groupby(list(keys), sort=False, dropna=False):
        good = rows[rows["status"] == "ok"]
        record = dict(zip(keys, values, strict=True))
        if good.empty:
            figures = (nan, nan, nan, 0, rows["status"].iloc[-1])
        elif len(good) == 1:
            only = good.iloc[0]
            figures = (only["value"], only["low"], only["high"], 1, "ok")
        else:
            mean, half = student_t_interval(good["value"].tolist())
            figures = (mean, mean - half, mean + half, len(good), "ok")
        record |= dict(zip(("value", "low", "high", "n", "status"), figures, strict=True))
        records.append(record)
    columns = [*keys, "value", "low", "high", "n", "status"]
    return pd.DataFrame.from_records(records, columns=columns)


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
