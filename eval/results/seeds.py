"""Several seeds as one figure: the mean and Student's 95 % interval.

One seed keeps the interval that was measured in it (over documents or queries). No measure is
negative and no share exceeds 1, so no interval does.
"""

from collections.abc import Hashable, Sequence
from math import inf, nan
from typing import Any

import pandas as pd

from eval.results.measures import MEASURES
from eval.results.statistics import student_t_mean

FIGURES = ("value", "low", "high", "n", "status")


def over_seeds(long: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """One row for each combination of `keys`: the mean over its rows that are ok.

    Two and more rows (seeds) get Student's t interval; one keeps the interval measured in it.
    Without an ok row the value is NaN and `status` the last failure.
    """
    groups: dict[tuple[Hashable, ...], list[tuple[Any, ...]]] = {}
    figures = long[["value", "low", "high", "status", "measure"]].itertuples(index=False, name=None)
    for key, row in zip(keys_of(long, keys), figures, strict=True):
        groups.setdefault(key, []).append(row)
    records = [(*key, *_one_figure(rows)) for key, rows in groups.items()]
    return pd.DataFrame.from_records(records, columns=[*keys, *FIGURES])


def keys_of(table: pd.DataFrame, names: Sequence[str]) -> "pd.Series[Any]":
    """The values of some columns as one tuple a row, None where a value is missing."""
    columns = [
        [None if missing else value for value, missing in zip(column, column.isna(), strict=True)]
        for column in (table[name] for name in names)
    ]
    return pd.Series(list(zip(*columns, strict=True)), index=table.index, dtype="object")


def _one_figure(rows: Sequence[tuple[Any, ...]]) -> tuple[Any, ...]:
    """`FIGURES` of rows (value, low, high, status, measure)."""
    good = [row for row in rows if row[3] == "ok"]
    if not good:
        return nan, nan, nan, 0, rows[-1][3]
    if len(good) == 1:
        return *good[0][:3], 1, "ok"
    mean = student_t_mean([row[0] for row in good])
    measure = MEASURES.get(str(good[0][4]))
    most = 1.0 if measure and measure.share else inf
    low, high = max(0.0, mean.value - mean.half), min(most, mean.value + mean.half)
    return mean.value, low, high, len(good), "ok"
