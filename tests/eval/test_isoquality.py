"""Iso-quality cost: the fit finds the law that made the points, and cost follows the ratio."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from archs.errors import UserError
from eval.isoquality import fit_ladder, iso_quality_cost, ladder_points, size_ratios
from eval.predict import predict
from eval.suite import load_suite
from tests.eval.conftest import Command
from tests.eval.micro import run, write_suite

SCALES = {"gqa": 40.0, "gdn": 34.0, "swa": 52.0}
FLOOR, EXPONENT = 1.1, 0.28


def ladder(noise: float = 0.0, seeds: int = 1) -> pd.DataFrame:
    """A results table whose losses follow one law, with noise between seeds."""
    generator, rows = np.random.default_rng(0), []
    for arch, scale in SCALES.items():
        for name, size in (("micro", 4e5), ("tiny", 1.3e6), ("mini", 3.5e6), ("small", 7.4e6)):
            for seed in range(seeds):
                loss = FLOOR + scale / size**EXPONENT
                loss *= 1 + noise * generator.standard_normal()
                rows.append(
                    {
                        "arch": arch, "scale": name, "seed": seed, "params": size, "value": loss,
                        "measure": "bits_per_byte", "stage": "train",
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


def test_intervals_hold_the_truth_and_need_seeds() -> None:
    table = size_ratios(ladder_points(ladder(noise=1e-3, seeds=3)), "gqa").set_index("arch")
    for arch, scale in SCALES.items():
        low, high = table.loc[arch, "low"], table.loc[arch, "high"]
        # Three seeds make a narrow bootstrap: it is held to its neighbourhood.
        assert 0.97 * low <= (scale / 40) ** (1 / EXPONENT) <= 1.03 * high
        assert low <= table.loc[arch, "ratio"] <= high
        assert high / low < 1.1
    assert "low" not in size_ratios(ladder_points(ladder()), "gqa")


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
    ladder_suite = replace(suite, train=train, mqar=None, decode=())
    assert run(ladder_suite, tmp_path / "out")
    found = decodebench("isoquality", "out", "--reference", "gqa", "--scale", "70m", "--json")
    assert found.code == 0, found.err
    rows = {row["arch"]: row for row in json.loads(found.out)}
    assert set(rows) == {"gqa", "linear"}
    assert rows["gqa"]["size_ratio"] == 1 and rows["linear"]["size_ratio"] > 0
    assert rows["gqa"]["size_ratio_low"] is None


def test_a_ladder_whose_sizes_are_not_told_apart_gives_no_ratio() -> None:
    flat = ladder_points(ladder(seeds=2))
    noise = np.random.default_rng(0).normal(0, 0.02, len(flat))
    flat["loss"] = 2.0 + noise
    with pytest.raises(UserError, match=r"falls by .*sizes are not told apart.*train longer"):
        size_ratios(flat, "gqa")
