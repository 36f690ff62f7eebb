"""Comparing models on the same documents: what they share must not blur how they differ."""

import numpy as np
import pandas as pd
import pytest

from eval.paired import paired_intervals
from eval.quality import DocumentScore, over_documents

HARD = np.array([1.6, 2.4, 1.9, 2.2, 1.7, 2.1])
SIZES = np.array([900, 1200, 1000, 800, 1100, 950])


def documents(scores: dict[str, np.ndarray], seed: int = 0) -> pd.DataFrame:
    rows = [
        {
            "arch": arch, "seed": seed, "position": d + 1, "value": value, "n": SIZES[d],
            "status": "ok",
        }
        for arch, values in scores.items()
        for d, value in enumerate(values)
    ]  # fmt: skip
    return pd.DataFrame(rows)


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
    found = paired_intervals(documents({"a": HARD + swing, "b": HARD - swing + 0.01}))
    assert found["a"][1] > found["b"][0]


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
