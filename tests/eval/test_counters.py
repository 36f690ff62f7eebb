"""Counters of a GPU: calibrated, of the step that was timed, or a reason in their place."""

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from archs.registry import ModelSpec
from archs.sizes import get_scale
from eval.cli.commands import bench_archs
from eval.measure import counted, counters
from eval.measure.cell_rows import counted_rows
from eval.measure.counted import STEPS, WARMUP, Work
from eval.measure.counters import FLOPS, INTENSITY, PACKED_FLOPS, Counters, why_not
from eval.measure.decode import Decoding
from eval.measure.suite import Suite, load_suite
from eval.report.leaderboard import wide
from eval.results.rows import Status
from eval.results.schema import load_long
from infer.engine import Engine
from tests.eval.conftest import Command
from tests.eval.fake_ncu import BYTES, CPU, CUDA, DENIED, FakeNcu, answers, make_fake_ncu
from tests.eval.micro import rows_of, run

MEASURED = ("step_bytes_meas", "step_flops_meas", INTENSITY)
WORK = Work(
    spec=ModelSpec(arch="gqa", scale=replace(get_scale("tiny"), vocab_size=257)),
    dtype=torch.float32, backend="torch", compiled=False, batch=2, context=16,
)  # fmt: skip
fake_ncu = pytest.fixture(make_fake_ncu)


# -- calibration --


@pytest.mark.parametrize(("major", "packed"), [(8, False), (9, False), (10, True), (12, True)])
def test_packed_instructions_are_counted_where_there_are_any(
    monkeypatch: pytest.MonkeyPatch, major: int, packed: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, 0))
    asked = counters.KINDS[1].metrics(CUDA)
    assert asked == ({**FLOPS, **PACKED_FLOPS} if packed else FLOPS)
    weights = {name.split("_op_")[-1].split("_")[0]: w for name, w in PACKED_FLOPS.items()}
    assert weights == {"fadd2": 2, "fmul2": 2, "ffma2": 4}


def test_bytes_are_scaled_by_a_known_copy_and_flops_are_not(fake_ncu: FakeNcu) -> None:
    log = fake_ncu(answers(copy=0.8, product=1.04))
    device = Counters(CPU)
    found = [device.count(WORK) for _ in range(2)][-1]
    assert found["step_bytes_meas"].value == pytest.approx(4000 / STEPS / 0.8, rel=1e-5)
    assert found["step_flops_meas"].value == 6 * 4000 / STEPS
    assert found[INTENSITY].value == pytest.approx(6 * 0.8, rel=1e-5)
    assert {figure.status for figure in found.values()} == {Status.OK}
    # Known work once, the step each time; bytes and FLOPs apart.
    asked = log.read_text().split("\n")
    assert asked[0] == f"copy {BYTES}" and asked[2] == f"product {next(iter(FLOPS))}"
    assert [line.split()[0] for line in asked[:-1]] == [
        "copy", "steps", "product", "steps", "steps", "steps",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("answer", "seen", "known", "wrong"),
    [
        (answers(copy=0.69), "0.69", "copy", {"step_bytes_meas", INTENSITY}),
        (answers(copy=1.31), "1.31", "copy", {"step_bytes_meas", INTENSITY}),
        (answers(product=0.5), "0.50", "product", {"step_flops_meas", INTENSITY}),
        (answers(product=2.0), "2.00", "product", {"step_flops_meas", INTENSITY}),
    ],
)
def test_counters_that_miss_known_work_are_not_believed(
    fake_ncu: FakeNcu, answer: str, seen: str, known: str, wrong: set[str]
) -> None:
    log = fake_ncu(answer)
    device = Counters(CPU)
    for _ in range(2):
        found = device.count(WORK)
    assert {m for m, f in found.items() if f.value is None} == wrong
    for measure in wrong:
        assert found[measure].status == Status.INCORRECT
        assert f"see {seen} of a known {known}" in found[measure].note
    assert log.read_text().count(known) == 1
    rows = {r.measure: r for r in counted_rows(found, WORK)}
    assert tuple(rows) == MEASURED
    assert rows[INTENSITY].status == Status.INCORRECT and rows[INTENSITY].note
    assert {(r.batch, r.context) for r in rows.values()} == {(2, 16)}


def test_a_step_that_moves_nothing_has_no_intensity(fake_ncu: FakeNcu) -> None:
    fake_ncu(answers(step=(0, 0)))
    found = Counters(CPU).count(WORK)
    assert found["step_bytes_meas"].value == 0
    assert found[INTENSITY].value is None
    assert "no traffic" in found[INTENSITY].note


def test_what_is_usable_is_told(fake_ncu: FakeNcu) -> None:
    fake_ncu(answers(copy=0.97, product=3))
    told = Counters(CPU).usable()
    assert told["step_bytes_meas"] == "usable; counts 0.970 of a known copy"
    assert told["step_flops_meas"].endswith("not to be trusted")


# -- what stands in the way --


def test_a_machine_without_counters_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "need an NVIDIA GPU" in str(why_not(CPU))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "need an NVIDIA GPU" in str(why_not(CUDA))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("PATH", "")
    assert "ncu is not on PATH" in str(why_not(CUDA))
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    assert why_not(CUDA) is None


@pytest.mark.parametrize(
    ("body", "status", "fragments"),
    [
        (f"print({DENIED!r}); sys.exit(1)", Status.UNSUPPORTED, ("not permitted", "NVreg_")),
        (f"print({DENIED!r}); tell()", Status.UNSUPPORTED, ("ERR_NVGPUCTRPERM",)),
        (
            "print('==ERROR== Failed to initialize the profiler: LibraryNotLoaded')\nsys.exit(9)",
            Status.ERROR,
            ("ended with code 9", "LibraryNotLoaded"),
        ),
        (
            "print('==ERROR== The application returned an error code (1).')\n"
            "print('Traceback\\n  ...\\nOutOfMemoryError: no room', file=sys.stderr)\nsys.exit(1)",
            Status.ERROR,
            ("ended with code 1", "returned an error code", "OutOfMemoryError: no room"),
        ),
        ("print('==WARNING== No kernels were profiled.')", Status.ERROR, ("no kernel",)),
        ("tell(*[0] * 0)", Status.ERROR, ("no kernel",)),
    ],
)
def test_whatever_goes_wrong_is_a_reason_and_is_tried_once(
    fake_ncu: FakeNcu, body: str, status: Status, fragments: tuple[str, ...]
) -> None:
    log = fake_ncu(body)
    device = Counters(CPU)
    for _ in range(3):
        found = device.count(WORK)
    assert tuple(found) == MEASURED
    for figure in found.values():
        assert figure.value is None and figure.status == status
        for fragment in fragments:
            assert fragment in figure.note
    assert len(log.read_text().splitlines()) == 2


# -- what is counted --


@contextmanager
def logged(log: list[str]) -> Iterator[None]:
    log.append("start")
    yield
    log.append("stop")


def test_only_warm_steps_are_counted_and_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    honest = Engine.extend_last
    opened: dict[str, Any] = {}

    def extend_last(self: Engine, *arguments: Any) -> Any:
        log.append(f"step at {self.store.lengths[0]}")
        return honest(self, *arguments)

    def decoding(model: Any, **options: Any) -> Decoding:
        opened.update(options)
        return Decoding(model, **options)

    monkeypatch.setattr(Engine, "extend_last", extend_last)
    monkeypatch.setattr(counted, "Decoding", decoding)
    monkeypatch.setattr(counted, "watched", lambda device: logged(log))
    counted.main("cpu", WORK.to_json())
    taken = [f"step at {16 + n}" for n in range(WARMUP + STEPS)]
    assert log == [*taken[:WARMUP], "start", *taken[WARMUP:], "stop"]
    assert opened["graphs"] is False and opened["batch"] == 2


@pytest.mark.parametrize("known", ["copy", "product"])
def test_known_work_is_counted_when_warm(monkeypatch: pytest.MonkeyPatch, known: str) -> None:
    log: list[str] = []
    name = {"copy": "neg", "product": "mm"}[known]
    honest = getattr(torch, name)

    def kernel(*operands: torch.Tensor, **options: Any) -> torch.Tensor:
        log.append(name)
        if known == "copy":
            assert 2 * operands[0].nbytes == counted.copied_bytes(CPU)
        else:
            assert {x.shape[i] for x in operands for i in (0, 1)} == {counted.product_size(CPU)}
        out: torch.Tensor = honest(*operands, **options)
        return out

    monkeypatch.setattr(torch, name, kernel)
    monkeypatch.setattr(counted, "watched", lambda device: logged(log))
    counted.main("cpu", known)
    assert log == [name, "start", name, "stop"]


def test_the_profiler_is_on_until_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: log.append("wait"))
    monkeypatch.setattr(torch.cuda.profiler, "profile", lambda: logged(log))
    with counted.watched(CUDA):
        log.append("work")
    assert log == ["wait", "start", "work", "wait", "stop"]


def test_work_survives_the_way_to_its_process() -> None:
    spec = ModelSpec(arch="gqa", scale=get_scale("tiny"), overrides={"gqa": {"kv_heads": 1}})
    work = replace(WORK, spec=spec, dtype=torch.bfloat16, compiled=True)
    assert Work.from_json(work.to_json()) == work


# -- the whole --


@pytest.mark.slow
def test_bench_counts_the_step_that_it_timed(fake_ncu: FakeNcu, tmp_path: Path) -> None:
    """The process under the fake really runs; only its counters are made up."""
    codes = tmp_path / "codes.txt"
    fake_ncu(
        "done = subprocess.run(child, capture_output=True, text=True)\n"
        f"open({str(codes)!r}, 'a').write(f'{{done.returncode}} {{done.stderr[-300:]}}\\n')\n"
        + answers(copy=1.25)
    )
    [found] = bench_archs(
        ["gqa"], scale="tiny", batches=[2], contexts=[16], steps=2, prompt=0, device=CPU,
        counters=True,
    )  # fmt: skip
    assert found["status"] == "ok" and 0 < float(str(found["tpot_ms"])) < 1e4
    assert "counters_note" not in found
    assert found["step_bytes_meas"] == pytest.approx(4000 / STEPS / 1.25)
    assert found["step_flops_meas"] == 6 * 4000 / STEPS
    assert found[INTENSITY] == pytest.approx(6 * 1.25)
    assert found["arith_intensity_pred"] == found["step_flops"] / found["step_bytes"]  # type: ignore[operator]
    assert codes.read_text().splitlines() == ["0 "] * 4


@pytest.mark.usefixtures("stub_roofline")
def test_bench_without_a_gpu_times_and_says_why_once(decodebench: Command) -> None:
    argv = ("--arch", "gqa", "--scale", "tiny", "--context", "16,32", "--steps", "2", "--counters")
    outcome = decodebench("bench", *argv, "--device", "cpu", "--json")
    assert outcome.code == 0
    rows = rows_of(outcome.out)
    assert [r["context"] for r in rows] == [16, 32]
    for found in rows:
        assert found["status"] == "ok" and 0 < found["tpot_ms"] < 1e4
        assert all(found[measure] is None for measure in MEASURED)
        assert found["step_bytes"] > 0 and found["step_flops"] > 0
        assert found["counters_note"] == why_not(CPU)
    outcome = decodebench("bench", *argv, "--device", "cpu")
    assert outcome.code == 0
    assert outcome.out.count(f"not counted: {why_not(CPU)}") == 1
    assert outcome.out.count("need an NVIDIA GPU") == 1
    plain = rows_of(decodebench("bench", *argv[:-1], "--device", "cpu", "--json").out)
    assert not {*MEASURED, "counters_note"} & set(plain[0])


@pytest.mark.usefixtures("stub_roofline")
def test_a_suite_has_a_row_for_every_missing_figure(suite: Suite, tmp_path: Path) -> None:
    plan = replace(suite.decode[0], batches=(1,), counters=True, no_cache=0, prompt=0)
    out = tmp_path / "out"
    assert run(replace(suite, train=None, quality=None, tasks={}, decode=(plan,)), out)
    long = load_long(out / "results.csv")
    missing = long[long["measure"].isin(MEASURED)]
    assert [*zip(missing["measure"], missing["context"], strict=True)] == [
        (measure, context) for context in (16, 32) for measure in MEASURED
    ]
    assert set(missing["status"]) == {"unsupported"} and set(missing["note"]) == {why_not(CPU)}
    assert missing["value"].isna().all()
    assert set(long[~long["measure"].isin(MEASURED)]["status"]) == {"ok"}
    board = wide(long)
    [intensity] = [c for c in board if c.startswith(INTENSITY) and c.endswith("c32:status")]
    assert board[intensity].tolist() == ["unsupported"]
    assert (board["tpot_ms@tiny/b1/c32"] > 0).all()


@pytest.mark.usefixtures("stub_roofline")
def test_a_suite_records_what_was_counted(suite: Suite, tmp_path: Path, fake_ncu: FakeNcu) -> None:
    fake_ncu(answers())
    plan = replace(suite.decode[0], batches=(1,), counters=True, no_cache=0, prompt=0)
    out = tmp_path / "out"
    assert run(replace(suite, train=None, quality=None, tasks={}, decode=(plan,)), out)
    with (out / "results.csv").open(newline="") as file:
        found = {(r["measure"], r["context"]): r for r in csv.DictReader(file)}
    assert float(found["step_bytes_meas", "32"]["value"]) == 4000 / STEPS
    assert float(found[INTENSITY, "32"]["value"]) == 6
    assert {r["status"] for r in found.values()} == {"ok"}


def test_a_suite_file_may_ask_for_counters(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('archs = ["gqa"]\n[[decode]]\nscale = "tiny"\ncounters = true\n')
    assert [plan.counters for plan in load_suite(str(path)).decode] == [True]
    assert not any(plan.counters for plan in load_suite("base").decode)


@pytest.mark.usefixtures("stub_roofline")
def test_doctor_tells_whether_counters_are_usable(decodebench: Command) -> None:
    outcome = decodebench("doctor")
    assert outcome.code == 0
    section = outcome.out.partition("\ncounters:\n")[2].splitlines()[:2]
    assert [line.split(":")[0].strip() for line in section] == list(MEASURED[:2])
    assert torch.cuda.is_available() or all("need an NVIDIA GPU" in line for line in section)
