"""The decode grid: its order, a cell's row, cells that cannot be measured, models held."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import eval.measure.site as site_module
from archs.backends import NoFormError
from archs.registry import HYBRIDS, REGISTRY, ModelSpec
from archs.sizes import get_scale
from eval.measure.agreement import Agreement
from eval.measure.site import Site
from eval.proof.gpu import decode_grid
from eval.proof.gpu.decode_grid import POINTS, Place, places, row_of
from infer.memory import DoesNotFitError
from tests.eval.fake_gpu import CPU, RATES, Bench, make_bench

bench = pytest.fixture(make_bench)


def test_the_grid_starts_with_all_architectures_at_one_point() -> None:
    cells = list(places())
    archs = (*REGISTRY, *HYBRIDS)
    assert len(cells) == 2 * len(archs) * len(POINTS) == len({p.key.__repr__() for p in cells})
    first = list(places(1))
    assert first == cells[: len(first)]
    assert {p[1:4] for p in first} == {POINTS[0]}
    assert [p.arch for p in first[::2]] == list(archs)
    assert [p.backend for p in first[:2]] == ["triton", "sdpa"]


@pytest.fixture
def site() -> Site:
    return Site(None, CPU, roofline=RATES)


@pytest.fixture(autouse=True)
def same_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.measure.site.measured_again", lambda known, _: known)


@pytest.mark.parametrize("arch", ["gqa", "gdn"])
def test_a_cell_has_all_columns(site: Site, arch: str) -> None:
    row: dict[str, Any] = row_of(Place(arch, "micro", 2, 40, "torch"), site, steps=3)
    # What runs as written is not compiled.
    assert row["status"] == "ok" and row.keys() | {"compile_s"} == set(decode_grid.COLUMNS)
    assert row["tpot_p50_ms"] <= row["tpot_p99_ms"]
    assert row["mbu"] == pytest.approx(
        row["step_bytes"] / (row["tpot_p50_ms"] / 1e3) / RATES.peak_bytes_per_s
    )
    assert row["output_tok_per_s"] == pytest.approx(2e3 / row["tpot_ms"])
    spec = ModelSpec(arch=arch, scale=get_scale("micro")).outline()
    assert spec.state_bytes(40) <= row["state_bytes"] <= spec.state_bytes(64)


def fails(error: Exception) -> Callable[..., object]:
    def work(*_: object, **__: object) -> object:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (NoFormError("retention has no form for backend 'sdpa'"), "unsupported"),
        (DoesNotFitError("8b needs 90 GiB"), "oom"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "oom"),
    ],
)
def test_a_cell_that_cannot_be_measured_is_a_row(
    site: Site, monkeypatch: pytest.MonkeyPatch, error: Exception, status: str
) -> None:
    monkeypatch.setattr("eval.measure.site.agreement", fails(error))
    row = row_of(Place("gqa", "micro", 2, 40, "torch"), site, steps=2)
    assert row["status"] == status and row["note"] == str(error)
    # What lacked memory must not stay in the way of the next cell.
    assert (site._served is None) == (status == "oom")


def test_a_cell_that_disagrees_is_not_timed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.measure.site.agreement", lambda *_, **__: Agreement(0.5, 0.1))
    row = row_of(Place("gqa", "micro", 2, 40, "torch"), site, steps=2)
    assert row["status"] == "incorrect" and "tpot_ms" not in row
    assert (row["agreement_error"], row["agreement_limit"]) == (0.5, 0.1)


def test_a_bug_is_raised_where_nothing_is_kept(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.measure.site.agreement", fails(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        row_of(Place("gqa", "micro", 2, 40, "torch"), site, steps=2)


def test_a_model_is_built_and_held_to_its_truth_once(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    built, held = [], []
    build, honest = site_module.build_to_serve, site_module.agreement
    monkeypatch.setattr(
        site_module, "build_to_serve", lambda *a: built.append(a[0].arch) or build(*a)
    )
    monkeypatch.setattr(
        site_module, "agreement", lambda *a, **b: held.append(b["batches"]) or honest(*a, **b)
    )
    for arch, batch, context in (
        ("gqa", 1, 200), ("gqa", 1, 400), ("gqa", 3, 200), ("gqa", 8, 400), ("gdn", 1, 200),
    ):  # fmt: skip
        row_of(Place(arch, "micro", batch, context, "torch"), site, steps=2)
    assert built == ["gqa", "gdn"]
    # Batches of three or more take the same forms.
    assert held == [(1,), (3,), (1,)]


def test_the_grid_is_recorded_and_goes_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def measure(place: Place, site: Site) -> dict[str, object]:
        asked.append(place)
        if place.arch == "gdn":
            raise RuntimeError("launch failed")
        return {**place.key, "status": "ok", "tpot_ms": 1.5, "tpot_p50_ms": 1.25}

    monkeypatch.setattr("eval.proof.gpu.proof.row_of", measure)
    bench.proof().decode_grid(first=1)
    bench.proof().decode_grid(first=1)
    ours = list(places(1, backends=("triton",)))
    # What raised is tried once more by the next call.
    assert asked == [*ours, *(p for p in ours if p.arch == "gdn")]
    rows = bench.rows("decode.csv")
    assert {r["status"] for r in rows if r["arch"] == "gdn"} == {"error"}
    assert {r["status"] for r in rows if r["arch"] != "gdn"} == {"ok"}
