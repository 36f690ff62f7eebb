"""The long table as everything that reads it takes it: each figure once, unlike figures apart.

Seeds of one configuration are averaged later; anything else that looks like a second seed is not
one. Runs of other configurations differ in steps, vocabulary, optimiser, learning rates or
overrides that no column of a row shows, so their trained figures get a `source`: the name of their
run. Where two runs measured the same figure and found other values, all their figures of that
kind get one, so that no run's figure silently takes the place of another's.
"""

from typing import Any

import pandas as pd

from eval.results.rows import CELL_FAILED, TRAINED
from eval.results.seeds import keys_of

#: What else can tell two figures of one measure and scale apart, in the order of the name.
QUALIFIERS = (
    "stage",
    "dtype",
    "weight_format",
    "state_format",
    "kernel_backend",
    "hardware",
    "corpus",
    "options",
    "tokens",
    "source",
)
#: What makes two rows of one measure and position the same figure.
IDENTITY = ("arch", "scale", "seed", "batch", "context", *QUALIFIERS)
#: A task is trained until it is solved: there, tokens are an outcome.
UNTIL_SOLVED = "task"
#: Which configuration and which run a row comes from.
ORIGIN = ["config_hash", "run"]


def tidy(long: pd.DataFrame) -> pd.DataFrame:
    """The long table as it is read from here on, with its `source`; twice changes nothing.

    Counts that play no part are missing instead of 0, each figure stands once (the last one
    written), and a failure goes where the same cell succeeded later.
    """
    long = long.copy()
    for name in ("batch", "context", "tokens", "params", "position"):
        long[name] = pd.to_numeric(long[name]).astype("Int64")
        long[name] = long[name].mask(long[name] == 0)
    long["source"] = _sources(long)
    # Points of a learning-rate sweep differ in their note alone.
    same = long.assign(note=long["note"].where(long["status"] == "ok", ""))
    same = same[[*IDENTITY, "measure", "position", "note"]]
    long = long[~same.duplicated(keep="last")]
    failed = long["measure"] == CELL_FAILED
    cell = keys_of(long, ("cell", "hardware", "config_hash"))
    last_good = dict(zip(cell[~failed], long.index[~failed], strict=True))
    stale = [
        f and last_good.get(c, -1) > i for i, c, f in zip(long.index, cell, failed, strict=True)
    ]
    return long[~pd.Series(stale, long.index, dtype=bool)].reset_index(drop=True)


def _sources(long: pd.DataFrame) -> "pd.Series[Any]":
    """The run, or without one the configuration, of each row that needs it; else empty."""
    rows = long.assign(run=long.get("run", ""))
    source = pd.Series("", index=long.index, dtype="object")
    if rows[ORIGIN].drop_duplicates().shape[0] < 2:
        return source
    kind = ["scale", *(q for q in QUALIFIERS if q != "source")]
    rows["tokens"] = rows["tokens"].mask(rows["stage"] == UNTIL_SOLVED)
    for key, group in rows.groupby(kind, dropna=False, sort=False):
        if _contradict(group):
            source[group.index] = group["run"].where(group["run"] != "", group["config_hash"])
        elif key[kind.index("stage")] in TRAINED and group["config_hash"].nunique() > 1:
            runs = group.groupby("config_hash")["run"].agg(lambda r: " + ".join(dict.fromkeys(r)))
            named = group["config_hash"].map(runs)
            source[group.index] = named.where(named != "", group["config_hash"])
    return source


def _contradict(group: pd.DataFrame) -> bool:
    """Whether two origins have another value for the same figure."""
    if group[ORIGIN].drop_duplicates().shape[0] < 2:
        return False
    figure = ["arch", "seed", "batch", "context", "measure", "position", "note"]
    good = group[(group["status"] == "ok") & group["value"].notna()]
    last = good.drop_duplicates([*figure, *ORIGIN], keep="last")
    return bool(last.drop_duplicates([*figure, "value"]).duplicated(figure).any())
