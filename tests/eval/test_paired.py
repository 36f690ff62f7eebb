"""Comparing models on the same documents: what they share must not blur how they differ."""

import numpy as np
import pandas as pd
import pytest

from eval.measure.quality import DocumentScore, over_documents
from eval.results.paired import ahead_of, paired_intervals

HARD = np.array([1.6, 2.4, 1.9, 2.2, 1.7, 2.1])
SIZES = np.array([900, 1200, 1000, 800, 1100, 950])


def documents(
    scores: dict[str, np.ndarray], seed: int = 0, sizes: np.ndarray = SIZES
) -> pd.DataFrame:
    rows = [
        {
            "arch": arch, "seed": seed, "position": d + 1, "value": value, "n": sizes[d],
            "status": "ok",
        }
        for arch, values in scores.items()
        for d, value in enumerate(values)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def figures(table: pd.DataFrame) -> pd.DataFrame:
    """The bits per byte that the documents add up to, a row per architecture."""
    means = table.groupby(["arch", "seed"], as_index=False)["value"].mean()
    return means.assign(status="ok", low=np.nan, high=np.nan)


def test_a_small_even_lead_is_told_apart_where_plain_intervals_overlap() -> None:
    noise = np.random.default_rng(1).normal(0, 1e-3, (2, 6))
    scores = {"a": HARD + noise[0], "b": HARD + 0.02 + noise[1]}
    found = paired_intervals(documents(scores))
    assert found["a"][1] < found["b"][0]
    plain = {
        arch: over_documents(
            [DocumentScore(d, v * n, n) for d, (v, n) in enumerate(zip(x, SIZES, strict=True))]
        )
        for arch, x in scores.items()
    }
    assert plain["a"].high > plain["b"].low
    for arch, (low, high) in found.items():
        assert low < plain[arch].value < high


def test_an_uneven_lead_is_not_told_apart() -> None:
    swing = np.array([0.1, -0.1, 0.1, -0.1, 0.1, -0.1])
    table = documents({"a": HARD + swing, "b": HARD - swing + 0.01})
    found = paired_intervals(table)
    assert found["a"][1] > found["b"][0]
    assert ahead_of(figures(table), table, higher=False) == {"a": (), "b": ()}


@pytest.mark.parametrize("count", [2, 3, 5, 9])
def test_two_equal_models_are_told_apart_in_one_table_of_twenty(count: int) -> None:
    """A bootstrap over two documents told them apart in 39 % of tables."""
    noise, leads, hits = np.random.default_rng(count), 0, 0
    for _ in range(300):
        hard = HARD[:1].repeat(count) + noise.normal(0, 0.2, count)
        own = noise.normal(0, 0.01, (2, count))
        table = documents({"a": hard + own[0], "b": hard + own[1]}, sizes=np.full(count, 1000))
        leads += any(ahead_of(figures(table), table, higher=False).values())
        low, high = paired_intervals(table)["a"]
        hits += low <= hard.mean() <= high
    assert 0.02 <= leads / 300 <= 0.08
    assert 0.92 <= hits / 300 <= 0.98


@pytest.mark.parametrize(
    "table",
    [
        documents({"a": HARD}),
        documents({"a": HARD[:1], "b": HARD[:1]}),
        pd.concat([documents({"a": HARD, "b": HARD}), documents({"a": HARD}, seed=1)]),
        documents({"a": HARD, "b": HARD[:5]}),
    ],
    ids=["one model", "one document", "several seeds", "other documents"],
)
def test_what_cannot_be_paired_has_no_paired_interval(table: pd.DataFrame) -> None:
    assert paired_intervals(table) == {}
