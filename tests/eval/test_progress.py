"""A log hears of a long run at least each minute, whatever its cells say."""

import io
import time

import pytest
from rich.console import Console

from eval.measure import progress
from eval.measure.progress import Progress


def log() -> tuple[Progress, io.StringIO]:
    stream = io.StringIO()
    return Progress(Console(file=stream, width=80)), stream


def test_a_cell_that_says_nothing_is_heard_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE_S", 0.05)
    told, stream = log()
    with told.over(2.0, 2, 2):
        with told.cell("decode gqa", 1.0):
            time.sleep(0.3)
        with told.cell("decode gdn", 1.0) as watch:
            watch.at(0.5, "9 tok/s")
            time.sleep(0.3)
    lines = stream.getvalue().splitlines()
    assert sum(line == "[  0%] decode gqa" for line in lines) >= 2
    assert sum("[ 75%] decode gdn, 9 tok/s" in line for line in lines) >= 2
    heard = len(lines)
    time.sleep(0.15)
    assert len(stream.getvalue().splitlines()) == heard


def test_a_short_run_says_each_cell_once() -> None:
    told, stream = log()
    with told.alone("score a"):
        pass
    [line] = stream.getvalue().splitlines()
    assert line.startswith("[100%] score a: 0.0 s")


def test_the_quiet_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE_S", 0.01)
    stream = io.StringIO()
    with Progress(Console(file=stream), quiet=True).alone("score a"):
        time.sleep(0.1)
    assert stream.getvalue() == ""
