"""Compile our Triton kernels ahead of time, for GPUs that need not be here.

Rows of a table are known by the content of what was compiled: those of an earlier table are taken
over where nothing changed. `leaderboards/ahead-of-time/cells.csv` holds every configuration.
"""

import csv
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

from archs.errors import unknown_name
from eval.measure.progress import Progress
from kernels.aot.ahead import TARGETS, Report, Variant, compile_ahead
from kernels.aot.content import content_key
from kernels.attention import combine as split_combine
from kernels.attention import decode as attention_decode
from kernels.attention import prefill as attention_prefill
from kernels.blocks import append as block_append
from kernels.blocks import pages as block_pages
from kernels.blocks import scan as block_scan
from kernels.conv import chunk as conv_chunk
from kernels.conv import shift as token_shift
from kernels.conv import step as conv_step
from kernels.decay import chunk as decay_chunk
from kernels.decay import linear_step, ssm_step
from kernels.dplr import step as wkv_step
from kernels.gated_delta import channel_chunk as kda_chunk
from kernels.gated_delta import chunk as gdn_chunk
from kernels.gated_delta import step as gdn_step
from kernels.latent import append as latent_append
from kernels.latent import decode as mla_decode
from kernels.norm import rows as norm_triton
from kernels.pages import write as page_write
from kernels.pooling import append as pooled_append
from kernels.pooling import decode as pooled_decode
from kernels.products import few_rows, gemv, head_gemv, project_append
from kernels.quant import packed_rows
from kernels.rope import append as rope_append
from kernels.rope import rotate as rope_rotate
from kernels.sampling import sample
from kernels.selective import chunk as selective_chunk
from kernels.selective import step as selective_step
from kernels.sparse import append as index_append
from kernels.sparse import scan as index_scan
from kernels.sparse import topk as rank_topk
from kernels.trapezoid import step as trapezoid_step

#: Every op with a Triton kernel: a module with `variants()`, the default one first.
OPS: dict[str, ModuleType] = {
    "attention_decode": attention_decode, "attention_prefill": attention_prefill,
    "block_append": block_append, "block_pages": block_pages, "block_scan": block_scan,
    "conv_chunk": conv_chunk, "conv_step": conv_step, "decay_chunk": decay_chunk,
    "few_rows": few_rows, "gdn_chunk": gdn_chunk, "gdn_step": gdn_step, "gemv": gemv,
    "head_gemv": head_gemv, "index_append": index_append, "index_scan": index_scan,
    "kda_chunk": kda_chunk, "latent_append": latent_append, "linear_step": linear_step,
    "mla_decode": mla_decode, "norm_triton": norm_triton, "packed_rows": packed_rows,
    "page_write": page_write, "pooled_append": pooled_append, "pooled_decode": pooled_decode,
    "project_append": project_append, "rank_topk": rank_topk, "rope_append": rope_append,
    "rope_rotate": rope_rotate, "sample": sample, "selective_chunk": selective_chunk,
    "selective_step": selective_step,
    "split_combine": split_combine, "ssm_step": ssm_step, "token_shift": token_shift,
    "trapezoid_step": trapezoid_step, "wkv_step": wkv_step,
}  # fmt: skip


#: Fewer cells than this are compiled here: worker processes take seconds to start.
FEW = 8

#: Columns that hold whole numbers.
NUMBERS = ("registers", "spill_bytes", "scalar_spills", "shared_bytes", "matrix_instructions")
COLUMNS = (
    "op", "variant", "target", "registers", "spill_bytes", "scalar_spills", "shared_bytes",
    "loads", "loads_in_loops", "matrix_instructions", "faults", "key",
)  # fmt: skip

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Cell:
    """Configuration `index` of an op, every one or the default ones, for a target."""

    op: str
    every: bool
    index: int
    target: str

    @property
    def variant(self) -> Variant:
        """The variant that is compiled."""
        return _variants(self.op, self.every)[self.index]

    @property
    def key(self) -> str:
        """The content of what is compiled, names aside."""
        return content_key(self.variant, self.target)


@cache
def _variants(op: str, every: bool) -> list[Variant]:
    found: list[Variant] = OPS[op].variants()
    return found if every else found[:1]


def cells(targets: Sequence[str], *, every: bool, ops: Sequence[str] = ()) -> list[Cell]:
    """The cells to compile: of all ops or these, every configuration or the default ones.

    Raises UserError on an unknown target or op.
    """
    for target in targets:
        if target not in TARGETS:
            raise unknown_name("target", target, TARGETS)
    for op in ops:
        if op not in OPS:
            raise unknown_name("operation", op, OPS)
    return [
        Cell(op, every, index, target)
        for op in OPS
        if not ops or op in ops
        for index, variant in enumerate(_variants(op, every))
        for target in targets
        if target in variant.targets
    ]


def kernel_table(
    wanted: Sequence[Cell], known: Mapping[str, Row] | None = None, *, progress: Progress,
    keep: Callable[[list[Row]], None] = lambda _: None,
) -> list[Row]:  # fmt: skip
    """One row per cell: registers, spills, loads, matrix instructions, faults.

    known: rows of an earlier table by their key; a cell whose key is among them is not compiled.
    keep: called with all rows so far if compiling ends early, whatever ended it.
    """
    rows = dict(known or {})
    missing = [cell for cell in wanted if cell.key not in rows]
    with ExitStack() as stack:
        run: Callable[[Callable[[Cell], Row], list[Cell]], Iterable[Row]] = map
        if len(missing) > FEW:
            # Spawned: a process forked from one that has threads may hang.
            pool = ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn"))
            run = stack.enter_context(pool).map
        stack.enter_context(progress.over(len(missing), len(missing), len(wanted)))
        for op, group in groupby(missing, lambda cell: cell.op):
            of_op = list(group)
            with progress.cell(f"compile {op}, {len(of_op)} cells", len(of_op)):
                try:
                    rows.update((str(row["key"]), row) for row in run(compiled, of_op))
                except BaseException:
                    keep(list(rows.values()))
                    raise
    return [_named(rows[cell.key], cell) for cell in wanted]


def read_table(path: Path) -> dict[str, Row]:
    """Rows of a table that was written before, by key: none where it has no keys or is no file."""
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("key")]
    return {row["key"]: {**row, **{name: int(row[name]) for name in NUMBERS}} for row in rows}


def compiled(cell: Cell) -> Row:
    """A cell's row, from compiling it."""
    found = compile_ahead(cell.variant, cell.target)
    row = {
        "target": cell.target, "registers": found.registers, "spill_bytes": found.spill_bytes,
        "scalar_spills": found.scalar_spills, "shared_bytes": found.shared_bytes,
        "loads": _loads(found.load_bytes), "loads_in_loops": _loads(found.loop_load_bytes),
        "matrix_instructions": found.matrix_instructions, "key": cell.key,
    }  # fmt: skip
    return _named(row, cell)


def _named(row: Row, cell: Cell) -> Row:
    # Names and what counts as a fault may have changed though the code has not.
    report = Report(
        target=cell.target, load_bytes=_widths(row["loads"]),
        loop_load_bytes=_widths(row["loads_in_loops"]), **{name: row[name] for name in NUMBERS},
    )  # fmt: skip
    faults = "; ".join(report.faults(cell.variant))
    named = {**row, "op": cell.op, "variant": cell.variant.name, "faults": faults}
    return {name: named[name] for name in COLUMNS}


def _loads(by_width: Mapping[int, int]) -> str:
    """The number of loads of each width in bytes, the widest first."""
    return " ".join(f"{n}x{width}B" for width, n in sorted(by_width.items(), reverse=True))


def _widths(loads: str) -> dict[int, int]:
    pairs = (part.removesuffix("B").split("x") for part in loads.split())
    return {int(width): int(n) for n, width in pairs}
