"""A hundred runs of one folder that are killed, that find no space or that find another one there:
what was finished stays as it is, and the last run finishes the rest.
"""

import errno
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from archs.errors import UserError
from eval.measure.plan import points
from eval.measure.progress import Watch
from eval.measure.provenance import provenance
from eval.measure.site import Site
from eval.measure.stages import STAGES
from eval.measure.suite import Suite
from eval.results.folder import Results
from eval.results.point import Point
from eval.results.rows import CELL_FAILED, About, Found, Row
from eval.results.schema import check_long
from tests.eval.micro import cells_of, run
from tests.eval.test_decode import CPU
from tests.eval.test_processes import wait_until, workers_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("stub_roofline")]
REFUSED = 2


def instead(point: Point, site: Site, watch: Watch) -> Found:
    """A measurement that takes a moment and writes a checkpoint, as training does."""
    folder = site.work_folder(point)
    folder.mkdir(parents=True, exist_ok=True)
    time.sleep(0.01)
    (folder / "checkpoint").write_text(point.key)
    return Found(about=About(), rows=(Row(measure="train_loss", value=point.seed + 1.0),))


def forked(work: Callable[[], object]) -> int:
    """The process that does this work; its exit code is 0, or `REFUSED` where the user is told."""
    process = os.fork()
    if process:
        return process
    try:
        work()
    except UserError:
        os._exit(REFUSED)
    except BaseException:
        os._exit(1)
    os._exit(0)


def code_of(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


class Folder:
    """A run folder, and what must never change in it."""

    def __init__(self, out: Path, suite: Suite) -> None:
        self.out = out
        self.wanted = list(points(suite, "cpu"))
        self.origin = provenance(suite.config_hash, CPU)
        self._finished: dict[Path, tuple[int, bytes]] = {}

    def check(self) -> int:
        """Every finished point is whole and was written once; how many there are."""
        found, results = {}, Results(self.out, self.origin)
        for point in self.wanted:
            lines = results.held(point)
            # What a killed worker was at failed, and is measured again.
            if lines and lines[0]["measure"] != CELL_FAILED:
                path = results.path(point)
                found[path] = path.stat().st_mtime_ns, path.read_bytes()
        assert found.items() >= self._finished.items()
        self._finished = found
        return len(found)


def test_a_hundred_ends_of_one_run(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert suite.train
    many = replace(suite, tasks={}, train=replace(suite.train, seeds=tuple(range(300))))
    for stage in STAGES:
        monkeypatch.setitem(STAGES, stage, instead)
    out, draw = tmp_path / "out", random.Random(0)
    folder = Folder(out, many)

    def full(handle: int) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    def until_full() -> None:
        honest, left = os.fsync, draw.randrange(12)

        def fsync(handle: int) -> None:
            nonlocal left
            left -= 1
            (honest if left > 0 else full)(handle)

        monkeypatch.setattr("archs.files.os.fsync", fsync)
        run(many, out)

    for _ in range(100):
        kind = draw.choice(["killed", "killed", "full", "two"])
        if kind == "full":
            code = code_of(forked(until_full))
            # On a fast machine the last of a hundred may have nothing left to write.
            assert code == REFUSED or folder.check() == len(folder.wanted)
        else:
            first = forked(lambda: run(many, out))
            time.sleep(draw.uniform(0.0, 0.25))
            if kind == "two":
                second = code_of(forked(lambda: run(many, out)))
                # One that comes before the first holds the folder, or after its end, goes on.
                assert second in (0, REFUSED)
            os.kill(first, signal.SIGKILL)
            assert code_of(first) in (0, REFUSED, -signal.SIGKILL)
        folder.check()
    assert run(many, out)
    assert folder.check() == len(folder.wanted)
    assert cells_of(out) == [point.key for point in folder.wanted]
    assert not check_long(out / "results.csv")


def test_killed_workers_and_parents_of_workers(suite: Suite, tmp_path: Path) -> None:
    assert suite.train
    several = replace(suite, decode=(), train=replace(suite.train, seeds=tuple(range(30))))
    out, draw = tmp_path / "out", random.Random(1)
    folder = Folder(out, several)
    for victim in ("worker", "parent") * 4:
        parent = forked(lambda: run(several, out, workers=2))
        with suppress(AssertionError):
            wait_until(lambda: workers_of(out), 10.0)
        time.sleep(draw.uniform(1.0, 4.0))
        if victim == "worker":
            for process in Path("/proc").glob("[0-9]*"):
                words = (process / "cmdline").read_bytes() if process.exists() else b""
                if b"eval.measure.processes" in words and str(out).encode() in words:
                    with suppress(ProcessLookupError):
                        os.kill(int(process.name), signal.SIGKILL)
                    break
            assert code_of(parent) == 0
        else:
            os.kill(parent, signal.SIGKILL)
            os.waitpid(parent, 0)
            wait_until(lambda: not workers_of(out))
        folder.check()
    assert run(several, out, workers=2)
    assert folder.check() == len(folder.wanted)
