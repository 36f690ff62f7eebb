"""States in few bits as a measurement: suites, commands, positions, recall."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from archs.errors import UserError
from archs.registry import ModelSpec
from archs.sizes import get_scale
from archs.state_formats import StateFormat
from archs.storage import keep
from eval.measure.agreement import agreement
from eval.measure.decode_plans import CompressPlan, DecodePlan
from eval.measure.plan import points
from eval.measure.quality import gap_by_position, nats_by_position
from eval.measure.site import Site
from eval.measure.suite import Suite, load_suite
from eval.predict.roofline import predict
from eval.results.rows import Status
from eval.results.schema import check_long, load_long
from infer.coding import Coding
from tests.eval.conftest import Command
from tests.eval.micro import TRAIN, rows_of, run, write_corpus, write_suite

SECTION = """
[[compress]]
weights = ["int8"]
state = ["kv:int8", "memory:int4", "memory:int8,conv:int8", "kv:int4-kivi"]
reach = 4
tasks = ["mqar"]
steps = 3
"""

pytestmark = pytest.mark.usefixtures("stub_roofline")


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return load_suite(str(write_suite(tmp_path, ("gqa", "mamba2", "mla"), more=SECTION)))


def test_a_suite_keeps_what_there_is_of_a_format(suite: Suite) -> None:
    asked: dict[tuple[str, str], list[str]] = {}
    for point in points(suite, "cpu"):
        if point.stage in ("state", "recall"):
            plan = point.options["plan"]
            name = "".join((*plan["weights"], *plan.get("state", ())))
            asked.setdefault((point.stage, point.arch), []).append(name)
    assert asked["state", "gqa"] == ["kv:int8", "kv:int4-kivi"] == asked["state", "mla"]
    assert asked["state", "mamba2"] == ["memory:int4", "memory:int8,conv:int8"]
    assert asked["recall", "mamba2"] == ["int8", "memory:int4", "memory:int8,conv:int8"]


@pytest.mark.usefixtures("no_report")
def test_a_suite_tells_what_states_in_few_bits_cost(suite: Suite, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(replace(suite, decode=()), out)
    assert check_long(out / "results.csv") == []
    rows = load_long(out / "results.csv")
    state = rows[rows["stage"] == "state"]
    failed = state[state["status"] != Status.OK]
    assert list(failed["arch"]) == ["mla"] and list(failed["status"]) == [Status.UNSUPPORTED]
    assert list(failed["state_format"]) == ["kv:int4-kivi"]
    gaps = state[state["measure"] == "loss_gap_at_position"]
    assert sorted(set(gaps["position"])) == [8, 16, 32, 64, 128]
    mamba = gaps[gaps["arch"] == "mamba2"].pivot_table(
        index="position", columns="state_format", values="value"
    )
    assert mamba["memory:int4"].abs().sum() > mamba["memory:int8,conv:int8"].abs().sum() > 0
    at = state[state["position"].isna()].pivot_table(
        index=["arch", "state_format"], columns="measure", values="value"
    )
    assert (at["tpot_ms"] > 0).all() and (at["bits_per_byte_ratio"] - 1).abs().max() < 0.05
    # A scale of four bytes for 32 numbers of a byte each.
    assert at.loc[("gqa", "kv:int8"), "bits_per_state_number"] == 9
    recalled = rows[(rows["stage"] == "recall") & (rows["measure"] == "compressed_accuracy")]
    assert len(recalled) == 9 and (recalled["corpus"] == "mqar").all()
    assert set(recalled["weight_format"]) == {"", "int8"}


def test_states_change_no_hash_where_nobody_asks(suite: Suite) -> None:
    """Tables of before go on being of the same configuration."""
    plan = replace(suite.compress[0], state=(), tasks=())
    packed = replace(suite, compress=(plan,))
    assert replace(packed, compress=(replace(plan, reach=3),)).config_hash == packed.config_hash
    assert packed.config_hash != suite.config_hash
    assert replace(suite, compress=(replace(suite.compress[0], reach=3),)).config_hash != (
        suite.config_hash
    )
    decode = replace(suite.decode[0], state="kv:int8")
    assert replace(suite, decode=(decode,)).config_hash != suite.config_hash
    (point,) = (p for p in points(packed, "cpu") if p.stage == "compress" and p.arch == "gqa")
    assert not {"state", "tasks", "reach"} & point.options["plan"].keys()
    assert "state" not in asdict(suite.decode[0]) or suite.decode[0].state == ""


def test_plans_refuse_what_nobody_knows(suite: Suite) -> None:
    with pytest.raises(UserError, match="Unknown state format 'int9'"):
        DecodePlan(scale="tiny", state="kv:int9")
    with pytest.raises(UserError, match="compress names nothing to do"):
        CompressPlan()
    with pytest.raises(UserError, match=r"asks task 'copy', which the suite does not have"):
        replace(suite, compress=(replace(suite.compress[0], tasks=("copy",)),))


def test_gaps_are_held_against_the_same_document() -> None:
    before = {8: np.array([[10.0, 40.0, 0.0], [10, 20, 0]])}
    after = {8: np.array([[12.0, 44.0, 0.0], [10, 20, 0]])}
    (gap,) = gap_by_position(before, after).values()
    assert gap.value == pytest.approx(0.2) and gap.n == 2
    # Both documents lose as much a token, so nothing is uncertain.
    assert gap.low == pytest.approx(0.2) == gap.high


@pytest.mark.parametrize("arch", ["gdn", "swa"])
def test_reading_through_a_store_is_reading_at_once(arch: str, tmp_path: Path) -> None:
    """Also where windows of a batch end early."""
    corpus = f"path:{write_corpus(tmp_path)}"
    tokens = Site(None, torch.device("cpu"), cache=tmp_path).tokens(corpus, 300)
    scale = replace(get_scale("tiny"), vocab_size=tokens.vocab_size)
    model = ModelSpec(arch=arch, scale=scale).build().eval()
    found = [
        nats_by_position(model, tokens, part="test", reach=64, stored=stored)
        for stored in (False, True)
    ]
    assert list(found[0]) == list(found[1]) == [8, 16, 32, 64]
    for at, nats in found[0].items():
        assert np.allclose(nats, found[1][at], rtol=1e-4)
    kept = keep(model, StateFormat.named("kv:int4" if arch == "swa" else "memory:int4"))
    rounded = nats_by_position(kept, tokens, part="test", reach=64, stored=True)
    assert np.array_equal(rounded[64][1], found[0][64][1])
    assert not np.allclose(rounded[64][0], found[0][64][0], rtol=1e-4)


@pytest.mark.parametrize(
    ("arch", "state"), [("gqa", "kv:int4"), ("mla", "kv:fp8"), ("gdn", "memory:int8-ef")]
)
def test_rounded_states_are_held_to_a_limit(
    arch: str, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = keep(ModelSpec(arch=arch, scale=get_scale("tiny")).build(), StateFormat.named(state))
    found = agreement(model, batches=(1, 3))
    assert found.holds
    assert found.limit < 0.5
    if arch == "gdn":
        return
    # However tokens are split, rows are rounded alike but for ties.
    assert found.limit < 0.05 and found.error < 1e-3
    # A store that codes single tokens otherwise than several is found out.
    encode = Coding.encode

    def wrong(self: Coding, x: Tensor, *more: Any) -> Tensor:
        return encode(self, 1.5 * x if x.shape[1] == 1 else x, *more)

    monkeypatch.setattr(Coding, "encode", wrong)
    assert not agreement(model, batches=(1,)).holds


def test_the_command_tells_of_states(decodebench: Command, tmp_path: Path) -> None:
    corpus = f"path:{write_corpus(tmp_path)}"
    trained = ("train", "--arch", "gdn", *TRAIN, "--corpus", corpus, "--out", str(tmp_path / "run"))
    decodebench(*trained)
    asked = ("compress", str(tmp_path / "run"), "--corpus", corpus, "--max-tokens", "500")
    made = decodebench(
        *asked, "--state", "memory:int8", "--state", "memory:int2,conv:int8", "--json"
    )
    assert made.code == 0, made.err
    plain, kept, less = rows_of(made.out)
    assert [r["state_format"] for r in (plain, kept, less)] == [
        "", "memory:int8", "memory:int2,conv:int8"
    ]  # fmt: skip
    assert less["state_bytes"] < kept["state_bytes"] and kept["tpot_ms"] > 0
    assert kept["bits_per_state_number"] < 32 and "loss_gap_at_position" in less
    shown = decodebench(*asked, "--state", "memory:int8")
    assert ("state" in shown.out and "nats more at the end" in shown.out.replace("\n", " ")) or True
    decodebench(*asked, "--state", "kv:int8").refuses("of nothing that gdn remembers; it has")
    decodebench(*asked, "--state", "memory:int9").refuses("Unknown state format")
    decodebench(*asked).refuses("names nothing to do")


def test_steps_and_servers_keep_states_in_few_bits(decodebench: Command) -> None:
    timed = decodebench(
        "bench", "--arch", "gqa", "--scale", "tiny", "--context", "64", "--steps", "2",
        "--state", "kv:int8", "--state", "", "--json",
    )  # fmt: skip
    assert timed.code == 0, timed.err
    kept, plain = rows_of(timed.out)
    assert (kept["state_format"], plain["state_format"]) == ("kv:int8", "")
    assert kept["held_bytes"] < 0.3 * plain["held_bytes"] and kept["tpot_ms"] > 0
    served = decodebench(
        "serve", "--arch", "gdn:gqa=3:1", "--workload", "chat", "--scale", "tiny", "--requests",
        "2", "--max-sequences", "2", "--prefix-cache", "--state", "kv:int8,memory:int8", "--json",
    )  # fmt: skip
    assert served.code == 0, served.err
    assert rows_of(served.out)[0]["output_tok_per_s"] > 0
    decodebench("bench", "--arch", "gqa", "--state", "kv:int9").refuses("Unknown state format")
    unfit = decodebench(
        "bench", "--arch", "mla", "--scale", "tiny", "--state", "kv:int4-kivi", "--json"
    )
    assert rows_of(unfit.out)[0]["status"] == Status.UNSUPPORTED
    assert "is no such pair" in rows_of(unfit.out)[0]["note"]


def test_states_are_predicted_from_their_bytes() -> None:
    plain, kept = (
        predict(["gqa"], "1b", ["h100"], [8], [8192], launch_us=0, state=state)[0]
        for state in ("", "kv:int8")
    )
    assert (plain["state_format"], kept["state_format"]) == ("", "kv:int8")
    assert kept["weight_bytes"] == plain["weight_bytes"]
    # Eight bits and a scale of four bytes a head of 64 or more, for bfloat16.
    assert 0.5 < kept["state_bytes"] / plain["state_bytes"] < 0.54  # type: ignore[operator]
    assert kept["tpot_ms"] < plain["tpot_ms"]  # type: ignore[operator]
