"""Compression as a measurement: suites, commands, their figures, and what tables tell apart."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from archs.backbone import cast
from archs.errors import UserError
from archs.registry import ModelSpec
from archs.sizes import get_scale
from archs.storage import store
from archs.weights import WeightFormat
from eval.measure.agreement import Agreement
from eval.measure.compressing import ratio_row
from eval.measure.decode_plans import CompressPlan, DecodePlan
from eval.measure.plan import points
from eval.measure.quality import DocumentScore
from eval.measure.site import served_dtype
from eval.measure.suite import Suite, load_suite
from eval.predict.fit import fit
from eval.predict.machine import ProductRate, Roofline, with_products
from eval.predict.roofline import predict, predict_ops
from eval.report.leaderboard import wide
from eval.results.rows import Status
from eval.results.schema import check_long, load_long
from tests.eval.conftest import Command
from tests.eval.micro import TRAIN, rows_of, run, write_corpus, write_suite
from train.checkpoint import read_metadata
from train.loop import CHECKPOINT_NAME

SECTION = """
[[compress]]
weights = ["float32", "int8", "int4-g32-awq"]
archs = ["gdn"]
calibration = 16
steps = 3
"""

pytestmark = pytest.mark.usefixtures("stub_roofline")


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return load_suite(str(write_suite(tmp_path, ("gqa", "gdn"), more=SECTION)))


@pytest.mark.usefixtures("no_report")
def test_a_suite_stores_its_trained_models(suite: Suite, tmp_path: Path) -> None:
    planned = [p for p in points(suite, "cpu") if p.stage == "compress"]
    assert [p.options["plan"]["weights"] for p in planned] == [
        ("float32",), ("int8",), ("int4-g32-awq",)
    ]  # fmt: skip
    out = tmp_path / "run"
    assert run(replace(suite, tasks={}, decode=()), out)
    assert check_long(out / "results.csv") == []
    rows = load_long(out / "results.csv")
    rows = rows[rows["stage"] == "compress"]
    assert set(rows["status"]) == {Status.OK.value} and set(rows["arch"]) == {"gdn"}
    table = rows[rows["position"].isna()].pivot_table(
        index="weight_format", columns="measure", values="value"
    )
    assert list(table.index) == ["", "int4-g32-awq", "int8"]
    assert table.loc["", "bits_per_byte_ratio"] == 1 and table.loc["", "bits_per_weight"] == 32
    held = table["held_weight_bytes"]
    assert held["int4-g32-awq"] < held["int8"] < 0.27 * held[""]
    assert (table["tpot_ms"] > 0).all()
    # Compressed models are checkpoints like others.
    kept = sorted(out.glob("cells/gdn/compress-*/" + CHECKPOINT_NAME))
    assert {read_metadata(path).weights for path in kept} == {"", "int4-g32-awq", "int8"}
    # A leaderboard keeps what is stored differently apart.
    names = [c for c in wide(load_long(out / "results.csv")) if c.startswith("compressed_bits")]
    assert {name.partition("c32")[2] for name in names if ":" not in name} == {
        "", "/int8", "/int4-g32-awq"
    }  # fmt: skip


@pytest.mark.usefixtures("no_report")
def test_a_step_that_is_wrong_takes_no_figure_of_quality(
    suite: Suite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "eval.measure.compressing.agreement", lambda *_, **__: Agreement(error=1.0, limit=0.1)
    )
    plan = replace(suite.compress[0], weights=("int8",))
    assert run(replace(suite, tasks={}, decode=(), compress=(plan,)), tmp_path / "run")
    rows = load_long(tmp_path / "run" / "results.csv")
    rows = rows[rows["stage"] == "compress"].set_index("measure")
    assert rows.loc["tpot_ms", "status"] == Status.INCORRECT
    assert "latencies withheld" in str(rows.loc["tpot_ms", "note"])
    assert rows.loc["bits_per_byte_ratio", "value"] > 0 and "mbu" not in rows.index
    assert check_long(tmp_path / "run" / "results.csv") == []


def test_formats_change_no_hash_where_nobody_asks(suite: Suite) -> None:
    """Tables of before go on being of the same configuration."""
    without = replace(suite, compress=())
    plan = asdict(without)
    assert plan.pop("compress") == () and without.config_hash != suite.config_hash
    decode = replace(without.decode[0], weights="int8")
    assert replace(without, decode=(decode,)).config_hash != without.config_hash
    assert suite.only(["gqa"]).compress == () and suite.only(["gdn"]).compress == suite.compress


def test_a_ratio_is_of_all_bits_and_its_interval_over_documents() -> None:
    before = [DocumentScore(d, bits, 10) for d, bits in enumerate((100.0, 300.0, 50.0))]
    after = [replace(score, bits=score.bits * r) for score, r in zip(before, (1.1, 1.2, 1.1))]  # noqa: B905
    row = ratio_row(before, after)
    assert row.value == pytest.approx((110 + 360 + 55) / 450) and row.n == 3
    assert row.low is not None and row.high is not None and row.low < row.value < row.high  # type: ignore[operator]
    same = ratio_row(before, before)
    assert (same.value, same.low, same.high) == (1, 1, 1)
    alone = ratio_row(before[:1], after[:1])
    assert alone.value == pytest.approx(1.1) and alone.low is None


def test_the_command_writes_checkpoints_that_others_take(
    decodebench: Command, tmp_path: Path
) -> None:
    corpus = f"path:{write_corpus(tmp_path)}"
    decodebench(
        "train", "--arch", "gqa", *TRAIN, "--corpus", corpus, "--out", str(tmp_path / "run")
    )
    made = decodebench(
        "compress", str(tmp_path / "run"), "--weights", "int4-g32", "--weights",
        "int4-g64-gptq,head:bfloat16", "--corpus", corpus, "--calibration", "16", "--max-tokens",
        "2000", "--json",
    )  # fmt: skip
    assert made.code == 0, made.err
    rows = rows_of(made.out)
    assert [row["weight_format"] for row in rows] == [
        "float32", "int4-g32", "int4-g64-gptq,head:bfloat16"
    ]  # fmt: skip
    assert all(row["status"] == "ok" and row["tpot_ms"] > 0 for row in rows)
    path = Path(rows[2]["checkpoint"])
    assert path == tmp_path / "run/compressed/int4-g64-gptq-head-bfloat16" / CHECKPOINT_NAME
    scored = decodebench("quality", str(path), "--corpus", corpus, "--json")
    assert scored.code == 0 and rows_of(scored.out)[0]["value"] > 0
    drafted = decodebench(
        "speculate", "--target", str(path), "--k", "2", "--context", "8", "--new-tokens", "6",
        "--corpus", corpus, "--json",
    )  # fmt: skip
    assert drafted.code == 0, drafted.err
    assert rows_of(drafted.out)[0]["lossless"] == 1
    again = decodebench("compress", str(path), "--weights", "int8", "--corpus", corpus)
    again.refuses("packed as int4-g64-gptq,head:bfloat16 already")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--weights", "int4-g60"], "Unknown weight format 'int4-g60'. Did you mean"),
        (["--weights", "int8-awq"], "awq chooses codes of integers of 2 to 4 bits"),
        (["--weights", "int8", "--weights", "int8"], "weights names 'int8' twice"),
        (["--weights", "int8", "--calibration", "0"], "calibration=0 must be at least 1"),
        (["--weights", "int8", "--corpus", "nothing"], "nothing"),
    ],
)
def test_bad_formats_are_one_line(
    arguments: list[str], says: str, decodebench: Command, tmp_path: Path
) -> None:
    corpus = f"path:{write_corpus(tmp_path)}"
    decodebench("train", "--arch", "gqa", *TRAIN, "--corpus", corpus, "--out", str(tmp_path))
    decodebench("compress", str(tmp_path), "--corpus", corpus, *arguments).refuses(says)


def test_steps_are_timed_in_every_format(decodebench: Command) -> None:
    timed = decodebench(
        "bench", "--arch", "gqa", "--scale", "tiny", "--context", "16", "--steps", "2",
        "--weights", "int4-g32", "--weights", "float32", "--json",
    )  # fmt: skip
    assert timed.code == 0, timed.err
    packed, plain = rows_of(timed.out)
    assert (packed["weight_format"], plain["weight_format"]) == ("int4-g32", "float32")
    assert packed["held_weight_bytes"] < 0.2 * plain["held_weight_bytes"]
    assert packed["step_bytes"] < 0.2 * plain["step_bytes"] and packed["tpot_ms"] > 0
    untrained = decodebench("bench", "--arch", "gqa", "--weights", "int4-g64-awq")
    untrained.refuses("these weights are random; leave it out")
    with pytest.raises(UserError, match="Unknown weight format"):
        DecodePlan(scale="tiny", weights="int9")
    with pytest.raises(UserError, match="compress names nothing to do"):
        CompressPlan(weights=())


def test_trained_models_are_served_in_what_their_weights_say() -> None:
    cpu = torch.device("cpu")
    model = ModelSpec(arch="gqa", scale=get_scale("tiny")).build()
    assert served_dtype(model, cpu) == torch.float32
    packed = store(model, WeightFormat.named("int4-g32"))
    assert served_dtype(cast(packed, torch.float32), cpu) == torch.bfloat16


def test_servers_hold_packed_weights(decodebench: Command) -> None:
    asked = ("serve", "--arch", "gqa", "--workload", "chat", "--weights", "int4-g64", "--json")
    small = ("--scale", "tiny", "--requests", "2", "--max-sequences", "2")
    served = decodebench(*asked, *small)
    assert served.code == 0, served.err
    assert rows_of(served.out)[0]["output_tok_per_s"] > 0
    # Half of the memory that plain weights take holds packed ones and sequences beside them.
    clocked = ("serve", "--arch", "gqa", "--workload", "chat", "--simulate", "--scale", "8b",
               "--memory", "8GiB", "--requests", "20", "--json")  # fmt: skip
    packed = decodebench(*clocked, "--weights", "int4-g64")
    assert packed.code == 0 and rows_of(packed.out)[0]["output_tok_per_s"] > 0
    decodebench(*clocked, "--weights", "bfloat16").refuses("give more memory")
    decodebench(*asked, "--weights", "int4-g64-gptq").refuses("these weights are random")


def test_packed_weights_are_predicted_from_their_bytes() -> None:
    plain, packed = (
        predict(["gqa"], "1b", ["h100"], [1], [1024], launch_us=0, weights=weights)[0]
        for weights in ("", "int4-g64")
    )
    assert (plain["weight_format"], packed["weight_format"]) == ("", "int4-g64")
    assert packed["state_bytes"] == plain["state_bytes"]
    saved = plain["step_bytes"] - packed["step_bytes"]  # type: ignore[operator]
    assert packed["weight_bytes"] == plain["weight_bytes"] - saved  # type: ignore[operator]
    gained = plain["tpot_ms"] / packed["tpot_ms"]  # type: ignore[operator]
    assert gained == pytest.approx(plain["step_bytes"] / packed["step_bytes"], rel=1e-3)  # type: ignore[operator]
    ops = {row["op"]: row for row in predict_ops(["gqa"], "1b", weights="int4-g64")}
    scale = get_scale("1b")
    # Eight bits a number and a scale of two bytes a row.
    assert ops["head"]["step_bytes"] == scale.vocab_size * (scale.d_model + 2)
    (row,) = fit(["gqa"], tpot_ms=50, scale="8b", contexts=[1024], gpus=1, weights="int4-g64")
    (wide,) = fit(["gqa"], tpot_ms=50, scale="8b", contexts=[1024], gpus=1)
    assert row["batch"] > wide["batch"]  # type: ignore[operator]


def test_packed_products_have_rates_of_their_own() -> None:
    known = Roofline(
        1e9, 1e12, torch.bfloat16, (ProductRate(1, 1e9), ProductRate(1, 2e9, 3, "int8"))
    )
    assert known.bytes_per_s(1) == 1e9 and known.bytes_per_s(1, "int8") == 2e9
    # What nobody measured is read as fast as plain weights.
    assert known.bytes_per_s(1, "int4-g64") == 1e9
    assert known.time_ms(0, 2e9, 1, "int8") == pytest.approx(1000 + 3e-3)
    found = with_products(known, torch.device("cpu"), (1, 8), ("", "int8"))
    assert {(p.rows, p.storage) for p in found.products} == {
        (1, ""), (8, ""), (1, "int8"), (8, "int8")
    }  # fmt: skip
    assert known.products[1] in found.products
