"""Trained cells of a suite in processes of one thread each, as many as there are cores.

Threads of one small model wait for each other, without end where another program has one of the
cores; processes do not. Small models leave most of a GPU idle, which several fill. A worker is
given a cell as a line of JSON, says how far it is, and answers with the cell's rows. What a worker
dies of ends its cell alone.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import IO, Any

import torch

from archs.errors import UserError
from eval import child
from eval.cells import Workshop
from eval.plan import Planned, guarded, plan
from eval.progress import Progress, Watch
from eval.results import CELL_FAILED, About, Cell, Row, Status
from eval.suite import load_suite

Found = tuple[About, list[Row] | None]


def cores() -> int:
    """How many processes can run at once here."""
    return len(os.sched_getaffinity(0))


def default_workers(device: torch.device) -> int:
    """One per core; on a GPU, whose memory and clock all would share, one."""
    return cores() if device.type == "cpu" else 1


class _Worker:
    """A process, the cell that it is at, and how far it is."""

    def __init__(self, command: Sequence[str], said: "SimpleQueue[tuple[_Worker, str]]") -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=child.environment(),
        )  # fmt: skip
        self.item: Planned | None = None
        Thread(target=self._listen, args=(said,), daemon=True).start()

    def _listen(self, said: "SimpleQueue[tuple[_Worker, str]]") -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said.put((self, line))
        said.put((self, ""))

    def begin(self, item: Planned) -> None:
        """Give it a cell."""
        self.item, self.began_s = item, time.monotonic()
        self.fraction, self.text = 0.0, ""
        assert self.process.stdin is not None
        # One that has died says so by the end of its output.
        with suppress(BrokenPipeError):
            print(json.dumps(asdict(item.cell)), file=self.process.stdin, flush=True)

    def hear(self, line: str) -> Found | None:
        """What a line says of its cell; None where it has only come further."""
        if not line.endswith("\n"):
            code = self.process.wait()
            status = Status.OOM if code == -signal.SIGKILL else Status.ERROR
            note = f"its process ended with {_end(code)}"
            return About(), [Row(measure=CELL_FAILED, status=status, note=note)]
        said: dict[str, Any] = json.loads(line)
        if "fraction" in said:
            self.fraction, self.text = said["fraction"], said["text"]
            return None
        if "error" in said:
            raise UserError(said["error"])
        rows = said["rows"]
        return About(**said["about"]), None if rows is None else [_row(row) for row in rows]


def side_by_side(
    items: Sequence[Planned], out: Path, device: torch.device, deadline: float | None,
    workers: int, progress: Progress,
) -> Iterator[tuple[Planned, Found]]:  # fmt: skip
    """Each cell with its rows as it ends; rows are None where the time budget stopped it.

    Cells of one architecture and scale run in order, since they share a sweep of rates.
    deadline: by the monotonic clock. Raises UserError where a cell did.
    """
    command = child.command("eval.processes", str(out), str(device), repr(deadline))
    said: SimpleQueue[tuple[_Worker, str]] = SimpleQueue()
    waiting, running, idle = list(items), list[_Worker](), list[_Worker]()
    try:
        while waiting or running:
            while len(running) < workers and (item := _next(waiting, running)) is not None:
                waiting.remove(item)
                worker = idle.pop() if idle else _Worker(command, said)
                worker.begin(item)
                running.append(worker)
            worker, line = said.get()
            if worker.item is None:
                # The end of one that had nothing to do.
                idle.remove(worker)
                continue
            item, found = worker.item, worker.hear(line)
            if found is None:
                _show(running, progress)
                continue
            running.remove(worker)
            if line:
                worker.item = None
                idle.append(worker)
            if found[1] is None:
                waiting.clear()
            progress.done(item.label, item.weight, time.monotonic() - worker.began_s, worker.text)
            yield item, found
    finally:
        for worker in [*idle, *running]:
            worker.process.kill()
            worker.process.wait()


def _next(waiting: Sequence[Planned], running: Sequence[_Worker]) -> Planned | None:
    """The first cell that no earlier one of its architecture and scale is still at."""
    taken = {_sweep(w.item.cell) for w in running if w.item is not None}
    return next((item for item in waiting if _sweep(item.cell) not in taken), None)


def _sweep(cell: Cell) -> tuple[str, str, str]:
    return cell.stage, cell.arch, cell.scale


def _end(code: int) -> str:
    if code < 0:
        return f"signal {signal.Signals(-code).name}, as when memory runs out"
    return f"exit code {code}"


def _row(values: dict[str, Any]) -> Row:
    return Row(**{**values, "status": Status(values["status"])})


def _show(running: Sequence[_Worker], progress: Progress) -> None:
    done = [(w.item, w.fraction) for w in running if w.item is not None]
    labels = ", ".join(f"{item.label} {100 * fraction:.0f} %" for item, fraction in done)
    progress.show(sum(fraction * item.weight for item, fraction in done), "", labels)


class _Told(Watch):
    """A cell's line, kept by the process that started this one."""

    def __init__(self, told: IO[str]) -> None:
        self.told = told

    def at(self, fraction: float, text: str = "") -> None:
        """The cell is `fraction` done."""
        _say(self.told, {"fraction": fraction, "text": text})


def _say(told: IO[str], what: dict[str, Any]) -> None:
    try:
        print(json.dumps(what), file=told, flush=True)
    except BrokenPipeError:
        # Nobody waits for this cell any more.
        os._exit(1)


def _main(folder: str, device_name: str, deadline: str) -> None:
    """Work on the cells that standard input names, until it ends."""
    # Ctrl-C is for the process that started this one, which ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    # What libraries print must not stand between the answers.
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    out = Path(folder)
    until = None if deadline == "None" else float(deadline)
    suite = load_suite(str(out / "config.toml"))
    planned = {p.cell: p for p in plan(Workshop(suite, out, torch.device(device_name), until))}
    for line in sys.stdin:
        try:
            about, rows = guarded(planned[Cell(**json.loads(line))], _Told(told), out)
        except UserError as error:
            _say(told, {"error": str(error)})
            return
        _say(
            told,
            {"about": asdict(about), "rows": rows if rows is None else [asdict(r) for r in rows]},
        )


if __name__ == "__main__":
    _main(*sys.argv[1:])
