"""The Python API: the same figures as the command, as tables."""

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from archs.errors import UserError
from eval.cli import api
from eval.report import plot
from eval.report.pictures.plans import PLANS
from tests.eval.micro import write_suite
from tests.eval.synthetic import ARCHS, LADDER, write_run


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """A full run's long table."""
    return api.load_results(write_run(tmp_path_factory.mktemp("api") / "a"))


def test_results_become_a_ranked_leaderboard_and_claims(results: pd.DataFrame) -> None:
    board = api.leaderboard(results)
    assert set(board["arch"]) == set(ARCHS) and board.columns[0] == "rank"
    by_recall = api.leaderboard(results, by="accuracy@mqar/c32")
    assert by_recall["arch"].iloc[-1] == "swa"
    assert set(api.claims(results)["verdict"]) >= {"supported", "conditional"}


DRAWN = [getattr(plot, name) for name in vars(plot) if name in plot.__all__]


def test_every_picture_of_the_report_is_in_the_api() -> None:
    assert len(DRAWN) == len(PLANS)


@pytest.mark.parametrize("draw", DRAWN, ids=lambda draw: draw.__name__)
def test_every_picture_draws_a_full_run(
    results: pd.DataFrame, draw: Callable[[pd.DataFrame], Any]
) -> None:
    assert draw(results).to_dict()["layer"]


def test_losses_by_position_come_as_measured_or_less_their_mean(results: pd.DataFrame) -> None:
    for from_mean in (False, True):
        chart = plot.loss_by_position(results, from_mean=from_mean).to_dict()
        shown = [row for data in chart["datasets"].values() for row in data if "loss" in row]
        assert len(shown) == 6 * len(ARCHS)
        assert all(("difference" in row) == from_mean for row in shown)


def test_a_picture_without_its_figures_says_what_it_needs(results: pd.DataFrame) -> None:
    with pytest.raises(UserError, match="needs accuracy"):
        plot.task(results[results["stage"] != "task"])


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


@pytest.mark.usefixtures("stub_roofline")
def test_bench_gives_one_row_per_cell() -> None:
    found = api.bench(["gqa"], scale="tiny", batches=[1, 2], contexts=[16], steps=2)
    assert list(found["batch"]) == [1, 2]
    assert (found["tpot_ms"] > 0).all()


def test_crossovers_come_from_the_roofline_or_from_results(results: pd.DataFrame) -> None:
    predicted = api.crossover("gdn", "mha", scale="1b", batches=[1])
    assert predicted["verdict"].tolist() == ["from"]
    measured = api.crossover("gdn", "mha", results=results)
    assert set(measured["batch"]) == {1, 8}
    assert (measured["timed_to"] == 16384).all()


def test_equal_loss_has_a_cost_for_every_architecture_of_a_ladder(results: pd.DataFrame) -> None:
    ladder = results[results["arch"].isin(LADDER)]
    found = api.isoquality(ladder, price_per_hour={"h100": 2.5}).set_index("arch")
    assert set(found.index) == set(LADDER)
    assert found["size_ratio"]["gqa"] == pytest.approx(1)
    assert found["size_ratio_high"]["gdn"] < 1
    assert (found["usd_per_million_tok"] > 0).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: api.predict(["gqa"], contexts=()), "contexts is empty"),
        (lambda: api.predict(["gqa"], batches=()), "batches is empty"),
        (lambda: api.predict([], contexts=(1,)), "archs is empty"),
        (lambda: api.predict(["gqa"], hardware=()), "hardware is empty"),
        (lambda: api.predict(["gqa"], batches=(0,)), "batches=0 must be at least 1"),
        (lambda: api.predict(["gqa"], contexts=(-1,)), "contexts=-1 must be at least 0"),
        (lambda: api.predict(["gqa"], launch_us=-5), "launch_us=-5 must be at least 0"),
        (lambda: api.predict(["gqa"], launch_us=math.nan), "launch_us=nan must be at least 0"),
        (
            lambda: api.predict(["gqa"], price_per_hour={"h100": math.nan}),
            "price of 'h100'=nan must be positive",
        ),
        (lambda: api.predict(["gqa"], price_per_hour={"h100": -1.0}), "must be positive"),
        (lambda: api.predict(["gqa"], price_per_hour={"h10": 1.0}), "'h10'. Did you mean 'h100'"),
        (lambda: api.predict_ops(["gqa"], contexts=()), "contexts is empty"),
        (lambda: api.crossover("gqa", "mla", batches=()), "batches is empty"),
        (lambda: api.crossover("gqa", "mla", hardware=()), "hardware is empty"),
        (lambda: api.bench([], scale="tiny"), "archs is empty"),
        (lambda: api.bench(["gqa"], scale="tiny", contexts=()), "contexts is empty"),
        (lambda: api.bench(["gqa"], scale="tiny", batches=(0,)), "batches=0 must be at least 1"),
        (lambda: api.bench(["gqa"], scale="tiny", device="gpu"), "device 'gpu'"),
        (lambda: api.compare(["gqa"], device="gpu"), "device 'gpu'"),
        (lambda: api.compare([]), "archs is empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_that_cannot_be_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


@pytest.mark.usefixtures("stub_roofline")
def test_the_device_may_be_chosen_for_me() -> None:
    timed = api.bench(["linear"], scale="tiny", contexts=(8,), steps=2, device="auto")
    assert set(timed["status"]) == {"ok"}


@pytest.mark.parametrize("name", ["predict", "predict_ops", "fit", "crossover", "isoquality"])
def test_functions_of_the_cost_model_say_what_they_take_and_return(name: str) -> None:
    function = getattr(api, name)
    signature = inspect.signature(function)
    assert function.__name__ == name and function.__doc__
    assert signature.return_annotation is pd.DataFrame and "hardware" in signature.parameters
