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


def speculated(long: pd.DataFrame, gains: dict[tuple[str, int], float]) -> pd.DataFrame:
    """The table with speed-ups of gqa by the context, by architecture and K."""
    base = long[(long["measure"] == "bits_per_byte") & (long["arch"] == "gqa")].iloc[:1]
    made = []
    for (arch, drafts), gain in gains.items():
        for measure, value in (("speedup", gain), ("lossless", 1.0)):
            made.append(
                base.assign(
                    arch=arch, stage="speculate", measure=measure, value=value, batch=1, context=64,
                    options=f"draft=context drafts={drafts}", cell=f"speculate/{arch}/{drafts}",
                )
            )  # fmt: skip
    return pd.concat([long, *made], ignore_index=True)


def test_speed_ups_decide_the_claim_on_speculation(long: pd.DataFrame) -> None:
    long = long[long["stage"] != "speculate"]
    assert verdicts(long)[12].verdict == "not measured"
    good = {("gqa", 2): 1.8, ("gqa", 4): 2.4, ("gqa", 8): 1.9, ("gdn", 3): 2.1, ("gdn", 8): 0.9}
    claim = verdicts(speculated(long, good))[12]
    assert claim.verdict == "supported"
    assert "gqa 2.40 times by context, K 4; gdn 2.10 times by context, K 3" in claim.evidence
    assert "1 of 5 cells are slower than plain decode, down to 0.90 times" in claim.evidence
    for change, verdict in (
        ({("gdn", 8): 2.2}, "conditional"), ({("gqa", 4): 1.9}, "conditional"),
        ({key: 0.8 for key in good}, "refuted"),
    ):  # fmt: skip
        assert verdicts(speculated(long, {**good, **change}))[12].verdict == verdict
    wrong = speculated(long, good)
    at = (wrong["stage"] == "speculate") & (wrong["arch"] == "gdn")
    wrong.loc[at & (wrong["measure"] == "lossless"), ["measure", "status"]] = ("cell", "incorrect")
    assert verdicts(wrong)[12].verdict == "refuted"


def with_servers(
    long: pd.DataFrame, gains: dict[str, float], *, page_waste: float = 0.08, **more: float
) -> pd.DataFrame:
    """The table with servers of these gains of continuous over static batching."""
    base = long[long["measure"] == "bits_per_byte"].iloc[:1]
    made = []
    for arch, gain in gains.items():
        for measure, value, words in (
            ("batching_gain", gain, ""),
            ("batching_gain_equal_steps", 1.7, ""),
            ("page_waste", page_waste, " batching=continuous"),
            ("page_waste_contiguous", 0.66, " batching=continuous"),
            ("page_waste", 0.5, " batching=static"),
            *((name, value, " batching=continuous") for name, value in more.items()),
        ):
            made.append(
                base.assign(
                    arch=arch, stage="serve", measure=measure, value=value, batch=8,
                    options=f"workload=uneven{words}", cell=f"serve/{arch}",
                )
            )  # fmt: skip
    return pd.concat([long, *made], ignore_index=True)


def test_servers_decide_the_claim_on_batching(long: pd.DataFrame) -> None:
    assert verdicts(long)[14].verdict == "not measured"
    claim = verdicts(with_servers(long, {"gqa": 1.6, "gdn": 1.4}))[14]
    assert claim.verdict == "conditional"
    assert "throughput conditional" in claim.evidence
    assert "1.40 (gdn) to 1.60 (gqa) times; steps of equal time would give 1.70" in claim.evidence
    assert "fragmentation supported: pages waste 8% to 8% of their rows" in claim.evidence
    assert "prefixes not measured" in claim.evidence
    assert "copy-on-write not measured" in claim.evidence
    assert verdicts(with_servers(long, {"gqa": 0.9}))[14].verdict == "refuted"


def test_each_part_of_the_claim_on_servers_has_its_verdict(long: pd.DataFrame) -> None:
    def told(gains: dict[str, float], **more: float) -> Claim:
        return verdicts(with_servers(long, gains, **more))[14]

    good = told({"gqa": 2.1, "mla": 2.4}, hit_rate=0.8, shared_state=0.4)
    assert good.verdict == "supported"
    assert "prefixes supported: 80% (gqa) to 80%" in good.evidence
    assert "copy-on-write supported: sharing saves 40% (gqa)" in good.evidence
    missed = told({"gqa": 2.1}, hit_rate=0.0, shared_state=0.4)
    assert missed.verdict == "conditional"
    assert "prefixes conditional: 0% (gqa)" in missed.evidence
    assert told({"gqa": 2.1}, hit_rate=0.8, shared_state=0.0).verdict == "conditional"
    assert told({"gqa": 1.6}, hit_rate=0.8, shared_state=0.4).verdict == "conditional"


def test_pages_are_held_to_whole_contexts_on_the_same_load(long: pd.DataFrame) -> None:
    """A load of answers shorter than a page says nothing of the others."""
    short = with_servers(long, {"gqa": 2.1}, page_waste=0.5)
    assert "fragmentation refuted" in verdicts(short)[14].evidence
    loads = [with_servers(long, {"mla": 2.1}), short[short["stage"] == "serve"]]
    claim = verdicts(pd.concat(loads, ignore_index=True))[14]
    assert claim.verdict == "conditional"
    assert "fragmentation conditional: pages waste 8% to 50% of their rows" in claim.evidence
    assert "pages save least on uneven (gqa): 50% against 66%" in claim.evidence


def test_without_figures_claims_on_figures_are_not_measured(long: pd.DataFrame) -> None:
    bare = long[long["stage"] == "cost"]
    found = verdicts(bare)
    assert {n for n, c in found.items() if c.verdict == "not measured"} == {
        5, 6, 8, 9, 10, 11, 12, 13, 14, 15
    }  # fmt: skip


def test_few_bits_are_judged_by_memory_loss_and_time(long: pd.DataFrame) -> None:
    claim = verdicts(long)[10]
    assert claim.verdict == "conditional"
    for part in (
        "int4-g64 6.4 of 8.0", "int8 0.01 %, int4-g64 0.", "int3-g64 0.", "int2-g64 ",
        "int3-g64 loses 0.1", "more than by awq", "qat recovers ", "of what int2-g64 loses",
        "decode is faster by, median over architectures: int4-g64 3.5", "int8 2.",
    ):  # fmt: skip
        assert part in claim.evidence, (part, claim.evidence)
    # Where memory and time follow the bits as well, nothing is left to be conditional on.
    ideal = long.copy()
    for bits, name in ((8, "int8"), (4, "int4-g64"), (3, "int3-g64"), (2, "int2-g64")):
        at = ideal["weight_format"] == name
        ideal.loc[at & (ideal["measure"] == "bits_per_weight"), "value"] = bits
        for measure in ("held_weight_bytes", "tpot_p50_ms"):
            plain = ideal[(ideal["measure"] == measure) & (ideal["weight_format"] == "")]
            plain = plain[(plain["stage"] == "decode") & (plain["batch"] == 1)]
            of = plain.set_index(["arch", "context"])["value"]
            here = at & (ideal["measure"] == measure) & (ideal["stage"] == "decode")
            keys = pd.MultiIndex.from_frame(ideal.loc[here, ["arch", "context"]])
            ideal.loc[here, "value"] = (of.reindex(keys) * bits / 32).to_numpy()
    assert verdicts(ideal)[10].verdict == "supported"
    alone = long[long["weight_format"].isin(["", "int8"])]
    assert verdicts(alone)[10].verdict == "not measured"
    worse = long.copy()
    at = worse["measure"] == "bits_per_byte_ratio"
    worse.loc[at, "value"] = 1 + 1 / worse.loc[at, "value"]
    assert verdicts(worse)[10].verdict == "refuted"


def test_pruning_is_judged_at_equal_tokens(long: pd.DataFrame) -> None:
    claim = verdicts(long)[11]
    assert claim.verdict == "supported"
    # 2:4 halves no dimension.
    assert "mlp:0.5: " in claim.evidence and "2:4" not in claim.evidence
    for part in ("% none", "% text", "% scratch", "better than text", "better than scratch"):
        assert part in claim.evidence, (part, claim.evidence)
    at = (long["stage"] == "prune") & long["options"].str.endswith("train=distil")
    worse = long.copy()
    worse.loc[at, "value"] = 1.05 + 0.001 * (worse.loc[at, "value"] - 1.01)
    assert verdicts(worse)[11].verdict == "conditional"
    worse.loc[at, "value"] += 0.5
    assert verdicts(worse)[11].verdict == "refuted"
    without = long[~at]
    assert verdicts(without)[11].verdict == "not measured"


def test_formats_of_unlike_runs_are_not_averaged(long: pd.DataFrame) -> None:
    """A second backend, of one architecture, is another place."""
    more = long[(long["stage"] == "decode") & (long["arch"] == "gqa")].copy()
    more["kernel_backend"] = "torch-compile"
    more["value"] *= 0.5
    both = pd.concat([long, more], ignore_index=True)
    assert verdicts(both)[10] == verdicts(long)[10]
