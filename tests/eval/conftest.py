"""The command in this process, from a folder of its own, and a machine that needs no measuring."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from eval.cli import main
from eval.measure.suite import Suite, load_suite
from eval.predict.machine import Roofline
from tests.eval.micro import write_suite

STUB_ROOFLINE = Roofline(20e9, 200e9, torch.float32)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    def refuses(self, *fragments: str) -> None:
        """Exit code 2 and one line on stderr that holds the fragments."""
        assert self.code == 2, self
        assert self.err.startswith("decodebench: ")
        assert self.err.count("\n") == 1
        for fragment in fragments:
            assert fragment in self.err


Command = Callable[..., Outcome]


@pytest.fixture
def decodebench(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Command:
    """Runs `decodebench ARGS` in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["decodebench", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capfd.readouterr()
        return Outcome(int(stop.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture(autouse=True)
def one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points are measured in this process, which tests may patch, unless a test says otherwise."""
    monkeypatch.setattr("eval.measure.processes.cores", lambda: 1)


@pytest.fixture
def stub_roofline(monkeypatch: pytest.MonkeyPatch) -> Roofline:
    """Commands and suites take this machine's rates as given."""
    for module in ("measure.site", "cli.doctor", "predict.accelerators"):
        monkeypatch.setattr(f"eval.{module}.measure_roofline", lambda *_: STUB_ROOFLINE)
    for name in ("measured_again", "with_products"):
        monkeypatch.setattr(f"eval.measure.site.{name}", lambda known, *_: known)
    return STUB_ROOFLINE


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all that these runs do."""
    monkeypatch.setattr("eval.cli.pages.write_report", lambda folder: folder / "report.html")


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of tables alone."""
    monkeypatch.setattr("eval.report.page.pictures", lambda _: [])


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    """The micro suite, in tmp_path."""
    return load_suite(str(write_suite(tmp_path)))
