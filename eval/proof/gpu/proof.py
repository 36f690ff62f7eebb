"""The proof on a GPU, resumable and within a time budget.

Correctness of every operation first; the times of one that fails are marked as incorrect, and a
baseline that computes something else is not timed. Then, by value, the decode steps and the cases
of all operations, ours and every installed baseline, against this device's measured copy bandwidth
and matrix rate. Rows that the files of `out` hold are not measured again, except errors and lack of
memory.
"""

import gc
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from archs.backends import resolve_backend
from archs.errors import UserError, unknown_name
from eval.measure.progress import Progress
from eval.measure.provenance import provenance
from eval.measure.site import Site
from eval.predict.cold import copies_for, time_cold
from eval.predict.machine import MOST_ROWS, ProductRate, Roofline, measure_roofline
from eval.proof.gpu import workers
from eval.proof.gpu.case import Case, Check, Op, Run, difference, guarded, lost, verdict
from eval.proof.gpu.decode_grid import COLUMNS as DECODE_COLUMNS
from eval.proof.gpu.decode_grid import KEY as DECODE_KEY
from eval.proof.gpu.decode_grid import POINTS, places, row_of
from eval.proof.gpu.table import Table
from eval.results.rows import Provenance, Status

FROM = tuple(f.name for f in fields(Provenance) if f.name != "config_hash")
CHECK_COLUMNS = ("op", "check", "status", "error", "limit", "note", *FROM)
OP_COLUMNS = (
    "op", "case", "backend", "status", "time_us", "low_us", "high_us", "bytes_per_s",
    "copy_fraction", "flops_per_s", "matrix_fraction", "moved_bytes", "flops", "method", "note",
    *FROM,
)  # fmt: skip
MACHINE_COLUMNS = ("measure", "value", *FROM)
#: Rows of the products that are measured: those of the grid's batches, and two, since one row has a
#: kernel of its own.
PRODUCT_ROWS = tuple(sorted({1, 2, *(min(batch, MOST_ROWS) for _, batch, _ in POINTS)}))
RATES = ("copy_bytes_per_s", "matrix_flops_per_s", "call_us", "read_bytes_per_s")
PRODUCTS = ("product_bytes_per_s", "product_launch_us")
OURS = "triton"
#: In the note of a cell that no later call may try, since it would end there, too.
FATAL = "the device was lost; remove this row to try it again"
#: Statuses that a new process or version may not repeat.
TRANSIENT = (Status.ERROR.value, Status.OOM.value, Status.INCORRECT.value)
#: How far a baseline in bf16 may be from ours, relative, for their times to be comparable.
AGREES = 3e-2


class Proof:
    """One proof in one folder.

    began_s: by the monotonic clock, from when on the budget counts; None: from now.
    workers: processes that checks run in, 0 for this one.
    Raises UserError where the folder holds other columns or another machine's rows.
    """

    def __init__(
        self, ops: Iterable[Op], out: Path, device: torch.device, *, budget_s: float | None,
        progress: Progress, workers: int = 0, began_s: float | None = None,
    ) -> None:  # fmt: skip
        resolve_backend(OURS, device)
        self.ops = list(ops)
        self.out = out
        self.device = device
        self.progress = progress
        self.workers = workers
        began_s = time.monotonic() if began_s is None else began_s
        self._deadline = None if budget_s is None else began_s + budget_s
        found = asdict(provenance("", device))
        self._from = {name: found[name] for name in FROM}
        self.checks = Table(out / "checks.csv", CHECK_COLUMNS, ("op", "check"), again)
        self.timings = Table(out / "kernels.csv", OP_COLUMNS, ("op", "case", "backend"), again)
        self.decode = Table(out / "decode.csv", (*DECODE_COLUMNS, *FROM), DECODE_KEY, again)
        self.machine = Table(out / "machine.csv", MACHINE_COLUMNS, ("measure",))
        self._require_one_machine()
        self._roofline: Roofline | None = None

    def _require_one_machine(self) -> None:
        """Raise UserError where the folder holds another machine's rates."""
        mine = self._from["hardware"]
        for table in (self.checks, self.timings, self.decode, self.machine):
            for other in {r["hardware"] for r in table.rows} - {mine}:
                raise UserError(
                    f"'{self.out}' holds results of {other}, this is {mine}; choose another --out"
                )

    @property
    def left_s(self) -> float | None:
        """Seconds of the budget that are left; None where there is no budget."""
        return None if self._deadline is None else self._deadline - time.monotonic()

    @property
    def over(self) -> bool:
        """Whether the budget is spent."""
        return self.left_s is not None and self.left_s <= 0

    @property
    def roofline(self) -> Roofline:
        """This device, measured once a folder."""
        if self._roofline is None:
            held = {r["measure"]: float(r["value"]) for r in self.machine.rows}
            products = [[f"{name}@{rows}" for name in PRODUCTS] for rows in PRODUCT_ROWS]
            # A row of a pass that was cut short is repeated, and the last one counts.
            if not {*RATES, *chain.from_iterable(products)} <= held.keys():
                r = measure_roofline(self.device, torch.bfloat16, PRODUCT_ROWS)
                rates = r.copy_bytes_per_s, r.matrix_flops_per_s, r.call_us, r.read_bytes_per_s
                held = dict(zip(RATES, rates, strict=True))
                for rows, names in zip(PRODUCT_ROWS, products, strict=True):
                    held |= zip(names, (r.bytes_per_s(rows), r.launch_us(rows)), strict=True)
                for measure, value in held.items():
                    self.machine.append({"measure": measure, "value": value, **self._from})
            copy, matrix, call_us, read = (held[name] for name in RATES)
            by_rows = tuple(
                ProductRate(rows, held[rate], held[launch])
                for rows, (rate, launch) in zip(PRODUCT_ROWS, products, strict=True)
            )
            self._roofline = Roofline(copy, matrix, torch.bfloat16, by_rows, call_us, read)
        return self._roofline

    # -- correctness -----------------------------------------------------------------------------

    def check(self) -> bool:
        """Run the checks that are not recorded; True when all of all operations passed."""
        waiting = [
            (op.name, check)
            for op in self.ops
            for check in op.checks
            if self.checks.find(op=op.name, check=check.name) is None
        ]
        with self.progress.over(len(waiting), len(waiting), len(waiting)):
            for op, check, found in self._verdicts(waiting):
                known = {"op": op, "check": check.name, "limit": check.limit}
                self.checks.append({**known, **found, **self._from})
        return all(
            (row := self.checks.find(op=op.name, check=check.name)) is not None
            and row["status"] == Status.OK
            for op in self.ops
            for check in op.checks
        )

    def _verdicts(
        self, waiting: Sequence[tuple[str, Check]]
    ) -> Iterator[tuple[str, Check, dict[str, object]]]:
        if self.workers:
            spread = workers.spread(waiting, self.device, self.workers, lambda: self.left_s)
            for op, check, row in spread:
                with self.progress.cell(f"check {op} {check.name}", 1.0) as watch:
                    watch.say(told(row))
                    yield op, check, row
            return
        for op, check in waiting:
            if self.over:
                return
            with self.progress.cell(f"check {op} {check.name}", 1.0) as watch:
                row = verdict(check, self.device)
                watch.say(told(row))
                yield op, check, row

    def _failed(self, op: Op) -> str | None:
        """Why an operation's times cannot be trusted; None if they can."""
        for check in op.checks:
            row = self.checks.find(op=op.name, check=check.name)
            if row is not None and row["status"] != Status.OK:
                return f"check {check.name}: {row['status']} {row['note']}".strip()
        return None

    def _checked(self, op: Op) -> bool:
        return all(self.checks.find(op=op.name, check=c.name) is not None for c in op.checks)

    # -- operations ------------------------------------------------------------------------------

    def bench(self, most_order: int | None = None) -> None:
        """Time the cases that are not recorded, in their order, up to `most_order`.

        A case is done when our own row is there, which comes last; of a case that was cut short
        only the missing rows are added. Cases of an operation with a check that has not run wait.
        Raises UserError where a fault has made the device useless.
        """
        pairs = ((op, case) for op in self.ops if self._checked(op) for case in op.cases)
        self._each([
            (op, case, None)
            for op, case in sorted(pairs, key=lambda pair: pair[1].order)
            if (most_order is None or case.order <= most_order)
            and self.timings.find(op=op.name, case=case.name, backend=OURS) is None
        ])  # fmt: skip

    def bench_late(self, most_order: int | None = None) -> None:
        """Time the late baselines of cases of which ours has been timed, up to `most_order`.

        The first ones of all cases come before the second ones of any, which are slower.
        """
        waiting = [
            (turn, op, case, name)
            for op in self.ops
            for case in op.cases
            if (most_order is None or case.order <= most_order)
            and self.timings.find(op=op.name, case=case.name, backend=OURS) is not None
            for turn, name in enumerate(case.late)
            if self.timings.find(op=op.name, case=case.name, backend=name) is None
        ]
        waiting.sort(key=lambda late: (late[0], late[2].order))
        self._each([late[1:] for late in waiting])

    def _each(self, waiting: Sequence[tuple[Op, Case, str | None]]) -> None:
        with self.progress.over(len(waiting), len(waiting), len(waiting)):
            for op, case, late in waiting:
                if self.over:
                    return
                with self.progress.cell(f"time {op.name} {case.name}", 1.0) as watch:
                    watch.say(self._time(op, case, late))

    def _time(self, op: Op, case: Case, late: str | None) -> str:
        """Time one late baseline, or all else not yet recorded, ours last; a line for the log."""
        rates = self.roofline
        said: list[str] = []
        made: dict[str, Any] = {}

        def make() -> dict[str, object]:
            made["copies"] = self._copies(case)
            made["ours"] = made["copies"][0][OURS]()
            return {}

        row = guarded(make)
        copies = made.get("copies", [{}])
        names = [late] if late else [n for n in copies[0] if n != OURS and n not in case.late]
        if row and lost(self.device):
            names = []
        for name in names if late else [*names, OURS]:
            if self.timings.find(op=op.name, case=case.name, backend=name) is not None:
                continue
            found = row
            if name != OURS or not row:
                timed = partial(self._timed, case, name, copies, made.get("ours"), rates)
                found = guarded(timed)
            failed = self._failed(op) if name == OURS else None
            if failed is not None:
                found = {**found, "status": Status.INCORRECT.value, "note": failed}
            fatal = lost(self.device)
            self._record(op, case, name, _fatal(found) if fatal else found)
            said.append(f"{name} {told(found)}")
            self._require(not fatal, f"{op.name} {case.name}")
        made.clear()
        copies.clear()
        _collect(self.device)
        return "; ".join(said)

    def _copies(self, case: Case) -> list[Mapping[str, Run]]:
        """Copies of the same operands, in different memory."""
        before = _held_bytes(self.device)
        built = [_build(case, self.device)]
        each_bytes = _held_bytes(self.device) - before
        count = copies_for(case.moved_bytes, each_bytes, self.device)
        return built + [_build(case, self.device) for _ in range(1, count)]

    def _timed(
        self, case: Case, name: str, copies: list[Mapping[str, Run]], ours: object, rates: Roofline
    ) -> dict[str, object]:
        """The row of one run; a baseline must first agree with ours, on operands as built."""
        if name != OURS and ours is None:
            return {"status": Status.ERROR.value, "note": "there is nothing of ours to agree with"}
        if name != OURS:
            away = difference(_build(case, self.device)[name](), ours)
            if not away <= AGREES:
                note = f"is {away:.2g} away from ours: it computes something else"
                return {"status": Status.INCORRECT.value, "note": note}
        runs = [copy[name] for copy in copies]
        timing = time_cold(runs, self.device)
        moved_per_s = case.moved_bytes / timing.median_s
        done_per_s = case.flops / timing.median_s
        return {
            "status": Status.OK.value,
            "time_us": timing.median_s * 1e6,
            "low_us": timing.low_s * 1e6,
            "high_us": timing.high_s * 1e6,
            "bytes_per_s": moved_per_s,
            "copy_fraction": moved_per_s / rates.copy_bytes_per_s,
            "flops_per_s": done_per_s,
            "matrix_fraction": done_per_s / rates.matrix_flops_per_s,
            "method": timing.method,
        }

    @staticmethod
    def _require(held: bool, what: str) -> None:
        if not held:
            raise UserError(
                f"{what} left the device in a fault that ends this process; it is recorded, run "
                "the same command again to go on after it"
            )

    def _record(self, op: Op, case: Case, backend: str, row: Mapping[str, object]) -> None:
        at = {"op": op.name, "case": case.name, "backend": backend}
        sizes = {"moved_bytes": case.moved_bytes, "flops": case.flops}
        self.timings.append({**at, **sizes, **row, **self._from})

    # -- whole steps -----------------------------------------------------------------------------

    def decode_grid(self, first: int | None = None, backends: Sequence[str] = (OURS,)) -> None:
        """Time the decode steps that are not recorded, in their order, or the first points'."""
        site = Site(None, self.device, roofline=self.roofline)
        waiting = [p for p in places(first, backends) if self.decode.find(**p.key) is None]
        with self.progress.over(len(waiting), len(waiting), len(waiting)):
            for place in waiting:
                if self.over:
                    return
                label = "decode {} @{} batch {} context {} {}".format(*place)
                with self.progress.cell(label, 1.0) as watch:
                    # Memory in reference cycles of an earlier cell must not count as this one's.
                    _collect(self.device)
                    row = guarded(partial(row_of, place, site))
                    fatal = lost(self.device)
                    row = _fatal(row) if fatal else row
                    self.decode.append({**place.key, **row, **self._from})
                    watch.say(told(row))
                    self._require(not fatal, label)


def again(row: Mapping[str, str]) -> bool:
    """Whether a cell of an earlier call is to be measured again."""
    return row["status"] in TRANSIENT and FATAL not in row["note"]


def _fatal(row: Mapping[str, object]) -> dict[str, object]:
    return {**row, "note": f"{row.get('note', '')}; {FATAL}".lstrip("; ")}


def told(row: Mapping[str, object]) -> str:
    """A row in a few words, for the log."""
    words = [str(row.get("status", ""))]
    for name, form in (
        ("error", "error {:.2g}"), ("time_us", "{:.1f} us"), ("copy_fraction", "copy {:.2f}"),
        ("matrix_fraction", "matrix {:.2f}"), ("tpot_p50_ms", "{:.3f} ms"), ("mbu", "mbu {:.2f}"),
        ("tpot_pred_ms", "predicted {:.3f} ms"), ("note", "{}"),
    ):  # fmt: skip
        if row.get(name) not in (None, ""):
            words.append(form.format(row[name]))
    return " ".join(words)


@contextmanager
def quick_collection() -> Iterator[None]:
    """In the body, garbage collection skips what is alive now, modules above all."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _collect(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _build(case: Case, device: torch.device) -> Mapping[str, Run]:
    torch.manual_seed(0)
    return case.build(device)


def _held_bytes(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def chosen(ops: Iterable[Op], names: Iterable[str]) -> Iterator[Op]:
    """The operations of these names, all when there are none. Raises UserError on unknown ones."""
    known = {op.name: op for op in ops}
    for name in names:
        if name not in known:
            raise unknown_name("operation", name, known)
    wanted = set(names)
    yield from (op for name, op in known.items() if not wanted or name in wanted)
