"""A whole suite, cell by cell: train, ask, time, record; resumable at any point.

A cell is what is recorded as one (an architecture trained with one seed, decoded at one scale and
batch, …). A finished cell is in `results.csv` and is not run again; a failed one is a row with
its status. Cells go stage by stage, so that a short time budget leaves every architecture with
the same columns.
"""

import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import tomli_w
import torch

from archs.errors import UserError
from archs.files import REFUSALS, read_text, refused, refusing, write
from eval.cells import CellFailure, Workshop
from eval.decode import out_of_memory
from eval.progress import Progress, Watch
from eval.results import (
    CELL_FAILED,
    About,
    Cell,
    Results,
    Row,
    Status,
    provenance,
)
from eval.schema import load_long
from eval.suite import Suite

#: What a run folder may hold of ours: the only names that --fresh removes. The configuration is
#: the last of them, so that a folder emptied in part is still known as ours.
OWN_NAMES = (
    "results.csv", "leaderboard.csv", "report.html", "errors.log", "cells", "plots", "config.toml",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Planned:
    """A cell, roughly how long it takes relative to others, and the work itself."""

    cell: Cell
    weight: float
    work: Callable[[Watch], tuple[About, list[Row]]]


def prepare_folder(suite: Suite, out: Path, *, fresh: bool) -> None:
    """Make or check the run folder. Raises UserError when it belongs to something else."""
    config = out / "config.toml"
    with refusing(out, "written"):
        if out.exists() and any(out.iterdir()) and not config.exists():
            raise UserError(f"'{out}' is not empty and not a run folder; choose another --out")
        if fresh:
            _remove_own(out)
        out.mkdir(parents=True, exist_ok=True)
        text = f"# config_hash = {suite.config_hash}\n" + tomli_w.dumps(suite.as_toml())
        if config.exists():
            held = read_text(config)
            if held != text:
                raise UserError(
                    f"'{out}' belongs to another configuration ({_hash_in(held)}, this is "
                    f"{suite.config_hash}); choose another --out, or --fresh to replace it"
                )
        else:
            write(config, text)


def _remove_own(out: Path) -> None:
    for name in OWN_NAMES:
        target = out / name
        if target.is_dir():
            shutil.rmtree(target)
        else:
            target.unlink(missing_ok=True)


def _hash_in(text: str) -> str:
    first = text.partition("\n")[0]
    return first.rpartition(" ")[2] or "unreadable"


def plan(workshop: Workshop) -> list[Planned]:
    """All cells of the suite in the order in which they run."""
    suite = workshop.suite
    cells = [Planned(Cell(arch="", stage="hardware"), 3.0, workshop.hardware)]
    train, mqar = suite.train, suite.mqar
    for arch in suite.archs:
        for scale in suite.scales:
            cell = Cell(arch=arch, stage="cost", scale=scale)
            cells.append(Planned(cell, 0.3, _bind(workshop.cost, cell)))
    if train is not None:
        for seed, scale in product(train.seeds, train.scales):
            for arch in suite.archs:
                cell = Cell(arch=arch, stage="train", scale=scale, seed=seed)
                steps = train.steps
                if seed == train.seeds[0] and len(train.learning_rates) > 1:
                    swept = len(train.learning_rates) * train.sweep_steps
                    steps = swept + steps * (train.sweep_steps != steps)
                cells.append(Planned(cell, 0.14 * steps, _bind(workshop.train, cell)))
    if mqar is not None:
        for seed in mqar.seeds:
            for arch in suite.archs:
                cell = Cell(arch=arch, stage="mqar", scale="mqar", seed=seed)
                cells.append(Planned(cell, 0.02 * mqar.steps, _bind(workshop.mqar, cell)))
    for index, decode in enumerate(suite.decode):
        for batch in decode.batches:
            for arch in suite.archs:
                cell = Cell(
                    arch=arch, stage="decode", scale=decode.scale, batch=batch, section=index
                )
                weight = 0.5 if decode.scale in suite.trained_scales else 5.0
                cells.append(Planned(cell, weight, _bind(workshop.decode, cell)))
    return cells


def _bind(
    work: Callable[[Cell, Watch], tuple[About, list[Row]]], cell: Cell
) -> Callable[[Watch], tuple[About, list[Row]]]:
    return lambda watch: work(cell, watch)


def run_suite(
    suite: Suite,
    out: Path,
    *,
    device: torch.device,
    fresh: bool = False,
    time_budget_s: float | None = None,
    progress: Progress,
) -> bool:
    """Run what is not done yet; True when all cells are recorded, False when the budget ended.

    Raises UserError on a folder of another configuration, bad input, or a full disk.
    """
    prepare_folder(suite, out, fresh=fresh)
    results = Results(out / "results.csv", provenance(suite.config_hash, device))
    deadline = None if time_budget_s is None else time.monotonic() + time_budget_s
    workshop = Workshop(suite, out, device, deadline)
    planned = plan(workshop)
    waiting = [p for p in planned if not results.done(p.cell)]
    with progress.over(sum(p.weight for p in waiting), len(waiting), len(planned)):
        for item in waiting:
            if deadline is not None and time.monotonic() >= deadline:
                return False
            label = " ".join(str(v) for v in _label(item.cell))
            with progress.cell(label, item.weight) as watch:
                about, rows = _guarded(item, watch, out)
                if rows is None:
                    return False
                results.append(item.cell, about, rows)
    return True


def _label(cell: Cell) -> Iterator[str]:
    yield cell.stage
    if cell.arch:
        yield cell.arch
    if cell.scale:
        yield f"@{cell.scale}"
    if cell.batch:
        yield f"batch {cell.batch}"
    if cell.seed:
        yield f"seed {cell.seed}"


def _guarded(item: Planned, watch: Watch, out: Path) -> tuple[About, list[Row] | None]:
    """The cell's rows, or one row that says how it failed; None when the budget stopped it."""
    try:
        return item.work(watch)
    except CellFailure as failure:
        if failure.stopped:
            return About(), None
        return failure.about, [Row(measure=CELL_FAILED, status=failure.status, note=str(failure))]
    except Exception as error:
        if out_of_memory(error):
            return About(), [Row(measure=CELL_FAILED, status=Status.OOM, note=_one_line(error))]
        if isinstance(error, UserError):
            # The user's to mend (a full disk, a bad corpus): finished cells stay, this one reruns.
            raise
        if isinstance(error, OSError) and error.errno in REFUSALS:
            # Not the architecture's fault: a row would say so for ever.
            why = refused(error, error.filename or out, "used")
            raise UserError(
                f"{why}; finished cells are kept, run the same command again to go on"
            ) from error
        with suppress(OSError), (out / "errors.log").open("a", encoding="utf-8") as log:
            log.write(f"{item.cell}\n{traceback.format_exc()}\n")
        note = f"{type(error).__name__}: {_one_line(error)}"
        return About(), [Row(measure=CELL_FAILED, status=Status.ERROR, note=note)]


def has_architecture(out: Path) -> bool:
    """Whether a run folder holds a row of an architecture."""
    results = out / "results.csv"
    return results.exists() and bool((load_long(results)["arch"] != "").any())


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
