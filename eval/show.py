"""Rows for people and for scripts: tables, JSON, CSV."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from archs.files import write
from eval.console import out

if TYPE_CHECKING:
    import pandas as pd

#: The option that every command with rows has.
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]

Cells = Mapping[str, object]

#: A prediction's columns for people: title, key, and what its figure is divided by.
PREDICTION = (
    ("arch", "arch", 1), ("on", "hardware", 1), ("batch", "batch", 1), ("context", "context", 1),
    ("op", "op", 1), ("×", "count", 1), ("state MB", "state_bytes", 1e6),
    ("step GB", "step_bytes", 1e9), ("FLOP/byte", "arith_intensity_pred", 1),
    ("TPOT ms", "tpot_ms", 1), ("ms", "time_ms", 1), ("token/s", "output_tok_per_s", 1),
    ("per user", "output_tok_per_s_per_user", 1), ("bound by", "bound_by", 1),
    ("from batch", "compute_bound_batch", 1), ("fit", "max_sequences", 1),
    ("$/Mtoken", "usd_per_million_tok", 1),
)  # fmt: skip


def show(rows: Sequence[Cells], as_json: bool) -> None:
    """Print rows as JSON (what is not finite as null), or as a table of all their columns."""
    if as_json:
        plain = [{k: None if _not_finite(v) else v for k, v in row.items()} for row in rows]
        print(json.dumps(plain, indent=2, allow_nan=False))
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    _table(rows, [(name, name, 1) for name in names])


def show_prediction(rows: Sequence[Cells], as_json: bool) -> None:
    """The same for predictions, whose tables keep to what fits a terminal."""
    if as_json:
        show(rows, as_json)
        return
    _table(rows, [column for column in PREDICTION if column[1] in rows[0]])


def write_csv(table: "pd.DataFrame", path: Path) -> None:
    """Write a table. Raises UserError where the file cannot be written."""
    write(path, table.to_csv(index=False))


def _table(rows: Sequence[Cells], columns: Sequence[tuple[str, str, float]]) -> None:
    drawn = Table()
    for title, key, _ in columns:
        number = any(isinstance(row.get(key), int | float) for row in rows)
        drawn.add_column(title, justify="right" if number else "left")
    for row in rows:
        drawn.add_row(*[_cell(row, key, scale) for _, key, scale in columns])
    out.print(drawn)


def _cell(row: Cells, key: str, scale: float) -> str:
    if key == "usd_per_million_tok" and row.get("fits") is False:
        return f"does not fit; {row['max_sequences']:,} would"
    return _text(row.get(key, ""), scale)


def _text(value: object, scale: float) -> str:
    if value is None:
        return "–"
    if isinstance(value, int | float) and scale != 1:
        value = value / scale
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:,.4g}"


def _not_finite(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
