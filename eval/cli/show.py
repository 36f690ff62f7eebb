"""Rows for people and for scripts: tables with units, JSON and CSV with raw figures."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from archs.files import write
from eval.cli.console import out
from eval.report.sheet import Field, Sheet

if TYPE_CHECKING:
    import pandas as pd

#: The option that every command with rows has.
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]

Cells = Mapping[str, object]

#: Columns that tell rows apart.
KEYS = frozenset(
    {"rank", "arch", "first", "second", "scale", "hardware", "batch", "context", "op", "case",
     "new_tokens", "backend", "kernel_backend", "weight_format", "state_format", "variant",
     "target", "measure", "position", "number", "source"}
)  # fmt: skip
#: Titles of columns whose names do not say it.
TITLES = {
    "hardware": "on", "kernel_backend": "backend", "weight_format": "weights",
    "state_format": "state",
    "arith_intensity_pred": "FLOP/byte predicted", "arith_intensity_meas": "FLOP/byte measured",
    "output_tok_per_s": "token/s", "compressed_bits_per_byte": "bits per byte",
    "loss_gap_at_position": "nats more at the end",
    "output_tok_per_s_per_user": "token/s per user", "output_tok_per_s_per_gpu": "token/s per GPU",
    "compute_bound_batch": "compute-bound from batch", "max_sequences": "sequences that fit",
    "usd_per_million_tok": "$/Mtoken", "count": "×",
}  # fmt: skip
#: Words of names that are units, in steps of a thousand.
SCALED = {
    "bytes": ("B", "kB", "MB", "GB", "TB", "PB"),
    "flops": ("FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP"),
}
WORDS = {
    "us": "µs",
    "flop": "FLOP",
    "tpot": "TPOT",
    "ttft": "TTFT",
    "gpu": "GPU",
    "gpus": "GPUs",
    "tok": "token",
}
#: The columns of a prediction that people see; all others are for scripts.
PREDICTION = (
    "rank", "arch", "hardware", "weight_format", "state_format", "batch", "context", "new_tokens",
    "op", "count", "state_bytes", "step_bytes",
    "arith_intensity_pred", "tpot_ms", "time_ms", "output_tok_per_s", "output_tok_per_s_per_user",
    "bound_by", "compute_bound_batch", "max_sequences", "usd_per_million_tok", "note",
)  # fmt: skip
#: The same of steps that were timed.
TIMED = (
    "arch", "kernel_backend", "weight_format", "state_format", "scale", "batch", "context",
    "tpot_ms",
    "tpot_p50_ms", "tpot_p99_ms", "output_tok_per_s", "mbu", "held_weight_bytes", "held_bytes",
    "ttft_ms", "status", "note",
)  # fmt: skip
#: What counters add to them, too much for one table: predicted, then measured.
COUNTED = (
    "step_bytes", "step_flops", "arith_intensity_pred",
    "step_bytes_meas", "step_flops_meas", "arith_intensity_meas",
)  # fmt: skip
#: The same of the question what fits under a limit.
FIT = (
    "rank", "arch", "hardware", "context", "gpus", "least_gpus", "batch", "tpot_ms",
    "output_tok_per_s_per_gpu", "usd_per_million_tok", "limited_by", "used_bytes_per_gpu", "note",
)  # fmt: skip


def show(rows: Sequence[Cells], as_json: bool) -> None:
    """Print rows as JSON (what is not finite as null), or as a table of all their columns."""
    if as_json:
        plain = [{k: None if _not_finite(v) else v for k, v in row.items()} for row in rows]
        print(json.dumps(plain, indent=2, allow_nan=False))
        return
    out.print(sheet(rows))


def show_timings(rows: Sequence[Cells], as_json: bool, *, counted: bool) -> None:
    """Steps that were timed; for people some columns, and those of counters in a second table."""
    if as_json:
        show(rows, as_json)
        return
    out.print(sheet([{name: row[name] for name in TIMED if name in row} for row in rows]))
    if not counted:
        return
    names = ("arch", "batch", "context", *COUNTED)
    out.print(sheet([{k: row[k] for k in names} for row in rows if COUNTED[-1] in row]))
    for note in filter(None, dict.fromkeys(row.get("counters_note", "") for row in rows)):
        out.print(f"not counted: {note}", soft_wrap=True)


def show_prediction(rows: Sequence[Cells], as_json: bool, names: Sequence[str]) -> None:
    """The same; for people these columns alone, and below them what launches and links rest on."""
    if as_json:
        show(rows, as_json)
        return
    out.print(sheet([{name: row[name] for name in names if name in row} for row in rows]))
    several = any(row.get("gpus") not in (None, 1) for row in rows)
    for what in ("launches", "link")[: 1 + several]:
        sources: dict[object, dict[str, None]] = {}
        for row in rows:
            sources.setdefault(row[f"{what}_from"], {})[str(row["hardware"])] = None
        for source, parts in sources.items():
            out.print(f"predicted; {what} of {', '.join(parts)}: {source}", soft_wrap=True)


def sheet(rows: Sequence[Cells]) -> Sheet:
    """A table of all columns in which some row holds anything, figures with their units."""
    names = dict.fromkeys(name for row in rows for name in row)
    names = dict.fromkeys(sorted(names, key=lambda name: name not in KEYS))
    filled = [name for name in names if any(row.get(name) not in ("", None) for row in rows)]
    return Sheet(tuple(_field(name, [row.get(name, "") for row in rows]) for name in filled))


def lines(given: Cells) -> Iterator[str]:
    """Lines `name: value` of single figures with their units; what is nested stands indented."""
    for name, value in given.items():
        if isinstance(value, Mapping):
            yield f"{name.replace('_', ' ')}:"
            yield from (f"  {key}: {inner}" for key, inner in value.items())
            continue
        title, (text,) = _told(name, [value])
        # Above a column "on" will do; in a line of its own it needs its name.
        yield f"{'hardware' if name == 'hardware' else title}: {text}"


def write_csv(table: "pd.DataFrame", path: Path) -> None:
    """Write a table. Raises UserError where the file cannot be written."""
    write(path, table.to_csv(index=False))


def _field(name: str, values: Sequence[object]) -> Field:
    title, cells = _told(name, values)
    number = any(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    return Field(title, tuple(cells), number=number, key=name in KEYS)


def _told(name: str, values: Sequence[object]) -> tuple[str, list[str]]:
    """A title with its unit, and the values in that unit."""
    words = name.split("_")
    scaled = next((word for word in words if word in SCALED), None)
    factor = 1.0
    if scaled is not None:
        units = SCALED[scaled]
        step = _step(values, len(units) - 1)
        factor = 1e3**step
        words[words.index(scaled)] = units[step]
    title = " ".join(WORDS.get(word, word) for word in words)
    title = TITLES.get(name, title.replace(" per s", "/s"))
    return title, [_text(value, factor) for value in values]


def _step(values: Sequence[object], most: int) -> int:
    """Thousands to count in: the smallest value is at least 1, or the largest below a million."""
    sizes = [abs(v) for v in values if isinstance(v, int | float) and v and math.isfinite(v)]
    if not sizes:
        return 0
    steps = [int(math.log10(size) // 3) for size in (min(sizes), max(sizes))]
    return min(max(steps[0], steps[1] - 1, 0), most)


def _text(value: object, factor: float = 1.0) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float) and factor != 1:
        value = value / factor
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:,.4g}"


def _not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
