"""The long table of results: one measurement a row, appended atomically, never lost.

A row says what was measured, on what and by which code. A killed process leaves an append whole
or, once the file is opened again, absent: each row is numbered within its append (`row` is "2/9").
A cell that is in the table is not run again. A failed cell is a row with a status.
"""

import csv
import io
import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

import torch

from archs.errors import UserError, unknown_name
from archs.files import write
from eval.measures import MEASURES


class Status(StrEnum):
    """How a cell ended."""

    OK = "ok"
    OOM = "oom"
    NAN = "nan"
    INCORRECT = "incorrect"
    UNSUPPORTED = "unsupported"
    ERROR = "error"


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Where a row comes from; the same for all rows of one run on one machine."""

    hardware: str
    driver: str
    torch: str
    triton: str
    commit: str
    config_hash: str
    started_at: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """What is run and recorded as one. section: which of the suite's sections of that stage."""

    arch: str
    stage: str
    scale: str = ""
    seed: int = 0
    batch: int = 0
    section: int = 0

    @property
    def key(self) -> str:
        """By which a finished cell is known."""
        where = f"{self.scale}/seed{self.seed}/batch{self.batch}"
        return f"{self.stage}{self.section}/{self.arch}/{where}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One measurement of a cell; low and high are its 95 % interval, and nothing else."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """What the rows of a cell are about, beside its key."""

    pattern: str = ""
    params: int = 0
    corpus: str = ""
    tokens: int = 0
    dtype: str = "float32"
    kernel_backend: str = "torch"


COLUMNS = [
    "cell", "row", "arch", "stage", "scale", "seed", "batch", "context", "position", "measure",
    "value", "low", "high", "n", "status", "note",
    *(f.name for f in fields(About)),
    *(f.name for f in fields(Provenance)), "schema",
]  # fmt: skip
NUMBERS = ("value", "low", "high")
#: Of the table that is written here (`eval.schema`).
SCHEMA = 3
#: The measure under which a cell that produced nothing is recorded.
CELL_FAILED = "cell"
#: Stages that train a model: their figures follow from a recipe, and their cells are not timed.
TRAINED = ("train", "mqar")


class Results:
    """The results file of one run. Raises UserError when another configuration wrote it."""

    def __init__(self, path: Path, provenance: Provenance) -> None:
        self.path = path
        self.provenance = provenance
        self._done: set[str] = set()
        if path.exists():
            self._heal()
            self._load_done()

    def done(self, cell: Cell) -> bool:
        """Whether the cell has been recorded, whatever its status."""
        return cell.key in self._done

    def drop(self, unwanted: Callable[[dict[str, str]], bool]) -> int:
        """Remove the cells of which a row is unwanted, all rows; returns how many cells."""
        if not self.path.exists():
            return 0
        with self.path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        gone = {line["cell"] for line in lines if unwanted(line)}
        if not gone:
            return 0
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(line for line in lines if line["cell"] not in gone)
        write(self.path, text.getvalue())
        self._done -= gone
        return len(gone)

    def append(self, cell: Cell, about: About, rows: Iterable[Row]) -> None:
        """Record a cell, all rows or none. Raises UserError when the disk refuses."""
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        if not self.path.exists() or self.path.stat().st_size == 0:
            writer.writeheader()
        records = [self._record(cell, about, row) for row in rows]
        for number, record in enumerate(records, 1):
            writer.writerow({**record, "row": f"{number}/{len(records)}"})
        self._write(text.getvalue().encode())
        self._done.add(cell.key)

    def _record(self, cell: Cell, about: About, row: Row) -> dict[str, object]:
        if row.measure not in MEASURES and row.measure != CELL_FAILED:
            raise unknown_name("measure", row.measure, MEASURES)
        record: dict[str, object] = {
            "cell": cell.key, "arch": cell.arch, "stage": cell.stage, "scale": cell.scale,
            "seed": cell.seed, "batch": cell.batch, "context": 0, "schema": SCHEMA,
            **_values(about), **_values(self.provenance),
        }  # fmt: skip
        record.update({k: v for k, v in _values(row).items() if v is not None and k not in NUMBERS})
        # A line is a row: that is what healing relies on.
        record["note"] = " ".join(row.note.split())
        for name in NUMBERS:
            number = getattr(row, name)
            if number is not None and math.isfinite(number):
                record[name] = repr(float(number))
        if row.value is not None and not math.isfinite(row.value) and row.status == Status.OK:
            record["status"] = Status.NAN
        return record

    def _write(self, content: bytes) -> None:
        before = self.path.stat().st_size if self.path.exists() else 0
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"'{self.path}' cannot be written: {error.strerror}") from error
        try:
            written = os.write(handle, content)
            if written != len(content):
                raise OSError(28, "No space left on device")
            os.fsync(handle)
        except OSError as error:
            os.ftruncate(handle, before)
            raise UserError(
                f"'{self.path}' could not take {len(content)} bytes more: {error.strerror}; "
                "earlier results are intact, free some space and run again"
            ) from error
        finally:
            os.close(handle)

    def _heal(self) -> None:
        """Drop what a killed process left of its last append: a torn line, rows before it."""
        content = self.path.read_bytes()
        lines = content.splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        if len(lines) > 1:
            text = lines[-1].decode(errors="replace")
            last = dict(zip(COLUMNS, next(csv.reader([text])), strict=False))
            place, _, total = last.get("row", "").partition("/")
            if place.isdecimal() and place != total:
                del lines[-int(place) :]
        kept = sum(map(len, lines))
        if kept < len(content):
            with self.path.open("r+b") as file:
                file.truncate(kept)
                os.fsync(file.fileno())

    def _load_done(self) -> None:
        if self.path.stat().st_size == 0:
            return
        with self.path.open(newline="", encoding="utf-8", errors="replace") as file:
            lines = csv.DictReader(file)
            if lines.fieldnames != COLUMNS:
                raise UserError(
                    f"'{self.path}' was written with other columns than schema {SCHEMA} has; "
                    "choose another --out, or --fresh to replace it"
                )
            held = list(lines)
        mine = self.provenance.config_hash
        for other in {line["config_hash"] for line in held} - {mine}:
            raise UserError(
                f"'{self.path.parent}' holds results of another configuration ({other}, this is "
                f"{mine}); choose another --out, or --fresh to replace it"
            )
        self._done = {line["cell"] for line in held}


def _values(item: object) -> dict[str, object]:
    return {f.name: getattr(item, f.name) for f in fields(item)}  # type: ignore[arg-type]


def provenance(config_hash: str, device: torch.device) -> Provenance:
    """This machine and this code, now."""
    try:
        from importlib.metadata import version

        triton_version = version("triton")
    except ModuleNotFoundError:
        triton_version = ""
    driver = ""
    if device.type == "cuda":
        driver = f"CUDA {torch.version.cuda}"
    return Provenance(
        hardware=hardware_name(device),
        driver=driver,
        torch=torch.__version__,
        triton=triton_version,
        commit=_commit(),
        config_hash=config_hash,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def hardware_name(device: torch.device) -> str:
    """GPU name, or CPU model with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model}, {torch.get_num_threads()} threads"


def _commit() -> str:
    """What the file COMMIT says, which whoever copies a tree without git writes; else git.

    "unknown" where git knows no repository of this very tree: one around the place where this is
    installed, or one that GIT_DIR names, is somebody else's.
    """
    root = Path(__file__).parent.parent
    told = root / "COMMIT"
    if told.is_file():
        return told.read_text(encoding="utf-8").strip()
    top = _git(root, "rev-parse", "--show-toplevel")
    if not top or Path(top).resolve() != root.resolve():
        return "unknown"
    return _git(root, "describe", "--always", "--dirty", "--exclude", "*") or "unknown"


def _git(root: Path, *arguments: str) -> str:
    """What git prints about the tree at `root`, whatever the environment says; "" if it cannot."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        found = subprocess.run(
            ["git", *arguments], cwd=root, env=own, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def as_mapping(row: Row) -> Mapping[str, object]:
    """A row as a plain mapping, for scripts."""
    return _values(row)
