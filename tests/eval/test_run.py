"""A micro suite end to end: everything is written, nothing is lost, nothing is run twice."""

import csv
import errno
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from rich.console import Console

from archs.errors import UserError
from archs.gqa import Attention
from archs.linear import LinearAttention
from eval.cells import Workshop
from eval.progress import Progress
from eval.results import load_long
from eval.run import OWN_NAMES, prepare_folder, run_suite
from eval.suite import Suite, load_suite
from tests.eval.conftest import Command
from tests.eval.micro import write_suite

pytestmark = pytest.mark.usefixtures("stub_roofline")
ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")

#: Runs the suite of argv[1] into argv[2], and waits for its end in the cell named by argv[3].
VICTIM = """
import sys, time
import eval.cells
from eval.cells import Workshop
from eval.cli import main
from eval.hardware import Roofline
import torch
torch.set_num_threads(1)
suite, out, stage = sys.argv[1:]
eval.cells.measure_roofline = lambda *_: Roofline(20e9, 200e9, torch.float32)

def wait(self, cell, watch):
    print("waiting", flush=True)
    time.sleep(60)

setattr(Workshop, stage, wait)
sys.argv = ["decodebench", "run", "--suite", suite, "--out", out, "--device", "cpu"]
main()
"""


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return load_suite(str(write_suite(tmp_path)))


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than all that these runs do."""
    monkeypatch.setattr("eval.report.write_report", lambda folder: folder / "report.html")


def run(suite: Suite, out: Path, **options: Any) -> bool:
    return run_suite(suite, out, device=CPU, progress=Progress(Console(), quiet=True), **options)


def cells_of(out: Path) -> list[str]:
    """Keys of the recorded cells, in order, each append once."""
    with (out / "results.csv").open() as file:
        return [row["cell"] for row in csv.DictReader(file) if row["row"].startswith("1/")]


def status_of(out: Path, stage: str, arch: str) -> set[str]:
    long = load_long(out / "results.csv")
    return set(long[(long["stage"] == stage) & (long["arch"] == arch)]["status"])


def wreck(*_: object, **__: object) -> NoReturn:
    raise ZeroDivisionError("kernel says\nno")


# -- the whole --


def test_a_run_leaves_everything_it_promises(decodebench: Command, tmp_path: Path) -> None:
    path = write_suite(tmp_path, ("gqa", "gdn:gqa=3:1"))
    first = decodebench("run", "--suite", path, "--out", "out", "--device", "cpu")
    assert first.code == 0, first.err
    out = tmp_path / "out"
    assert load_suite(str(out / "config.toml")) == load_suite(str(path))
    for name in ("results.csv", "leaderboard.csv", "report.html", "plots/tpot-context.png"):
        assert (out / name).stat().st_size > 500, name
    assert (out / "cells/gqa/train-tiny-seed0/metrics.jsonl").exists()
    assert (out / "cells/gqa/train-tiny-seed0/checkpoint.safetensors").exists()
    long = load_long(out / "results.csv")
    assert set(long["status"]) == {"ok"}
    expected = {"bits_per_byte", "mqar_accuracy", "tpot_ms", "ttft_ms", "state_bytes", "mbu",
                "nocache_tpot_ms", "loss_at_position", "copy_bytes_per_s"}  # fmt: skip
    assert expected <= set(long["measure"])
    assert "gdn:gqa=3:1" in first.out


@pytest.mark.usefixtures("no_report")
def test_a_finished_run_runs_nothing_again(decodebench: Command, tmp_path: Path) -> None:
    argv = ("run", "--suite", write_suite(tmp_path), "--out", "out", "--device", "cpu")
    assert decodebench(*argv).code == 0
    before = (tmp_path / "out" / "results.csv").read_bytes()
    again = decodebench(*argv)
    assert again.code == 0
    assert "6 of 6 cells are done already" in again.err
    assert (tmp_path / "out" / "results.csv").read_bytes() == before


def test_dry_run_writes_nothing(decodebench: Command, tmp_path: Path) -> None:
    path = write_suite(tmp_path)
    outcome = decodebench("run", "--suite", path, "--out", "out", "--dry-run")
    assert len(outcome.out.splitlines()) == 6
    assert not (tmp_path / "out").exists()


def test_the_command_needs_no_git(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    assert run(replace(suite, train=None, quality=None, mqar=None), tmp_path / "out")
    assert set(load_long(tmp_path / "out" / "results.csv")["commit"]) == {"unknown"}


# -- the folder --


@pytest.mark.usefixtures("no_report")
def test_a_folder_of_another_configuration_is_refused(decodebench: Command, tmp_path: Path) -> None:
    path = write_suite(tmp_path)
    prepare_folder(load_suite(str(path)), tmp_path / "out", fresh=False)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "results.csv").write_text("old")
    path.write_text(path.read_text().replace("steps = 3", "steps = 4"))
    argv = ("run", "--suite", path, "--out", "out", "--device", "cpu", "--json")
    decodebench(*argv).refuses("'out' belongs to another configuration", "--fresh")
    assert (tmp_path / "out" / "results.csv").read_text() == "old"
    assert decodebench(*argv, "--fresh").code == 0
    assert len(cells_of(tmp_path / "out")) == 6
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_fresh_spares_a_folder_that_is_no_run(suite: Suite, tmp_path: Path) -> None:
    """The user's own folder may have names in common with ours."""
    (tmp_path / "thesis" / "plots").mkdir(parents=True)
    (tmp_path / "thesis" / "plots" / "figure1.svg").write_text("<svg/>")
    with pytest.raises(UserError, match="not a run folder"):
        prepare_folder(suite, tmp_path / "thesis", fresh=True)
    assert (tmp_path / "thesis" / "plots" / "figure1.svg").exists()


def test_a_folder_emptied_in_part_is_still_ours(suite: Suite, tmp_path: Path) -> None:
    prepare_folder(suite, tmp_path / "out", fresh=False)
    (tmp_path / "out" / "cells").mkdir()
    assert OWN_NAMES[-1] == "config.toml"
    prepare_folder(suite, tmp_path / "out", fresh=True)
    assert not (tmp_path / "out" / "cells").exists()


def test_a_file_in_place_of_the_folder_is_refused(suite: Suite, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match="'.*out' cannot be written: Not a directory"):
        prepare_folder(suite, tmp_path / "out", fresh=False)


# -- cells that fail --


def test_a_cell_that_raises_is_a_row_and_the_suite_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite = load_suite(str(write_suite(tmp_path, ("linear", "gqa"))))
    monkeypatch.setattr(LinearAttention, "forward", wreck)
    out = tmp_path / "out"
    assert run(suite, out)
    for stage in ("train", "mqar", "decode"):
        assert status_of(out, stage, "linear") == {"error"}
        assert status_of(out, stage, "gqa") == {"ok"}
    long = load_long(out / "results.csv")
    assert "ZeroDivisionError: kernel says no" in set(long["note"])
    assert "Traceback" in (out / "errors.log").read_text()
    assert run(suite, out)
    assert max(Counter(cells_of(out)).values()) == 1


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no room"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_out_of_memory_is_a_status(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def exhaust(*_: object, **__: object) -> NoReturn:
        raise error

    monkeypatch.setattr("eval.cells.measure_decode", exhaust)
    assert run(suite, tmp_path / "out")
    assert status_of(tmp_path / "out", "decode", "gqa") == {"oom"}
    assert status_of(tmp_path / "out", "train", "gqa") == {"ok"}


def test_a_state_beyond_memory_is_out_of_memory(tmp_path: Path) -> None:
    path = write_suite(tmp_path)
    path.write_text(path.read_text().replace("contexts = [16, 32]", "contexts = [100000000000]"))
    assert run(load_suite(str(path)), tmp_path / "out")
    assert status_of(tmp_path / "out", "decode", "gqa") == {"oom"}


def test_training_that_diverges_is_a_status(tmp_path: Path) -> None:
    suite = load_suite(str(write_suite(tmp_path, rate=1e30)))
    assert run(suite, tmp_path / "out")
    assert status_of(tmp_path / "out", "train", "gqa") == {"nan"}
    assert status_of(tmp_path / "out", "decode", "gqa") == {"ok"}


def test_a_mixer_that_decodes_wrongly_gets_no_latency(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Attention, "extend", lambda self, x, state: 2 * x)
    assert run(suite, tmp_path / "out")
    assert status_of(tmp_path / "out", "decode", "gqa") == {"incorrect"}
    assert "tpot_ms" not in set(load_long(tmp_path / "out" / "results.csv")["measure"])


# -- runs that are stopped --


def test_a_time_budget_stops_cleanly_and_the_next_run_goes_on(
    decodebench: Command, suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ("run", "--suite", tmp_path / "micro.toml", "--out", "out", "--device", "cpu")
    early = decodebench(*argv, "--time-budget", "0.0001")
    assert early.code == 0
    assert "time budget ended" in early.out
    clock = iter(range(1000))
    with monkeypatch.context() as patch:
        patch.setattr("eval.run.time.monotonic", lambda: float(next(clock)))
        assert not run(suite, tmp_path / "out", time_budget_s=3.0)
    done = cells_of(tmp_path / "out")
    assert 0 < len(done) < 6
    assert run(suite, tmp_path / "out")
    assert len(cells_of(tmp_path / "out")) == 6
    assert cells_of(tmp_path / "out")[: len(done)] == done


def test_a_budget_that_ends_within_training_leaves_no_row(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Workshop.train

    def late(self: Workshop, *arguments: Any) -> Any:
        monkeypatch.setattr(self, "deadline", time.monotonic())
        return honest(self, *arguments)

    monkeypatch.setattr(Workshop, "train", late)
    assert not run(suite, tmp_path / "out", time_budget_s=100.0)
    assert not [c for c in cells_of(tmp_path / "out") if c.startswith("train")]


@pytest.mark.usefixtures("no_report")
def test_a_full_disk_keeps_what_was_there(
    decodebench: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_suite(tmp_path)
    argv = ("run", "--suite", path, "--out", "out", "--device", "cpu", "--json")
    honest = os.write
    table = tmp_path / "out" / "results.csv"

    def full(handle: int, content: bytes) -> int:
        if b"train0/" not in content:
            return honest(handle, content)
        honest(handle, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("eval.results.os.write", full)
        outcome = decodebench(*argv)
        outcome.refuses("results.csv", "No space left on device", "earlier results are intact")
    assert len(cells_of(tmp_path / "out")) == 2
    assert table.read_bytes().endswith(b"\n")
    assert decodebench(*argv).code == 0
    assert len(cells_of(tmp_path / "out")) == 6


def test_a_disk_that_fills_within_a_cell_fails_no_cell(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row would say for ever that the architecture is at fault."""

    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("eval.cells.prepare", full)
        with pytest.raises(UserError, match="disk is full .*finished cells are kept"):
            run(suite, tmp_path / "out")
    assert len(cells_of(tmp_path / "out")) == 2
    assert run(suite, tmp_path / "out")


def stop(tmp_path: Path, stage: str, sent: signal.Signals) -> tuple[int, str]:
    """Exit code and stderr of a run that got a signal in the first cell of a stage."""
    command = [sys.executable, "-c", VICTIM, str(tmp_path / "micro.toml"), str(tmp_path / "out")]
    process = subprocess.Popen(
        [*command, stage], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(sent)
    return process.wait(20), process.communicate()[1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train", "decode"])
def test_a_killed_run_keeps_its_cells_and_the_next_one_completes(
    suite: Suite, tmp_path: Path, stage: str
) -> None:
    assert stop(tmp_path, stage, signal.SIGKILL)[0] == -signal.SIGKILL
    done = cells_of(tmp_path / "out")
    assert len(done) == {"train": 2, "decode": 4}[stage]
    assert run(suite, tmp_path / "out")
    assert cells_of(tmp_path / "out")[: len(done)] == done
    assert len(cells_of(tmp_path / "out")) == 6


@pytest.mark.slow
def test_an_interrupted_run_says_so_and_keeps_its_cells(suite: Suite, tmp_path: Path) -> None:
    code, shown = stop(tmp_path, "mqar", signal.SIGINT)
    assert code == 130
    assert shown.splitlines()[-1].startswith("decodebench: interrupted; finished cells are kept")
    assert "Traceback" not in shown
    assert len(cells_of(tmp_path / "out")) == 3
