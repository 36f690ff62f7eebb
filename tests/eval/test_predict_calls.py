"""Launches of steps on a CPU: counted on narrow models, and what predictions make of them."""

from dataclasses import replace
from math import prod
from typing import Any

import pytest
import torch

from archs.cost import Step
from archs.registry import ModelSpec
from archs.sizes import get_scale
from archs.state_formats import StateFormat
from archs.storage import keep
from archs.weights import WeightFormat
from eval.predict.accelerators import hardware_of
from eval.predict.calls import CountCalls, StepCalls
from eval.predict.coding import with_codings
from eval.predict.crossover import crossovers
from eval.predict.machine import CodingRate, Roofline
from eval.predict.roofline import bound_by, calls_on, outline_on, predict, predict_ops, step_ms
from eval.predict.speculation import speculate
from eval.predict.split import Split
from infer.draft_length import expected_tokens
from infer.engine import Engine

#: The stubbed machine's launches take no time.
LAUNCH_US = 3.0


@pytest.mark.parametrize(
    ("arch", "context"), [("gqa", 64), ("nsa", 64), ("nsa", 512), ("dsa", 64), ("rwkv7", 4)]
)
def test_launches_are_those_of_a_step_at_full_width(arch: str, context: int) -> None:
    spec = ModelSpec(arch=arch, scale=get_scale("tiny"))
    engine = Engine(spec.build().eval(), max_sequences=1, max_context=context + 2)
    sequence, token = engine.store.add(), torch.zeros(1, 1, dtype=torch.int64)
    engine.store.fill([sequence], context)
    engine.extend_last([sequence], token)
    with CountCalls() as counted:
        engine.extend_last([sequence], token)
    assert StepCalls(spec).at(context) == counted.calls


def test_launches_of_formats_rings_and_several_tokens_are_counted() -> None:
    spec = ModelSpec(arch="gdn:gqa=1:1", scale=get_scale("tiny"))
    plain = StepCalls(spec)
    assert StepCalls(spec, state="kv:int8").at(64) > plain.at(64)
    assert StepCalls(spec, WeightFormat.named("int4-g64")).at(64) > plain.at(64)
    assert StepCalls(spec, replay=16).at(64) != plain.at(64) < plain.at(64, 5)
    assert plain.at(5000) == plain.at(1 << 20)
    # A head has one layer, and joins what it reads.
    one = StepCalls(ModelSpec(arch="gqa", scale=get_scale("tiny").with_options({"n_layers": 1})))
    assert one.at(64) < StepCalls(one.spec, head=True).at(64) < 1.5 * one.at(64)


@pytest.mark.usefixtures("stub_roofline")
def test_a_cpu_s_launches_are_counted_and_named() -> None:
    """A part of the table takes one for each operation; what picks rows makes many more."""
    grid: dict[str, Any] = {
        "scale": "tiny", "batches": [1], "contexts": [600], "launch_us": LAUNCH_US,
    }  # fmt: skip
    dense, sparse = predict(["gqa", "nsa"], hardware=["this-machine"], **grid)
    assert sparse["step_calls"] > 2 * dense["step_calls"] > 100  # type: ignore[operator]
    [there] = predict(["nsa"], hardware=["h100"], **grid)
    assert there["step_calls"] is None
    rows = predict_ops(["nsa"], hardware=["this-machine"], **grid)
    assert sum(float(str(row["time_ms"])) for row in rows) == pytest.approx(sparse["tpot_ms"])
    [more] = [row for row in rows if row["op"] == "other calls"]
    ops = sum(int(str(row["count"])) for row in rows)
    assert ops == sparse["step_calls"] and more["step_bytes"] == more["step_flops"] == 0
    assert "other calls" not in {
        row["op"] for row in predict_ops(["nsa"], hardware=["h100"], **grid)
    }


@pytest.mark.usefixtures("stub_roofline")
def test_every_prediction_for_a_cpu_counts_them() -> None:
    """One step, whoever asks: a table of times, a split model, a crossing, speculation."""
    spec = ModelSpec(arch="nsa", scale=get_scale("tiny"))
    [row] = predict(["nsa"], "tiny", ["this-machine"], [1], [600], launch_us=LAUNCH_US)
    part = hardware_of("this-machine", launch_us=LAUNCH_US)
    part, model = outline_on(part, spec, None)
    split = Split(model, part, 1, calls=calls_on(part, spec, None))
    assert split.tpot_ms(1, 600) == pytest.approx(row["tpot_ms"])
    assert Split(model, part, 1).tpot_ms(1, 600) < 0.9 * float(str(row["tpot_ms"]))
    [drafted] = speculate(
        "nsa", None, scale="tiny", acceptance=0.7, hardware=["this-machine"], contexts=[600],
        launch_us=LAUNCH_US,
    )  # fmt: skip
    assert drafted["plain_tpot_ms"] == pytest.approx(row["tpot_ms"])
    [crossing] = crossovers(
        "nsa", "gqa", "tiny", ["this-machine"], [1], longest=600, launch_us=LAUNCH_US
    )
    assert (crossing["verdict"], crossing["looked_to"]) == ("never", 600)
    assert crossing["first_tpot_ms"] == pytest.approx(row["tpot_ms"])


@pytest.mark.usefixtures("stub_roofline")
def test_a_head_that_drafts_takes_the_launches_of_its_own_steps() -> None:
    """Where a launch takes a second, nothing else counts."""
    [row] = speculate(
        "gqa", "mtp", scale="tiny", acceptance=0.7, hardware=["this-machine"], contexts=[64],
        drafts=[4], launch_us=1e6,
    )  # fmt: skip
    own = StepCalls(ModelSpec(arch="gqa", scale=get_scale("tiny")))
    head = replace(own, head=True, _known={})
    spent = own.at(64, 5) + head.at(64, 5) + 3 * head.at(64)
    assert row["speedup_pred"] == pytest.approx(expected_tokens(0.7, 4) * own.at(64) / spent, 1e-3)


def test_states_in_few_bits_cost_the_copies_that_torch_makes_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At rates that are given: rows once a step and layer, states of recurrences both ways."""
    monkeypatch.setattr(
        "eval.predict.coding._measured", lambda *key: CodingRate(*key[:3], 1.0, 2.0)
    )
    shape, rates = get_scale("tiny"), Roofline(1e9, 1e9, torch.float32)
    for arch, state, seen, kept in (
        ("gqa", "kv:int8", 65, 1), ("swa(window=16)", "kv:fp8", 16, 1), ("cla", "kv:int8", 65, 1),
        ("mla", "kv:bfloat16", 65, 1), ("gdn", "memory:int8", 1, 1),
    ):  # fmt: skip
        model = keep(ModelSpec(arch=arch, scale=shape).outline(), StateFormat.named(state))
        specs = model.state_specs()
        known = with_codings(rates, torch.device("cpu"), specs)
        coded = [t for s in specs for t in (*s.owned, *s.fixed) if t.is_coded]
        numbers = 3 * sum(prod(t.shape) for t in coded)
        cost = model.cost(Step(3, 1, 64))
        expected_ms = 1e3 * numbers * (seen + 2.0 * kept)
        assert numbers and step_ms(cost, known) == pytest.approx(expected_ms, rel=1e-2), arch
        assert step_ms(cost, rates) < 1e-3 * expected_ms
        assert bound_by(cost, known) == "state"


def test_a_cpu_s_predictions_know_how_fast_it_codes_states() -> None:
    """Measured, for the format that is asked for; a part of the table reads codes as they lie."""
    spec = ModelSpec(arch="gqa", scale=get_scale("tiny"))
    for key, wanted in (("this-machine", 1), ("h100", 0)):
        part = hardware_of(key, "bfloat16")
        found, model = outline_on(part, spec, None, "kv:int8")
        assert len(found.roofline.codings) == wanted and not part.roofline.codings
        plain_ms, coded_ms = (
            step_ms(model.cost(Step(8, 1, 4096)), p.roofline) for p in (part, found)
        )
        assert (coded_ms > plain_ms) is bool(wanted)
