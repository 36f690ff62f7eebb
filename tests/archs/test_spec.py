"""What is declared: formats, rows, values; and the bytes that follow from it."""

from statistics import mean
from typing import Any

import pytest
import torch
from torch import nn

from archs.backbone import replays
from archs.cost import Coded, Step, linear_cost, state_traffic
from archs.errors import UserError
from archs.formats import Format
from archs.layers import Projection
from archs.packed import Packed, nearest
from archs.registry import ModelSpec
from archs.sizes import get_scale
from archs.spec import RECURRENT_LIMIT, FixedSpec, RowSpec, StateSpec, TensorSpec, kept_states
from archs.weights import Number
from infer.store import StateStore
from tests.eval.test_conformance import DATA

HALF, WIDE = Format.of(torch.bfloat16), Format.of(torch.float32)
#: 4-bit numbers in groups of 32 with a scale and a zero point in bfloat16.
INT4 = Format(dtype=torch.uint8, bits=4, kind="int", group=32, scale=HALF, zero=HALF)


def row(**options: Any) -> RowSpec:
    """Rows of 64 bytes."""
    return RowSpec(**{"name": "kv", "shape": (2, 16), "format": HALF, **options})


@pytest.mark.parametrize(
    ("stored", "numbers", "nbytes"),
    [(HALF, 7, 14), (INT4, 64, 32 + 2 * 2 * 2), (INT4, 33, 17 + 2 * 2 * 2),
     (Format(dtype=torch.int32, bits=3, kind="int"), 11, 8)],
    ids=str,
)  # fmt: skip
def test_bytes_of_a_format_include_its_scales(stored: Format, numbers: int, nbytes: int) -> None:
    assert stored.nbytes(numbers) == nbytes


@pytest.mark.parametrize(
    ("options", "message"),
    [({"bits": 9, "dtype": torch.uint8}, "bits=9 do not fit in an element of torch.uint8"),
     ({"group": 32}, "group=32 with scale=None"),
     ({"group": 0, "scale": HALF}, "group=0 must be at least 1"),
     ({"zero": HALF}, "a zero point belongs to a scale")],
    ids=str,
)  # fmt: skip
def test_a_format_that_contradicts_itself_is_refused(options: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Format(**{"dtype": torch.int8, "bits": 4, **options})


def test_a_dtype_without_plain_numbers_is_refused() -> None:
    with pytest.raises(UserError, match=r"dtype torch\.complex64; choose one of float64"):
        Format.of(torch.complex64)


def test_codes_are_stored_of_what_the_mixer_gives() -> None:
    with pytest.raises(UserError, match=r"'kv' is stored as int4 in groups of 32; say in which"):
        row(format=INT4)
    spec = row(format=INT4, given=torch.float32)
    store = StateStore([StateSpec(rows=(spec,))], max_sequences=1, max_context=8)
    (layer,) = store.pools.layers
    assert layer.rows["kv"][1].dtype == torch.uint8 and spec.given_dtype == torch.float32


@pytest.mark.parametrize(
    ("context", "new", "visible"), [(0, 1, 1), (3, 2, 5), (20, 1, 7), (20, 4, 10), (20, 0, 7)]
)
def test_visible_rows_of_a_window_with_sinks(context: int, new: int, visible: int) -> None:
    assert row(window=5, sinks=2).visible_rows(context, new) == visible


def test_rows_of_several_tokens_come_when_they_are_complete() -> None:
    means = row(every=4)
    assert [means.rows(n) for n in (0, 3, 4, 11)] == [0, 0, 1, 2]
    assert means.new_rows(3, 1) == 1 and means.new_rows(4, 3) == 0
    assert means.visible_rows(6, 2) == 2
    assert means.held_pages(40, page_size=4) == 3
    assert StateSpec(rows=(means,)).bytes_per_token == 16
    assert StateSpec(rows=(row(every=3),)).bytes_per_token == pytest.approx(64 / 3)
    assert StateSpec(rows=(row(every=4),)).write_bytes(1, context=3) == 64
    assert StateSpec(rows=(row(every=4),)).write_bytes(1, context=4) == 0


def test_held_scanned_and_gathered_bytes_are_told_apart() -> None:
    key = row(name="key", shape=(4,))
    spec = StateSpec(rows=(key, row(picks=16)), fixed=(value(),))
    assert spec.state_bytes(1000) == 1000 * (8 + 64) + 40
    assert spec.scanned_bytes(1000) == 1001 * 8
    assert spec.gathered_bytes(1000) == 16 * 64
    # Rows that several tokens pick are read once.
    assert spec.gathered_bytes(9, 2) == 11 * 64
    assert spec.gathered_bytes(1000, 3) == 3 * 16 * 64
    assert spec.gathered_bytes(1000, 66) == 66 * 16 * 64
    assert spec.gathered_bytes(1000, 67) == 1067 * 64
    assert spec.read_bytes(1000) == 1001 * 8 + 16 * 64 + 40


def value(**options: Any) -> FixedSpec:
    """A value of 40 bytes."""
    return FixedSpec(**{"name": "memory", "shape": (10,), "format": WIDE, **options})


@pytest.mark.parametrize(
    ("new", "lookback", "values"), [(1, 0, 1), (4, 0, 1), (4, 4, 4), (9, 4, 5), (10, 4, 1)]
)
def test_values_that_a_rollback_can_reach_are_written_one_by_one(
    new: int, lookback: int, values: int
) -> None:
    spec = StateSpec(fixed=(value(),))
    assert spec.write_bytes(new, lookback=lookback) == values * 40
    assert state_traffic(spec, Step(3, new, 50, lookback)) == {
        "state_read_bytes": 3 * 40, "state_write_bytes": 3 * values * 40, "coded": ()
    }  # fmt: skip
    short = Format.of(torch.bfloat16)
    coded = StateSpec(fixed=(value(format=short, given=torch.float32),))
    [found] = state_traffic(coded, Step(3, new, 50, lookback))["coded"]
    assert found == Coded(
        format=short, run=10, given=torch.float32, decoded=3 * 10, encoded=3 * values * 10
    )


def replayed() -> StateSpec:
    """A value of 40 bytes with inputs of 8, and one that copies alone serve."""
    inputs = TensorSpec(name="inputs", shape=(4,), format=HALF)
    return StateSpec(fixed=(value(inputs=inputs), value(name="tail")))


def test_a_replayed_value_is_held_once_beside_its_inputs() -> None:
    spec = replayed()
    assert spec.state_bytes(100, lookback=4) == 5 * 80
    assert spec.state_bytes(100, lookback=4, replay=16) == 40 + 16 * 8 + 5 * 40
    assert spec.state_bytes(0, lookback=4, replay=16) == 0
    for rows in (-1, 9):
        with pytest.raises(UserError, match=rf"replay={rows} with lookback=4: .* take replay=10"):
            StateStore([spec], max_sequences=1, max_context=8, lookback=4, replay=rows)


@pytest.mark.parametrize(
    ("new", "lookback", "rows"),
    [
        (1, 0, 16),
        (1, 4, 16),
        (5, 4, 16),
        (5, 4, 10),
        (9, 8, 18),
        (2, 0, 16),
        (1, 0, 2),
        (12, 0, 16),
    ],
)
def test_mean_traffic_of_replay_is_that_of_its_steps(new: int, lookback: int, rows: int) -> None:
    spec, steps = replayed(), 720
    store = StateStore(
        [spec], max_sequences=1, max_context=steps * new, lookback=lookback, replay=rows
    )
    sequence, read, written = store.add(), [], []
    for _ in range(steps):
        with store.step([sequence], new) as step:
            assert step.rings is not None
            [held], [fold] = step.rings.held, step.rings.fold
            assert step.rings.whole or held + new <= rows
            kept = kept_states(new, lookback)
            values = 40 * (step.rings.whole or fold > 0) + 40 * kept
            read.append(80 + held * 8)
            written.append(values + (0 if new > RECURRENT_LIMIT else new * 8))
    # The first steps find the ring empty.
    period = slice(steps // 2, None)
    rollback = {"lookback": lookback, "replay": rows}
    assert spec.read_bytes(99, new, **rollback) == pytest.approx(mean(read[period]), abs=1)
    assert spec.write_bytes(new, context=99, **rollback) == pytest.approx(
        mean(written[period]), abs=1
    )


def test_a_ring_changes_nothing_where_no_value_declares_inputs() -> None:
    found = {
        arch: [replays(ModelSpec(arch=arch, scale=get_scale("tiny")).outline(), n) for n in (0, 16)]
        for arch in ("gqa", "mamba1", "gdn", "gdn:gqa=3:1")
    }
    assert found == {
        "gqa": [False, False], "mamba1": [False, False],
        "gdn": [False, True], "gdn:gqa=3:1": [False, True],
    }  # fmt: skip


@pytest.mark.parametrize("arch", ["gdn", "kda", "rwkv7", "mamba2", "linear"])
def test_four_tokens_back_by_replay_take_little_more_than_the_state_at_1b(arch: str) -> None:
    specs = ModelSpec(arch=arch, scale=get_scale("1b")).outline(torch.bfloat16).state_specs()
    store = StateStore(
        specs, max_sequences=2, max_context=64, lookback=4, replay=16, device="meta"
    )  # fmt: skip
    sequence = store.add()
    for new in (9, 1, 1, 4, 1, 3):
        store.commit(store.begin([sequence], new))
    declared = sum(s.state_bytes(19, lookback=4, replay=16) for s in specs)
    assert store.allocated_bytes == declared
    plain, copies = (sum(s.state_bytes(19, lookback=n) for s in specs) for n in (0, 4))
    assert declared - plain < (copies - plain) / 4


@pytest.mark.parametrize("name", ["every", "window", "picks"])
def test_counts_below_one_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"'kv': {name}=0 must be at least 1"):
        row(**{name: 0})


def test_a_layer_may_read_anothers_rows_beside_its_own() -> None:
    spec = ModelSpec(arch=str(DATA / "pooled_rows.py"), scale=get_scale("tiny")).outline()
    first, second = spec.state_specs()[:2]
    assert [t.name for t in first.owned] == ["kv", "means"]
    assert [t.name for t in second.owned] == ["kv"]
    assert second.bytes_per_token == 0 < second.scanned_bytes(99)


@pytest.mark.parametrize("arch", ["gdn", "mamba2"])
def test_four_tokens_back_hold_five_values_at_1b(arch: str) -> None:
    specs = ModelSpec(arch=arch, scale=get_scale("1b")).outline(torch.bfloat16).state_specs()
    store = StateStore(specs, max_sequences=2, max_context=64, lookback=4, device="meta")
    sequence = store.add()
    for new in (9, 1, 1, 4, 1, 3):
        store.commit(store.begin([sequence], new))
        held = sum(t.nbytes for layer in store.pools.layers for t in layer.fixed.values())
        assert store.slots is not None and held % store.slots.count == 0
        one = held // store.slots.count
        assert store.allocated_bytes <= 5 * one
    assert store.allocated_bytes == 5 * one == 5 * sum(spec.fixed_bytes for spec in specs)
    # Of all sequences together: that of zeros and that of padding beside five for each.
    assert store.slots.count == 2 * 5 + 2
    store.rollback(sequence, 4)
    assert store.allocated_bytes == one


def test_a_projection_is_read_in_the_format_that_it_names() -> None:
    layer = Projection(64, 32, 64).bfloat16()
    plain = linear_cost("plain", layer, 3)
    number = Number.named("int4-g32")
    layer.store(Packed(nearest(torch.randn(96, 64), number), number, 64, torch.bfloat16))
    packed = linear_cost("packed", layer, 3)
    assert (plain.storage, packed.storage) == ("", "int4-g32")
    assert plain.weight_bytes == 2 * 64 * 96
    # Four bits a weight, and a scale and a zero point of two bytes for every 32.
    assert packed.weight_bytes == 64 * 96 // 2 + 64 * 96 // 32 * 4
    assert packed.matrix_flops == plain.matrix_flops == 2 * 3 * 64 * 96
    assert linear_cost("torch's", nn.Linear(64, 96), 1).weight_bytes == 4 * 64 * 96 + 4 * 96
