"""Speculation as a measurement: suites, the command, its figures, where it is predicted to pay."""

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from archs.checks import parse
from archs.errors import UserError
from archs.heads import HeadModel
from archs.registry import ModelSpec
from archs.sizes import get_scale
from eval.measure import speculation
from eval.measure.decode_plans import SpeculatePlan
from eval.measure.plan import points
from eval.measure.speculation import round_costs
from eval.measure.suite import Suite, load_suite
from eval.measure.ties import Gap
from eval.predict.roofline import resident_bytes
from eval.predict.speculation import speculate
from eval.results.rows import Status
from eval.results.schema import load_long
from infer.draft_length import expected_tokens
from infer.speculate import NotLosslessError, Round, Speculation
from tests.eval.conftest import Command
from tests.eval.micro import TRAIN, rows_of, run, write_corpus, write_suite

SECTIONS = """
[[speculate]]
draft = "context"
drafts = [2, 4]
contexts = [16]
new_tokens = 12

[[speculate]]
draft = "mtp"
targets = ["gdn"]
drafts = [3]
contexts = [16]
new_tokens = 12

[[speculate]]
draft = "gqa@nano"
targets = ["gdn"]
drafts = [3]
batches = [2]
contexts = [16, 24]
new_tokens = 12
"""


pytestmark = pytest.mark.usefixtures("stub_roofline")


@pytest.fixture
def speculating(tmp_path: Path) -> Suite:
    path = write_suite(tmp_path, ("gqa", "gdn"), more=SECTIONS)
    path.write_text(
        path.read_text().replace(
            'scale = "tiny"', 'scale = "tiny"\nmtp_weight = 0.3\nladder = ["nano"]', 1
        )
    )
    return replace(load_suite(str(path)), tasks={}, decode=())


def test_a_suite_speculates_with_the_models_that_it_trains(
    speculating: Suite, tmp_path: Path
) -> None:
    assert run(speculating, tmp_path / "out")
    long = load_long(tmp_path / "out" / "results.csv")
    rows = long[long["stage"] == "speculate"]
    assert set(rows["status"]) == {"ok"}
    assert sorted(set(zip(rows["arch"], rows["options"], rows["batch"], strict=True))) == [
        ("gdn", "draft=context drafts=2", 1),
        ("gdn", "draft=context drafts=4", 1),
        ("gdn", "draft=gqa@nano drafts=3", 2),
        ("gdn", "draft=mtp drafts=3", 1),
        ("gqa", "draft=context drafts=2", 1),
        ("gqa", "draft=context drafts=4", 1),
    ]
    one = rows[(rows["options"] == "draft=gqa@nano drafts=3") & (rows["context"] == 24)]
    whole = one[one["position"].fillna(0) == 0].set_index("measure")["value"]
    assert whole["lossless"] == 1
    assert 1 <= whole["tokens_per_verification"] <= 4
    assert whole["tokens_per_verification_pred"] == pytest.approx(
        expected_tokens(whole["acceptance"], 3)
    )
    assert whole["speedup"] == pytest.approx(
        whole["plain_tpot_ms"] / whole["speculative_tpot_ms"], rel=0.5
    )
    assert whole["speedup_pred"] > 0 and whole["draft_state_bytes"] > 0
    model = speculating.trained_model("gdn", "tiny", 300).outline()
    held = model.state_bytes(24, lookback=3) - model.state_bytes(24)
    assert whole["rollback_bytes"] == held > 0
    positions = one[one["position"].fillna(0) > 0].set_index("position")["value"]
    assert list(positions.index) == [1, 2, 3]
    assert positions.is_monotonic_decreasing


def test_a_suite_names_the_models_that_it_lacks(tmp_path: Path) -> None:
    data = tomllib.loads(write_suite(tmp_path).read_text())
    for plan, fragment in (
        ({"draft": "gqa@nano"}, 'add ladder = \\["nano"\\]'),
        ({"draft": "mla@tiny"}, "'mla', which the suite does not train"),
        ({"targets": ["mla"]}, "'mla', which the suite does not train"),
        ({"draft": "gqa"}, "none of context, layers:N, mtp and ARCH@SCALE"),
        ({"draft": "mtp"}, r"a head that the suite does not train; set mtp_weight in \[train\]"),
        ({"draft": "gqa@tny"}, "Did you mean 'tiny'"),
        ({"draft": "layers:0"}, "'layers:0' is none of context"),
        ({"drafts": [9]}, "drafts=9 are more than a step can take back"),
        ({"new_tokens": 1}, "new_tokens=1 must be at least 2"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"state": "kv:int9"}, "Did you mean 'int"),
    ):
        with pytest.raises(UserError, match=fragment):
            parse(Suite, {"name": "s", **data, "speculate": [plan]}, "s.toml")
    del data["train"]
    with pytest.raises(UserError, match="speculate needs trained models"):
        parse(Suite, {"name": "s", **data, "speculate": [{}]}, "s.toml")


def test_a_suite_without_it_keeps_its_hash(tmp_path: Path) -> None:
    suite = load_suite("tiny")
    assert suite.config_hash == "6ec32664d6e5"
    speculating = replace(suite, speculate=(SpeculatePlan(),))
    assert speculating.config_hash != suite.config_hash
    # Folders that were measured before options were added go on.
    digests: dict[str, str] = {}
    for point in points(speculating, "cpu"):
        digests.setdefault(point.stage, point.digest)
    assert digests["train"] == "f52b9cab8eb2" and digests["decode"] == "8df84c65ce8b"
    assert digests["speculate"] == "df458366f2fc"


def test_rounds_cost_what_they_took_and_what_lies_between() -> None:
    """Tails of a generation draft less than they were asked for; a search may never find k."""
    rounds = {0: [10.0, 10.0, 30.0], 1: [12.0, 14.0], 2: [], 3: [20.0]}
    found = [
        Speculation(
            [[0]], [*(Round((k,), (0,)) for _ in times), Round((0,), (0,))], 1.0,
            [2.0 * bool(k) for _ in times] + [0.0], [ms - 2 * bool(k) for ms in times] + [10.0],
        )
        for k, times in rounds.items()
    ]  # fmt: skip
    assert round_costs(found) == pytest.approx([1.0, 1.3, 1.65, 2.0])


def test_the_command_measures_checkpoints(decodebench: Command, tmp_path: Path) -> None:
    write_corpus(tmp_path)
    text = ("--corpus", "path:text.txt")
    decodebench("train", "--arch", "gdn", *TRAIN, *text, "--out", "target")
    decodebench("train", "--arch", "gqa", "--scale", "nano", *TRAIN, *text, "--out", "draft")
    asked = ("speculate", "--target", "target", *text, "--context", "16", "--new-tokens", "8")
    outcome = decodebench(*asked, "--draft", "draft", "--k", "2,3", "--batch", "2", "--json")
    rows = rows_of(outcome.out)
    assert [(r["arch"], r["draft"], r["drafts"], r["batch"]) for r in rows] == [
        ("gdn", "gqa@nano", "2", 2), ("gdn", "gqa@nano", "3", 2),
    ]  # fmt: skip
    assert all(r["lossless"] == 1 and r["speedup"] > 0 for r in rows)
    assert rows[1]["acceptance_at_3"] <= rows[1]["acceptance_at_1"]
    early = rows_of(decodebench(*asked, "--draft", "layers:1", "--k", "2", "--json").out)
    assert early[0]["draft"] == "layers:1" and early[0]["lossless"] == 1
    decodebench(*asked, "--draft", "mtp").refuses("holds no head", "mtp_weight = 0.3")
    decodebench(*asked, "--draft", "layers:4").refuses("first 4 layers of a model of 4")
    drawn = decodebench(*asked, "--k", "2", "--temperature", "1", "--adaptive")
    assert drawn.code == 0
    assert "batch 1, context 16: " in drawn.out
    decodebench(*asked, "--draft", "nothing").refuses("nothing", "does not exist")
    decodebench(*asked, "--k", "9").refuses("drafts=9 are more than a step can take back")
    decodebench(*asked[:-4], "--context", "100k").refuses("held-out text has", "shorter context")
    decodebench("train", "--arch", "gqa", *TRAIN, *text, "--vocab-size", "400", "--out", "other")
    decodebench(*asked, "--draft", "other").refuses("was trained on tokens bpe400")
    decodebench("speculate", "--target", "gqa", "--draft", "draft").refuses("is a checkpoint")
    decodebench("speculate", "--target", "gqa", "--draft", "gqa").refuses("ARCH@SCALE")


def test_the_command_trains_a_head_that_drafts(decodebench: Command, tmp_path: Path) -> None:
    write_corpus(tmp_path)
    text = ("--corpus", "path:text.txt")
    with_head = ("--mtp-weight", "0.3", "--early-exit-layers", "1", "--early-exit-weight", "0.2")
    decodebench("train", "--arch", "gdn", *TRAIN, *text, *with_head, "--out", "target")
    asked = ("speculate", "--target", "target", *text, "--context", "16", "--new-tokens", "12")
    outcome = decodebench(*asked, "--draft", "mtp", "--k", "1,3", "--batch", "1,2", "--json")
    rows = rows_of(outcome.out)
    assert [(r["draft"], r["drafts"], r["batch"]) for r in rows] == [
        ("mtp", "1", 1), ("mtp", "3", 1), ("mtp", "1", 2), ("mtp", "3", 2),
    ]  # fmt: skip
    assert all(r["lossless"] == 1 and r["draft_state_bytes"] > 0 for r in rows)
    # The head is no part of the model that is served.
    assert decodebench("quality", "target", *text).code == 0
    refused = decodebench(
        "train", "--arch", "gdn", *TRAIN, *text, "--early-exit-layers", "9",
        "--early-exit-weight", "1", "--out", "deep",
    )  # fmt: skip
    refused.refuses("first 9 layers of a model of 4 are no draft")
    decodebench("speculate", "--target", "gqa", "--draft", "layers:2").refuses("is measured alone")
    predicted = decodebench("speculate", "--target", "gqa", "--draft", "mtp", "--json")
    assert rows_of(predicted.out)[0]["draft"] == "mtp"


def test_tokens_that_differ_by_more_than_a_tie_make_a_point_incorrect(
    decodebench: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_corpus(tmp_path)
    text = ("--corpus", "path:text.txt")
    decodebench("train", "--arch", "gqa", *TRAIN, *text)
    generate = speculation.generate

    def wrong(*given: object, **options: object) -> object:
        found = generate(*given, **options)  # type: ignore[arg-type]
        found.tokens[0][3] = (found.tokens[0][3] + 1) % 300
        return found

    monkeypatch.setattr(speculation, "generate", wrong)
    asked = ("speculate", "--target", "runs/train", *text, "--context", "16", "--k", "2")
    outcome = decodebench(*asked, "--json")
    assert outcome.code == 1
    row = rows_of(outcome.out)[0]
    assert row["status"] == Status.INCORRECT and "speedup" not in row
    assert "where plain decode gives" in str(row["note"])
    # The same difference as a tie: the two logits are equal.
    monkeypatch.setattr(speculation, "tie_gap", lambda *_: Gap(1e-6, 1e-4))
    row = rows_of(decodebench(*asked, "--json").out)[0]
    assert row["status"] == Status.OK and row["lossless"] == 0
    assert "a tie at token 3" in str(row["note"])


def test_states_in_few_bits_are_speculated_on_where_that_loses_nothing(
    decodebench: Command, tmp_path: Path
) -> None:
    """Rows are what they are however tokens come; a verification would round a state once."""
    write_corpus(tmp_path)
    text = ("--corpus", "path:text.txt")
    for arch in ("gqa", "gdn:gqa=3:1"):
        decodebench("train", "--arch", arch, *TRAIN, *text, "--out", arch)
    asked = ("--context", "40", "--new-tokens", "8", "--k", "2", *text, "--json")
    for state in ("kv:int4-g32", "kv:int8"):
        [row] = rows_of(decodebench("speculate", "--target", "gqa", "--state", state, *asked).out)
        assert row["status"] == Status.OK and row["lossless"] == 1
        assert row["state_format"] == state
    plain = rows_of(decodebench("speculate", "--target", "gqa", *asked).out)[0]
    assert row["draft_state_bytes"] == plain["draft_state_bytes"] == 0
    drafted = ("--draft", "gqa", "--state", "kv:int8,memory:int8")
    [row] = rows_of(decodebench("speculate", "--target", "gqa", *drafted, *asked).out)
    assert row["state_format"] == "kv:int8" and row["draft_state_bytes"] > 0
    hybrid = ("speculate", "--target", "gdn:gqa=3:1")
    [row] = rows_of(decodebench(*hybrid, "--state", "memory:int8-ef", *asked).out)
    assert row["status"] == Status.UNSUPPORTED
    assert "'memory:int8-ef' is rounded at the end of every step" in str(row["note"])
    [row] = rows_of(decodebench(*hybrid, "--state", "kv:int8", *asked).out)
    assert row["lossless"] == 1
    decodebench("speculate", "--target", "gqa", "--state", "memory:int8").refuses(
        "'memory:int8' is of nothing that gqa remembers; it has kv"
    )
    decodebench("speculate", "--target", "gqa", "--weights", "int8").refuses(
        "'int8' are of predictions", "compress it"
    )


# -- prediction ------------------------------------------------------------------------------------


def test_speculation_pays_less_the_larger_the_batch() -> None:
    rows = speculate("gqa", "gqa", scale="8b", draft_scale="1b", acceptance=0.8,
                     batches=(1, 16, 64, 256), contexts=(1024,))  # fmt: skip
    gains = [float(str(row["speedup_pred"])) for row in rows]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > 1.5
    drafts = [int(str(row["drafts"])) for row in rows]
    assert drafts == sorted(drafts, reverse=True)


def test_drafts_that_are_never_right_never_pay() -> None:
    for batch in (1, 64):
        (row,) = speculate("gqa", "gqa", scale="8b", draft_scale="1b", acceptance=0.0,
                           batches=(batch,), contexts=(1024,))  # fmt: skip
        assert row["drafts"] == 0 and row["max_drafts"] == 0
        assert float(str(row["speedup_pred"])) < 1


def test_free_drafts_that_are_always_right_multiply_the_speed_of_a_model_bound_by_weights() -> None:
    (row,) = speculate("swa", None, scale="8b", acceptance=1.0, contexts=(64,), launch_us=0.0)
    assert row["drafts"] == 8
    assert float(str(row["speedup_pred"])) == pytest.approx(9, rel=0.03)


def test_a_head_costs_less_than_a_small_model_and_holds_no_second_embedding() -> None:
    spec = ModelSpec(arch="gqa", scale=get_scale("8b"))
    trunk = spec.outline()
    head = HeadModel(trunk, spec.head())
    own = sum(p.nbytes for p in spec.head().parameters())
    assert resident_bytes(head, beside=trunk) == own < 0.1 * resident_bytes(trunk)
    gains = [
        float(str(row["speedup_pred"]))
        for draft in (None, "mtp", "gqa")
        for row in speculate("gqa", draft, scale="8b", draft_scale="1b", acceptance=0.8,
                             batches=(1,), contexts=(1024,))
    ]  # fmt: skip
    assert gains == sorted(gains, reverse=True)
    assert gains[1] > 1.8


def test_copies_of_recurrent_state_are_what_rollback_takes() -> None:
    (row,) = speculate("gdn", None, scale="8b", acceptance=0.7, drafts=(4,))
    model = ModelSpec(arch="gdn", scale=get_scale("8b")).outline(torch.bfloat16)
    assert row["rollback_bytes"] == 4 * sum(s.fixed_bytes for s in model.state_specs())


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        ({"acceptance": 1.5}, "acceptance=1.5 must lie between 0 and 1"),
        ({"drafts": ()}, "drafts"),
        ({"drafts": (4, 16)}, "drafts=16 are more than a step can take back"),
        ({"draft_scale": "tiny"}, "vocabulary of 4096 tokens at scale tiny is not"),
        ({"hardware": ("h10",)}, "hardware"),
    ],
)
def test_predictions_refuse_what_cannot_be(options: dict[str, object], fragment: str) -> None:
    given: dict[str, object] = {"scale": "8b", "draft_scale": "1b", "acceptance": 0.7, **options}
    with pytest.raises(UserError, match=fragment):
        speculate("gqa", "gqa", **given)  # type: ignore[arg-type]


def test_states_in_few_bits_are_predicted_with_their_bytes() -> None:
    at = {"scale": "8b", "acceptance": 0.8, "batches": (64,), "contexts": (16384,)}
    [plain] = speculate("gqa", None, **at)  # type: ignore[arg-type]
    [short] = speculate("gqa", None, state="kv:int4-g32", weights="int8", **at)  # type: ignore[arg-type]
    assert (plain["fits"], short["fits"]) == (False, True)
    assert (short["weight_format"], short["state_format"]) == ("int8", "kv:int4-g32")
    with pytest.raises(NotLosslessError, match="'memory:int8' is rounded at the end of every step"):
        speculate("gdn", None, state="kv:int8,memory:int8", **at)  # type: ignore[arg-type]
