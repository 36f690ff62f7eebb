"""The long table as the charts query it: means over seeds, one column per measure."""

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from math import log
from typing import NamedTuple

import pandas as pd

from eval.report.leaderboard import column_names, compare, compared
from eval.report.pictures.palette import Palette
from eval.results.families import families_of
from eval.results.seeds import over_seeds
from eval.results.tidy import tidy

#: Times that differ by less are called equal: a clock's noise, not an architecture's.
EQUAL = 0.05
#: The share of right answers over which a model has learnt a task: others have nothing to lose.
LEARNT = 0.5
#: What formats of weights are compared at, beside the architecture.
PLACE = (
    "scale", "hardware", "state_format", "kernel_backend", "corpus", "options", "tokens", "source",
)  # fmt: skip


class Setting(NamedTuple):
    """The conditions of a latency."""

    hardware: str
    scale: str
    dtype: str
    weight_format: str
    state_format: str
    kernel_backend: str
    source: str

    def __str__(self) -> str:
        kernels = self.kernel_backend and f"{self.kernel_backend} kernels"
        packed = self.weight_format and f"weights {self.weight_format}"
        kept = self.state_format and f"state {self.state_format}"
        what = [self.dtype, packed, kept, kernels, self.source]
        return " · ".join(w for w in (f"{self.scale} shapes", self.hardware, *what) if w)


class Figures:
    """Figures of a long table by setting; `palette` gives every architecture its colour."""

    def __init__(self, long: pd.DataFrame) -> None:
        tidied = compared(tidy(long))
        median = bool((tidied["measure"] == "tpot_p50_ms").any())
        #: What `tpot_ms` holds here: a stalled step bends the mean, so medians where recorded.
        self.per_token = "median time per output token" if median else "time per output token"
        self.long = _medians_for_means(tidied) if median else tidied
        self.palette = Palette.of((a for a in self.long["arch"] if a), families_of(self.long))
        self._good = self.long[self.long["status"] == "ok"]

    @cached_property
    def settings(self) -> list[Setting]:
        """Settings of decode, those with most architectures and the largest models first."""
        return self._settings("decode", "tpot_ms")

    @cached_property
    def speculated_settings(self) -> list[Setting]:
        """Settings of speculation, in the same order."""
        return self._settings("speculate", "speedup")

    @cached_property
    def served_settings(self) -> list[Setting]:
        """Settings of servers, in the same order."""
        return self._settings("serve", "output_tok_per_s")

    @cached_property
    def declared_settings(self) -> list[Setting]:
        """Settings of untimed figures: those of decode, then those of declarations alone."""
        return [*self.settings, *self._settings("cost", "state_bytes")]

    def _settings(self, stage: str, measure: str) -> list[Setting]:
        rows = self.long[(self.long["stage"] == stage) & (self.long["measure"] == measure)]
        found = rows.groupby(list(Setting._fields), sort=False)
        size = {Setting(*map(str, k)): (g["arch"].nunique(), _largest(g)) for k, g in found}
        return sorted(size, key=lambda setting: size[setting], reverse=True)

    def at(self, setting: Setting, *measures: str, stage: str = "decode") -> pd.DataFrame:
        """Rows of arch, batch, context with a column for each measure (all present)."""
        return self._pivot(self._rows_at(setting, stage), ["arch", "batch", "context"], measures)

    def _rows_at(self, setting: Setting, stage: str) -> pd.DataFrame:
        rows = self._good[self._good["stage"] == stage]
        for name, value in setting._asdict().items():
            rows = rows[rows[name] == value]
        return rows

    def served(self, setting: Setting, *measures: str) -> pd.DataFrame:
        """Servers: rows of arch, options (the load and the policy) and a column for each measure
        (all present).
        """
        return self._pivot(self._rows_at(setting, "serve"), ["arch", "options"], measures)

    def stored_rows(self, stage: str, *measures: str) -> pd.DataFrame:
        """Rows of models whose weights are stored in several formats, which `weight_format` names,
        plain ones ("float32") too: those of the scale, machine, backend, options and run that most
        of them share; of decode, of its smallest batch and longest context.
        """
        rows = self._good[(self._good["stage"] == stage) & self._good["measure"].isin(measures)]
        plain = rows["weight_format"] == ""
        rows = rows.assign(weight_format=rows["weight_format"].mask(plain, rows["dtype"]))
        if rows.empty:
            return rows
        places = [same for _, same in rows.groupby(list(PLACE), dropna=False, sort=False)]
        rows = max(places, key=lambda same: len(same[["arch", "weight_format"]].drop_duplicates()))
        if stage == "decode":
            rows = rows[rows["batch"] == rows["batch"].min()]
            rows = rows[rows["context"] == rows["context"].max()]
        return rows

    def compressed(self, *measures: str, stage: str = "compress") -> pd.DataFrame:
        """`stored_rows` as rows of arch, scale, hardware, weight_format and a column for each
        measure (all present), means over seeds.
        """
        rows = self.stored_rows(stage, *measures)
        return self._pivot(rows, ["arch", "scale", "hardware", "weight_format"], measures)

    def kept_gaps(self) -> pd.DataFrame:
        """Loss over that of a state as it is computed, by position: rows of arch, scale,
        state_format, position and value, means over seeds, of the scale most seen.
        """
        rows = self._good[self._good["measure"] == "loss_gap_at_position"]
        if rows.empty:
            return rows
        rows = rows[rows["scale"] == rows["scale"].mode().iloc[0]]
        return over_seeds(rows, ["arch", "scale", "state_format", "position"])

    def kept_far(self) -> tuple[pd.DataFrame, str]:
        """States of which one kind is in few bits: rows of arch, scale, state_format, kind,
        bits_per_state_number and loss_gap_at_position, that of the farthest octave, which the text
        names.
        """
        gaps = self.kept_gaps()
        if gaps.empty:
            return gaps.assign(kind="", state_format=""), ""
        far = int(gaps["position"].max())
        gaps = gaps[(gaps["position"] == far) & ~gaps["state_format"].str.contains(",")]
        bits = self._good[
            (self._good["measure"] == "bits_per_state_number") & (self._good["stage"] == "state")
        ]
        keys = ["arch", "scale", "state_format"]
        bits = over_seeds(bits, keys).rename(columns={"value": "bits_per_state_number"})
        table = gaps.rename(columns={"value": "loss_gap_at_position"})
        table = table[[*keys, "loss_gap_at_position"]].merge(
            bits[[*keys, "bits_per_state_number"]], on=keys
        )
        table["kind"] = table["state_format"].str.partition(":")[0]
        return table, f"tokens {far // 2 + 1} to {far}"

    def recalled(self) -> pd.DataFrame:
        """A task's models in few bits: rows of arch, scale, part (weights, kv, memory, conv),
        format, bits, compressed_accuracy, and plain, the accuracy before; of the task most seen,
        means over the seeds that learnt it (`LEARNT`), of which there are `models`.
        """
        rows = self._good[self._good["stage"] == "recall"]
        if rows.empty:
            return rows
        rows = rows[rows["scale"] == rows["scale"].mode().iloc[0]]
        packed = rows["weight_format"] != ""
        kind = rows["state_format"].str.partition(":")[0]
        rows = rows.assign(
            part=kind.mask(packed, "weights"),
            format=rows["state_format"].mask(packed, rows["weight_format"]),
            measure=rows["measure"].str.replace(r"bits_per_.*", "bits", regex=True),
        )
        rows = rows[~rows["format"].str.contains(",")]
        before = self._good[(self._good["stage"] == "task") & (self._good["measure"] == "accuracy")]
        # A format is held against the very models that answered in it.
        plain = before[["arch", "scale", "seed", "value"]].rename(columns={"value": "plain"})
        plain = plain[plain["plain"] > LEARNT]
        both = rows.merge(plain, on=["arch", "scale", "seed"])
        keys = ["arch", "scale", "part", "format"]
        table = self._pivot(both, keys, ["bits", "compressed_accuracy"])
        seeds = both.groupby(keys, as_index=False).agg(
            plain=("plain", "mean"), models=("seed", "nunique")
        )
        return table.merge(seeds, on=keys)

    def pruned(self) -> pd.DataFrame:
        """Bits of held-out text of pruned models over their parents': rows of arch, seed, plan,
        way (none, text, scratch, distil) and value.
        """
        rows = self.long[self.long["stage"] == "prune"]
        rows = rows[(rows["measure"] == "bits_per_byte_ratio") & (rows["status"] == "ok")]
        words = rows["options"].str.extract(r"^prune=(?P<plan>\S+) train=(?P<way>\w+)$")
        return pd.concat([rows[["arch", "seed", "value"]], words], axis=1)

    def speculated(self, setting: Setting) -> pd.DataFrame:
        """Greedy speculation: rows of arch, batch, context, how (what drafts, and what rolls back),
        drafts, and the speed-up, measured and predicted.
        """
        measures = ["speedup", "speedup_pred"]
        rows = self._rows_at(setting, "speculate")
        rows = rows[rows["measure"].isin(measures)].dropna(subset=["batch", "context"])
        words = [dict(w.partition("=")[::2] for w in str(o).split()) for o in rows["options"]]
        rows = rows.assign(
            drafts=[int(w.get("drafts", 0)) for w in words],
            how=[" ".join(filter(None, (w.pop("draft", ""), *_further(w)))) for w in words],
        )
        rows = rows[[float(w.get("temperature", 0)) == 0 for w in words]]
        keys = ["arch", "batch", "context", "how", "drafts"]
        table = over_seeds(rows, [*keys, "measure"])
        table = table.pivot(index=keys, columns="measure", values="value")
        table = table.reindex(columns=measures).dropna(subset=["speedup"]).reset_index()
        return table.astype({"batch": int, "context": int, "drafts": int})

    def declared(self, scale: str, *measures: str) -> pd.DataFrame:
        """What the declarations say of one sequence at a scale: rows of arch, context (where the
        measures have one) and a column for each measure, from whichever stage recorded them.
        """
        rows = self._good[(self._good["scale"] == scale) & self._good["measure"].isin(measures)]
        rows = rows[rows["batch"].isna() | (rows["batch"] == 1)]
        rows = _of_one_source(rows)
        rows = rows.drop_duplicates(["arch", "context", "measure"], keep="last")
        keys = ["arch", "context"] if rows["context"].notna().any() else ["arch"]
        return self._pivot(rows, keys, measures)

    @cached_property
    def tasks(self) -> list[str]:
        """The synthetic tasks of the table, in order."""
        return list(dict.fromkeys(self._good.loc[self._good["measure"] == "accuracy", "scale"]))

    def asked(self, task: str) -> str:
        """The options of the task behind `quality`."""
        rows = self._rows_of("accuracy", task)
        return "" if rows.empty else str(rows["options"].iloc[0])

    def quality(self, measure: str, *keys: str, scale: str = "") -> tuple[str, pd.DataFrame]:
        """The scale most seen, or this one, and its rows of arch, keys, value, low, high."""
        rows = self._rows_of(measure, scale)
        if rows.empty:
            return "", rows
        return str(rows["scale"].iloc[0]), over_seeds(rows, ["arch", *keys])

    def ahead(self, measure: str, scale: str = "") -> dict[str, tuple[str, ...]]:
        """By architecture, those that it is ahead of in `quality` (`eval.results.paired`)."""
        rows = self._rows_of(measure, scale)
        return {} if rows.empty else compare(rows, self.long)

    def _rows_of(self, measure: str, scale: str = "") -> pd.DataFrame:
        """The rows of the column that most architectures have; the last of several such."""
        rows = self._good[(self._good["measure"] == measure) & (self._good["arch"] != "")]
        rows = rows[rows["scale"] == scale] if scale else rows
        if rows.empty:
            return rows
        columns = [same for _, same in rows.groupby(column_names(rows), sort=False)]
        return max(reversed(columns), key=lambda same: same["arch"].nunique())

    def machine(self, setting: Setting, measure: str) -> float | None:
        """A figure of the machine that a setting was timed on, from the same run where known."""
        rows = self._good[(self._good["measure"] == measure) & (self._good["arch"] == "")]
        rows = rows[rows["hardware"] == setting.hardware]
        same = rows[rows["source"] == setting.source]
        rows = rows if same.empty else same
        return None if rows.empty else float(rows["value"].iloc[-1])

    def bandwidth(self, setting: Setting) -> float | None:
        """The most that the machine of a setting moves, copying or reading, in bytes per second."""
        found = [self.machine(setting, m) for m in ("copy_bytes_per_s", "read_bytes_per_s")]
        return max((rate for rate in found if rate), default=None)

    def _pivot(self, rows: pd.DataFrame, keys: list[str], measures: Sequence[str]) -> pd.DataFrame:
        rows = rows[rows["measure"].isin(measures)].dropna(subset=keys)
        table = over_seeds(rows, [*keys, "measure"])
        table = table.pivot(index=keys, columns="measure", values="value")
        table = table.reindex(columns=list(measures)).dropna().reset_index()
        return table.astype({key: int for key in keys if key in ("batch", "context")})


def _further(words: dict[str, str]) -> list[str]:
    """What else tells one way to speculate from another, in a curve's name."""
    return [f"{name} {value}".strip() for name, value in words.items()
            if name in ("adaptive", "replay")]  # fmt: skip


def exponent(contexts: Sequence[float], per_token_ms: Sequence[float]) -> float:
    """a of O(n^a) for generating n tokens, from the time of one: the steepest part's slope + 1.

    The steepest, because constant costs hide the growth at short contexts.
    """
    points = sorted(zip(contexts, per_token_ms, strict=True))
    slopes = [log(b[1] / a[1]) / log(b[0] / a[0]) for a, b in pairwise(points)]
    return 1 + max(slopes)


def _medians_for_means(long: pd.DataFrame) -> pd.DataFrame:
    kept = long[long["measure"] != "tpot_ms"]
    return kept.assign(measure=kept["measure"].replace("tpot_p50_ms", "tpot_ms"))


def _of_one_source(rows: pd.DataFrame) -> pd.DataFrame:
    """Of each stage the rows of the source with most architectures, the last of several such."""
    kept = []
    for _, stage in rows.groupby("stage", sort=False):
        sources = [same for _, same in stage.groupby("source", sort=False)]
        kept.append(max(reversed(sources), key=lambda same: same["arch"].nunique()))
    return pd.concat(kept).sort_index() if kept else rows


def _largest(rows: pd.DataFrame) -> int:
    return int(rows["params"].max()) if rows["params"].notna().any() else 0
