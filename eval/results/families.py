"""Families of architectures by what they remember, as a table tells them.

They give the pictures their hues: softmax (rows that grow with the context), latent (such rows
shared by all heads), window (rows that stop growing), recurrent (no rows at all) and hybrid
(layers of more than one kind).
"""

from typing import Literal, get_args

import pandas as pd

from archs.names import mixers_in

Family = Literal["softmax", "latent", "window", "recurrent", "hybrid", "unknown"]

#: Families of the architectures that tables had before they had this column, in the order of their
#: looks. A newer one stands in its table alone.
KNOWN: dict[str, Family] = {
    "mha": "softmax", "gqa": "softmax", "mqa": "softmax", "swa": "window", "mla": "latent",
    "cla": "softmax", "linear": "recurrent", "gdn": "recurrent", "mamba1": "recurrent",
    "mamba2": "recurrent", "gdn:gqa=3:1": "hybrid", "swa:gqa=3:1": "hybrid",
    "mamba2:gqa=3:1": "hybrid", "kda": "recurrent", "dsa": "latent",
    "nsa": "softmax", "shortconv": "recurrent", "mamba3": "recurrent", "rwkv7": "recurrent",
    "gta": "softmax", "grouped_latent": "softmax", "csa": "latent", "hca": "latent",
}  # fmt: skip


def families_of(long: pd.DataFrame) -> dict[str, Family]:
    """The family of each architecture of a long table, in the table's order.

    As its rows say, else of known mixers by their pattern, else by how the state's bytes grow;
    bytes alone cannot tell latent rows from others that grow.
    """
    found: dict[str, Family] = {}
    for arch, rows in long[long["arch"] != ""].groupby("arch", sort=False):
        said = [name for name in get_args(Family) if name in set(rows["family"])]
        named = said[0] if said else known_family(str(arch))
        found[str(arch)] = named or _by_bytes(rows[rows["status"] == "ok"])
    return found


def known_family(arch: str) -> Family | None:
    """The family of a name or a pattern of names in `KNOWN`; None for any other."""
    if arch in KNOWN:
        return KNOWN[arch]
    if "(" in arch:
        # An option may change what is remembered.
        return None
    kinds = {KNOWN.get(name) for name in mixers_in(arch)}
    if None in kinds:
        return None
    return kinds.pop() if len(kinds) == 1 else "hybrid"


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
