"""Checks in processes of their own: which verdict each has, however its process ends."""

import json
import sys
from collections.abc import Sequence

import pytest

from eval.proof.gpu import workers
from eval.proof.gpu.case import Op
from eval.proof.gpu.ops import OPS
from tests.eval.fake_gpu import CPU, OK, Bench, make_bench

bench = pytest.fixture(make_bench)


@pytest.fixture
def stub_worker(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Workers that end as their checks are called; how long each was let run."""
    let = []

    def run(names: Sequence[workers.Name], timeout_s: float) -> tuple[list[workers.Row], str]:
        let.append(timeout_s)
        lines: list[workers.Row] = []
        for _, check in names:
            if check == "crash":
                return lines, "exit code -11 Segmentation fault"
            if check == "hang":
                return lines, "timeout"
            lines.append({"status": "error"} if check == "lost" else OK)
            if check == "lost":
                return lines, "exit code 3"
        return lines, "exit code 0"

    monkeypatch.setattr(workers, "command", lambda device, names: names)
    monkeypatch.setattr(workers, "_run", run)
    return let


def test_a_worker_that_dies_or_hangs_takes_no_other_check_along(
    bench: Bench, stub_worker: list[float]
) -> None:
    names = ["1", "crash", "2", "lost", "3", "hang", "4"]
    op = Op(name="a", checks=[bench.check(name) for name in names], cases=[bench.case("c", 0)])
    made = bench.proof(op, workers=2)
    assert not made.check()
    rows = {r["check"]: r for r in bench.rows("checks.csv")}
    assert {n: rows[n]["status"] for n in names} == {
        "1": "ok", "crash": "error", "2": "ok", "lost": "error", "3": "ok", "hang": "error",
        "4": "ok",
    }  # fmt: skip
    assert rows["crash"]["note"] == "its process ended: exit code -11 Segmentation fault"
    assert rows["hang"]["note"] == "its process ended: timeout"
    assert len(bench.rows("checks.csv")) == len(names) and not bench.log
    assert max(stub_worker) == len(names) * workers.PATIENCE_S


def test_a_check_that_there_was_no_time_for_has_no_verdict(
    bench: Bench, stub_worker: list[float]
) -> None:
    op = Op(name="a", checks=[bench.check(n) for n in ("1", "hang", "2")])
    assert not bench.proof(op, budget_s=60, workers=1).check()
    assert [r["check"] for r in bench.rows("checks.csv")] == ["1"]
    assert stub_worker[0] <= 60
    assert not bench.proof(op, budget_s=1e-9, workers=1).check()
    assert len(stub_worker) == 1


@pytest.mark.parametrize(
    ("script", "rows", "end"),
    [
        ("print('noise', row, sep='\\n')", [OK], "exit code 0"),
        ("print(row); sys.exit('it went\\nwrong')", [OK], "exit code 1 wrong"),
        ("print(row[:9]); sys.exit(3)", [], "exit code 3"),
    ],
)
def test_what_a_process_printed_and_how_it_ended(
    script: str, rows: list[workers.Row], end: str
) -> None:
    code = f"import sys; row = {json.dumps(OK)!r}; {script}"
    assert workers._run([sys.executable, "-S", "-c", code], 60.0) == (rows, end)


def test_a_process_that_hangs_is_ended() -> None:
    hang = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    assert workers._run(hang, 0.1) == ([], "timeout")


@pytest.mark.slow
def test_a_real_worker_reports_what_its_kernel_says_here() -> None:
    [op] = [o for o in OPS if o.name == "page_write"]
    waiting = [(op.name, op.checks[0])]
    [(name, check, row)] = workers.spread(waiting, CPU, 1, lambda: None)
    assert (name, check.name, row["status"]) == ("page_write", "4 tokens", "error")
    assert "ValueError" in str(row["note"])
