"""Families of architectures by what they remember, never by their name.

They give the pictures their hues: softmax (rows that grow with the context), latent (such rows
shared by all heads), window (rows that stop growing), recurrent (no rows at all) and hybrid
(layers of more than one kind).
"""

from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from typing import Literal

import pandas as pd

from archs.errors import UserError
from archs.registry import ModelSpec
from archs.sizes import SCALES
from archs.spec import StateSpec

Family = Literal["softmax", "latent", "window", "recurrent", "hybrid", "unknown"]


def state_family(specs: Iterable[StateSpec]) -> Family:
    """The family of a model from the state specs of its layers.

    A row without a head axis is one that all heads share: latent. Layers that read another
    layer's rows count with their owner.
    """
    kinds: set[Family] = set()
    for spec in specs:
        if spec.rows and not spec.owned:
            continue
        growing = [t for t in spec.owned if t.window is None]
        if growing:
            kinds.add("latent" if all(len(t.shape) == 1 for t in growing) else "softmax")
        else:
            kinds.add("window" if spec.owned else "recurrent")
    if len(kinds) > 1:
        return "hybrid"
    return kinds.pop() if kinds else "unknown"


def families_of(long: pd.DataFrame) -> dict[str, Family]:
    """The family of each architecture of a long table, in the table's order.

    From its declared state where the name is a registered one, otherwise by how its state bytes
    grow; bytes alone cannot tell latent rows from others that grow. No file is loaded.
    """
    found: dict[str, Family] = {}
    for arch, rows in long[long["arch"] != ""].groupby("arch", sort=False):
        found[str(arch)] = declared_family(str(arch)) or _by_bytes(rows[rows["status"] == "ok"])
    return found


@cache
def declared_family(arch: str) -> Family | None:
    """The family that a registered name or a pattern of such declares; None for any other name.

    It is the same at every scale that is deep enough for the pattern.
    """
    if ".py" in arch:
        return None
    for scale in ("tiny", "70m"):
        with suppress(UserError):
            model = ModelSpec(arch=arch, scale=SCALES[scale], hidden=0).outline()
            return state_family(model.state_specs())
    return None


def _by_bytes(rows: pd.DataFrame) -> Family:
    slopes = rows[rows["measure"] == "state_bytes_per_token"]
    if slopes.empty:
        return "unknown"
    scale, slope = slopes["scale"].iloc[-1], slopes["value"].iloc[-1]
    rows = rows[rows["scale"] == scale]
    fixed = rows[rows["measure"] == "state_bytes_fixed"]
    constant = fixed["value"].iloc[-1] if len(fixed) else 0.0
    totals = rows[rows["measure"] == "state_bytes"]
    straight = slope * totals["context"].astype("float64") + constant
    # A page may be partly empty; a window holds far more than that.
    bounded = bool((totals["value"] > 1.25 * straight).any())
    if slope > 0:
        return "hybrid" if constant > 0 or bounded else "softmax"
    if constant > 0:
        return "hybrid" if bounded else "recurrent"
    return "window"
