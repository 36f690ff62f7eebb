"""Launches of steps on a CPU: counted on narrow models, and what predictions make of them."""

from typing import Any

import pytest
import torch

from archs.registry import ModelSpec
from archs.sizes import get_scale
from archs.weights import WeightFormat
from eval.predict.accelerators import hardware_of
from eval.predict.calls import CountCalls, StepCalls
from eval.predict.crossover import crossovers
from eval.predict.roofline import calls_on, outline_on, predict, predict_ops
from eval.predict.speculation import speculate
from eval.predict.split import Split
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
    model = outline_on(part, spec, None)
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
