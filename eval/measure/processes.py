"""Points that train, in processes of one thread each, as many as there are cores.

Threads of one small model wait for each other, without end where another program has one of the
cores; processes do not. Small models leave most of a GPU idle, which several fill. A worker is
given a point as a line of JSON, says how far it is, and answers with what it found. What a worker
dies of ends its point alone.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import IO, Any

import torch

from archs.checks import parse
from archs.errors import UserError
from eval.measure import child
from eval.measure.progress import Progress, Watch
from eval.measure.site import Site
from eval.measure.stages import measure
from eval.results.point import Point
from eval.results.rows import About, Found, Status, failed


def cores() -> int:
    """How many processes can run at once here."""
    return len(os.sched_getaffinity(0))


def default_workers(device: torch.device) -> int:
    """One per core; on a GPU, whose memory and clock all would share, one."""
    return cores() if device.type == "cpu" else 1


class _Worker:
    """A process, the point that it is at, and how far it is."""

    def __init__(self, command: Sequence[str], said: "SimpleQueue[tuple[_Worker, str]]") -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=child.environment(),
        )  # fmt: skip
        self.point: Point | None = None
        Thread(target=self._listen, args=(said,), daemon=True).start()

    def _listen(self, said: "SimpleQueue[tuple[_Worker, str]]") -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            said.put((self, line))
        said.put((self, ""))

    def begin(self, point: Point) -> None:
        """Give it a point."""
        self.point, self.began_s = point, time.monotonic()
        self.fraction, self.text = 0.0, ""
        assert self.process.stdin is not None
        # One that has died says so by the end of its output.
        with suppress(BrokenPipeError):
            print(point.to_json(), file=self.process.stdin, flush=True)

    def hear(self, line: str) -> Found | None:
        """The outcome of a point in a worker's line; None if the line only reports progress."""
        if not line.endswith("\n"):
            code = self.process.wait()
            status = Status.OOM if code == -signal.SIGKILL else Status.ERROR
            return Found(
                about=About(), rows=(failed(status, f"its process ended with {_end(code)}"),)
            )
        said: dict[str, Any] = json.loads(line)
        if "fraction" in said:
            self.fraction, self.text = said["fraction"], said["text"]
            return None
        if "error" in said:
            raise UserError(said["error"])
        return parse(Found, said, "a worker's answer")


def side_by_side(
    points: Sequence[Point], weights: Mapping[Point, float], site: Site, workers: int,
    progress: Progress,
) -> Iterator[tuple[Point, Found]]:  # fmt: skip
    """Each point with what was found as it ends; stopped where the time budget ended it.

    Points of one architecture and scale are measured in order, since they share a sweep of rates;
    of others the longest first, as far as weights and earlier points of its architecture tell.
    Raises UserError where a point did.
    """
    expected = dict(weights)
    command = child.command(
        "eval.measure.processes",
        str(site.folder),
        str(site.cache),
        str(site.device),
        repr(site.deadline),
    )
    said: SimpleQueue[tuple[_Worker, str]] = SimpleQueue()
    waiting, running, idle = list(points), list[_Worker](), list[_Worker]()
    try:
        while waiting or running:
            while (
                len(running) < workers and (point := _next(waiting, expected, running)) is not None
            ):
                waiting.remove(point)
                worker = idle.pop() if idle else _Worker(command, said)
                worker.begin(point)
                running.append(worker)
            worker, line = said.get()
            if worker.point is None:
                # The end of one that had nothing to do.
                idle.remove(worker)
                continue
            point, found = worker.point, worker.hear(line)
            if found is None:
                _show(running, weights, progress)
                continue
            running.remove(worker)
            if line:
                worker.point = None
                idle.append(worker)
            if found.stopped:
                waiting.clear()
            seconds = time.monotonic() - worker.began_s
            progress.done(point.label, weights[point], seconds, worker.text)
            for later in waiting:
                if later.arch == point.arch:
                    expected[later] = weights[later] * seconds / weights[point]
            yield point, found
    finally:
        for worker in [*idle, *running]:
            worker.process.kill()
            worker.process.wait()


def _next(
    waiting: Sequence[Point], expected: Mapping[Point, float], running: Sequence[_Worker]
) -> Point | None:
    """The longest point that no earlier one of its architecture and scale is still at, so that no
    core is left alone with a long one at the end; of equals the first.
    """
    taken = {_sweep(w.point) for w in running if w.point is not None}
    heads = dict[tuple[str, str, str], Point]()
    for point in waiting:
        heads.setdefault(_sweep(point), point)
    free = [point for sweep, point in heads.items() if sweep not in taken]
    return max(free, key=expected.__getitem__, default=None)


def _sweep(point: Point) -> tuple[str, str, str]:
    return point.stage, point.arch, point.scale


def _end(code: int) -> str:
    if code < 0:
        return f"signal {signal.Signals(-code).name}, as when memory runs out"
    return f"exit code {code}"


def _show(running: Sequence[_Worker], weights: Mapping[Point, float], progress: Progress) -> None:
    done = [(w.point, w.fraction) for w in running if w.point is not None]
    labels = ", ".join(f"{point.label} {100 * fraction:.0f} %" for point, fraction in done)
    progress.show(sum(fraction * weights[point] for point, fraction in done), "", labels)


class _Told(Watch):
    """A point's line, kept by the process that started this one."""

    def __init__(self, told: IO[str]) -> None:
        self.told = told

    def at(self, fraction: float, text: str = "") -> None:
        """The point is `fraction` done."""
        _say(self.told, {"fraction": fraction, "text": text})


def _say(told: IO[str], what: dict[str, Any]) -> None:
    try:
        print(json.dumps(what), file=told, flush=True)
    except BrokenPipeError:
        # The process that waited for this point is gone.
        os._exit(1)


def _main(folder: str, cache: str, device_name: str, deadline: str) -> None:
    """Measure the points that standard input names, until it ends."""
    # Ctrl-C is for the process that started this one, which ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    # What libraries print must not stand between the answers.
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    site = Site(
        Path(folder), torch.device(device_name), cache=Path(cache),
        deadline=None if deadline == "None" else float(deadline),
    )  # fmt: skip
    for line in sys.stdin:
        try:
            found = measure(Point.from_json(line), site, _Told(told))
        except UserError as error:
            _say(told, {"error": str(error)})
            return
        _say(told, asdict(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
