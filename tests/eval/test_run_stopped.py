"""Runs that are stopped by a budget, a full disk, a kill or Ctrl-C lose nothing."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

from archs.errors import UserError
from eval.measure import text
from eval.measure.progress import Watch
from eval.measure.site import Failure, Site
from eval.measure.stages import STAGES
from eval.measure.suite import Suite
from eval.results.point import Point
from eval.results.rows import About, Found, Status
from tests.eval.conftest import Command
from tests.eval.micro import cells_of, run

pytestmark = pytest.mark.usefixtures("stub_roofline")
ROOT = Path(__file__).parents[2]

#: Runs the suite of argv[1] into argv[2], and waits for its end in the stage named by argv[3].
VICTIM = """
import signal, sys, time
# A shell's background jobs ignore it, and so would their children.
signal.signal(signal.SIGINT, signal.default_int_handler)
import eval.measure.site
from eval.measure.stages import STAGES
from eval.cli import main
from eval.predict.machine import Roofline
import torch
torch.set_num_threads(1)
suite, out, stage = sys.argv[1:]
eval.measure.site.measure_roofline = lambda *_: Roofline(20e9, 200e9, torch.float32)

def wait(point, site, watch):
    print("waiting", flush=True)
    time.sleep(60)

STAGES[stage] = wait
options = ["--device", "cpu", "--workers", "1"]
sys.argv = ["decodebench", "run", "--suite", suite, "--out", out, *options]
main()
"""


def test_a_time_budget_stops_cleanly_and_the_next_run_goes_on(
    decodebench: Command, suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ("run", "--suite", "micro.toml", "--out", "early", "--device", "cpu")
    early = decodebench(*argv, "--time-budget", "0.0001")
    assert early.code == 3
    assert "time budget ended" in early.out
    seconds = iter(range(100))
    with monkeypatch.context() as patch:
        clock = SimpleNamespace(monotonic=lambda: float(next(seconds)))
        patch.setattr("eval.measure.run.time", clock)
        patch.setattr("eval.measure.site.time", clock)
        assert not run(suite, tmp_path / "out", time_budget_s=1.5)
    done = cells_of(tmp_path / "out")
    assert len(done) == 1
    assert run(suite, tmp_path / "out")
    assert len(cells_of(tmp_path / "out")) == 6
    assert cells_of(tmp_path / "out")[: len(done)] == done


@pytest.mark.usefixtures("no_report")
def test_a_cell_that_fails_fails_the_command_and_what_does_not_fit_does_not(
    decodebench: Command, suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> NoReturn:
        raise Failure(status, About(), "made to fail")

    argv = ("run", "--suite", "micro.toml", "--device", "cpu", "--json")
    monkeypatch.setitem(STAGES, "decode", fail)
    # Code that changes between two calls, as in a tree that is worked on, would be another try.
    monkeypatch.setattr("eval.measure.provenance._commit", lambda: "0123abc")
    for status, code in ((Status.INCORRECT, 1), (Status.OOM, 0)):
        done = decodebench(*argv, "--out", status)
        assert done.code == code and json.loads(done.out)["finished"], status
    # A finished run says so each time that it is asked.
    assert decodebench(*argv, "--out", Status.INCORRECT).code == 1


def test_a_budget_that_ends_within_training_leaves_no_row(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(point: Point, site: Site, watch: Watch) -> Found:
        monkeypatch.setattr(site, "deadline", time.monotonic())
        return text.measure(point, site, watch)

    monkeypatch.setitem(STAGES, "train", late)
    assert not run(suite, tmp_path / "out", time_budget_s=100.0)
    assert not [c for c in cells_of(tmp_path / "out") if c.startswith("train")]


@pytest.mark.usefixtures("no_report")
def test_a_full_disk_keeps_what_was_there(
    decodebench: Command, suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ("run", "--suite", "micro.toml", "--out", "out", "--device", "cpu", "--json")
    honest = os.replace

    def full(source: Path, target: Path) -> None:
        if target.name.startswith("train-"):
            raise OSError(errno.ENOSPC, "No space left on device")
        honest(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("archs.files.os.replace", full)
        outcome = decodebench(*argv)
        outcome.refuses("points/train-gqa", "No space left on device", "free some space")
    assert len(cells_of(tmp_path / "out")) == 2
    assert len(list((tmp_path / "out" / "points").iterdir())) == 2
    assert decodebench(*argv).code == 0
    assert len(cells_of(tmp_path / "out")) == 6


def test_a_disk_that_fills_within_a_cell_fails_no_cell(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row would say for ever that the architecture is at fault."""

    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("eval.measure.site.build_to_serve", full)
        with pytest.raises(UserError, match=r"No space left.*; free .*finished points are kept"):
            run(suite, tmp_path / "out")
    assert len(cells_of(tmp_path / "out")) == 4
    assert run(suite, tmp_path / "out")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EIO])
def test_a_file_system_that_refuses_within_a_cell_fails_no_cell(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> NoReturn:
        raise OSError(number, os.strerror(number), "the/cache")

    monkeypatch.setattr("eval.measure.site.build_to_serve", refuse)
    with pytest.raises(UserError, match=r"'the/cache' cannot be used.*finished points are kept"):
        run(suite, tmp_path / "out")
    assert len(cells_of(tmp_path / "out")) == 4


def stop(tmp_path: Path, stage: str, sent: signal.Signals) -> tuple[int, str]:
    """Exit code and stderr of a run that got a signal in the first cell of a stage."""
    command = [sys.executable, "-c", VICTIM, str(tmp_path / "micro.toml"), str(tmp_path / "out")]
    process = subprocess.Popen(
        [*command, stage], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(sent)
    return process.wait(30), process.communicate()[1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train", "decode"])
def test_a_killed_run_keeps_its_points_and_the_next_one_completes(
    suite: Suite, tmp_path: Path, stage: str
) -> None:
    assert stop(tmp_path, stage, signal.SIGKILL)[0] == -signal.SIGKILL
    done = cells_of(tmp_path / "out")
    assert len(done) == {"train": 2, "decode": 4}[stage]
    assert run(suite, tmp_path / "out")
    assert cells_of(tmp_path / "out")[: len(done)] == done
    assert len(cells_of(tmp_path / "out")) == 6


@pytest.mark.slow
def test_an_interrupted_run_says_so_and_keeps_its_points(suite: Suite, tmp_path: Path) -> None:
    code, shown = stop(tmp_path, "task", signal.SIGINT)
    assert code == 130
    assert shown.splitlines()[-1].startswith("decodebench: interrupted; finished points are kept")
    assert "Traceback" not in shown
    assert len(cells_of(tmp_path / "out")) == 3


def test_two_runs_in_one_folder_do_not_mix(
    decodebench: Command, suite: Suite, tmp_path: Path
) -> None:
    argv = ["run", "--suite", "micro.toml", "--out", "out", "--device", "cpu"]
    with subprocess.Popen(
        [sys.executable, "-c", VICTIM, "micro.toml", "out", "decode"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
    ) as first:  # fmt: skip
        assert first.stdout is not None
        assert first.stdout.readline() == b"waiting\n"
        held = (tmp_path / "out" / "results.csv").read_bytes()
        for more in ([], ["--fresh"]):
            second = decodebench(*argv, *more)
            assert second.code == 2
            assert "another process is writing to 'out'" in second.err
        assert (tmp_path / "out" / "results.csv").read_bytes() == held
        first.kill()
    assert decodebench(*argv).code == 0
