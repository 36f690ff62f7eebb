"""The cells of a suite in the order in which they run, and what becomes of one that fails."""

import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from archs.errors import UserError
from archs.files import REFUSALS, refused
from eval.cells import CellFailure, Workshop
from eval.decode import out_of_memory
from eval.progress import Watch
from eval.results import CELL_FAILED, About, Cell, Row, Status
from infer.sampling import NoTokenError


@dataclass(frozen=True, slots=True)
class Planned:
    """A cell, roughly how long it takes relative to others, and the work itself."""

    cell: Cell
    weight: float
    work: Callable[[Watch], tuple[About, list[Row]]]

    @property
    def label(self) -> str:
        """What a person reads of the cell."""
        return " ".join(_words(self.cell))


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


def _words(cell: Cell) -> Iterator[str]:
    yield cell.stage
    if cell.arch:
        yield cell.arch
    if cell.scale:
        yield f"@{cell.scale}"
    if cell.batch:
        yield f"batch {cell.batch}"
    if cell.seed:
        yield f"seed {cell.seed}"


def guarded(item: Planned, watch: Watch, out: Path) -> tuple[About, list[Row] | None]:
    """The cell's rows, or one row that says how it failed; None when the budget stopped it.

    Raises UserError on what the user can mend (a full disk, a bad corpus): the cell runs again.
    """
    try:
        return item.work(watch)
    except CellFailure as failure:
        if failure.stopped:
            return About(), None
        return failure.about, [_failed(failure.status, str(failure))]
    except Exception as error:
        if out_of_memory(error):
            return About(), [_failed(Status.OOM, _one_line(error))]
        if isinstance(error, NoTokenError):
            return About(), [_failed(Status.NAN, _one_line(error))]
        if isinstance(error, UserError):
            raise
        if isinstance(error, OSError) and error.errno in REFUSALS:
            # Not the architecture's fault: a row would say so for ever.
            why = refused(error, error.filename or out, "used")
            raise UserError(
                f"{why}; finished cells are kept, run the same command again to go on"
            ) from error
        with suppress(OSError), (out / "errors.log").open("a", encoding="utf-8") as log:
            log.write(f"{item.cell}\n{traceback.format_exc()}\n")
        return About(), [_failed(Status.ERROR, f"{type(error).__name__}: {_one_line(error)}")]


def _failed(status: Status, note: str) -> Row:
    return Row(measure=CELL_FAILED, status=status, note=note)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
