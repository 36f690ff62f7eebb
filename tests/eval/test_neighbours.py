"""A shared machine says so, and ceilings are the most that it was seen to reach."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from eval.measure.cell_rows import load_rows, roofline_rows
from eval.predict import machine as hardware
from eval.predict import neighbours
from eval.predict.machine import Roofline, measure_roofline, measured_again
from eval.predict.neighbours import Neighbours

CPU = torch.device("cpu")
SPIN = "import time\nend = time.monotonic() + {s}\nwhile time.monotonic() < end: pass"


def test_another_program_is_seen() -> None:
    cores = sorted(os.sched_getaffinity(0))
    other = subprocess.Popen([sys.executable, "-c", SPIN.format(s=8)])
    os.sched_setaffinity(other.pid, cores[:1])
    try:
        time.sleep(0.3)
        with Neighbours() as busy:
            time.sleep(1.0)
    finally:
        other.kill()
        other.wait()
    # At the least half of the one core: others may want it, too, and count as well.
    assert busy.share is not None and busy.share >= 0.5 / len(cores)


def test_ones_own_work_is_told_apart() -> None:
    before, end = neighbours._own_s(), time.process_time() + 0.3
    while time.process_time() < end:
        pass
    assert neighbours._own_s() - before == pytest.approx(0.3, abs=0.1)


def stat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *lines: str) -> Path:
    path = tmp_path / "stat"
    path.write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(neighbours, "STAT", path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2})
    return path


def test_a_share_is_of_the_cores_that_this_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter((0.0, 10.0))
    path = stat(tmp_path, monkeypatch, "cpu 9 9 9 9 9 9 9 9 0 0", "cpu0 0 0 0 0 0 0 0 0 0 0",
                "cpu1 0 0 0 0 0 0 0 0 0 0", "cpu2 0 0 0 0 0 0 0 0 0 0")  # fmt: skip
    monkeypatch.setattr(neighbours.time, "monotonic", lambda: next(clock))
    own = iter((1.0, 3.0))
    monkeypatch.setattr(neighbours, "_own_s", lambda: next(own))
    hz = os.sysconf("SC_CLK_TCK")
    with Neighbours() as others:
        # Core 0: 6 s of work, 2 of them ours; core 1, not ours: 10 s; core 2: 2 s stolen.
        path.write_text(
            f"cpu0 {6 * hz} 0 0 {4 * hz} 0 0 0 0 0 0\ncpu1 {10 * hz} 0 0 0 0 0 0 0 0 0\n"
            f"cpu2 0 0 0 0 {8 * hz} 0 0 {2 * hz} 0 0\n"
        )
    assert others.share == pytest.approx(0.3, abs=0.003)
    assert others.word == "busy: other programs took 30 % of the cores"
    assert [(r.measure, r.value) for r in load_rows(others.share, batch=1)] == [
        ("other_load", others.share)
    ]


def test_where_nobody_tells_there_is_no_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(neighbours, "STAT", tmp_path / "none")
    with Neighbours() as others:
        pass
    assert others.share is None and others.word == "" and load_rows(others.share) == []


def attempts(monkeypatch: pytest.MonkeyPatch, *found: Roofline) -> list[int]:
    made: list[int] = []

    def measured(*_: object) -> Roofline:
        made.append(1)
        return found[len(made) - 1]

    monkeypatch.setattr(hardware, "_measured", measured)
    return made


def rates(copy: float, read: float, matrix: float, load: float | None) -> Roofline:
    return Roofline(copy, matrix, torch.float32, (), copy, read, load)


def test_a_busy_machine_is_measured_again_and_the_quietest_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = attempts(monkeypatch, rates(5, 9, 40, 0.5), rates(8, 7, 30, 0.0), rates(99, 99, 99, 0))
    found = measure_roofline(CPU)
    assert len(made) == 2
    # The ceilings are those of either; what a call costs is the quiet attempt's.
    assert (found.copy_bytes_per_s, found.read_bytes_per_s, found.matrix_flops_per_s) == (8, 9, 40)
    assert (found.call_us, found.other_load) == (8, 0.0)


def test_a_machine_that_stays_busy_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    made = attempts(monkeypatch, rates(5, 5, 5, 0.5), rates(6, 6, 6, 0.4), rates(7, 7, 7, 0.6))
    found = measure_roofline(CPU)
    assert len(made) == 3
    assert (found.copy_bytes_per_s, found.call_us, found.other_load) == (7, 6, 0.4)
    assert {"other_load": 0.4}.items() <= {r.measure: r.value for r in roofline_rows(found)}.items()


def test_the_ceiling_of_a_step_is_the_faster_of_copying_and_reading() -> None:
    assert rates(5, 9, 40, None).peak_bytes_per_s == 9
    assert rates(5, 0, 40, None).peak_bytes_per_s == 5
    assert rates(5, 9, 45, None).ridge_flop_per_byte == 5


def test_beside_a_timing_ceilings_only_rise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "_ceilings", lambda *_: rates(7, 7, 7, None))
    found = measured_again(rates(5, 9, 6, 0.2), CPU)
    assert (found.copy_bytes_per_s, found.read_bytes_per_s, found.matrix_flops_per_s) == (7, 9, 7)
    assert (found.call_us, found.other_load) == (5, 0.2)
    assert measured_again(found, torch.device("cuda", 0)) is found
