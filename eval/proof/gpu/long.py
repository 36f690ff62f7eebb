"""Whole steps of a proof as the long table that reports and leaderboards read.

The proof's own files have a row per cell and grow while it runs; this is made from them anew.
"""

from collections.abc import Iterator, Mapping
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from archs.registry import ModelSpec, layer_names
from archs.sizes import get_scale
from eval.proof.gpu.decode_grid import COLUMNS, KEY
from eval.proof.gpu.table import Table
from eval.results.folder import write_table
from eval.results.point import Point
from eval.results.rows import CELL_FAILED, About, Found, Provenance, Row, Status, records

#: Columns of a decode row that are measures of the whole step by the same name.
MEASURED = (
    "tpot_ms", "tpot_p50_ms", "tpot_p99_ms", "output_tok_per_s", "mbu", "mfu", "tpot_pred_ms",
    "step_bytes", "step_flops", "state_bytes", "agreement_error",
)  # fmt: skip
FROM = ("hardware", "driver", "torch", "triton", "commit", "started_at")
#: A proof has no configuration but its code.
CONFIG = "proof"


def write_results(folder: Path) -> Path:
    """Write `results.csv` from `machine.csv` and `decode.csv`; its path. Baselines stay in theirs.

    Raises UserError where the disk refuses.
    """
    target = folder / "results.csv"
    lines = [
        line
        for point, found, origin in _points(folder)
        for line in records(point, found, Provenance(**origin, config_hash=CONFIG))
    ]
    if lines:
        write_table(target, lines)
    return target


def _points(folder: Path) -> Iterator[tuple[Point, Found, dict[str, str]]]:
    machine = Table(folder / "machine.csv", ("measure", "value", *FROM), ("measure",)).rows
    if machine:
        rates = [_rate(r["measure"], float(r["value"])) for r in machine]
        found = Found(about=About(dtype="bfloat16"), rows=tuple(rates))
        yield Point(stage="hardware", device="cuda"), found, _origin(machine[0])
    steps = Table(folder / "decode.csv", (*COLUMNS, *FROM), KEY).rows
    ours = sorted((r for r in steps if r["kernel_backend"] == "triton"), key=_place)
    for (scale, batch, arch), group in groupby(ours, key=_place):
        held = sorted(group, key=lambda r: int(r["context"]))
        about = About(
            pattern=":".join(dict.fromkeys(layer_names(arch, get_scale(scale).n_layers))),
            params=_parameters(arch, scale),
            dtype="bfloat16", kernel_backend="triton",
        )  # fmt: skip
        point = Point(stage="decode", arch=arch, scale=scale, batch=batch, device="cuda")
        rows = tuple(row for r in held for row in _rows(r))
        yield point, Found(about=about, rows=rows), _origin(held[0])


@cache
def _parameters(arch: str, scale: str) -> int:
    outline = ModelSpec(arch=arch, scale=get_scale(scale)).outline()
    return sum(p.numel() for p in outline.parameters())


def _rate(name: str, value: float) -> Row:
    """A measured rate; of a product, `name` ends with its rows, which results call a batch."""
    measure, _, rows = name.partition("@")
    return Row(measure=measure, value=value, batch=int(rows) if rows else None)


def _place(row: Mapping[str, str]) -> tuple[str, int, str]:
    return row["scale"], int(row["batch"]), row["arch"]


def _origin(row: Mapping[str, str]) -> dict[str, str]:
    return {name: row[name] for name in FROM}


def _rows(step: Mapping[str, str]) -> Iterator[Row]:
    at: dict[str, Any] = {"batch": int(step["batch"]), "context": int(step["context"])}
    if step["status"] != Status.OK:
        status = Status(step["status"])
        yield Row(measure=CELL_FAILED, status=status, note=step["note"], **at)
        return
    found = {name: float(step[name]) for name in MEASURED if step[name]}
    # Tables of earlier versions hold the throughput of a median step.
    if "tpot_ms" in found:
        found["output_tok_per_s_per_user"] = 1e3 / found["tpot_ms"]
        found["output_tok_per_s"] = at["batch"] * found["output_tok_per_s_per_user"]
    if "step_bytes" in found:
        found["arith_intensity_pred"] = found["step_flops"] / found["step_bytes"]
    for measure, value in found.items():
        yield Row(measure=measure, value=value, **at)
