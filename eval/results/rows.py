"""Rows of results: one measurement each, with what was measured, on what and by which code."""

import math
from dataclasses import dataclass, fields
from enum import StrEnum

from archs.errors import unknown_name
from eval.results.measures import MEASURES
from eval.results.point import Point


class Status(StrEnum):
    """How a point, or one of its figures, ended."""

    OK = "ok"
    OOM = "oom"
    NAN = "nan"
    INCORRECT = "incorrect"
    UNSUPPORTED = "unsupported"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """On which machine, by which code and when."""

    hardware: str
    driver: str
    torch: str
    triton: str
    commit: str
    config_hash: str
    started_at: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One figure of a point; low and high are its 95 % interval, and nothing else.

    options: instead of the point's own (`About.options`), where its figures differ in them.
    """

    measure: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 1
    batch: int | None = None
    context: int | None = None
    position: int | None = None
    status: Status = Status.OK
    note: str = ""
    options: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """What a point's rows are about, beside the point itself.

    family: one of `eval.results.families.Family`. options: what else sets their figures apart from
      others of the same measure and scale, as words of the form name=value.
    """

    pattern: str = ""
    family: str = ""
    params: int = 0
    corpus: str = ""
    tokens: int = 0
    dtype: str = "float32"
    weight_format: str = ""
    state_format: str = ""
    kernel_backend: str = "torch"
    options: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Steps:
    """The times of single steps at a context, in their order."""

    context: int
    step_ms: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """What measuring a point gave; stopped: a time budget ended it before it gave anything.

    steps, withheld: for the caller, and in no table: single steps, and figures of a point that
    failed, which has none.
    """

    about: About
    rows: tuple[Row, ...]
    stopped: bool = False
    steps: tuple[Steps, ...] = ()
    withheld: tuple[Row, ...] = ()

    @property
    def failure(self) -> Row | None:
        """The row that says how the point failed as a whole; None where it gave figures."""
        first = self.rows[0] if self.rows else None
        return first if first is not None and first.measure == CELL_FAILED else None


COLUMNS = [
    "cell", "row", "arch", "stage", "scale", "seed", "batch", "context", "position", "measure",
    "value", "low", "high", "n", "status", "note",
    *(f.name for f in fields(About)),
    *(f.name for f in fields(Provenance)), "schema",
]  # fmt: skip
NUMBERS = ("value", "low", "high")
#: Of the table that is written here (`eval.results.schema`).
SCHEMA = 6
#: The measure under which a point that gave nothing is recorded.
CELL_FAILED = "cell"
#: Stages that train a model: their figures follow from a recipe, and they are not timed.
TRAINED = ("train", "task")


def failed(status: Status, note: str) -> Row:
    """The one row of a point that gave nothing."""
    return Row(measure=CELL_FAILED, status=status, note=note)


def records(point: Point, found: Found, origin: Provenance) -> list[dict[str, object]]:
    """A point's rows as lines of the table. Raises UserError for a measure that nobody declared."""
    made = [_record(point, found.about, row, origin) for row in found.rows]
    return [{**line, "row": f"{n}/{len(made)}"} for n, line in enumerate(made, 1)]


def _record(point: Point, about: About, row: Row, origin: Provenance) -> dict[str, object]:
    if row.measure not in MEASURES and row.measure != CELL_FAILED:
        raise unknown_name("measure", row.measure, MEASURES)
    line: dict[str, object] = {
        "cell": point.key, "arch": point.arch, "stage": point.stage, "scale": point.scale,
        "seed": point.seed, "batch": point.batch, "context": 0, "schema": SCHEMA,
        **values(about), **values(origin),
    }  # fmt: skip
    line.update({k: v for k, v in values(row).items() if v is not None and k not in NUMBERS})
    # A line is a row, whoever reads it.
    line["note"] = " ".join(row.note.split())
    for name in NUMBERS:
        number = getattr(row, name)
        if number is not None and math.isfinite(number):
            line[name] = repr(float(number))
    if row.value is not None and not math.isfinite(row.value) and row.status == Status.OK:
        line["status"] = Status.NAN
    return line


def values(item: object) -> dict[str, object]:
    """A dataclass's fields by name, not copied."""
    return {f.name: getattr(item, f.name) for f in fields(item)}  # type: ignore[arg-type]
