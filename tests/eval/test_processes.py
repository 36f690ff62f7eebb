"""Models that train side by side: the same rows as one after another, and nothing lost."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest
import torch

from archs.errors import UserError
from eval.measure import plan, processes
from eval.measure.suite import Suite, load_suite
from eval.results.point import Point
from eval.results.schema import load_long
from tests.eval.micro import cells_of, run, write_suite

pytestmark = pytest.mark.usefixtures("stub_roofline")
#: What differs between two runs of one thing.
TIMES = ("_s", "_ms", "_per_s", "_per_user", "mbu", "mfu", "other_load")


def figures(out: Path) -> pd.DataFrame:
    """Every figure but for times, in one order."""
    rows = load_long(out / "results.csv")
    rows = rows[~rows["measure"].str.endswith(TIMES)]
    keys = ["cell", "measure", "context", "position", "batch"]
    return rows[[*keys, "value", "status", "params"]].sort_values(keys, ignore_index=True)


def test_rows_are_those_of_one_process(tmp_path: Path) -> None:
    suite = load_suite(str(write_suite(tmp_path, ("gqa", "linear"))))
    assert suite.train is not None
    # The second seed takes up the rate that the first one's sweep has found.
    rates = replace(suite.train, learning_rates=(1e-3, 4e-3), sweep_steps=3, seeds=(0, 1))
    suite = replace(suite, train=rates)
    assert run(suite, tmp_path / "one")
    assert run(suite, tmp_path / "two", workers=2)
    pd.testing.assert_frame_equal(figures(tmp_path / "one"), figures(tmp_path / "two"))
    assert cells_of(tmp_path / "two")[-1].startswith("decode")


def test_models_share_a_gpu_only_where_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.measure.processes.cores", lambda: 7)
    assert processes.default_workers(torch.device("cpu")) == 7
    assert processes.default_workers(torch.device("cuda", 0)) == 1


def test_a_worker_that_is_killed_ends_its_point_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = load_suite(str(write_suite(tmp_path, ("gqa", "mqa"))))
    begin = processes._Worker.begin

    def killed(worker: processes._Worker, point: Point) -> None:
        begin(worker, point)
        if point.arch == "gqa" and point.stage == "train":
            worker.process.kill()

    monkeypatch.setattr(processes._Worker, "begin", killed)
    assert run(suite, tmp_path / "out", workers=2)
    rows = load_long(tmp_path / "out" / "results.csv")
    failed = rows[rows["status"] != "ok"]
    [cell] = failed["cell"]
    assert cell.startswith("train/gqa/tiny/seed0/batch0/")
    assert failed["note"].item() == "its process ended with signal SIGKILL, as when memory runs out"
    ended = {tuple(cell.split("/")[:2]) for cell in rows["cell"]}
    assert {("train", "mqa"), ("task", "gqa")} <= ended


def test_what_the_user_can_mend_ends_the_run(
    tmp_path: Path, suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = processes._Worker.begin

    def spoiled(worker: processes._Worker, point: Point) -> None:
        (tmp_path / "text.txt").unlink(missing_ok=True)
        begin(worker, point)

    monkeypatch.setattr(processes._Worker, "begin", spoiled)
    with pytest.raises(UserError, match=r"text\.txt"):
        run(suite, tmp_path / "out", workers=2)


def test_a_budget_that_ends_stops_the_workers(suite: Suite, tmp_path: Path) -> None:
    assert suite.train is not None
    long = replace(suite, train=replace(suite.train, steps=100_000), tasks={})
    began = time.monotonic()
    assert not run(long, tmp_path / "out", workers=2, time_budget_s=8.0)
    assert time.monotonic() - began < 60
    assert not any("train" in cell for cell in cells_of(tmp_path / "out"))


ORPHANED = """
import sys
import torch
import eval.measure.site
from eval.predict.machine import Roofline
from eval.measure.suite import load_suite
from tests.eval.micro import run
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

eval.measure.site.measure_roofline = lambda *_: Roofline(20e9, 200e9, torch.float32)
suite = load_suite(sys.argv[1])
suite = replace(suite, train=replace(suite.train, steps=100_000), tasks={})
run(suite, Path(sys.argv[2]), workers=2)
"""


def test_workers_end_with_the_process_that_started_them(suite: Suite, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = [sys.executable, "-c", ORPHANED, str(tmp_path / "micro.toml"), str(out)]
    root = Path(__file__).parents[2]
    parent = subprocess.Popen(words, env={**os.environ, "PYTHONPATH": str(root)})
    wait_until(lambda: workers_of(out))
    parent.kill()
    parent.wait()
    wait_until(lambda: not workers_of(out))


def workers_of(out: Path) -> list[bytes]:
    """Processes that work for a run folder."""
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    return [
        line for line in lines if b"eval.measure.processes" in line and str(out).encode() in line
    ]


def wait_until(holds: Callable[[], object], patience_s: float = 60.0) -> None:
    end = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.2)


def test_the_longest_begins_first_and_a_sweep_in_order(tmp_path: Path) -> None:
    suite = load_suite(str(write_suite(tmp_path, ("gqa", "mqa", "linear"))))
    assert suite.train is not None
    suite = replace(suite, train=replace(suite.train, seeds=(0, 1)))
    points = [point for point in plan.points(suite, "cpu") if point.stage == "train"]
    long = next(point for point in points if point.arch == "mqa")
    expected = {point: 2.0 if point == long else 1.0 for point in points}
    given, running = list[Point](), list[processes._Worker]()
    while (point := processes._next(points, expected, running)) is not None:
        points.remove(point)
        given.append(point)
        running.append(Mock(point=point))
    assert [point.arch for point in given] == ["mqa", "gqa", "linear"]
    assert {point.seed for point in given} == {0}
    assert {point.seed for point in points} == {1}
