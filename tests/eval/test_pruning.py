"""Pruning as a measurement: each way to train on, sizes, checkpoints, refusals."""

from dataclasses import replace
from pathlib import Path

import pytest

from archs.errors import UserError
from eval.measure.decode_plans import CompressPlan
from eval.measure.plan import points
from eval.measure.suite import Suite, load_suite
from eval.results.schema import check_long, load_long
from tests.eval.micro import run, write_suite
from train.checkpoint import load_model, read_metadata, read_spec
from train.loop import CHECKPOINT_NAME

SECTION = """
[[compress]]
prune = ["mlp:0.5", "2:4-wanda"]
archs = ["gdn"]
calibration = 8
steps = 3
distil_steps = 2
tasks = ["mqar"]
"""

pytestmark = pytest.mark.usefixtures("stub_roofline")


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return load_suite(str(write_suite(tmp_path, ("gqa", "gdn"), more=SECTION)))


@pytest.mark.usefixtures("no_report")
def test_a_suite_prunes_its_trained_models(suite: Suite, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert run(
        replace(suite, tasks={}, decode=(), compress=(replace(suite.compress[0], tasks=()),)), out
    )
    assert check_long(out / "results.csv") == []
    rows = load_long(out / "results.csv")
    rows = rows[rows["stage"] == "prune"]
    assert set(rows["status"]) == {"ok"} and set(rows["arch"]) == {"gdn"}
    scored = rows[rows["measure"] == "bits_per_byte_ratio"].set_index("options")["value"]
    assert sorted(scored.index) == [
        *(f"prune=2:4-wanda train={how}" for how in ("distil", "none", "text")),
        *(f"prune=mlp:0.5 train={how}" for how in ("distil", "none", "scratch", "text")),
    ]
    assert (scored > 0.9).all() and scored.nunique() == len(scored)
    whole = rows.set_index(["options", "measure"])["value"]
    smaller, sparse = "prune=mlp:0.5", "prune=2:4-wanda"
    assert whole[smaller, "held_weight_bytes"] < whole[sparse, "held_weight_bytes"]
    assert whole[smaller, "tpot_ms"] > 0 and whole[smaller, "state_bytes"] > 0
    params = rows.groupby("options")["params"].first()
    assert params[smaller] < params[sparse]
    # What was distilled is a checkpoint like others.
    (path,) = (
        p for p in out.glob("cells/gdn/prune-*/" + CHECKPOINT_NAME)
        if read_metadata(p).pruned == "mlp:0.5"
    )  # fmt: skip
    model, spec = load_model(path), read_spec(path)
    assert sum(p.numel() for p in model.parameters()) == params[smaller]
    assert [layer.hidden for layer in spec.layers] == [
        layer.hidden // 2
        for layer in read_spec(next(out.glob("cells/gdn/train-*/" + CHECKPOINT_NAME))).layer_specs()
    ]


@pytest.mark.usefixtures("no_report")
def test_what_does_not_fit_a_model_is_a_row_and_ends_no_run(tmp_path: Path) -> None:
    """Cuts that leave no whole unit, axes of others, groups wider than a matrix: not one point."""
    section = """
[[compress]]
prune = ["state:0.5", "key_dim:0.5", "layers:4"]
weights = ["int4-g128"]
calibration = 8
steps = 3
distil_steps = 0
"""
    path = write_suite(tmp_path, ("mqa", "gdn"), more=section)
    path.write_text(path.read_text().replace('scale = "tiny"', 'scale = "nano"', 1))
    assert run(replace(load_suite(str(path)), tasks={}, decode=()), tmp_path / "run")
    rows = load_long(tmp_path / "run" / "results.csv")
    failed = rows[rows["stage"].isin(["prune", "compress"]) & (rows["status"] != "ok")]
    assert set(failed["status"]) == {"unsupported"}
    told = {(r.arch, r.options or r.weight_format): r.note for r in failed.itertuples()}
    assert "keeps 0.5 of 1 kv_heads units" in told["mqa", "prune=state:0.5"]
    assert "Unknown axis of mqa 'key_dim'" in told["mqa", "prune=key_dim:0.5"]
    assert "layers cannot be removed" in told["gdn", "prune=layers:4"]
    assert "groups of 128 columns, wider" in told["gdn", "int4-g128"]
    assert ("gdn", "prune=state:0.5") not in told


def test_tasks_are_not_asked_of_pruned_models(suite: Suite) -> None:
    stages = [p.stage for p in points(suite, "cpu")]
    assert stages.count("prune") == 2 and "recall" not in stages


def test_pruning_changes_no_hash_where_nobody_asks(suite: Suite) -> None:
    packed = CompressPlan(weights=("int8",))
    before = replace(suite, compress=(packed,)).config_hash
    assert replace(suite, compress=(replace(packed, distil_steps=7),)).config_hash == before
    pruned = replace(packed, prune=("mlp:0.5",))
    assert replace(suite, compress=(pruned,)).config_hash != before
    assert replace(suite, compress=(replace(pruned, distil_steps=7),)).config_hash != (
        replace(suite, compress=(pruned,)).config_hash
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prune": ("mlp",)}, "cut 'mlp' is not AXIS:AMOUNT"),
        ({"prune": ("mlp:1.5",)}, "must keep a share between 0 and 1"),
        ({"prune": ("0.5-wonda",)}, "is not AXIS:AMOUNT"),
        ({"prune": ("mlp:0.5", "mlp:0.5")}, "prune names 'mlp:0.5' twice"),
        ({"prune": ("mlp:0.5",), "distil_weight": 2.0}, "weight=2.0 must be at most 1"),
        ({"prune": ("mlp:0.5",), "distil_steps": -1}, "distil_steps=-1 must be at least 0"),
        ({}, "compress names nothing to do"),
    ],
)
def test_bad_plans_are_refused_when_a_suite_is_read(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        CompressPlan(**options)  # type: ignore[arg-type]
