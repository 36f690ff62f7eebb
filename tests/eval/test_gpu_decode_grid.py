"""The decode grid: its order, a cell's row, cells that cannot be measured, models held."""

from collections.abc import Callable

import pytest
import torch

from archs.backends import NoFormError
from archs.registry import HYBRIDS, REGISTRY
from eval.agreement import Agreement
from eval.gpu import decode_grid
from eval.gpu.decode_grid import POINTS, Point, Server, points
from infer.memory import DoesNotFitError
from tests.eval.fake_gpu import CPU, RATES, Bench, make_bench

bench = pytest.fixture(make_bench)


def test_the_grid_starts_with_all_architectures_at_one_point() -> None:
    cells = list(points())
    archs = (*REGISTRY, *HYBRIDS)
    assert len(cells) == 2 * len(archs) * len(POINTS) == len({p.key.__repr__() for p in cells})
    first = list(points(1))
    assert first == cells[: len(first)]
    assert {p[1:4] for p in first} == {POINTS[0]}
    assert [p.arch for p in first[::2]] == list(archs)
    assert [p.backend for p in first[:2]] == ["triton", "sdpa"]


@pytest.fixture
def server() -> Server:
    return Server(CPU, torch.float32, RATES)


@pytest.mark.parametrize("arch", ["gqa", "gdn"])
def test_a_cell_has_all_columns(server: Server, arch: str) -> None:
    row = server.measure(Point(arch, "micro", 2, 40, "torch"), steps=3)
    assert row["status"] == "ok" and row.keys() | {"note"} == set(decode_grid.COLUMNS)
    assert row["tpot_p50_ms"] <= row["tpot_p99_ms"]  # type: ignore[operator]
    assert row["mbu"] == pytest.approx(
        row["step_bytes"] / (row["tpot_p50_ms"] / 1e3) / RATES.peak_bytes_per_s  # type: ignore[operator]
    )
    assert row["output_tok_per_s"] == pytest.approx(2e3 / row["tpot_ms"])  # type: ignore[operator]


def fails(error: Exception) -> Callable[..., object]:
    def work(*_: object, **__: object) -> object:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NoFormError("retention has no form for backend 'sdpa'"), "unsupported"),
        (DoesNotFitError("8b needs 90 GiB"), "oom"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory\nTried"), "oom"),
    ],
)
def test_a_cell_that_cannot_be_measured_is_a_row(
    server: Server, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str
) -> None:
    monkeypatch.setattr(decode_grid, "measure_decode", fails(error))
    row = server.measure(Point("gqa", "micro", 2, 40, "torch"), steps=2)
    assert row["status"] == status and row["note"] == str(error).partition("\n")[0]


def test_a_cell_that_disagrees_is_not_timed(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_grid, "agreement", lambda *_, **__: Agreement(0.5, 0.1))
    row = server.measure(Point("gqa", "micro", 2, 40, "torch"), steps=2)
    assert row["status"] == "incorrect" and "tpot_ms" not in row


def test_a_model_is_held_for_all_backends_of_a_point(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = []
    build = decode_grid.build_to_serve
    monkeypatch.setattr(
        decode_grid, "build_to_serve", lambda *a: built.append(a[0].arch) or build(*a)
    )
    for arch, context in (("gqa", 20), ("gqa", 40), ("gdn", 20)):
        server.measure(Point(arch, "micro", 1, context, "torch"), steps=2)
    assert built == ["gqa", "gdn"]


def test_the_grid_is_recorded_and_goes_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measure(self: Server, point: Point, steps: int = 24) -> dict[str, object]:
        asked.append(point)
        if point.arch == "gdn":
            raise RuntimeError("launch failed")
        return {**point.key, "status": "ok", "tpot_ms": 1.5, "tpot_p50_ms": 1.25}

    monkeypatch.setattr(Server, "measure", measure)
    bench.proof().decode_grid(first=1)
    bench.proof().decode_grid(first=1)
    ours = list(points(1, backends=("triton",)))
    # What raised is tried once more by the next call.
    assert asked == [*ours, *(p for p in ours if p.arch == "gdn")]
    rows = bench.rows("decode.csv")
    assert {r["status"] for r in rows if r["arch"] == "gdn"} == {"error"}
    assert {r["status"] for r in rows if r["arch"] != "gdn"} == {"ok"}
