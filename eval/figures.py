"""The long table as the charts ask for it: means over seeds, one column a measure."""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from math import log
from typing import NamedTuple

import pandas as pd

from eval.families import families_of
from eval.leaderboard import compared, tidy
from eval.pictures.canvas import Palette
from eval.seeds import over_seeds


class Setting(NamedTuple):
    """Under what a latency was taken."""

    hardware: str
    scale: str
    dtype: str
    kernel_backend: str

    def __str__(self) -> str:
        what = [self.dtype, self.kernel_backend and f"{self.kernel_backend} kernels"]
        return " · ".join(w for w in (f"{self.scale} shapes", self.hardware, *what) if w)


class Figures:
    """Figures of a long table by setting; `palette` gives every architecture its colour."""

    def __init__(self, long: pd.DataFrame) -> None:
        self.long = _typical(compared(tidy(long)))
        self.palette = Palette.of(families_of(self.long))
        self._good = self.long[self.long["status"] == "ok"]

    @cached_property
    def settings(self) -> list[Setting]:
        """Settings of decode, those with most architectures and the largest models first."""
        rows = self.long[(self.long["stage"] == "decode") & (self.long["measure"] == "tpot_ms")]
        found = rows.groupby(list(Setting._fields), sort=False)
        size = {Setting(*map(str, k)): (g["arch"].nunique(), _largest(g)) for k, g in found}
        return sorted(size, key=lambda setting: size[setting], reverse=True)

    def at(self, setting: Setting, *measures: str, stage: str = "decode") -> pd.DataFrame:
        """Rows of arch, batch, context with a column for each measure (all present)."""
        rows = self._good[self._good["stage"] == stage]
        for name, value in setting._asdict().items():
            rows = rows[rows[name] == value]
        return self._pivot(rows, ["arch", "batch", "context"], measures)

    def declared(self, scale: str, *measures: str) -> pd.DataFrame:
        """What the declarations say of one sequence at a scale: rows of arch, context (where the
        measures have one) and a column for each measure, from whichever stage recorded them.
        """
        rows = self._good[(self._good["scale"] == scale) & self._good["measure"].isin(measures)]
        rows = rows[rows["batch"].isna() | (rows["batch"] == 1)]
        rows = rows.drop_duplicates(["arch", "context", "measure"], keep="last")
        keys = ["arch", "context"] if rows["context"].notna().any() else ["arch"]
        return self._pivot(rows, keys, measures)

    def quality(self, measure: str, *keys: str) -> tuple[str, pd.DataFrame]:
        """The scale most seen, and its rows of arch, keys, value, low, high."""
        rows = self._good[(self._good["measure"] == measure) & (self._good["arch"] != "")]
        if rows.empty:
            return "", rows
        scale = rows.groupby("scale", sort=False)["arch"].nunique().idxmax()
        return str(scale), over_seeds(rows[rows["scale"] == scale], ["arch", *keys])

    def machine(self, hardware: str, measure: str) -> float | None:
        """A figure of the machine itself."""
        rows = self._good[(self._good["measure"] == measure) & (self._good["arch"] == "")]
        rows = rows[rows["hardware"] == hardware]
        return None if rows.empty else float(rows["value"].iloc[-1])

    def _pivot(self, rows: pd.DataFrame, keys: list[str], measures: Sequence[str]) -> pd.DataFrame:
        rows = rows[rows["measure"].isin(measures)].dropna(subset=keys)
        table = over_seeds(rows, [*keys, "measure"])
        table = table.pivot(index=keys, columns="measure", values="value")
        table = table.reindex(columns=list(measures)).dropna().reset_index()
        return table.astype({key: int for key in keys if key != "arch"})


def exponent(contexts: Sequence[float], per_token_ms: Sequence[float]) -> float:
    """a of O(n^a) for generating n tokens, from the time of one: the steepest part's slope + 1.

    The steepest, because constant costs hide the growth at short contexts.
    """
    points = sorted(zip(contexts, per_token_ms, strict=True))
    slopes = [log(b[1] / a[1]) / log(b[0] / a[0]) for a, b in pairwise(points)]
    return 1 + max(slopes)


def _typical(long: pd.DataFrame) -> pd.DataFrame:
    """Medians in place of mean times per token, where recorded: a stalled step bends no curve."""
    if not (long["measure"] == "tpot_p50_ms").any():
        return long
    kept = long[long["measure"] != "tpot_ms"]
    return kept.assign(measure=kept["measure"].replace("tpot_p50_ms", "tpot_ms"))


def _largest(rows: pd.DataFrame) -> int:
    return int(rows["params"].max()) if rows["params"].notna().any() else 0
