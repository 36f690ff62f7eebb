"""A results table as the claims query it, and the outcome of one claim."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import pandas as pd

from eval.report.figures import Figures
from eval.results.statistics import student_t_mean

Verdict = Literal["supported", "conditional", "refuted", "not measured"]


def _by_arch(rows: pd.DataFrame) -> "pd.Series[float]":
    return rows.groupby("arch", sort=False)["value"].mean()


@dataclass(frozen=True, slots=True)
class Claim:
    """A claim with what was found."""

    number: int
    text: str
    verdict: Verdict
    evidence: str


class Evidence:
    """A long table of results as the claims ask for it."""

    def __init__(self, long: pd.DataFrame) -> None:
        self.figures = Figures(long)
        settings = self.figures.settings
        self.where = str(settings[0]) if settings else ""
        self.timed = pd.DataFrame(columns=["arch", "batch", "context", "tpot_ms"])
        if settings:
            self.timed = self.figures.at(settings[0], "tpot_ms")

    @cached_property
    def speculated(self) -> pd.DataFrame:
        """Speed-ups by speculation: arch, draft, drafts, batch, context, speedup."""
        rows = self._speculation("speedup")
        words = [dict(w.partition("=")[::2] for w in str(o).split()) for o in rows["options"]]
        return pd.DataFrame(
            {
                "arch": list(rows["arch"]), "draft": [w["draft"] for w in words],
                "drafts": [int(w["drafts"]) for w in words], "batch": list(rows["batch"]),
                "context": list(rows["context"]), "speedup": list(rows["value"]),
            }
        )  # fmt: skip

    def served(self, measure: str) -> pd.DataFrame:
        """A measure of servers as long rows: all policies and loads of every architecture."""
        long = self.figures.long
        rows = long[(long["stage"] == "serve") & (long["measure"] == measure)]
        return rows[rows["status"] == "ok"]

    def ratios(self, weights: str) -> "pd.Series[float]":
        """Bits of held-out text of each architecture with its weights stored in a format, over
        those with plain ones; means over seeds.
        """
        return _by_arch(self._compressed("bits_per_byte_ratio", weights))

    def more(self, weights: str, other: str) -> tuple[float, float, float] | None:
        """By how much the bits of `weights` exceed those of `other`, relative to plain ones: mean
        and 95 % interval over models (architectures and seeds), paired; None without two of them.
        """
        pairs = [
            self._compressed("bits_per_byte_ratio", name).set_index(["arch", "seed"])["value"]
            for name in (weights, other)
        ]
        apart = (pairs[0] - pairs[1]).dropna()
        if len(apart) < 2:
            return None
        found = student_t_mean(list(apart))
        return found.value, found.value - found.half, found.value + found.half

    def _compressed(self, measure: str, weights: str) -> pd.DataFrame:
        rows = self.figures.stored_rows("compress", measure)
        return rows[rows["weight_format"] == weights]

    @property
    def lossless(self) -> bool | None:
        """Whether no speculation gave other tokens than plain decode; None where all were drawn."""
        long = self.figures.long
        wrong = (long["stage"] == "speculate") & (long["status"] == "incorrect")
        if wrong.any():
            return False
        return None if self._speculation("lossless").empty else True

    def _speculation(self, measure: str) -> pd.DataFrame:
        long = self.figures.long
        rows = long[(long["stage"] == "speculate") & (long["measure"] == measure)]
        return rows[rows["status"] == "ok"]

    def tpot_ms(self, arch: str, batch: int, context: int) -> float | None:
        """The time per token of a cell."""
        rows = self.timed[(self.timed["arch"] == arch) & (self.timed["batch"] == batch)]
        rows = rows[rows["context"] == context]
        return None if rows.empty else float(rows["tpot_ms"].iloc[0])

    def quality(
        self, measure: str, arch: str, scale: str = ""
    ) -> tuple[float, float, float] | None:
        """Value and interval of a quality measure, at the scale most seen or at this one."""
        rows = self.figures.quality(measure, scale=scale)[1]
        rows = rows[rows["arch"] == arch] if not rows.empty else rows
        if rows.empty:
            return None
        return tuple(rows[["value", "low", "high"]].iloc[0])

    def ahead(self, measure: str, arch: str, other: str, scale: str = "") -> bool | None:
        """Whether `arch` is ahead of `other` beyond chance; None where that was not compared."""
        found = self.figures.ahead(measure, scale)
        return other in found[arch] if arch in found and other in found else None
