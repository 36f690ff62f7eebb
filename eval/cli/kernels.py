"""`decodebench kernels`: compile our kernels ahead of time, and prove them on a GPU."""

import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from archs.errors import UserError
from eval.cli.console import err, out
from eval.cli.options import FAILED, leave
from eval.cli.show import Json, show, write_csv

if TYPE_CHECKING:
    from eval.proof.gpu.proof import Proof

#: How much longer than the budget the last cell may take.
GRACE_S = 15.0
#: The decode grid's name in the table.
STEP = "decode step"
BUDGET = "Stop cleanly after, e.g. 9m; the same command goes on."
OUT = "CSV, whose unchanged rows are kept; of a proof DIR, default leaderboards/GPU/DATE."
PREPARE = "Compile all that --check and --bench launch into this folder; no GPU needed."


def kernels(
    target: Annotated[
        list[str] | None, typer.Option(help="Default: sm_90; of --all: each.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All configurations.")] = False,
    check: Annotated[bool, typer.Option("--check", help="On a GPU: against oracles.")] = False,
    bench: Annotated[bool, typer.Option("--bench", help="On a GPU: time, baselines too.")] = False,
    op: Annotated[list[str] | None, typer.Option(help="Only these; default: all.")] = None,
    suite: Annotated[str, typer.Option(help="Run after --bench; none: no suite.")] = "base",
    plan: Annotated[bool, typer.Option("--plan", help="List what --bench would time.")] = False,
    time_budget: Annotated[str | None, typer.Option(help=BUDGET)] = None,
    prepare: Annotated[Path | None, typer.Option(help=PREPARE)] = None,
    cache: Annotated[Path | None, typer.Option(help="Take the kernels that lie here.")] = None,
    out_path: Annotated[
        Path | None,
        typer.Option("--out", help=OUT),
    ] = None,
    json_: Json = False,
) -> None:
    """Compile our Triton kernels ahead of time, or check and time them on a GPU."""
    # Budgets count from here: importing torch can take many seconds.
    began_s = time.monotonic()
    if prepare is not None:
        _prepare(prepare, op or [], target or [])
        return
    if cache is not None:
        from eval.proof.gpu.cache import use

        err.print(f"{use(cache)} prepared kernels are in Triton's cache")
    if plan:
        rows = planned(op or [])
    elif check or bench:
        rows, over = _prove(bench, op or [], suite, time_budget, out_path, json_, began_s)
        show(rows, json_)
        ours = (row["status"] for row in rows if row["backend"] in ("", "triton"))
        leave(ours, finished=not over)
        return
    else:
        import pandas as pd

        from eval.measure.progress import Progress
        from eval.proof.kernel_table import cells, kernel_table, read_table
        from kernels.aot.ahead import TARGETS

        targets = target or (list(TARGETS) if every else ["sm_90"])
        wanted = cells(targets, every=every, ops=op or [])
        known = read_table(out_path) if out_path is not None else {}

        def keep(found: list[dict[str, Any]]) -> None:
            if out_path is not None:
                write_csv(pd.DataFrame(found), out_path)

        rows = kernel_table(wanted, known, progress=Progress(err, quiet=json_), keep=keep)
    if out_path is not None:
        import pandas as pd

        write_csv(pd.DataFrame(rows), out_path)
    faulty = [row for row in rows if row.get("faults")]
    if out_path is None or json_ or faulty:
        show(rows if out_path is None else faulty, json_)
    if out_path is not None and not json_:
        out.print(f"{len(rows)} rows in '{out_path}'", markup=False)
    if faulty:
        raise typer.Exit(FAILED)


def _prepare(folder: Path, names: list[str], targets: list[str]) -> None:
    from eval.proof.gpu.cache import TARGET, prepare
    from eval.proof.gpu.ops import OPS
    from eval.proof.gpu.proof import chosen

    for target in targets:
        if target != TARGET:
            raise UserError(f"--prepare compiles for {TARGET} only, not for '{target}'")
    list(chosen(OPS, names))
    report = prepare(folder, names)
    count, seconds = len(report["kernels"]), report["compile_s"]
    out.print(f"{count} kernels in '{folder}', {seconds:.0f} s of compilation")
    for kind, found in report["not_ok"].items():
        for line in found:
            out.print(f"{kind}: {line}")
    for kind, what in report["faults"]:
        out.print(f"in a capture: {kind} {what}")
    if report["faults"]:
        raise typer.Exit(FAILED)


def planned(names: list[str]) -> list[dict[str, object]]:
    """Every cell that the proof would time, not measured."""
    from eval.proof.gpu.decode_grid import places
    from eval.proof.gpu.ops import OPS
    from eval.proof.gpu.proof import OURS, chosen

    ops = list(chosen(OPS, names))
    pairs = sorted(((o, c) for o in ops for c in o.cases), key=lambda pair: pair[1].order)
    cells = [(o.name, case.name, OURS) for o, case in pairs]
    if not names:
        cells += [(STEP, _step_name(p._asdict()), p.backend) for p in places()]
    return [
        {"op": o, "case": case, "backend": backend, "status": "not measured"}
        for o, case, backend in cells
    ]


def _step_name(cell: Mapping[str, object]) -> str:
    return "{arch} {scale} batch {batch} context {context}".format(**cell)


def _prove(
    bench: bool, names: list[str], suite: str, time_budget: str | None, out_path: Path | None,
    quiet: bool, began_s: float,
) -> tuple[list[dict[str, Any]], bool]:  # fmt: skip
    """Run the proof; returns the rows of what was checked or timed, recorded ones included, and
    whether the budget ended first.
    """
    import torch

    from eval.cli.options import parse_duration_s, resolve_device
    from eval.measure.progress import Progress
    from eval.proof.gpu import workers
    from eval.proof.gpu.long import write_results
    from eval.proof.gpu.ops import OPS
    from eval.proof.gpu.proof import Proof, chosen, quick_collection
    from eval.results.lock import only_writer

    ops = list(chosen(OPS, names))
    budget_s = parse_duration_s(time_budget)
    if not torch.cuda.is_available():
        raise UserError(
            "--check and --bench need a CUDA device, and this machine has none; without these "
            "options the kernels are compiled ahead of time, and --plan lists what would be timed"
        )
    folder = out_path or _default_folder()
    with only_writer(folder):
        proof = Proof(
            ops, folder, resolve_device("cuda"), budget_s=budget_s,
            progress=Progress(err, quiet=quiet), workers=workers.count(), began_s=began_s,
        )  # fmt: skip
        try:
            with quick_collection(), interrupted_after(proof.left_s):
                # A kernel that was not checked is not timed, so --bench checks too.
                proof.check()
                if bench:
                    _bench(proof, names, suite)
        except BudgetOverError:
            console = proof.progress.console
            console.print("the time budget ended within a cell, which is not recorded")
        finally:
            write_results(folder)
    if proof.over and not quiet:
        out.print("the time budget ended; run the same command again to go on")
    return summary(proof, bench), proof.over


def _bench(proof: "Proof", names: Sequence[str], suite: str) -> None:
    """The most valuable first, so that a short budget leaves a small table of everything."""
    if not names:
        proof.decode_grid(first=1)
    proof.bench(most_order=0)
    if not names:
        proof.decode_grid(first=3)
    proof.bench(most_order=1)
    proof.bench_late(most_order=0)
    if not names:
        proof.decode_grid(first=8)
    proof.bench()
    if not names:
        proof.decode_grid()
    proof.bench_late()
    if not names:
        proof.decode_grid(backends=("sdpa",))
        _run_suite(proof.left_s, suite, proof.out, proof.device, proof.progress)


class BudgetOverError(BaseException):
    """The budget ended, and a cell has not; no `except Exception` may take it for the cell's."""


@contextmanager
def interrupted_after(left_s: float | None) -> Iterator[None]:
    """Raises BudgetOverError in the body once the budget and a little more have passed."""
    if left_s is None:
        yield
        return

    def stop(signum: int, frame: object) -> None:
        raise BudgetOverError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(left_s, 0.0) + GRACE_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def summary(proof: "Proof", bench: bool) -> list[dict[str, Any]]:
    """Rows of a proof's folder: all checks, or the failed ones and the times.

    error: of a check, relative; fractions: of this device's copy bandwidth and matrix rate.
    """
    rows: list[dict[str, Any]] = [
        {"op": r["op"], "case": f"check {r['check']}", "backend": "", "status": r["status"],
         "error": _number(r["error"]), "note": r["note"]}
        for r in proof.checks.rows
        if not bench or r["status"] != "ok"
    ]  # fmt: skip
    if not bench:
        return rows
    rows += [
        {"op": r["op"], "case": r["case"], "backend": r["backend"], "status": r["status"],
         "time_us": _number(r["time_us"]), "copy_fraction": _number(r["copy_fraction"]),
         "matrix_fraction": _number(r["matrix_fraction"]), "note": r["note"]}
        for r in proof.timings.rows
    ]  # fmt: skip
    for r in proof.decode.rows:
        ms = _number(r["tpot_p50_ms"])
        rows.append(
            {"op": STEP, "case": _step_name(r), "backend": r["kernel_backend"],
             "status": r["status"], "time_us": None if ms is None else ms * 1e3,
             "copy_fraction": _number(r["mbu"]), "matrix_fraction": _number(r["mfu"]),
             "note": r["note"]}
        )  # fmt: skip
    return rows


def _number(text: str) -> float | None:
    return float(text) if text else None


def _default_folder() -> Path:
    """leaderboards/<gpu>/<date>: a proof of the same day goes on there."""
    import torch

    name = "-".join(torch.cuda.get_device_name().lower().split())
    return Path("leaderboards") / name / date.today().isoformat()


def _run_suite(left_s: float | None, suite: str, folder: Path, device: Any, progress: Any) -> None:
    if suite == "none" or (left_s is not None and left_s <= 0):
        return
    # What these import need not be installed where only kernels are proven.
    from eval.cli.pages import write_report
    from eval.measure.run import has_architecture, run_suite
    from eval.measure.suite import load_suite

    chosen_suite = load_suite(suite)
    where = folder / chosen_suite.name
    run_suite(
        chosen_suite, where, device=device, fresh=False, time_budget_s=left_s, progress=progress
    )
    if has_architecture(where):
        write_report(where)
