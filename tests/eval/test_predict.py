"""Predictions from declarations, the rooflines they stand on, and what the doctor says."""

import importlib.metadata
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from archs.cost import Cost, OpCost, Step
from archs.errors import UserError
from archs.registry import HYBRIDS, REGISTRY, ModelSpec
from archs.sizes import get_scale
from eval.cli.doctor import OPTIONAL, diagnose
from eval.measure.decode import decode_cost
from eval.predict.accelerators import hardware_of, prices_of
from eval.predict.calls import IdleLayer
from eval.predict.machine import ProductRate, Roofline, measure_roofline, now_s
from eval.predict.roofline import (
    bound_by,
    parse_counts,
    predict,
    predict_ops,
    resident_bytes,
    step_ms,
)
from eval.results.accelerators import ACCELERATORS
from eval.results.measures import MEASURES
from tests.eval.conftest import STUB_ROOFLINE, Command

ROOT = Path(__file__).parents[2]
MEASURED = "leaderboards/nvidia-h100-80gb-hbm3/2026-11-27"
ROOFLINE = Roofline(copy_bytes_per_s=100.0, matrix_flops_per_s=1000.0, dtype=torch.float32)


# -- rooflines --


@pytest.mark.parametrize(("part", "ridge"), [("h100", 295), ("h200", 206), ("a100", 153)])
def test_ridge_points_of_the_datasheets(part: str, ridge: int) -> None:
    assert round(hardware_of(part).roofline.ridge_flop_per_byte) == ridge


@pytest.mark.parametrize("part", ACCELERATORS)
def test_every_part_has_a_sound_datasheet(part: str) -> None:
    """Half precision is the faster one; figures are in the unit that their names say."""
    entry = ACCELERATORS[part]
    assert entry.tflops_per_s["bfloat16"] == entry.tflops_per_s["float16"]
    assert 10 < entry.tflops_per_s["float32"] < entry.tflops_per_s["bfloat16"] < 10_000
    assert 0.1 < entry.bandwidth_tbyte_per_s < 20
    assert hardware_of(part).memory_bytes == entry.memory_gbyte * 1e9
    assert entry.source


def test_work_is_bound_by_bytes_or_by_flops() -> None:
    assert ROOFLINE.ridge_flop_per_byte == 10
    assert ROOFLINE.time_ms(flops=0, moved_bytes=50) == 500
    assert ROOFLINE.time_ms(flops=5000, moved_bytes=50) == 5000
    assert ROOFLINE.time_ms(flops=500, moved_bytes=50) == 500


def test_a_product_has_the_rate_and_the_launch_of_its_rows() -> None:
    products = (ProductRate(1, 50.0, 1e6), ProductRate(8, 10.0, 2e6))
    roofline = replace(ROOFLINE, products=products, call_us=5e5)
    assert roofline.time_ms(flops=0, moved_bytes=50, rows=1) == 1000 + 1000
    assert roofline.time_ms(flops=0, moved_bytes=50, rows=7) == 5000 + 2000
    assert roofline.time_ms(flops=9000, moved_bytes=50, rows=512) == 9000 + 2000
    # What is no product reads as fast as one row does, after a launch of its own.
    assert roofline.time_ms(flops=0, moved_bytes=50) == 1000 + 500
    assert ROOFLINE.launch_us(1) == 0 and ROOFLINE.bytes_per_s(4) == 100


def test_the_operations_of_a_model_say_how_many_rows_their_products_have() -> None:
    model = ModelSpec(arch="mla", scale=get_scale("tiny")).outline()
    ops = model.cost(Step(3, 1, 64)).ops
    weights = [op for op in ops if op.matrix_flops and op.weight_bytes]
    assert weights and all(op.rows == 3 for op in weights)
    assert all(op.matrix_flops == 2 * op.rows * op.weight_bytes / 4 for op in weights)
    assert not any(op.rows for op in ops if not op.matrix_flops)


def test_launch_and_bandwidth_of_a_product_are_a_line_through_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two matrices of 1 MiB and 64 MiB at 20 bytes per µs, each call 30 µs late."""

    def each_s(works: Sequence[Callable[[], Tensor]], device: torch.device) -> float:
        if isinstance(works[0], IdleLayer):
            return 1e-6 * works[0].calls
        rows, side = works[0]().shape
        return (4 * side**2 / 20 + 30) / 1e6 if rows > 1 else 4 * side**2 / 2e6

    monkeypatch.setattr("eval.predict.machine.each_s", each_s)
    monkeypatch.setattr("eval.predict.machine._best_s", lambda work, device, repeats: 0.5)
    found = measure_roofline("cpu", torch.float32, [3])
    assert found.products[0] == ProductRate(1, pytest.approx(2e6), pytest.approx(0, abs=1e-6))
    assert found.products[1] == ProductRate(3, pytest.approx(20e6), pytest.approx(30))
    assert found.call_us == pytest.approx(1)


def test_products_are_timed_as_a_step_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients a GPU's single row would take another kernel than the step's."""
    seen: list[bool] = []

    def watched(works: Sequence[Callable[[], object]], device: torch.device) -> float:
        seen.append(torch.is_grad_enabled())
        return 1e-3

    monkeypatch.setattr("eval.predict.machine.each_s", watched)
    monkeypatch.setattr("eval.predict.machine._best_s", lambda *_: 1e-3)
    measure_roofline("cpu", rows=(1, 8))
    assert seen and not any(seen)


def test_this_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of 2 bytes per byte held, a read of 1, 2 n^3 FLOPs, over the time of one call."""
    monkeypatch.setattr("eval.predict.machine._best_s", lambda work, *_: (work(), 0.5)[1])
    found = measure_roofline("cpu", torch.float32)
    assert found.copy_bytes_per_s == 2 * 2**27 / 0.5
    assert found.read_bytes_per_s == 2**27 / 0.5
    assert found.matrix_flops_per_s == 2 * 1024**3 / 0.5


def test_the_rates_of_this_machine_are_plausible() -> None:
    found = measure_roofline()
    assert 1e8 < found.copy_bytes_per_s < 1e13
    assert 1e8 < found.matrix_flops_per_s < 1e15
    assert now_s(torch.device("cpu")) <= now_s(torch.device("cpu"))


@pytest.mark.usefixtures("stub_roofline")
def test_this_machine_stands_beside_the_datasheets() -> None:
    found = hardware_of("this-machine")
    assert found.roofline == STUB_ROOFLINE
    assert found.memory_bytes > 1 << 20
    row = predict(["gqa"], "tiny", ["this-machine"], [1], [64])[0]
    assert row["dtype"] == "float32"
    assert row["ridge_flop_per_byte"] == 10


def test_unknown_parts_and_dtypes_name_the_nearest() -> None:
    with pytest.raises(UserError, match=r"hardware 'h20'. Did you mean 'h200'.*this-machine"):
        hardware_of("h20")
    with pytest.raises(UserError, match=r"dtype 'bfloat'. Did you mean 'bfloat16'"):
        hardware_of("h100", "bfloat")


# -- predictions --


@pytest.mark.parametrize("arch", [*REGISTRY, *HYBRIDS])
@pytest.mark.parametrize("batch", [1, 7])
def test_a_step_moves_weights_and_state(arch: str, batch: int) -> None:
    """All weights but the embedding's table once (its rows as read), the state of each sequence.

    Of the biases of pooling, one row for each token of a group, a step reads one.
    """
    (row,) = predict([arch], "70m", ["h100"], [batch], [512])
    model = ModelSpec(arch=arch, scale=get_scale("70m")).outline(torch.bfloat16)
    weights = sum(
        (p[:1] if name.endswith(("pool_bias", "index_bias")) else p).nbytes
        for name, p in model.named_parameters()
    )
    rows = batch * 512 * 2
    assert row["weight_bytes"] == weights + rows
    specs = model.state_specs()
    state = sum(s.read_bytes(512) + s.write_bytes() for s in specs)
    assert row["step_bytes"] == weights + rows + batch * state
    assert row["state_bytes"] == model.state_bytes(512)
    assert row["step_flops"] == model.cost(Step(batch, 1, 512)).flops
    assert row["arith_intensity_pred"] == row["step_flops"] / row["step_bytes"]


def test_one_row_for_every_cell_of_the_grid() -> None:
    rows = predict(["gqa", "mamba2"], "tiny", ["h100", "l4"], [1, 8], [64, 128, 256])
    keys = [(r["arch"], r["hardware"], r["batch"], r["context"]) for r in rows]
    assert len(set(keys)) == len(keys) == 2 * 2 * 2 * 3
    for row in rows:
        figures = {k for k, v in row.items() if isinstance(v, float)}
        assert figures <= set(MEASURES)
        tpot_ms = float(str(row["tpot_ms"]))
        assert row["output_tok_per_s_per_user"] == pytest.approx(1e3 / tpot_ms)
        assert row["output_tok_per_s"] == pytest.approx(1e3 / tpot_ms * int(str(row["batch"])))


def test_operations_add_up_to_the_step() -> None:
    at = ("8b", ["h200"], [4], [4096])
    (whole,) = predict(["gdn:gqa=3:1"], *at, launch_us=2.0)
    parts = predict_ops(["gdn:gqa=3:1"], *at, launch_us=2.0)
    for part_name, name in (("step_bytes", "step_bytes"), ("step_flops", "step_flops")):
        assert sum(int(str(p[part_name])) for p in parts) == whole[name]
    total = sum(float(str(p["time_ms"])) for p in parts)
    assert total == pytest.approx(float(str(whole["tpot_ms"])))


def test_a_ring_of_inputs_spares_writes_and_takes_memory(decodebench: Command) -> None:
    """As the engine that is measured: one write of the large state in so many steps."""
    model = ModelSpec(arch="gdn", scale=get_scale("8b")).outline(torch.bfloat16)
    at = ("8b", ["h100"], [64], [4096])
    rows = {replay: predict(["gdn", "gqa"], *at, replay=replay) for replay in (0, 16)}
    for (gdn, gqa), replay in zip(rows.values(), rows, strict=True):
        assert gdn["replay"] == replay
        assert gdn["step_bytes"] == decode_cost(model, 64, 4096, replay).bytes
        assert gdn["state_bytes"] == model.state_bytes(4096, replay=replay)
        assert gqa["tpot_ms"] == rows[0][1]["tpot_ms"]
    assert float(str(rows[16][0]["tpot_ms"])) < float(str(rows[0][0]["tpot_ms"]))
    assert int(str(rows[16][0]["state_bytes"])) > int(str(rows[0][0]["state_bytes"]))
    command = ["predict", "--arch", "gdn", "--batch", "64", "--context", "4k", "--json"]
    assert json.loads(decodebench(*command, "--replay", "16").out) == [rows[16][0]]
    parts = predict_ops(["gdn"], *at, replay=16)
    assert sum(int(str(p["step_bytes"])) for p in parts) == rows[16][0]["step_bytes"]
    with pytest.raises(UserError, match="replay=1 "):
        predict(["gdn"], *at, replay=1)


def test_a_launch_costs_each_operation() -> None:
    cost = Cost.of(OpCost(name="a", weight_bytes=50), OpCost(name="b", matrix_flops=2000))
    assert step_ms(cost, ROOFLINE) == 500 + 2000
    assert step_ms(cost, replace(ROOFLINE, call_us=1e6)) == 500 + 2000 + 2 * 1000


@pytest.mark.parametrize(
    ("op", "launch_us", "expected"),
    [
        (OpCost(name="x", weight_bytes=90, state_read_bytes=10), 0, "weights"),
        (OpCost(name="x", weight_bytes=10, state_read_bytes=60, state_write_bytes=30), 0, "state"),
        (OpCost(name="x", weight_bytes=10, matrix_flops=101), 0, "compute"),
        (OpCost(name="x", weight_bytes=10, matrix_flops=99), 0, "weights"),
        (OpCost(name="x", weight_bytes=10), 1e6, "launches"),
    ],
)
def test_what_bounds_a_step(op: OpCost, launch_us: float, expected: str) -> None:
    assert bound_by(Cost.of(op), replace(ROOFLINE, call_us=launch_us)) == expected


def test_a_launch_costs_what_was_measured_unless_it_is_given() -> None:
    """The figures of the committed tables, named as the source."""
    alone, row = predict(["gqa"], "1b", ["h200"], [1, 8], [1024])
    machine = pd.read_csv(ROOT / MEASURED / "machine.csv").set_index("measure")["value"]
    assert row["product_launch_us"] == pytest.approx(machine["product_launch_us"], rel=2e-3)
    assert row["call_us"] == pytest.approx(machine["call_us"], rel=2e-3)
    assert MEASURED in str(row["launches_from"])
    # One row has our kernel: the line through the times of two matrices.
    kernels = pd.read_csv(ROOT / MEASURED / "kernels.csv")
    ours = kernels[(kernels["op"] == "gemv") & (kernels["backend"] == "triton")].set_index("case")
    small, large = (ours.loc[f"{n}x2048 bf16"] for n in (2048, 11008))
    slope = (large["time_us"] - small["time_us"]) / (large["moved_bytes"] - small["moved_bytes"])
    launch_us = small["time_us"] - slope * small["moved_bytes"]
    assert alone["product_launch_us"] == pytest.approx(launch_us, abs=0.02)
    [free] = predict(["gqa"], "1b", ["h200"], [8], [1024], launch_us=0)
    assert (free["product_launch_us"], free["call_us"], free["launches_from"]) == (0, 0, "given")
    ops = ModelSpec(arch="gqa", scale=get_scale("1b")).outline().cost(Step(8, 1, 1024)).ops
    products = sum(op.rows > 0 for op in ops)
    launches_ms = (3.32 * products + 1.18 * (len(ops) - products)) / 1e3
    gap_ms = float(str(row["tpot_ms"])) - float(str(free["tpot_ms"]))
    assert gap_ms == pytest.approx(launches_ms)


def test_a_product_with_weights_turns_compute_bound_at_the_ridge() -> None:
    rows = predict_ops(["mha"], "8b", ["h100"], [1], [1024])
    found = {str(row["op"]): row for row in rows}
    ridge = 989 / 3.35
    assert found["mlp down"]["compute_bound_batch"] == pytest.approx(ridge, rel=1e-6)
    assert found["attention"]["compute_bound_batch"] is None


def test_what_fits_is_what_memory_holds() -> None:
    (row,) = predict(["mha"], "1b", ["l4"], [1], [8192])
    model = ModelSpec(arch="mha", scale=get_scale("1b")).outline(torch.bfloat16)
    room = 24_000_000_000 - resident_bytes(model)
    most = room // model.state_bytes(8192)
    assert row["max_sequences"] == most
    rows = predict(["mha"], "1b", ["l4"], [most, most + 1], [8192])
    assert [r["fits"] for r in rows] == [True, False]
    assert predict(["mha"], "1b", ["l4"], [1], [2**30])[0]["max_sequences"] == 0


def test_a_batch_that_does_not_fit_has_no_time_and_no_price(decodebench: Command) -> None:
    """8b, 64 sequences of 128k tokens: 1.1 TB of state on 80 GB."""
    price = {"h100": 2.5}
    (row,) = predict(["gqa"], "8b", ["h100"], [64], [131072], price_per_hour=price)
    assert (row["fits"], row["max_sequences"], row["usd_per_million_tok"]) == (False, 3, None)
    for name in ("tpot_ms", "output_tok_per_s", "output_tok_per_s_per_user"):
        assert row[name] is None
    assert row["note"] == "does not fit; 3 would"
    (row,) = predict(["gqa"], "8b", ["h100"], [3], [131072], price_per_hour=price)
    assert row["fits"] and isinstance(row["usd_per_million_tok"], float)
    shape = ("predict", "--arch", "gqa", "--scale", "8b", "--batch", "64", "--context", "128k")
    assert "does not fit; 3 would" in decodebench(*shape, "--price", "2.5").out


def test_prices_become_dollars_per_million_tokens() -> None:
    (row,) = predict(["gqa"], "1b", ["h100"], [8], [1024], price_per_hour={"h100": 3.6})
    per_token = 3.6 / 3600 / float(str(row["output_tok_per_s"]))
    assert row["usd_per_million_tok"] == pytest.approx(per_token * 1e6)
    assert prices_of("2.5", ["h100", "l4"]) == {"h100": 2.5, "l4": 2.5}
    assert prices_of("h100=2.5", ["h100", "l4"]) == {"h100": 2.5}
    for text in ("free", "-1", "nan", "inf", "h200=2"):
        with pytest.raises(UserError, match=f"price '{text}' must be a positive number"):
            prices_of(text, ["h100"])


# -- counts --


def test_counts_are_lists_and_ranges() -> None:
    assert parse_counts("1,8,64") == [1, 8, 64]
    assert parse_counts("1:16") == [1, 2, 4, 8, 16]
    assert parse_counts("3:20") == [3, 6, 12]
    assert parse_counts("4k,1M") == [4096, 1 << 20]
    assert parse_counts("1k:4k") == [1024, 2048, 4096]


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "x", "k", "1,,2", "8:", "1:0", "²"])
def test_impossible_counts_are_named(text: str) -> None:
    with pytest.raises(UserError, match=r"is not a positive count|ends before it begins"):
        parse_counts(text)


# -- the doctor --


@pytest.mark.usefixtures("stub_roofline")
def test_the_doctor_tells_what_is_here_and_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPTIONAL, "no_such_library", "nothing")
    monkeypatch.setitem(OPTIONAL, "numpy", "arrays")
    facts = diagnose()
    assert facts["torch"] == torch.__version__
    assert facts["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert math.isfinite(float(str(facts["free_memory_bytes"])))
    assert facts["ridge_flop_per_byte"] == 10
    optional = facts["optional"]
    assert isinstance(optional, dict)
    assert optional["no_such_library"] == "absent (nothing)"
    assert optional["numpy"] == importlib.metadata.version("numpy")


@pytest.mark.usefixtures("stub_roofline")
def test_the_doctor_rounds_and_names_units(decodebench: Command) -> None:
    lines = decodebench("doctor").out.splitlines()
    assert "copy GB/s: 20" in lines and "matrix GFLOP/s: 200" in lines
    assert "  transformers: " in "\n".join(lines)
    figures = [line.partition(": ")[2] for line in lines if "free" in line]
    assert len(figures) == 2 and all(len(figure) <= 6 for figure in figures)


def test_a_picture_shows_what_fits(decodebench: Command, tmp_path: Path) -> None:
    at = ("predict", "--arch", "mha", "--batch", "64", "--picture", "a.svg", "--context")
    assert decodebench(*at, "1k,2k,1m").code == 0
    drawn = (tmp_path / "a.svg").read_text()
    assert "context: 1024" in drawn and "context: 1048576" not in drawn
    decodebench(*at, "512k,1m").refuses("nothing asked for fits in memory", "lower batch")
