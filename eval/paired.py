"""Intervals for comparing models that were scored on the same text.

How hard a document is moves every model's loss alike and says nothing about which is better. So
before documents are resampled, what all models have in common on each is taken out (Cousineau's
within-subject interval with Morey's correction, Tutorials in Quantitative Methods for Psychology
2005 and 2008). Training noise is not in it: only several seeds show that.
"""

from collections.abc import Hashable
from math import sqrt

import numpy as np
import pandas as pd

DOCUMENTS = "document_bits_per_byte"
RESAMPLES = 10_000


def paired_intervals(documents: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """95 % interval around each architecture's bits per byte, document effects removed.

    documents: rows of `document_bits_per_byte`: arch, seed, position, value, n (bytes).
    Empty unless there are several documents and several architectures of one seed each, all
    scored on the same documents.
    """
    good = documents[documents["status"] == "ok"]
    if good.empty or (good.groupby("arch")["seed"].nunique() > 1).any():
        return {}
    scores = good.pivot_table(index="position", columns="arch", values="value")
    sizes = good.groupby("position")["n"].first().to_numpy(dtype=float)
    count, models = scores.shape
    if count < 2 or models < 2 or scores.isna().to_numpy().any():
        return {}
    values = scores.to_numpy(dtype=float)
    apart = values - values.mean(axis=1, keepdims=True)
    centre = _weighted(values, sizes)
    chosen = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    weights = sizes[chosen]
    shares = weights / weights.sum(axis=1, keepdims=True)
    resampled = np.einsum("rd,rdm->rm", shares, apart[chosen])
    ends = np.quantile(resampled, (0.025, 0.975), axis=0) - _weighted(apart, sizes)
    low, high = centre + sqrt(models / (models - 1)) * ends
    names: list[Hashable] = list(scores.columns)
    return {str(arch): (float(a), float(b)) for arch, a, b in zip(names, low, high, strict=True)}


def _weighted(values: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    mean: np.ndarray = (values * sizes[:, None]).sum(0) / sizes.sum()
    return mean
