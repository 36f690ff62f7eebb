"""`decodebench kernels` with --plan, --check and --bench: rows, exit codes, refusals."""

import json
from collections.abc import Callable, Sequence

import pytest
import torch

from archs.registry import REGISTRY
from eval import cli_kernels
from eval.gpu import workers
from eval.gpu.case import Op
from eval.gpu.decode_grid import Server, points
from eval.gpu.ops import OPS
from tests.eval.conftest import Command, Outcome
from tests.eval.fake_gpu import CPU, Bench, failing, make_bench

bench = pytest.fixture(make_bench)


def test_plan_lists_what_would_be_timed(decodebench: Command) -> None:
    done = decodebench("kernels", "--plan", "--json")
    rows = json.loads(done.out)
    assert done.code == 0 and {r["status"] for r in rows} == {"not measured"}
    assert len(rows) == sum(len(op.cases) for op in OPS) + len(list(points()))
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
        monkeypatch.setattr("eval.gpu.ops.OPS", tuple(ops))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr("eval.options.resolve_device", lambda _: CPU)
        monkeypatch.setattr(workers, "count", lambda: 0)
        monkeypatch.setattr(Server, "measure", lambda self, p: {**p.key, "status": "ok",
                                                                "tpot_p50_ms": 2.0})  # fmt: skip
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
    assert len(rows) == 2 + len(list(points()))
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
