"""Intervals cover what they say, and equal models are hardly ever told apart."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from eval.results.paired import Shared, by_documents, by_intervals, by_seeds
from eval.results.statistics import (
    Difference,
    ahead,
    student_t_cdf,
    student_t_mean,
    student_t_quantile,
    weighted_mean,
    wilson,
)

MODELS = tuple(f"m{i}" for i in range(13))
Table = Callable[[np.random.Generator], list[Difference]]


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.70620), (1.5, 6.016663), (2, 4.302653), (4, 2.776445), (29, 2.045230), (1e6, 1.959966)],
)
def test_student_t_quantiles(freedom: float, quantile: float) -> None:
    assert student_t_quantile(0.975, freedom) == pytest.approx(quantile, rel=1e-6)


def test_tails_far_out_stay_exact() -> None:
    """1 / π · atan(1 / t) is what lies beyond t of one degree of freedom."""
    for t in (10.0, 1e3, 1e5):
        assert 1 - student_t_cdf(t, 1) == pytest.approx(np.arctan(1 / t) / np.pi, rel=1e-4)
    assert student_t_cdf(50.0, 1e6) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("seeds", [2, 3, 4, 5])
def test_the_interval_over_seeds_covers_what_it_says(seeds: int) -> None:
    noise = np.random.default_rng(seeds)
    found = [student_t_mean(noise.normal(2.0, 0.01, seeds).tolist()) for _ in range(2000)]
    covered = np.mean([abs(mean.value - 2.0) <= mean.half for mean in found])
    assert 0.92 <= covered <= 0.98


@pytest.mark.parametrize("count", [2, 3, 5, 9, 20, 40])
@pytest.mark.parametrize("power", [0.0, 0.5], ids=["equal noise", "small ones are noisier"])
def test_the_interval_of_a_weighted_mean_covers_what_it_says(count: int, power: float) -> None:
    noise, hits = np.random.default_rng(count), 0
    for _ in range(1500):
        weights = np.exp(noise.normal(0, 0.4, count))
        mean = weighted_mean(noise.normal(0, 1, count) * weights**-power, weights)
        hits += abs(mean.value) <= mean.half
    assert 0.92 <= hits / 1500 <= 0.98


def test_equal_weights_give_the_plain_mean() -> None:
    values = [1.0, 2.0, 4.5]
    weighted, plain = weighted_mean(np.array(values), np.full(3, 7.0)), student_t_mean(values)
    assert (weighted.value, weighted.error) == pytest.approx((plain.value, plain.error))
    assert weighted.freedom == pytest.approx(2)


def documents(count: int) -> Table:
    """Equal models of unlike noise on documents of unlike difficulty and size."""

    def draw(noise: np.random.Generator) -> list[Difference]:
        sizes = np.exp(noise.normal(7, 0.4, count))
        own = noise.normal(0, 1, (count, 13)) * np.linspace(0.005, 0.02, 13)
        hard = noise.normal(2, 0.3, (count, 1))
        return by_documents(Shared(MODELS, hard + own, sizes))

    return draw


def seeds(count: int, spread: float) -> Table:
    """Equal models trained with several seeds; the last is `spread` times as noisy."""

    def draw(noise: np.random.Generator) -> list[Difference]:
        scale = np.r_[np.ones(12), spread] * 0.004
        return by_seeds({m: noise.normal(2, s, count) for m, s in zip(MODELS, scale, strict=True)})

    return draw


TABLES = {
    "2 documents": documents(2), "9 documents": documents(9), "40 documents": documents(40),
    "2 seeds": seeds(2, 1), "3 seeds": seeds(3, 1), "5 seeds, one noisy": seeds(5, 3),
}  # fmt: skip


def share_of_false_leads(table: Table, tables: int) -> float:
    noise = np.random.default_rng(7)
    return float(np.mean([bool(ahead(table(noise), higher=False)) for _ in range(tables)]))


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_of_13_equal_models_hardly_any_is_ahead(table: Table) -> None:
    assert share_of_false_leads(table, 150) <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_of_13_equal_models_at_most_one_table_in_20_has_a_lead(table: Table) -> None:
    assert share_of_false_leads(table, 1000) <= 0.05


def test_a_lead_is_seen() -> None:
    noise = np.random.default_rng(0)
    hard, own = noise.normal(2, 0.3, (9, 1)), noise.normal(0, 0.005, (9, 13))
    own[:, 0] -= 0.05
    found = ahead(by_documents(Shared(MODELS, hard + own, np.ones(9))), higher=False)
    assert {pair for pair in found if "m0" in pair} == {("m0", m) for m in MODELS[1:]}
    trained = {m: noise.normal(2 - 0.03 * (m == "m0"), 0.004, 3) for m in MODELS}
    found = ahead(by_seeds(trained), higher=False)
    assert set(found) == {("m0", m) for m in MODELS[1:]}
    assert set(ahead(by_seeds(trained), higher=True)) == {(m, "m0") for m in MODELS[1:]}


def test_intervals_alone_are_corrected_too() -> None:
    """13 equal recalls of 4,096 queries each: plain intervals come apart in one table of five."""

    def draw(noise: np.random.Generator) -> list[Difference]:
        found = [wilson(int(k), 4096) for k in noise.binomial(4096, 0.5, 13)]
        rows = [(m, e.value, e.low, e.high, e.n) for m, e in zip(MODELS, found, strict=True)]
        return by_intervals(pd.DataFrame(rows, columns=["arch", "value", "low", "high", "n"]))

    assert share_of_false_leads(draw, 150) <= 0.05
