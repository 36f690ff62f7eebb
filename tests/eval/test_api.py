"""The Python API: the same figures as the command, as tables."""

from pathlib import Path

import pytest

from archs.errors import UserError
from eval import api, plot
from tests.eval.micro import write_suite
from tests.eval.synthetic import ARCHS, write_run


def test_results_become_a_ranked_leaderboard_and_claims(tmp_path: Path) -> None:
    results = api.load_results(write_run(tmp_path / "a"))
    board = api.leaderboard(results)
    assert set(board["arch"]) == set(ARCHS) and board.columns[0] == "rank"
    by_recall = api.leaderboard(results, by="mqar_accuracy@mqar/c32")
    assert by_recall["arch"].iloc[-1] == "swa"
    assert set(api.claims(results)["verdict"]) >= {"supported", "conditional"}


@pytest.mark.parametrize(
    "draw",
    [
        plot.quality_against_state, plot.latency_against_context, plot.roofline, plot.recall,
        plot.throughput_against_latency, plot.loss_by_position, plot.predicted_against_measured,
    ],
    ids=lambda draw: draw.__name__,
)  # fmt: skip
def test_every_picture_draws_a_full_run(tmp_path: Path, draw: object) -> None:
    results = api.load_results(write_run(tmp_path / "a"))
    assert callable(draw)
    assert draw(results).to_dict()["layer"]


def test_a_picture_without_its_figures_says_what_it_needs(tmp_path: Path) -> None:
    results = api.load_results(write_run(tmp_path / "a"))
    with pytest.raises(UserError, match="needs mqar_accuracy"):
        plot.recall(results[results["stage"] != "mqar"])


def test_predictions_come_as_rows_of_every_combination() -> None:
    found = api.predict(
        ["gqa", "mamba2"], hardware=["h100", "h200"], batches=[1, 8], contexts=[1024],
        price_per_hour={"h100": 2.0},
    )  # fmt: skip
    assert len(found) == 8
    priced = found.set_index("hardware")["usd_per_million_tok"]
    assert priced["h100"].notna().all() and priced["h200"].isna().all()
    by_op = api.predict_ops(["gqa"], hardware=["h100", "h200"])
    mlp = by_op[by_op["op"] == "mlp down"].set_index("hardware")["compute_bound_batch"]
    assert mlp.round().to_dict() == {"h100": 295, "h200": 206}


def test_compare_runs_a_suite_over_the_named_architectures(tmp_path: Path) -> None:
    suite = write_suite(tmp_path, archs=("mha",))
    results = api.compare(["gqa"], suite=str(suite), out=tmp_path / "run")
    assert set(results["arch"]) == {"", "gqa"}
    assert (results["status"] == "ok").all()


def test_bench_gives_one_row_per_cell() -> None:
    found = api.bench(["gqa"], scale="tiny", batches=[1, 2], contexts=[16], steps=2)
    assert list(found["batch"]) == [1, 2]
    assert (found["tpot_ms"] > 0).all()
