"""The schema of the long results table: its columns, its version, and what makes a row unsound.

Version 1 had no `schema` column. A change that an older reader would misread raises the version;
a table of a newer version is refused, one of an older version is read.
"""

from collections.abc import Iterator
from datetime import datetime
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd

from archs.errors import UserError
from eval.results.measures import MEASURES
from eval.results.rows import CELL_FAILED, COLUMNS, SCHEMA, Status
from eval.results.seeds import keys_of

OURS = "name a run folder or its results.csv"
Kind = Literal["text", "integer", "number", "count"]


class Column(NamedTuple):
    """kind: text; integer (always there); count (integer or empty); number (finite or empty)."""

    kind: Kind
    meaning: str


LONG: dict[str, Column] = {
    "cell": Column(
        "text",
        "the point: stage, architecture, scale, seed, batch, hash of all that was asked for",
    ),
    "row": Column("text", "number of the row within its cell, 2/9"),
    "arch": Column("text", "architecture; empty for figures of the machine itself"),
    "stage": Column("text", "hardware, cost, train, task, decode, ..."),
    "scale": Column("text", "shape: tiny, 70m, ...; of a task its name"),
    "seed": Column("integer", "of initialisation and data"),
    "batch": Column("integer", "sequences; 0 where none play a part"),
    "context": Column("integer", "tokens held before the step; 0 where none play a part"),
    "position": Column("count", "token position, of curves over positions"),
    "measure": Column("text", "one of the measures below"),
    "value": Column("number", "the figure in the measure's unit; empty where it failed"),
    "low": Column("number", "lower end of the 95 % interval, where there is one; nothing else"),
    "high": Column("number", "upper end"),
    "n": Column("integer", "samples in the figure"),
    "status": Column("text", ", ".join(Status) + "; a latency stands only beside ok"),
    "note": Column("text", "why it failed, or what sets this row apart"),
    "pattern": Column("text", "mixer of every layer"),
    "family": Column("text", "what it remembers: softmax, latent, window, recurrent, hybrid"),
    "params": Column("integer", "parameters, embedding included"),
    "corpus": Column("text", "text or task trained on"),
    "tokens": Column("integer", "trained on"),
    "dtype": Column("text", "of the weights, and of what is computed with packed ones"),
    "weight_format": Column(
        "text", "how weights are stored where they are packed: int4-g64; empty: plain numbers"
    ),
    "state_format": Column(
        "text", "how the state is kept: kv:int8,memory:int8-ef; empty: as it is computed"
    ),
    "kernel_backend": Column("text", "what ran the operations"),
    "options": Column(
        "text",
        "what else sets the figure apart, as name=value: what a task asks, what "
        "drafts, what is replayed",
    ),
    "hardware": Column("text", "GPU, or CPU with the threads in use"),
    "driver": Column("text", "CUDA version, on a GPU"),
    "torch": Column("text", "version"),
    "triton": Column("text", "version, where installed"),
    "commit": Column("text", "of this program"),
    "config_hash": Column(
        "text", "of the configuration that asked for it, whatever its name and architectures"
    ),
    "started_at": Column("text", "ISO 8601, with its time zone"),
    "schema": Column("integer", "version of this schema; absent in version 1"),
}
assert list(LONG) == COLUMNS

#: Measures whose low and high were percentiles or extremes before version 3.
SPREAD_BEFORE_3 = ("tpot_ms", "ttft_ms", "cached_tpot_ms", "nocache_tpot_ms")
#: What a task's stage and measures were called before version 4.
NAMES_BEFORE_4 = {
    "stage": {"mqar": "task"},
    "measure": {"mqar_accuracy": "accuracy", "mqar_steps_to_99": "steps_to_99"},
}
#: The largest integer that every reader of a CSV keeps exactly, 2^53 - 1.
MOST = 9007199254740991
#: What makes two rows of one cell the same figure, with `NEEDED`.
FIGURE = (
    "arch", "scale", "seed", "batch", "context", "position", "measure", "corpus", "tokens",
    "dtype", "weight_format", "state_format", "kernel_backend", "options", "note",
)  # fmt: skip
#: Columns that a row cannot do without.
NEEDED = ("cell", "stage", "hardware", "commit", "config_hash")


class Fault(NamedTuple):
    """What is wrong with a line of the file (1 is the header)."""

    line: int
    what: str


def load_long(path: Path) -> pd.DataFrame:
    """A long table, typed. Raises UserError naming the file, the row and the column at fault."""
    table, found = _read(path)
    faults = [*found, *_unknown(table)]
    if faults:
        first = min(faults)
        raise UserError(f"'{path}' row {first.line}: {first.what}{_more(len(faults) - 1)}")
    return table


def _more(others: int) -> str:
    return f" ({others} more: `leaderboard --check` lists them)" if others else ""


def check_long(path: Path) -> list[Fault]:
    """Everything that is wrong with a table's rows, in their order; empty where it is sound.

    Raises UserError where the file is no results table at all.
    """
    table, found = _read(path)
    faults = [*found, *_unknown(table)]
    # What could not be read is not judged as well.
    unread = {fault.line for fault in faults}
    faults += [fault for fault in _implausible(table) if fault.line not in unread]
    return sorted(faults)


def _read(path: Path) -> tuple[pd.DataFrame, list[Fault]]:
    """The table with numbers where they are some, and the faults of those that are not."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except FileNotFoundError:
        raise UserError(f"'{path}' does not exist; run a suite first") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"'{path}' is not a results table: {reason}; {OURS}") from None
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}; {OURS}") from None
    if "rank" in table and "schema" not in table:
        raise UserError(f"'{path}' is a wide leaderboard, made from a results table; {OURS}")
    if "schema" not in table:
        table["schema"] = "1"
    for name in ("family", "options", "weight_format", "state_format"):
        if name not in table:
            table[name] = ""
    missing = [c for c in COLUMNS if c not in table.columns]
    if missing:
        raise UserError(f"'{path}' is not a results table: it lacks the columns {missing}; {OURS}")
    newer = pd.to_numeric(table["schema"], errors="coerce").max()
    if newer > SCHEMA:
        raise UserError(
            f"'{path}' has schema {newer:.0f}, this program knows up to {SCHEMA}; update it"
        )
    faults = []
    for name, column in LONG.items():
        if column.kind == "text":
            continue
        text = table[name]
        numbers = pd.to_numeric(text.replace("", None), errors="coerce")
        bad = ~np.isfinite(numbers) & (text != "")
        faults += [Fault(i + 2, f"{name}='{text[i]}' is not a number") for i in _where(bad)]
        if column.kind == "integer":
            empty = text == ""
            faults += [Fault(i + 2, f"{name} is empty; it needs an integer") for i in _where(empty)]
            broken = np.isfinite(numbers) & (numbers % 1 != 0)
            faults += [Fault(i + 2, f"{name}='{text[i]}' is no integer") for i in _where(broken)]
            large = np.isfinite(numbers) & (numbers.abs() > MOST)
            faults += [
                Fault(i + 2, f"{name}='{text[i]}' exceeds {MOST}; it could not be kept exactly")
                for i in _where(large)
            ]
            numbers = numbers.where(np.isfinite(numbers) & ~large, 0).astype(int)
        table[name] = numbers
    spread = (table["schema"] < 3) & table["measure"].isin(SPREAD_BEFORE_3)
    table.loc[spread, ["low", "high"]] = np.nan
    for name, new in NAMES_BEFORE_4.items():
        older = table["schema"] < 4
        table[name] = table[name].mask(older, table[name].replace(new))
    return table, faults


def _where(mask: "pd.Series[bool]") -> list[int]:
    return [int(i) for i in np.flatnonzero(mask.to_numpy())]


def _unknown(table: pd.DataFrame) -> Iterator[Fault]:
    for column, allowed in (
        ("measure", {*MEASURES, CELL_FAILED}),
        ("status", {status.value for status in Status}),
    ):
        for i in _where(~table[column].isin(allowed)):
            name = table[column].iloc[i]
            near = get_close_matches(name, allowed, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            yield Fault(i + 2, f"unknown {column} '{name}'{hint}")


def _implausible(table: pd.DataFrame) -> Iterator[Fault]:
    """Rows that can be read and cannot be true."""
    ok = table["status"] == Status.OK
    value, low, high = (table[name] for name in ("value", "low", "high"))
    for i in _where(ok & value.isna() & (table["measure"] != CELL_FAILED)):
        yield Fault(i + 2, "status is ok and value is empty; a failure needs its status")
    for i in _where(~ok & value.notna()):
        status = table["status"].iloc[i]
        yield Fault(i + 2, f"value={value[i]:g} beside status '{status}'; a failure has no figure")
    signed = table["measure"].isin([name for name, m in MEASURES.items() if m.signed])
    for name in ("value", "seed", "batch", "context", "position", "n", "params", "tokens"):
        for i in _where((table[name] < 0) & ~(signed & (name == "value"))):
            yield Fault(i + 2, f"{name}={table[name].iloc[i]:g} is negative")
    shares = [name for name, measure in MEASURES.items() if measure.share]
    for i in _where(table["measure"].isin(shares) & (value > 1)):
        name = table["measure"].iloc[i]
        yield Fault(i + 2, f"{name}={value[i]:g} exceeds 1; it is a share, not per cent")
    for i in _where(low > high):
        yield Fault(i + 2, f"low={low[i]:g} exceeds high={high[i]:g}")
    for i in _where(low.isna() != high.isna()):
        yield Fault(i + 2, "one end of the interval is empty; give both or none")
    for name in NEEDED:
        for i in _where(table[name] == ""):
            yield Fault(i + 2, f"{name} is empty")
    for i in _where((table["arch"] == "") & (table["stage"] != "hardware")):
        yield Fault(i + 2, "arch is empty; only figures of the machine have none")
    yield from _contradictions(table[ok])
    yield from _torn(table)
    for i, text in enumerate(table["started_at"]):
        if not _is_time(text):
            yield Fault(i + 2, f"started_at='{text}' is not an ISO 8601 time with a zone")


def _contradictions(good: pd.DataFrame) -> Iterator[Fault]:
    """Figures that stand twice with different values."""
    first: dict[tuple[object, ...], tuple[int, float]] = {}
    keys = keys_of(good, [*NEEDED, *FIGURE])
    for i, key, value in zip(good.index, keys, good["value"], strict=True):
        line, known = first.setdefault(key, (int(i) + 2, value))
        if value != known and not (pd.isna(value) and pd.isna(known)):
            yield Fault(
                int(i) + 2, f"value={value:g}, but row {line} gives {known:g} for the same figure"
            )


def _torn(table: pd.DataFrame) -> Iterator[Fault]:
    """Cells of which rows are missing: those recorded together are numbered 1/n to n/n."""
    cells: dict[tuple[str, int], dict[int, set[object]]] = {}
    last: dict[tuple[str, int], int] = {}
    unread = set()
    origins = keys_of(table, ["hardware", "config_hash", "started_at"])
    for i, (cell, text) in enumerate(zip(table["cell"], table["row"], strict=True)):
        number, _, total = text.partition("/")
        if not (number.isdecimal() and total.isdecimal() and 0 < int(number) <= int(total) <= MOST):
            yield Fault(i + 2, f"row='{text}' is not the number of a row in its cell, such as 2/9")
            unread.add(cell)
            continue
        key = cell, int(total)
        cells.setdefault(key, {}).setdefault(int(number), set()).add(origins.iloc[i])
        last[key] = i + 2
    for (cell, total), rows in cells.items():
        times = max(len(found) for found in rows.values())
        complete = sum(len(found) == times for found in rows.values())
        if complete < total and cell not in unread:
            first = next(n for n in range(1, total + 1) if len(rows.get(n, ())) < times)
            yield Fault(
                last[cell, total], f"cell '{cell}' lacks {total - complete} of its {total} rows, "
                f"such as {first}/{total}",
            )  # fmt: skip


def _is_time(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False


def document() -> str:
    """The schema as Markdown: what `leaderboards/SCHEMA.md` holds."""
    lines = [
        f"# Results: schema {SCHEMA}",
        "",
        "`decodebench leaderboard --schema` prints this page; `decodebench leaderboard --check "
        "FILE` holds a table to it and names every row at fault.",
        "",
        "## results.csv: one measurement a row",
        "",
        "| column | holds | meaning |",
        "|---|---|---|",
        *(f"| `{name}` | {c.kind} | {c.meaning} |" for name, c in LONG.items()),
        "",
        "integer: always there; count: integer or empty; number: finite or empty. UTF-8, comma, "
        "quoted as RFC 4180, a line a row. The measure `cell` marks a cell that failed as a whole.",
        "",
        "## Measures",
        "",
        "| measure | unit | better | meaning |",
        "|---|---|---|---|",
        *(f"| `{n}` | {m.unit} | {m.better or ''} | {m.meaning} |" for n, m in MEASURES.items()),
        "",
        "## leaderboard.csv: one architecture a row",
        "",
        "Made from results tables. `measure@scale`, `measure@scale/b8/c4096` (batch, context) hold "
        "means over seeds; `:n` the seeds, `:status` of cells that failed. What else differs "
        "within a measure (stage, dtype, backend, hardware, corpus, tokens) joins the name, so "
        "that unlike figures are never averaged. So does the run, where runs of several "
        "configurations trained, or where two runs found other values for one figure. Provenance "
        "stands once a row, several values joined by `; `.",
        "",
        "`:low` and `:high` are the 95 % interval of that one figure: Student's over seeds; with "
        "one seed, of bits per byte Student's over the documents that all models share (what "
        "documents do to all of them alike is taken out), of a task's accuracy Wilson's over "
        "sequences. results.csv holds the interval of bits per byte over documents as they are.",
        "",
        "`:ahead_of` names those that the row is better than, by Student's t of each pair (paired "
        "by document, or over seeds with their noise pooled) with Holm's correction for all pairs: "
        "of tables of equal models at most 5 % name any. `rank` follows from it: one more than "
        "those ahead, up to all but those behind. Two intervals may be apart without a rank "
        "between them, and may overlap a little with one.",
        "",
        "## Versions",
        "",
        "- 6: the column `state_format`; states were kept as they are computed before.",
        "- 5: the column `weight_format`; weights were plain numbers before.",
        "- 4: the columns `family` and `options`; a task's stage is `task`, its measures "
        "`accuracy` and `steps_to_99`. They were `mqar`, `mqar_accuracy` and `mqar_steps_to_99`, "
        "and are renamed when read.",
        "- 3: `low` and `high` are 95 % intervals alone, and throughput follows from the mean time "
        "per token.",
        "- 2: the column `schema`. `low` and `high` of tpot_ms were percentiles of its steps, of "
        "ttft_ms, cached_tpot_ms and nocache_tpot_ms the least and the largest of repeats: such "
        "ends are dropped when read. Throughput followed from the median.",
        "- 1: as 2, without it.",
    ]
    return "\n".join(lines) + "\n"
