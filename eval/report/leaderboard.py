"""The wide table: one architecture a row, every column saying at which scale it was taken.

`bits_per_byte@tiny` and `tpot_ms@70m/b1/c4096` are columns; `:low`, `:high` (95 % interval), `:n`
(seeds averaged), `:ahead_of` (those that are worse beyond chance, over all pairs) and `:status` (of
cells that failed) stand beside them. Whatever else varies within a measure (dtype, backend,
hardware, corpus, tokens, stage, the run) joins the name, so that unlike figures are never averaged:
only seeds are. Curves stay in the long table.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from math import isnan
from pathlib import Path
from typing import Any, Self

import pandas as pd

from archs.errors import UserError
from eval.report.sheet import Field, Sheet
from eval.results.families import families_of
from eval.results.measures import MEASURES
from eval.results.paired import DOCUMENTS, ahead_of, paired_intervals
from eval.results.rows import CELL_FAILED
from eval.results.schema import load_long
from eval.results.seeds import keys_of, over_seeds
from eval.results.tidy import IDENTITY, QUALIFIERS, UNTIL_SOLVED, tidy

#: Measures with several figures in one cell; they stay in the long table.
CURVES = ("loss_at_position", "sweep_score", DOCUMENTS)
#: Provenance kept per scale, and per row.
BY_SCALE = ("params", "tokens")
BY_ROW = (
    "seed", "corpus", "dtype", "weight_format", "state_format", "kernel_backend", "hardware",
    "driver", "torch", "triton", "commit", "config_hash", "started_at", "run",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Column:
    """The name of a figure's column, taken apart."""

    measure: str
    scale: str
    batch: int | None = None
    context: int | None = None
    extra: tuple[str, ...] = ()

    def __str__(self) -> str:
        batch = [] if self.batch is None else [f"b{self.batch}"]
        context = [] if self.context is None else [f"c{self.context}"]
        return f"{self.measure}@" + "/".join([self.scale, *batch, *context, *self.extra])

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """The column of that name; None where it holds no figure of a known measure."""
        measure, _, where = name.partition("@")
        if measure not in MEASURES or ":" in where:
            return None
        found = re.fullmatch(r"([^/]*)(?:/b(\d+))?(?:/c(\d+))?(?:/(.*))?", where)
        if found is None:
            return None
        scale, batch, context, extra = found.groups()
        return cls(
            measure,
            scale,
            int(batch) if batch else None,
            int(context) if context else None,
            tuple(extra.split("/")) if extra else (),
        )


def merge(paths: Iterable[Path]) -> pd.DataFrame:
    """The long tables of run folders or CSV files as one tidy table, with a `run` column.

    Where runs contradict each other, each keeps its figure (`eval.results.tidy`). Raises UserError.
    """
    files = [path / "results.csv" if path.is_dir() else path for path in paths]
    if not files:
        raise UserError("no runs to merge; name at least one run folder or results.csv")
    names = [f.parent.name if f.name == "results.csv" else f.stem for f in files]
    tables = [
        load_long(file).assign(run=name if names.count(name) == 1 else str(file.parent))
        for file, name in zip(files, names, strict=True)
    ]
    return tidy(pd.concat(tables, ignore_index=True))


def wide(long: pd.DataFrame) -> pd.DataFrame:
    """The leaderboard of a long table, unranked, architectures in the order of the table."""
    long = compared(tidy(long))
    rows = long[(long["arch"] != "") & ~long["measure"].isin(CURVES)]
    if rows.empty:
        raise UserError("the results hold no architecture yet; run `decodebench run` first")
    table = pd.DataFrame({"arch": list(dict.fromkeys(rows["arch"]))}).set_index("arch")
    families = families_of(long)
    table["family"] = [families[arch] for arch in table.index]
    by_arch = rows.groupby("arch", sort=False)
    table["pattern"] = by_arch["pattern"].agg(_joined)
    table["status"] = by_arch["status"].agg(_outcome)
    figures = _unpredicted(rows[rows["measure"] != CELL_FAILED])
    figures = figures.assign(column=column_names(figures))
    summary = dict(list(over_seeds(figures, ["arch", "column"]).groupby("column")))
    order = {name: place for place, name in enumerate(MEASURES)}
    columns = sorted(dict.fromkeys(figures["column"]), key=lambda c: order[c.partition("@")[0]])
    failed = rows[rows["measure"] == CELL_FAILED]
    stages = {column: set(group) for column, group in figures.groupby("column")["stage"]}
    of_column = dict(list(figures.groupby("column", sort=False)))
    parts: dict[str, pd.Series[Any]] = {}
    for column in columns:
        found = summary[column].set_index("arch")
        parts[column] = found["value"]
        if found["low"].notna().any():
            parts |= {f"{column}:low": found["low"], f"{column}:high": found["high"]}
            ahead = compare(of_column[column], long)
            if ahead:
                parts[f"{column}:ahead_of"] = pd.Series({a: "; ".join(w) for a, w in ahead.items()})
        if (found["n"] > 1).any():
            parts[f"{column}:n"] = found["n"].astype("Int64")
        status = _failures(failed, column, stages[column]) | found["status"].to_dict()
        if set(status.values()) != {"ok"}:
            parts[f"{column}:status"] = pd.Series(status)
    for name in BY_SCALE:
        for scale, group in rows[rows[name].notna()].groupby("scale", sort=False):
            parts[f"{name}@{scale}"] = group.groupby("arch")[name].agg(_joined)
    for name in BY_ROW:
        if name in rows:
            parts[name] = by_arch[name].agg(_joined)
    return pd.concat([table, pd.DataFrame(parts, index=table.index)], axis=1).reset_index()


def compared(long: pd.DataFrame) -> pd.DataFrame:
    """A tidy table whose bits per byte carry the intervals that compare models with each other."""
    scores = long[(long["measure"] == "bits_per_byte") & (long["status"] == "ok")]
    if scores.empty:
        return long
    long = long.copy()
    for _, same in scores.groupby(column_names(scores)):
        found = paired_intervals(_documents_of(same, long))
        for row, arch in zip(same.index, same["arch"], strict=True):
            if arch in found:
                long.loc[row, ["low", "high"]] = found[arch]
    return long


def compare(rows: pd.DataFrame, long: pd.DataFrame) -> dict[str, tuple[str, ...]]:
    """By architecture, those that it is ahead of in the rows of one column (`paired`)."""
    better = MEASURES[str(rows["measure"].iloc[0])].better
    if better is None:
        return {}
    return ahead_of(rows, _documents_of(rows, long), higher=better == "higher")


def _documents_of(rows: pd.DataFrame, long: pd.DataFrame) -> pd.DataFrame:
    """The scores by document behind rows of bits per byte; none behind those of other measures."""
    if set(rows["measure"]) != {"bits_per_byte"}:
        return long.iloc[:0]
    documents = long[long["measure"] == DOCUMENTS]
    return documents[keys_of(documents, IDENTITY).isin(set(keys_of(rows, IDENTITY)))]


def _unpredicted(rows: pd.DataFrame) -> pd.DataFrame:
    """The table without predictions (stage cost) of steps that another stage recorded."""
    same = keys_of(rows, ("arch", "measure", "scale", "batch", "context"))
    predicted = rows["stage"] == "cost"
    return rows[~(predicted & same.isin(set(same[~predicted])))]


def _failures(failed: pd.DataFrame, name: str, stages: set[str]) -> dict[str, str]:
    """By architecture, the status of failed cells that should have held this column's figure."""
    column = Column.parse(name)
    failed = failed[failed["stage"].isin(stages)]
    return {
        str(arch): str(status)
        for arch, status, scale, batch in zip(
            failed["arch"], failed["status"], failed["scale"], failed["batch"], strict=True
        )
        if column and scale == column.scale and (pd.isna(batch) or batch == column.batch)
    }


def rank(table: pd.DataFrame, by: str | None = None) -> pd.DataFrame:
    """The table sorted by quality, with a leading `rank` column that intervals decide.

    by: a column; by default the `bits_per_byte` column that most architectures have. Who is ahead
    of whom stands in its `:ahead_of`; an entry's rank runs from one more than those ahead of it to
    all but those behind it ("1–3"). A figure without interval is sorted but has no rank. Raises
    UserError where `by` is no figure of the table.
    """
    by = by or quality_column(table)
    if by is None:
        return _with_ranks(table, [""] * len(table))
    column = Column.parse(by)
    if column is None or by not in table:
        near = get_close_matches(by, [str(c) for c in figure_columns(table)], n=3, cutoff=0.3)
        raise UserError(
            f"'{by}' is not a figure to rank by; name a column of the table, such as "
            f"{', '.join(near or map(str, figure_columns(table)[:3]))}"
        )
    sign = -1.0 if MEASURES[column.measure].better == "higher" else 1.0
    table = table.sort_values(by, ascending=sign > 0, na_position="last", kind="stable")
    if f"{by}:ahead_of" not in table:
        return _with_ranks(table, [""] * len(table))
    behind = {
        arch: [] if worse == "" else str(worse).split("; ")
        for arch, worse in zip(table["arch"], table[f"{by}:ahead_of"], strict=True)
        if not pd.isna(worse)
    }
    ranks = []
    for arch in table["arch"]:
        first = 1 + sum(arch in worse for worse in behind.values())
        last = len(behind) - len(behind.get(arch, ()))
        one = str(first) if first == last else f"{first}–{last}"
        ranks.append(one if arch in behind else "")
    return _with_ranks(table, ranks)


def _with_ranks(table: pd.DataFrame, ranks: list[str]) -> pd.DataFrame:
    # In one step: a table of so many columns is slow to change column by column.
    first = pd.Series(ranks, index=table.index, name="rank")
    return pd.concat([first, table], axis=1).reset_index(drop=True)


def quality_column(table: pd.DataFrame) -> str | None:
    """The column that ranks: bits per byte at the scale that most architectures have."""
    return fullest(table, "bits_per_byte")


def fullest(table: pd.DataFrame, measure: str) -> str | None:
    """The column of a measure that most architectures have; the last of several such."""
    columns = [str(c) for c in figure_columns(table) if c.measure == measure]
    return max(reversed(columns), key=lambda c: len(table[c].dropna()), default=None)


def by_task(table: pd.DataFrame) -> dict[str, str]:
    """The fullest accuracy column of each synthetic task, by the task's name."""
    columns = [c for c in figure_columns(table) if c.measure == "accuracy"]
    fullest_of: dict[str, str] = {}
    for column in columns:
        same = [str(c) for c in reversed(columns) if c.scale == column.scale]
        fullest_of[column.scale] = max(same, key=lambda c: len(table[c].dropna()))
    return fullest_of


def figure_columns(table: pd.DataFrame) -> list[Column]:
    """The columns that hold figures, in the table's order."""
    return [parsed for name in table.columns if (parsed := Column.parse(str(name)))]


@dataclass(frozen=True, slots=True)
class Headline:
    """A column of the short leaderboard: which figure, its title, its scale."""

    title: str
    column: str
    factor: float
    digits: int

    @property
    def where(self) -> str:
        """Scale, batch and context of the figure."""
        where = self.column.partition("@")[2].replace("/", " ")
        return re.sub(r"\bc(\d+)", lambda found: f"c{short_count(int(found[1]))}", where)

    def text(self, row: "pd.Series[Any]") -> str:
        """The figure of a row with its interval's half width, or why there is none."""
        value, status = row[self.column], row.get(f"{self.column}:status")
        if not isinstance(value, float) or isnan(value):
            return status if isinstance(status, str) else "–"
        low, high = row.get(f"{self.column}:low"), row.get(f"{self.column}:high")
        text = _number(value * self.factor, self.digits)
        ranked = self.column.startswith("bits_per_byte@")
        if not ranked or not isinstance(low, float) or not isinstance(high, float) or isnan(low):
            return text
        return f"{text} ±{_number((high - low) / 2 * self.factor, self.digits)}"


def headlines(table: pd.DataFrame) -> list[Headline]:
    """The few figures that a ranked table shows: quality, tasks, state, latency, throughput.

    Latency is that of the smallest batch at the shortest and the longest context of the scale
    that most architectures were timed at (the largest of several such); throughput that of the
    largest batch. What was not measured is left out.
    """
    parsed = figure_columns(table)
    timed = [c for c in parsed if c.measure == "tpot_ms"]
    chosen: list[tuple[str, str | None, float, int]] = [
        ("bits/byte", quality_column(table), 1, 3),
        *((f"{scale} %", column, 100, 1) for scale, column in by_task(table).items()),
    ]
    home = _home(table, timed) or _home(table, [c for c in parsed if "state" in c.measure])

    def best(measure: str, *, most_users: bool = False, longest: bool = False) -> str | None:
        found = [c for c in parsed if c.measure == measure and c.scale == home]
        users = {c.batch or 0 for c in found}
        batch = max(users, default=0) if most_users else min(users, default=0)
        found = [c for c in found if (c.batch or 0) == batch]
        found.sort(key=lambda c: c.context or 0, reverse=longest)
        return str(found[0]) if found else None

    median = "tpot_p50_ms" if best("tpot_p50_ms") else "tpot_ms"
    short, long = best(median), best(median, longest=True)
    per_token = "TPOT p50 ms" if median == "tpot_p50_ms" else "TPOT ms"
    chosen += [
        ("kB/token", best("state_bytes_per_token"), 1e-3, 2),
        ("state MB", best("state_bytes", longest=True), 1e-6, 1),
        (per_token, short, 1, 2),
        (per_token, long if long != short else None, 1, 2),
        ("token/s", best("output_tok_per_s", most_users=True), 1, 0),
        ("MBU %", best("mbu", longest=True), 100, 0),
    ]
    return [Headline(t, column, f, d) for t, column, f, d in chosen if column is not None]


def to_table(table: pd.DataFrame) -> Sheet:
    """The short ranked leaderboard for a terminal of any width."""
    ranked = table if "rank" in table else rank(table)
    rows = [row for _, row in ranked.iterrows()]
    shown = [
        Field("rank", tuple(str(row["rank"]) or "–" for row in rows), number=True, key=True),
        Field("arch", tuple(str(row["arch"]) for row in rows), key=True),
    ]
    for headline in headlines(ranked):
        cells = tuple(headline.text(row) for row in rows)
        shown.append(Field(headline.title, cells, number=True, below=headline.where))
    statuses = tuple(str(row["status"]).replace(" ×1", "") for row in rows)
    return Sheet((*shown, Field("status", statuses)))


def column_names(rows: pd.DataFrame) -> "pd.Series[Any]":
    """The column name of each row, with the qualifiers that vary within measure and scale."""
    names = pd.Series("", index=rows.index, dtype="object")
    for (measure, scale), group in rows.groupby(["measure", "scale"], sort=False):
        varying = [q for q in QUALIFIERS if group[q].nunique(dropna=False) > 1]
        if {"dtype", "weight_format"} <= set(varying) and _one_dtype_each(group):
            varying.remove("dtype")
        if "stage" in varying and not _stages_collide(group):
            varying.remove("stage")
        if "tokens" in varying and UNTIL_SOLVED in set(group["stage"]):
            varying.remove("tokens")
        for _, same in group.groupby(["batch", "context", *varying], dropna=False, sort=False):
            one: dict[str, Any] = {str(k): v for k, v in same.iloc[0].items()}
            batch, context = (
                None if pd.isna(one[k]) else int(one[k]) for k in ("batch", "context")
            )
            extra = tuple(
                re.sub(r"[/:@]", " ", str(one[q])) + (" tokens" if q == "tokens" else "")
                for q in varying
                if not pd.isna(one[q]) and one[q] != ""
            )
            names[same.index] = str(Column(str(measure), str(scale), batch, context, extra))
    return names


def _one_dtype_each(group: pd.DataFrame) -> bool:
    """Whether the format of the weights tells the dtype."""
    return bool((group.groupby("weight_format")["dtype"].nunique() == 1).all())


def _stages_collide(group: pd.DataFrame) -> bool:
    """Whether two stages give a figure of one architecture under the same batch and context."""
    by = group.groupby(["arch", "batch", "context"], dropna=False)["stage"]
    return bool((by.nunique() > 1).any())


def _home(table: pd.DataFrame, columns: Sequence[Column]) -> str | None:
    """The scale of most figures, the one with the most parameters among equals."""

    def size(column: Column) -> tuple[int, int]:
        params = f"params@{column.scale}"
        texts = [str(p) for p in table[params].dropna()] if params in table else []
        known = [int(text.split("; ")[0]) for text in texts]
        status = f"{column}:status"
        tried = table[status if status in table else str(column)].notna()
        return int(tried.sum()), max(known, default=0)

    return max(columns, key=size).scale if columns else None


def short_count(count: int) -> str:
    """16384 as "16k": whole binary thousands are shortened, other counts are not."""
    return f"{count >> 10}k" if count and count % 1024 == 0 else str(count)


def _joined(values: "pd.Series[Any]") -> str:
    return "; ".join(dict.fromkeys(str(v) for v in values if not pd.isna(v) and v != ""))


def _outcome(statuses: "pd.Series[Any]") -> str:
    """ "ok", or what went wrong and how often: "oom ×2"."""
    failed = statuses[statuses != "ok"].value_counts()
    return ", ".join(f"{name} ×{count}" for name, count in failed.items()) or "ok"


def _number(value: float, digits: int) -> str:
    """At least two significant digits; thousands grouped."""
    if value and abs(value) < 10.0**-digits:
        return f"{value:.2g}"
    return f"{value:,.{digits}f}"
