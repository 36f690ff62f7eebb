"""Comparing models: intervals on the documents that they share, and who is ahead of whom.

How hard a document is moves every model's loss alike and says nothing about which is better. So
an interval that compares models is taken over documents from which what all models have in common
is removed (Cousineau's within-subject interval with Morey's correction, Tutorials in Quantitative
Methods for Psychology 2005 and 2008). Training noise is not in it: only several seeds show that.

Who is ahead is not read off intervals but tested, pair by pair and corrected for all pairs
(`eval.results.statistics.ahead`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import sqrt

import numpy as np
import pandas as pd

from eval.results.statistics import Array, Difference, ahead, student_t_quantile, weighted_mean

DOCUMENTS = "document_bits_per_byte"
#: Degrees of freedom of an interval that does not say over how many samples it was taken.
MANY = 1e6


@dataclass(frozen=True, slots=True)
class Shared:
    """Bits per byte of models on the same documents [documents, models], and their bytes."""

    models: tuple[str, ...]
    scores: Array
    sizes: Array


def shared_documents(documents: pd.DataFrame) -> Shared | None:
    """The models that rows of `document_bits_per_byte` (arch, seed, position, value, n) compare.

    None unless there are several documents and several architectures of one seed each, all
    scored on the same documents.
    """
    good = documents[documents["status"] == "ok"]
    if good.empty or (good.groupby("arch")["seed"].nunique() > 1).any():
        return None
    scores = good.pivot_table(index="position", columns="arch", values="value")
    if min(scores.shape) < 2 or scores.isna().to_numpy().any():
        return None
    sizes = good.groupby("position")["n"].first().to_numpy(dtype=float)
    return Shared(tuple(map(str, scores.columns)), scores.to_numpy(dtype=float), sizes)


def paired_intervals(documents: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """95 % interval around each architecture's bits per byte, document effects removed.

    Empty where `shared_documents` finds nothing to compare.
    """
    shared = shared_documents(documents)
    if shared is None:
        return {}
    count = len(shared.models)
    apart = shared.scores - shared.scores.mean(axis=1, keepdims=True)
    found = {}
    for model, scores, rest in zip(shared.models, shared.scores.T, apart.T, strict=True):
        centre = weighted_mean(scores, shared.sizes).value
        half = sqrt(count / (count - 1)) * weighted_mean(rest, shared.sizes).half
        found[model] = (centre - half, centre + half)
    return found


def ahead_of(
    rows: pd.DataFrame, documents: pd.DataFrame, *, higher: bool
) -> dict[str, tuple[str, ...]]:
    """By architecture, those that it is ahead of; without those that nothing can be said of.

    rows: one figure's rows of a tidy table, a row per architecture and seed. documents: the rows
    of `document_bits_per_byte` that belong to them. Several seeds are compared by their noise,
    one seed over the documents or, without any, by the intervals measured.
    """
    good = rows[(rows["status"] == "ok") & rows["value"].notna()]
    samples = {str(arch): list(group["value"]) for arch, group in good.groupby("arch", sort=False)}
    differences = by_seeds(samples)
    if not differences and (shared := shared_documents(documents)) is not None:
        differences = by_documents(shared)
    differences = differences or by_intervals(good)
    found: dict[str, list[str]] = {
        name: [] for pair in differences for name in (pair.first, pair.second)
    }
    for better, worse in ahead(differences, higher=higher):
        found[better].append(worse)
    return {name: tuple(worse) for name, worse in found.items()}


def by_documents(shared: Shared) -> list[Difference]:
    """Student's t of each pair's differences over documents: no pair lends another its noise."""
    differences = []
    for a, b in combinations(range(len(shared.models)), 2):
        mean = weighted_mean(shared.scores[:, a] - shared.scores[:, b], shared.sizes)
        pair = shared.models[a], shared.models[b]
        differences.append(Difference(*pair, mean.value, mean.error, mean.freedom))
    return differences


def by_seeds(samples: Mapping[str, Sequence[float]]) -> list[Difference]:
    """Student's t over seeds; empty where no architecture has two.

    Two or three seeds tell next to nothing of one architecture's noise, so the noise is pooled
    over all of them; a pair that is noisier than that keeps its own.
    """
    freedom = sum(len(values) - 1 for values in samples.values())
    if freedom < 1:
        return []
    squares = {name: _squares(values) for name, values in samples.items()}
    pooled = sum(squares.values()) / freedom
    differences = []
    for (a, first), (b, second) in combinations(samples.items(), 2):
        own = sum(squares[x] / len(v) / max(1, len(v) - 1) for x, v in ((a, first), (b, second)))
        error = sqrt(max(own, pooled * (1 / len(first) + 1 / len(second))))
        gap = float(np.mean(first) - np.mean(second))
        differences.append(Difference(a, b, gap, error, freedom))
    return differences


def _squares(values: Sequence[float]) -> float:
    return float(np.square(np.asarray(values) - np.mean(values)).sum())


def by_intervals(rows: pd.DataFrame) -> list[Difference]:
    """From independent 95 % intervals, by the ends that face each other (Newcombe 1998)."""
    known = rows.dropna(subset=["low", "high"])
    ends = known[["arch", "value", "low", "high", "n"]].itertuples(index=False, name=None)
    differences = []
    for first, second in combinations(ends, 2):
        lower, upper = sorted((first, second), key=lambda end: end[1])
        freedom = min(end[4] - 1 if end[4] > 1 else MANY for end in (first, second))
        reach = sqrt((lower[3] - lower[1]) ** 2 + (upper[1] - upper[2]) ** 2)
        error = reach / student_t_quantile(0.975, freedom)
        gap = first[1] - second[1]
        differences.append(Difference(str(first[0]), str(second[0]), gap, error, freedom))
    return differences
