"""The proof on a GPU, on a CPU: order, verdicts, baselines, resuming, budget."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from archs.errors import UserError
from eval.proof.gpu import proof
from eval.proof.gpu.case import Case, Check, Op, Run, lazily
from tests.eval.fake_gpu import RATES, SECONDS, Bench, failing, make_bench

bench = pytest.fixture(make_bench)


# -- checks --


def test_cases_run_in_their_order_whatever_their_operation(bench: Bench) -> None:
    first = Op(name="a", checks=[bench.check()], cases=[bench.case("a2", 2), bench.case("a0", 0)])
    second = Op(name="b", checks=[bench.check()], cases=[bench.case("b1", 1), bench.case("b0", 0)])
    made = bench.proof(first, second)
    assert made.check()
    made.bench(most_order=1)
    assert [case for _, case, *_ in bench.statuses()] == ["a0", "b0", "b1"]
    made.bench()
    assert [case for _, case, *_ in bench.statuses()] == ["a0", "b0", "b1", "a2"]


def test_rows_say_what_share_of_the_device_was_used(bench: Bench) -> None:
    made = bench.proof(Op(name="a", checks=[bench.check()], cases=[bench.case("c", 0)]))
    made.check()
    made.bench()
    [row] = bench.rows("kernels.csv")
    assert float(row["time_us"]) == pytest.approx(2000)
    assert float(row["copy_fraction"]) == pytest.approx(1000 / SECONDS / 1e9)
    assert float(row["matrix_fraction"]) == pytest.approx(4000 / SECONDS / 1e12)
    assert row["method"] == "graph" and row["torch"] == torch.__version__ and row["commit"]
    [check] = bench.rows("checks.csv")
    assert (check["status"], float(check["error"]), check["limit"]) == ("ok", 0.0, "0.001")
    assert len(bench.rows("machine.csv")) == 4 + 2 * len(RATES.products)
    again = bench.proof()
    assert again.roofline == RATES and bench.log.count("roofline") == 1


def raising(_: torch.device) -> Sequence[tuple[Tensor, Tensor]]:
    raise RuntimeError("illegal\ninstruction")


def test_a_failing_check_marks_the_times_of_its_operation_alone(bench: Bench) -> None:
    wrong = Op(name="wrong", checks=[bench.check(), bench.check("off", got=1.1)],
               cases=[bench.case("w", 0)])  # fmt: skip
    broken = Op(name="broken", checks=[Check(name="dies", run=raising, limit=1.0)],
                cases=[bench.case("b", 0)])  # fmt: skip
    nan = Op(name="nan", checks=[bench.check("nan", got=float("nan"))])
    right = Op(name="right", checks=[bench.check()], cases=[bench.case("r", 1)])
    made = bench.proof(wrong, broken, nan, right)
    assert not made.check()
    made.bench()
    assert bench.statuses() == [
        ("wrong", "w", "triton", "incorrect"), ("broken", "b", "triton", "incorrect"),
        ("right", "r", "triton", "ok"),
    ]  # fmt: skip
    notes = [row["note"] for row in bench.rows("kernels.csv")]
    assert "off: incorrect" in notes[0] and "RuntimeError: illegal instruction" in notes[1]
    times = [row["time_us"] for row in bench.rows("kernels.csv")]
    assert times[0] and times[1] and times[2]
    assert [r["status"] for r in bench.rows("checks.csv")] == [
        "ok", "incorrect", "error", "incorrect", "ok"
    ]  # fmt: skip


# -- baselines --


def test_a_raising_baseline_is_a_row_and_the_rest_goes_on(bench: Bench) -> None:
    def never() -> Run:
        raise ImportError("made for another torch")

    case = bench.case("c", 0, torch=failing, sdpa=lazily(never), cublas=bench.run("cublas"))
    made = bench.proof(Op(name="a", checks=[bench.check()], cases=[case, bench.case("d", 1)]))
    made.check()
    made.bench()
    assert bench.statuses() == [
        ("a", "c", "torch", "error"), ("a", "c", "sdpa", "error"), ("a", "c", "cublas", "ok"),
        ("a", "c", "triton", "ok"), ("a", "d", "triton", "ok"),
    ]  # fmt: skip
    notes = [row["note"] for row in bench.rows("kernels.csv")]
    assert notes[:2] == ["ImportError: no such kernel", "ImportError: made for another torch"]


def test_a_baseline_that_computes_something_else_is_not_timed(bench: Bench) -> None:
    case = bench.case("c", 0, torch=bench.run("other", 1.2), sdpa=bench.run("near", 1.001))
    made = bench.proof(Op(name="a", checks=[bench.check()], cases=[case]))
    made.check()
    made.bench()
    assert [s for *_, s in bench.statuses()] == ["incorrect", "ok", "ok"]
    row = bench.rows("kernels.csv")[0]
    assert "0.2 away from ours" in row["note"] and row["time_us"] == ""


def test_late_baselines_come_after_everything_and_the_first_of_all_cases_before_the_second(
    bench: Bench,
) -> None:
    def case(name: str, order: int) -> Case:
        built = bench.case(name, order, sdpa=bench.run("early"), torch=bench.run("slow"),
                           cublas=bench.run("quick"))  # fmt: skip
        return replace(built, late=("cublas", "torch"))

    cases = [case("c1", 1), case("c0", 0)]
    made = bench.proof(Op(name="a", checks=[bench.check()], cases=cases))
    made.check()
    made.bench_late()
    assert not made.timings.rows, "nothing of ours is timed yet"
    made.bench()
    made.bench_late()
    made.bench_late()
    assert [(c, b) for _, c, b, _ in bench.statuses()] == [
        ("c0", "sdpa"), ("c0", "triton"), ("c1", "sdpa"), ("c1", "triton"),
        ("c0", "cublas"), ("c1", "cublas"), ("c0", "torch"), ("c1", "torch"),
    ]  # fmt: skip


def test_a_baseline_is_compared_on_operands_that_nothing_has_changed(bench: Bench) -> None:
    def build(_: torch.device) -> Mapping[str, Run]:
        state = torch.randn(4)

        def step() -> Tensor:
            return state.mul_(3.0).clone()

        return {"triton": step, "torch": step, "sdpa": step}

    case = Case(name="c", order=0, moved_bytes=8, flops=8, build=build)
    made = bench.proof(Op(name="a", checks=[bench.check()], cases=[case]))
    made.check()
    made.bench()
    assert [(b, s) for *_, b, s in bench.statuses()] == [
        ("torch", "ok"), ("sdpa", "ok"), ("triton", "ok")
    ]  # fmt: skip


def test_a_kernel_that_fails_at_a_case_has_a_row_and_baselines_have_nothing_to_agree_with(
    bench: Bench,
) -> None:
    def build(_: torch.device) -> Mapping[str, Run]:
        return {"triton": failing, "torch": bench.run("torch")}

    def refuse(_: torch.device) -> Mapping[str, Run]:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    builds = {"c": build, "d": refuse, "e": bench.case("e", 0).build}
    cases = [
        Case(name=name, order=0, moved_bytes=8, flops=8, build=each)
        for name, each in builds.items()
    ]
    made = bench.proof(Op(name="a", checks=[bench.check()], cases=cases))
    made.check()
    made.bench()
    assert bench.statuses() == [
        ("a", "c", "torch", "error"), ("a", "c", "triton", "error"), ("a", "d", "triton", "oom"),
        ("a", "e", "triton", "ok"),
    ]  # fmt: skip


def test_a_fault_that_ends_the_process_is_recorded_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = []

    def fatal() -> object:
        dead.append(True)
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(proof, "lost", lambda _: bool(dead))

    def build(_: torch.device) -> Mapping[str, Run]:
        return {"triton": fatal, "torch": bench.run("torch")}

    case = Case(name="c", order=0, moved_bytes=8, flops=8, build=build)
    op = Op(name="a", checks=[bench.check()], cases=[case, bench.case("d", 1)])
    made = bench.proof(op)
    made.check()
    with pytest.raises(UserError, match=r"a c left the device in a fault.*again to go on"):
        made.bench()
    assert bench.statuses() == [("a", "c", "triton", "error")]
    dead.clear()
    bench.proof(op).bench()
    assert bench.statuses()[1:] == [("a", "d", "triton", "ok")]


# -- going on --


def test_what_is_recorded_does_not_run_again(bench: Bench) -> None:
    case = bench.case("c", 0, torch=bench.run("torch"))
    op = Op(name="a", checks=[bench.check()], cases=[case])
    for _ in range(2):
        made = bench.proof(op)
        made.check()
        made.bench()
        ran = len(bench.log)
    assert made.check() and len(bench.log) == ran
    assert len(bench.statuses()) == 2 and bench.log.count("check sound") == 1


def test_of_a_case_that_was_cut_short_only_missing_rows_are_added(bench: Bench) -> None:
    stopped = []

    def stop() -> Tensor:
        if not stopped:
            stopped.append(True)
            raise KeyboardInterrupt
        return torch.ones(2)

    case = bench.case("c", 0, torch=bench.run("torch"), sdpa=stop)
    op = Op(name="a", checks=[bench.check()], cases=[case])
    made = bench.proof(op)
    made.check()
    with pytest.raises(KeyboardInterrupt):
        made.bench()
    assert [b for *_, b, _ in bench.statuses()] == ["torch"]
    bench.log.clear()
    bench.proof(op).bench()
    assert [b for *_, b, _ in bench.statuses()] == ["torch", "sdpa", "triton"]
    assert "torch" not in bench.log


def test_a_spent_budget_stops_cleanly_and_a_second_call_completes(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(proof.time, "monotonic", lambda: now[0])

    def slow(name: str) -> Check:
        inner = bench.check(name)

        def run(device: torch.device) -> Sequence[tuple[Tensor, Tensor]]:
            now[0] += 4
            return inner.run(device)

        return Check(name=name, run=run, limit=1e-3)

    ops = [
        Op(name="a", checks=[slow("1"), slow("2")], cases=[bench.case("a0", 0)]),
        Op(name="b", checks=[slow("3"), slow("4")], cases=[bench.case("b0", 0)]),
    ]
    made = bench.proof(*ops, budget_s=10)
    assert not made.check() and made.over and made.left_s == -2
    made.bench()
    made.decode_grid()
    assert [r["check"] for r in bench.rows("checks.csv")] == ["1", "2", "3"]
    assert not (bench.out / "kernels.csv").exists()
    # An operation with a check that has not run waits; it is no failure of it.
    waits = bench.proof(*ops)
    waits.bench()
    assert bench.statuses() == [("a", "a0", "triton", "ok")]
    made = bench.proof(*ops, budget_s=10)
    assert made.check() and not made.over
    made.bench()
    assert bench.statuses()[1:] == [("b", "b0", "triton", "ok")]


def test_a_folder_of_another_form_or_machine_is_refused(bench: Bench) -> None:
    bench.out.mkdir()
    (bench.out / "kernels.csv").write_text("op,case\na,b\n")
    with pytest.raises(UserError, match=r"kernels.csv' has columns .* choose another --out") as why:
        bench.proof()
    assert "\n" not in str(why.value)
    (bench.out / "kernels.csv").unlink()
    made = bench.proof(Op(name="a", checks=[bench.check()]))
    made._from["hardware"] = "Another GPU"
    made.check()
    with pytest.raises(UserError, match=r"holds results of Another GPU, this is .*--out"):
        bench.proof()
