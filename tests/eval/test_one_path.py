"""Whoever asks for a step, in whatever way: it is one point, measured in one way, and one row."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import decodebench
from archs.errors import UserError
from archs.state_formats import StateFormat
from archs.storage import keep
from eval.cli.bench_worker import answer
from eval.cli.commands import score_checkpoint, train_one
from eval.measure.decode_plans import DecodePlan
from eval.measure.progress import Watch
from eval.measure.quality import document_scores, over_documents
from eval.measure.site import Site
from eval.measure.stages import STAGES
from eval.measure.suite import QualityPlan, Suite
from eval.predict.machine import ProductRate, Roofline
from eval.proof.gpu.decode_grid import NAMES, Place, row_of
from eval.results.point import Point
from eval.results.rows import About, Found, Row, Steps
from eval.results.schema import load_long
from tests.eval.micro import run
from tests.eval.test_decode import CPU
from train.checkpoint import load_model

PLACE = Place(arch="gqa", scale="tiny", batch=2, context=16, backend="torch")
STEP_MS = (4.0, 1.0, 1.0)
FIGURES = {
    "tpot_ms": 2.0, "tpot_p50_ms": 1.0, "tpot_p99_ms": 3.94, "mbu": 0.25, "held_bytes": 4096.0,
    "step_bytes": 5e6,
}  # fmt: skip

Row_ = dict[str, Any]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Point]:
    """The points that are measured, to figures that are known."""
    points = []

    def instead(point: Point, site: Site, watch: Watch) -> Found:
        points.append(point)
        at = {"batch": point.batch, "context": point.options["contexts"][0]}
        rows = tuple(Row(measure=name, value=value, **at) for name, value in FIGURES.items())
        steps = (Steps(context=at["context"], step_ms=STEP_MS),)
        return Found(about=About(kernel_backend="torch"), rows=rows, steps=steps)

    monkeypatch.setitem(STAGES, "decode", instead)
    return points


def by_suite(suite: Suite, out: Path) -> Row_:
    plan = DecodePlan(
        scale=PLACE.scale, batches=(PLACE.batch,), contexts=(PLACE.context,), steps=len(STEP_MS),
        backend=PLACE.backend,
    )  # fmt: skip
    one = replace(suite, archs=(PLACE.arch,), train=None, quality=None, tasks={}, decode=(plan,))
    assert run(one, out)
    long = load_long(out / "results.csv")
    long = long[long["stage"] == "decode"]
    figures = dict(zip(long["measure"], long["value"], strict=True))
    return {**figures, **long.iloc[0][["arch", "scale", "batch", "context", "status"]]}


def by_script(suite: Suite, out: Path) -> Row_:
    table = decodebench.bench(
        [PLACE.arch], scale=PLACE.scale, batches=[PLACE.batch], contexts=[PLACE.context],
        steps=len(STEP_MS), backend=PLACE.backend,
    )  # fmt: skip
    [row] = table.to_dict("records")
    return row


def by_fixture(suite: Suite, out: Path) -> Row_:
    found = answer(
        arch=PLACE.arch, batch=PLACE.batch, context=PLACE.context, scale=PLACE.scale, device="cpu",
        backend=PLACE.backend, compiled=False, rounds=len(STEP_MS),
    )  # fmt: skip
    info: Row_ = found["info"]
    return {**info, "step_s": found["step_s"]}


def by_proof(suite: Suite, out: Path) -> Row_:
    row = row_of(PLACE, Site(None, CPU), steps=len(STEP_MS))
    measures = {column: measure for measure, column in NAMES.items()}
    return {measures.get(name, name): value for name, value in row.items()}


WAYS: dict[str, Callable[[Suite, Path], Row_]] = {
    "run": by_suite, "bench": by_script, "fixture": by_fixture, "proof": by_proof,
}  # fmt: skip


@pytest.mark.usefixtures("stub_roofline")
def test_the_same_point_gives_the_same_row(
    asked: list[Point], suite: Suite, tmp_path: Path
) -> None:
    label = {"arch": "gqa", "scale": "tiny", "batch": 2, "context": 16, "status": "ok"}
    for name, way in WAYS.items():
        row = way(suite, tmp_path / name)
        assert {key: row[key] for key in (*label, *FIGURES)} == label | FIGURES, name
        # Only the fixture asks for single steps.
        assert ("step_s" in row) == (name == "fixture")
        assert row.get("step_s", [ms / 1e3 for ms in STEP_MS]) == [ms / 1e3 for ms in STEP_MS]
    assert len(asked) == len(WAYS) and len(set(asked)) == 1


@pytest.mark.usefixtures("stub_roofline")
def test_the_train_command_and_a_suite_train_the_same_point(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, kept = [], []
    honest = STAGES["train"]

    def watched(point: Point, site: Site, watch: Watch) -> Found:
        asked.append(point)
        kept.append(site.work_folder(point))
        return honest(point, site, watch)

    monkeypatch.setitem(STAGES, "train", watched)
    monkeypatch.chdir(tmp_path)
    assert suite.train and len(suite.train.learning_rates) == 1
    one = replace(
        suite, archs=("gqa",), tasks={}, decode=(), quality=QualityPlan(max_tokens=0, reach=0)
    )
    assert run(one, tmp_path / "out")
    plan = {"steps": 3, "batch": 2, "seq_len": 32, "learning_rates": suite.train.learning_rates}
    row = train_one(
        "gqa", scale="tiny", corpus=suite.corpus.spec, vocab_size=300, plan=plan, seed=0,
        out=tmp_path / "alone", device=CPU, resume=True, time_budget_s=None,
        console=Console(quiet=True),
    )  # fmt: skip
    assert len(asked) == 2 and len(set(asked)) == 1
    assert (kept[1] / "checkpoint.safetensors").exists() and kept[1] == tmp_path / "alone"
    long = load_long(tmp_path / "out" / "results.csv").set_index("measure")["value"]
    for measure in ("train_loss", "bits_per_byte"):
        assert row[measure] == long[measure], measure
    # The quality command scores by the same code.
    whole, *curve = score_checkpoint(tmp_path / "alone", suite.corpus.spec, None, CPU)
    assert whole["measure"] == "bits_per_byte" and whole["value"] == row["bits_per_byte"]
    assert [point["position"] for point in curve] == [8, 16, 32, 64]
    kept, *by_position = score_checkpoint(
        tmp_path / "alone", suite.corpus.spec, None, CPU, state="kv:int3"
    )
    reference = load_model(tmp_path / "alone" / "checkpoint.safetensors").eval()
    keep(reference, StateFormat.named("kv:int3"))
    tokens = Site(None, CPU).tokens(suite.corpus.spec, 300)
    scores = document_scores(reference, tokens, part="test", seq_len=32, stored=True)
    assert kept["value"] == over_documents(scores).value != whole["value"]
    assert by_position != curve and [p["position"] for p in by_position] == [8, 16, 32, 64]
    with pytest.raises(UserError, match="memory"):
        score_checkpoint(tmp_path / "alone", suite.corpus.spec, None, CPU, state="memory:int8")


def test_predictions_rest_on_products_of_as_many_rows_whoever_asks(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rates of products of one row, which all may have measured before, are others."""
    machine = Roofline(1e9, 1e12, torch.float32, read_bytes_per_s=1e9)
    monkeypatch.setattr("eval.cli.bench_worker._site", lambda device: Site(None, device))
    monkeypatch.setattr("eval.predict.machine._ceilings", lambda *_: machine)
    monkeypatch.setattr("eval.predict.machine._call_us", lambda *_: 1.0)
    monkeypatch.setattr(
        "eval.predict.machine._product_rate",
        lambda rows, *_: ProductRate(rows, 1e9 / rows, 5.0 * rows),
    )
    found = {name: way(suite, tmp_path / name)["tpot_pred_ms"] for name, way in WAYS.items()}
    assert found["run"] > 0 and len(set(found.values())) == 1, found
    long = load_long(tmp_path / "run" / "results.csv")
    products = long[long["measure"] == "product_bytes_per_s"].set_index("batch")["value"]
    assert dict(products) == {1: 1e9, PLACE.batch: 1e9 / PLACE.batch}
    site = Site(None, CPU)
    assert [p.rows for p in site.roofline((1,)).products] == [1]
    assert [p.rows for p in site.roofline((300, 8)).products] == [1, 8, 64]
