"""The paged store: allocation, copy-on-write, windows, rollback and its refusals."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from archs.errors import UserError
from archs.formats import Format
from archs.spec import FixedSpec, RowSpec, StateSpec
from infer.pages import StoreFullError
from infer.store import StateStore

ROW = RowSpec(name="kv", shape=(2, 3), format=Format.of(torch.float32))
CELL = FixedSpec(name="cell", shape=(4,), format=Format.of(torch.float32))


def store_of(*specs: StateSpec, **options: int) -> StateStore:
    defaults = {"max_sequences": 3, "max_context": 40, "page_size": 4}
    return StateStore(specs, **{**defaults, **options})


def feed(store: StateStore, slots: list[int], values: list[int], count: int | None = None) -> None:
    """One step whose rows carry `values`; `count` of them valid."""
    new = None if count is None else torch.tensor([count] * len(slots))
    step = store.begin(slots, len(values), new)
    rows = torch.tensor(values, dtype=torch.float32)[None, :, None, None]
    for layer, spec in zip(step.layers, store.specs, strict=True):
        if spec.owned:
            layer.append("kv", rows.expand(len(slots), -1, 2, 3))
        if spec.fixed:
            layer.put("cell", torch.full((len(slots), 4), float(values[-1])),
                      rows[..., 0].expand(len(slots), -1, 4) if layer.each else None)  # fmt: skip
    store.commit(step)


def held(store: StateStore, slot: int, layer: int = 0) -> list[int]:
    return store.snapshot(slot)[layer]["kv"][0, :, 0].int().tolist()


def test_rows_come_back_in_order_across_pages() -> None:
    store = store_of(StateSpec(rows=(ROW,)))
    slot = store.add()
    feed(store, [slot], [1, 2, 3])
    feed(store, [slot], [4, 5, 6, 7, 8, 9])
    assert held(store, slot) == list(range(1, 10))


def test_a_plain_batch_is_read_without_a_gather() -> None:
    store = store_of(StateSpec(rows=(ROW,)))
    slots = [store.add(), store.add()]
    feed(store, slots, [1, 2, 3])
    step = store.begin(slots, 1)
    seen = step.layers[0].append("kv", torch.zeros(2, 1, 2, 3))
    assert seen.rows.untyped_storage().data_ptr() == store.pools.layers[0].rows["kv"][1].data_ptr()
    assert seen.mask is None


def test_a_windowed_layer_frees_the_pages_it_leaves() -> None:
    store = store_of(StateSpec(rows=(replace(ROW, window=6),)))
    slot = store.add()
    for token in range(30):
        feed(store, [slot], [token])
        assert store.allocated_bytes == store.declared_bytes(token + 1)
    assert held(store, slot) == list(range(24, 30))
    assert store.allocated_bytes <= 3 * 4 * ROW.nbytes


def test_layers_of_one_window_share_a_table() -> None:
    full, windowed = StateSpec(rows=(ROW,)), StateSpec(rows=(replace(ROW, window=6),))
    store = store_of(full, windowed, windowed, full)
    assert len(store.tables) == 2


def test_a_sharing_layer_owns_nothing_and_sees_its_owner() -> None:
    store = store_of(StateSpec(rows=(ROW,)), StateSpec(rows=(replace(ROW, owner=0),)))
    slot = store.add()
    step = store.begin([slot], 2)
    seen = step.layers[0].append("kv", torch.ones(1, 2, 2, 3))
    assert step.layers[1].seen("kv") is seen
    store.commit(step)
    assert store.allocated_bytes == 4 * ROW.nbytes
    with pytest.raises(ValueError, match="declares no row tensor"):
        store.begin([slot], 1).layers[1].append("kv", torch.ones(1, 1, 2, 3))


def test_fork_shares_pages_until_either_side_writes() -> None:
    store = store_of(StateSpec(rows=(ROW,), fixed=(CELL,)))
    parent = store.add()
    feed(store, [parent], [1, 2, 3, 4, 5])
    before = store.allocated_bytes
    child = store.fork(parent)
    assert store.allocated_bytes == before
    feed(store, [parent], [60])
    assert store.allocated_bytes == before + CELL.nbytes + 4 * ROW.nbytes
    feed(store, [child], [70])
    assert held(store, parent) == [1, 2, 3, 4, 5, 60]
    assert held(store, child) == [1, 2, 3, 4, 5, 70]
    assert store.allocated_bytes == before + CELL.nbytes + 4 * ROW.nbytes
    store.release(parent)
    store.release(child)
    assert store.allocated_bytes == 0


def test_sequences_join_and_leave_while_others_go_on() -> None:
    store = store_of(StateSpec(rows=(ROW,)))
    a, b = store.add(), store.add()
    feed(store, [a, b], [1, 2, 3, 4, 5])
    store.release(a)
    c = store.add()
    feed(store, [c], [9])
    feed(store, [c, b], [6])
    feed(store, [b, c], [7])
    assert held(store, b) == [1, 2, 3, 4, 5, 6, 7]
    assert held(store, c) == [9, 6, 7]


@pytest.mark.parametrize("window", [None, 6])
def test_rollback_restores_rows_and_fixed_state(window: int | None) -> None:
    store = store_of(StateSpec(rows=(replace(ROW, window=window),), fixed=(CELL,)), lookback=3)
    slot = store.add()
    for token in range(1, 20):
        feed(store, [slot], [token])
    feed(store, [slot], [90, 91, 92])
    store.rollback(slot, 2)
    assert store.lengths[slot] == 20
    assert held(store, slot)[-2:] == [19, 90]
    assert store.snapshot(slot)[0]["cell"].tolist() == [90.0] * 4
    feed(store, [slot], [20])
    assert held(store, slot)[-3:] == [19, 90, 20]


def test_rollback_refuses_what_the_state_no_longer_reaches() -> None:
    store = store_of(StateSpec(fixed=(CELL,)), lookback=2)
    slot = store.add()
    feed(store, [slot], [1, 2, 3, 4, 5, 6])
    with pytest.raises(UserError, match="larger lookback"):
        store.rollback(slot, 3)
    store.rollback(slot, 2)
    assert store.snapshot(slot)[0]["cell"].tolist() == [4.0] * 4
    # A long step has no values between its tokens.
    feed(store, [slot], list(range(10)))
    with pytest.raises(UserError, match="larger lookback"):
        store.rollback(slot, 1)


def test_a_store_without_bounded_state_rolls_back_any_distance() -> None:
    store = store_of(StateSpec(rows=(ROW,)))
    slot = store.add()
    feed(store, [slot], list(range(20)))
    store.rollback(slot, 17)
    assert held(store, slot) == [0, 1, 2]
    assert store.allocated_bytes == 4 * ROW.nbytes


def test_a_small_pool_fills_and_says_so() -> None:
    store = store_of(StateSpec(rows=(ROW,)), pages=3)
    a, b = store.add(), store.add()
    feed(store, [a], [1] * 8)
    feed(store, [b], [1] * 4)
    with pytest.raises(StoreFullError, match="all 3 pages"):
        store.begin([a], 1)
    store.release(b)
    feed(store, [a], [2])
    assert held(store, a) == [1] * 8 + [2]


def test_a_step_that_finds_the_pool_full_loses_nothing() -> None:
    store = store_of(StateSpec(rows=(ROW,)), pages=3)
    a = store.add()
    feed(store, [a], [1, 2, 3, 4, 5, 6])
    b = store.fork(a)
    with pytest.raises(StoreFullError, match="all 3 pages"):
        # The shared page is made a's own before the pool is full.
        store.begin([a, b], 3)
    assert held(store, a) == held(store, b) == [1, 2, 3, 4, 5, 6]
    store.release(b)
    feed(store, [a], [7])
    assert held(store, a) == [1, 2, 3, 4, 5, 6, 7]


def test_slots_run_out_with_a_remedy() -> None:
    store = store_of(StateSpec(fixed=(CELL,)), max_sequences=1)
    store.add()
    with pytest.raises(StoreFullError, match="release one"):
        store.add()


def test_bad_input_names_value_and_rule() -> None:
    with pytest.raises(UserError, match="page_size=0"):
        store_of(StateSpec(rows=(ROW,)), page_size=0)
    store = store_of(StateSpec(rows=(ROW,)))
    with pytest.raises(UserError, match="sequence 0 is not open"):
        store.begin([0], 1)
    slot = store.add()
    with pytest.raises(UserError, match="exceeds max_context=40"):
        store.begin([slot], 41)
    with pytest.raises(UserError, match="must lie between"):
        store.begin([slot], 2, torch.tensor([3]))


def test_a_pool_that_cannot_fit_is_refused_before_it_is_made() -> None:
    with pytest.raises(UserError, match=r"GiB.*lower the batch"):
        store_of(StateSpec(rows=(ROW,)), max_context=10**13)


def reach(values: list[int], window: int | None) -> list[int]:
    """The rows that the next token may see beside itself."""
    return values if window is None else values[len(values) - min(len(values), window - 1) :]


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["feed", "fork", "release", "rollback"]), st.integers(0, 9)),
    max_size=25,
)


@settings(max_examples=60, deadline=None)
@given(
    actions=ACTIONS, window=st.sampled_from([None, 1, 5, 9]), page_size=st.sampled_from([1, 3, 8])
)
def test_any_history_reads_back_as_a_list_would(
    actions: list[tuple[str, int]], window: int | None, page_size: int
) -> None:
    spec = StateSpec(rows=(replace(ROW, window=window),), fixed=(CELL,))
    store = store_of(spec, max_sequences=4, max_context=200, page_size=page_size, lookback=4)
    model: dict[int, list[int]] = {store.add(): []}
    counter = 1
    for action, n in actions:
        slot = sorted(model)[n % len(model)] if model else None
        if slot is None:
            model[store.add()] = []
        elif action == "feed":
            values = list(range(counter, counter + n + 1))
            counter += n + 1
            feed(store, [slot], values)
            model[slot] = model[slot] + values
        elif action == "fork" and len(model) < 4:
            model[store.fork(slot)] = list(model[slot])
        elif action == "release":
            store.release(slot)
            del model[slot]
        elif action == "rollback":
            back = min(n, store.lengths[slot] - store.oldest[slot])
            store.rollback(slot, back)
            model[slot] = model[slot][: len(model[slot]) - back]
        for open_slot, values in model.items():
            assert reach(held(store, open_slot), window) == reach(values, window)
            cell = store.snapshot(open_slot)[0]["cell"][0].item()
            assert cell == (values[-1] if values else 0)
    for slot in list(model):
        store.release(slot)
    assert store.allocated_bytes == 0
