"""Iso-quality cost: the fit finds the law that made the points, and cost follows the ratio."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from archs.errors import UserError
from eval.measure.suite import load_suite
from eval.predict.isoquality import iso_quality_cost
from eval.predict.roofline import predict
from eval.results.ladder import fit_ladder, ladder_points, size_ratios
from tests.eval.conftest import Command
from tests.eval.micro import run, write_suite

SCALES = {"gqa": 40.0, "gdn": 34.0, "swa": 52.0}
FLOOR, EXPONENT = 1.1, 0.28


def ladder(noise: float = 0.0, seeds: int = 1, draw: int = 0) -> pd.DataFrame:
    """A results table whose losses follow one law, with noise between seeds."""
    generator, rows = np.random.default_rng(draw), []
    for arch, scale in SCALES.items():
        for name, size in (("micro", 4e5), ("tiny", 1.3e6), ("mini", 3.5e6), ("small", 7.4e6)):
            for seed in range(seeds):
                loss = FLOOR + scale / size**EXPONENT
                loss *= 1 + noise * generator.standard_normal()
                rows.append(
                    {
                        "arch": arch, "scale": name, "seed": seed, "params": size, "value": loss,
                        "measure": "bits_per_byte", "stage": "train", "corpus": "sotu",
                        "tokens": 1000, "config_hash": "c0ffee",
                    }
                )  # fmt: skip
    return pd.DataFrame(rows)


def test_the_fit_finds_the_law() -> None:
    fit = fit_ladder(ladder_points(ladder()))
    assert fit.floor == pytest.approx(FLOOR, rel=1e-2)
    assert fit.exponent == pytest.approx(EXPONENT, rel=1e-2)
    assert fit.loss("swa", 1e6) == pytest.approx(FLOOR + 52 / 1e6**EXPONENT, rel=1e-4)
    assert fit.size_ratio("gdn", "gqa") == pytest.approx((34 / 40) ** (1 / EXPONENT), rel=1e-2)
    assert fit.size_ratio("gqa", "gqa") == 1 and fit.error < 1e-5


def test_the_law_of_any_noiseless_ladder_is_found() -> None:
    """60 laws of unlike floors, exponents, sizes and architectures, each to 0.1 %."""
    noise = np.random.default_rng(3)
    for _ in range(60):
        floor, exponent = noise.uniform(0.3, 2.0), noise.uniform(0.05, 0.8)
        sizes = 3e5 * np.cumprod(np.r_[1.0, noise.uniform(1.6, 4.0, noise.integers(2, 5))])
        scales = noise.uniform(0.3, 1.5, noise.integers(2, 7)) * 1e6**exponent
        law = [(f"m{m}", n, floor + a / n**exponent) for m, a in enumerate(scales) for n in sizes]
        fit = fit_ladder(pd.DataFrame(law, columns=["arch", "parameters", "loss"]))
        assert (fit.floor, fit.exponent) == pytest.approx((floor, exponent), rel=1e-3)
        assert list(fit.scale.values()) == pytest.approx(scales, rel=1e-3)
        ratios = [fit.size_ratio(arch, "m0") for arch in fit.scale]
        assert ratios == pytest.approx((scales / scales[0]) ** (1 / exponent), rel=1e-3)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_of_ratios_cover_what_they_say(seeds: int) -> None:
    """A bootstrap of two seeds covered 81 %."""
    hits = []
    for draw in range(200):
        points = ladder_points(ladder(noise=4e-3, seeds=seeds, draw=draw))
        table = size_ratios(points, "gqa").set_index("arch")
        for arch in ("gdn", "swa"):
            true = (SCALES[arch] / SCALES["gqa"]) ** (1 / EXPONENT)
            hits.append(table.loc[arch, "low"] <= true <= table.loc[arch, "high"])
    assert 0.92 <= np.mean(hits) <= 0.98


def test_intervals_need_seeds() -> None:
    assert "low" not in size_ratios(ladder_points(ladder()), "gqa")
    table = size_ratios(ladder_points(ladder(noise=1e-3, seeds=2)), "gqa").set_index("arch")
    assert table.loc["gqa", ["ratio", "low", "high"]].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("name", "value"), [("corpus", "stdlib"), ("tokens", 999), ("config_hash", "another")]
)
def test_trainings_that_are_no_seeds_of_each_other_are_refused(name: str, value: object) -> None:
    other = ladder(draw=1).assign(**{name: value})
    with pytest.raises(UserError, match=rf"mix trainings of {name} .* and {value}, which are no"):
        ladder_points(pd.concat([ladder(), other], ignore_index=True))


def test_cost_is_the_layers_times_the_ratio() -> None:
    rows = iso_quality_cost(
        ladder(), "gqa", scale="1b", hardware=["h100"], batches=[8], contexts=[4096],
        price_per_hour={"h100": 3.6},
    )  # fmt: skip
    by_arch = {row["arch"]: row for row in rows}
    [plain] = predict(["gqa"], "1b", ["h100"], [8], [4096])
    assert by_arch["gqa"]["tpot_ms"] == pytest.approx(plain["tpot_ms"])
    [other] = predict(["swa"], "1b", ["h100"], [8], [4096])
    ratio, tpot = by_arch["swa"]["size_ratio"], by_arch["swa"]["tpot_ms"]
    assert isinstance(ratio, float) and isinstance(tpot, float) and ratio > 2
    assert (
        isinstance(other["tpot_ms"], float) and other["tpot_ms"] < tpot < ratio * other["tpot_ms"]
    )
    # 3.6 $ an hour is a millionth of $ per millisecond.
    assert by_arch["swa"]["usd_per_million_tok"] == pytest.approx(tpot / 8)
    assert by_arch["swa"]["extrapolation"] == pytest.approx(1.2e9 / 7.4e6, rel=0.3)


def test_a_batch_that_does_not_fit_has_no_time_and_no_price() -> None:
    price = {"h100": 2.5}
    rows = iso_quality_cost(ladder(), "gqa", scale="8b", contexts=[131072], price_per_hour=price)
    for row in rows:
        alone = predict([str(row["arch"])], "8b", ["h100"], [64], [131072])[0]
        deep = float(str(row["state_bytes"])) / float(str(alone["state_bytes"]))
        assert deep == pytest.approx(row["size_ratio"])
        assert row["fits"] is (int(str(row["max_sequences"])) >= 64)
        for name in ("usd_per_million_tok", "tpot_ms", "output_tok_per_s"):
            assert (row[name] is None) is not row["fits"]
        assert ("would" in str(row["note"]) or "not one" in str(row["note"])) is not row["fits"]
    by_arch = {str(row["arch"]): row for row in rows}
    assert (by_arch["gqa"]["max_sequences"], by_arch["gqa"]["fits"]) == (3, False)
    assert by_arch["gdn"]["fits"] is True


def test_a_far_shape_is_called_a_direction() -> None:
    [row] = [r for r in iso_quality_cost(ladder(), "gqa", scale="8b") if r["arch"] == "gqa"]
    assert "8b has about 1,100 times the parameters of the ladder's largest" in str(row["caution"])
    [near] = [r for r in iso_quality_cost(ladder(), "gqa", scale="tiny") if r["arch"] == "gqa"]
    assert near["caution"] == "" and float(str(near["extrapolation"])) < 2


def test_short_ladders_and_unknown_references_are_refused() -> None:
    table = ladder()
    with pytest.raises(UserError, match=r"fewer than 3 trained sizes of gdn, gqa, swa"):
        ladder_points(table[table["scale"].isin(["micro", "tiny"])])
    with pytest.raises(UserError, match="reference 'mha' is not in the ladder"):
        size_ratios(ladder_points(table), "mha")


@pytest.mark.usefixtures("stub_roofline", "no_report")
def test_a_ladder_runs_and_answers(decodebench: Command, tmp_path: Path) -> None:
    suite = load_suite(str(write_suite(tmp_path, ("gqa", "linear"))))
    assert suite.train is not None
    train = replace(suite.train, ladder=("micro", "mini"))
    ladder_suite = replace(suite, train=train, tasks={}, decode=())
    assert run(ladder_suite, tmp_path / "out")
    found = decodebench("isoquality", "out", "--reference", "gqa", "--scale", "70m", "--json")
    assert found.code == 0, found.err
    rows = {row["arch"]: row for row in json.loads(found.out)}
    assert set(rows) == {"gqa", "linear"}
    assert rows["gqa"]["size_ratio"] == 1 and rows["linear"]["size_ratio"] > 0
    assert rows["gqa"]["size_ratio_low"] is None
    told = decodebench("isoquality", "out", "--scale", "8b")
    assert "times the parameters of the ladder's largest model; a fit is evidence up to" in told.out


def test_a_ladder_whose_sizes_are_not_told_apart_gives_no_ratio() -> None:
    flat = ladder_points(ladder(seeds=2))
    noise = np.random.default_rng(0).normal(0, 0.02, len(flat))
    flat["loss"] = 2.0 + noise
    with pytest.raises(UserError, match=r"falls by .*sizes are not told apart.*train longer"):
        size_ratios(flat, "gqa")
