"""The claims on a made-up run: verdicts follow the figures, and say so when there are none."""

from pathlib import Path

import pandas as pd
import pytest

from eval.proof.claims import CHECKS, Claim, claims
from eval.report.leaderboard import merge
from tests.eval.synthetic import write_run


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    folder: Path = tmp_path_factory.mktemp("run")
    return merge([write_run(folder)])


def verdicts(long: pd.DataFrame) -> dict[int, Claim]:
    return {claim.number: claim for claim in claims(long)}


def test_every_claim_has_a_verdict_with_evidence(long: pd.DataFrame) -> None:
    found = verdicts(long)
    assert sorted(found) == sorted(number for number, *_ in CHECKS)
    assert all(claim.evidence for claim in found.values())


@pytest.mark.parametrize("number", [1, 4, 7, 16])
def test_claims_that_arithmetic_settles_are_supported(long: pd.DataFrame, number: int) -> None:
    assert verdicts(long)[number].verdict == "supported"


def test_intensity_of_attention_is_named_by_query_heads(long: pd.DataFrame) -> None:
    claim = verdicts(long)[2]
    assert claim.verdict == "conditional"
    assert "mha 1.0, gqa 4.0, mqa 32" in claim.evidence


def test_exponents_without_a_cache_depend_on_length(long: pd.DataFrame) -> None:
    claim = verdicts(long)[3]
    assert claim.verdict == "conditional"
    assert "3.00 and 1.99" in claim.evidence
    assert "measured at 16,384 tokens (70m shapes" in claim.evidence
    assert "8 times slower without, from 256 tokens on exponents of 2.19 and 1.69" in claim.evidence
    single = verdicts(
        long[~(long["measure"].str.endswith("cache_tpot_ms") & (long["context"] > 256))]
    )
    assert "measured at 256 tokens" in single[3].evidence
    assert "exponents of" not in single[3].evidence.partition("measured")[2]
    larger = long[long["measure"].str.contains("cache")].assign(batch=8)
    more = verdicts(pd.concat([long, larger], ignore_index=True))
    assert more[3].evidence == claim.evidence


def test_recall_beyond_the_window_decides_the_windows_claim(long: pd.DataFrame) -> None:
    assert verdicts(long)[8].verdict == "supported"
    solved = long.copy()
    at = (solved["arch"] == "swa") & (solved["measure"] == "accuracy")
    solved.loc[at, ["value", "low", "high"]] = (0.998, 0.997, 0.999)
    assert verdicts(solved)[8].verdict == "refuted"


def test_latency_ratio_decides_the_recurrent_claim(long: pd.DataFrame) -> None:
    faster = long.copy()
    at = (faster["arch"] == "mamba2") & (faster["measure"] == "tpot_p50_ms")
    faster.loc[at, ["value", "low", "high"]] /= 100
    assert verdicts(faster)[15].verdict == "supported"
    assert "mamba2" in verdicts(faster)[15].evidence


def test_without_figures_claims_on_figures_are_not_measured(long: pd.DataFrame) -> None:
    bare = long[long["stage"] == "cost"]
    found = verdicts(bare)
    assert {n for n, c in found.items() if c.verdict == "not measured"} == {5, 6, 8, 9, 13, 15}
