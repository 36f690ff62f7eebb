"""A step is all or nothing: pages, rows, fixed tensors and slots after steps that fail."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from archs.errors import UserError
from archs.formats import Format
from archs.registry import ModelSpec
from archs.spec import FixedSpec, StateSpec
from eval.proof.conformance import CHECK_SCALE
from infer.engine import Engine
from infer.pages import StoreFullError
from infer.store import StateStore
from tests.infer.test_store import CELL, ROW, feed, held, store_of
from tests.kernels.interpreter import interpreted

POOLED_ROWS = Path(__file__).parents[1] / "data" / "pooled_rows.py"
FAILURES = [RuntimeError("device"), torch.OutOfMemoryError("memory"), KeyboardInterrupt()]


def engine_for(arch: str, window: int = 12, **options: Any) -> Engine:
    overrides = {"swa": {"window": window}} if arch == "swa" else {}
    model = ModelSpec(arch=arch, scale=CHECK_SCALE, overrides=overrides).build(seed=3)
    return Engine(model, **{"max_sequences": 3, "max_context": 64, "page_size": 2, **options})


def fails_in_last_layer(
    engine: Engine, failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[int], Tensor], None]:
    """A step whose last layer fails after it has written its state, all others having run."""
    mixer = engine.model.layers[-1].mixer
    extend = mixer.extend

    def failing(*given: Any) -> Tensor:
        extend(*given)
        raise failure

    def step(slots: list[int], tokens: Tensor) -> None:
        with monkeypatch.context() as patched:
            patched.setattr(mixer, "extend", failing)
            with pytest.raises(type(failure)):
                engine.extend(slots, tokens)

    return step


def ids(batch: int, count: int, seed: int = 1) -> Tensor:
    return torch.randint(256, (batch, count), generator=torch.Generator().manual_seed(seed))


def test_begin_gives_back_all_that_it_took_where_pages_run_out() -> None:
    store = store_of(StateSpec(rows=(replace(ROW, window=4),)), page_size=1, pages=5)
    a, b = store.add(), store.add()
    feed(store, [a], list(range(1, 9)))
    feed(store, [b], [1])
    table = next(iter(store.tables.values()))
    before = store.allocated_bytes, [dict(t) for t in table.tables], list(table.refs)
    with pytest.raises(StoreFullError):
        store.begin([a, b], 6)
    assert (store.allocated_bytes, table.tables, table.refs) == before
    assert held(store, a) == [5, 6, 7, 8] and held(store, b) == [1]
    assert store.peak_bytes >= store.allocated_bytes
    feed(store, [a], [9])
    assert held(store, a) == [6, 7, 8, 9]


def test_begin_gives_shared_pages_back_to_those_who_shared_them() -> None:
    store = store_of(StateSpec(rows=(ROW,)), pages=3)
    a = store.add()
    feed(store, [a], [1, 2, 3, 4, 5, 6])
    b = store.fork(a)
    table = next(iter(store.tables.values()))
    with pytest.raises(StoreFullError):
        store.begin([a, b], 3)
    assert table.tables[a] == table.tables[b] and table.used == 2
    store.release(b)
    assert table.used == 2
    feed(store, [a], [7])
    assert held(store, a) == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda f: type(f).__name__)
@pytest.mark.parametrize(
    ("arch", "lookback"), [("gqa", 0), ("swa", 0), ("swa", 3), ("gdn", 3), ("gdn:swa=1:1", 3)]
)
def test_after_a_failed_step_sequences_go_on_as_if_it_had_not_been(
    arch: str, lookback: int, failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, other = (engine_for(arch, lookback=lookback, page_size=3) for _ in range(2))
    tokens, more = ids(2, 21), ids(2, 1, seed=2)
    slots = []
    for e in (engine, other):
        slots = [e.store.add(), e.store.add()]
        for piece in (tokens[:, :19], tokens[:, 19:20], tokens[:, 20:]):
            e.extend(slots, piece)
    allocated = engine.store.allocated_bytes
    fail = fails_in_last_layer(engine, failure, monkeypatch)
    fail(slots, ids(2, 1, seed=5))
    if lookback:
        fail(slots, ids(2, 2, seed=6))
    assert engine.store.allocated_bytes <= allocated <= engine.store.peak_bytes
    assert engine.store.lengths[:2] == [21, 21]
    for piece in (more, tokens[:, :9]):
        torch.testing.assert_close(engine.extend(slots, piece), other.extend(slots, piece))
    assert engine.store.allocated_bytes == other.store.allocated_bytes
    for slot in slots:
        engine.store.release(slot)
    assert engine.store.allocated_bytes == 0


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize(
    ("arch", "window"), [("gqa", 12), ("swa", 12), ("swa", 2), (str(POOLED_ROWS), 12)]
)
def test_whoever_writes_on_in_a_shared_page_leaves_the_rows_of_longer_forks_alone(
    arch: str, window: int, order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last of those who share a page keeps it, and the others get it back where a step fails.
    engine = engine_for(arch, window, lookback=4, page_size=4)
    store, tokens = engine.store, ids(1, 31)
    longest = store.add()
    for piece in tokens.split([24, 3, 4], 1):
        engine.extend([longest], piece)
    slots, lengths = [longest, store.fork(longest), store.fork(longest)], [31, 29, 28]
    for slot, length in zip(slots, lengths, strict=True):
        store.rollback(slot, 31 - length)
    fails_in_last_layer(engine, FAILURES[0], monkeypatch)([slots[i] for i in order], ids(3, 3))
    more = ids(1, 2, seed=2)
    for slot, length in zip(slots, lengths, strict=True):
        expected = engine.model(torch.cat((tokens[:, :length], more), 1))[:, -2:]
        torch.testing.assert_close(engine.extend([slot], more), expected, rtol=1e-4, atol=1e-4)


def test_a_rollback_after_a_failed_step_is_right_or_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A window's ring has a page to spare; of snapshots there are as many as tokens to roll back.
    for arch, beyond in (("swa", [3]), ("gdn", [2, 3])):
        tokens, more, refused = ids(1, 24), ids(1, 6, seed=2), []
        for back in (0, 1, 2, 3):
            engine = engine_for(arch, lookback=3, page_size=1)
            slot = engine.store.add()
            for t in range(24):
                engine.extend([slot], tokens[:, t : t + 1])
            fails_in_last_layer(engine, FAILURES[0], monkeypatch)([slot], ids(1, 2, seed=5))
            try:
                engine.store.rollback(slot, back)
            except UserError:
                refused.append(back)
                continue
            kept = torch.cat((tokens[:, : 24 - back], more), 1)
            expected = engine.model(kept)[:, -6:]
            torch.testing.assert_close(engine.extend([slot], more), expected, rtol=1e-4, atol=1e-4)
        assert refused == beyond


@pytest.mark.parametrize(
    ("arch", "count", "lookback"), [("gdn", 1, 0), ("swa", 20, 0), ("gdn", 4, 3)]
)
def test_a_sequence_whose_state_was_overwritten_says_so_until_it_is_released(
    arch: str, count: int, lookback: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_for(arch, lookback=lookback)
    a, b = engine.store.add(), engine.store.add()
    engine.extend([a, b], ids(2, 19))
    before = engine.store.snapshot(b)
    fails_in_last_layer(engine, FAILURES[0], monkeypatch)([a], ids(1, count))
    for use in (engine.store.fork, engine.store.snapshot, lambda s: engine.store.rollback(s, 0),
                lambda s: engine.extend([b, s], ids(2, 1))):  # fmt: skip
        with pytest.raises(UserError, match=f"sequence {a} was lost in a step that failed"):
            use(a)
    for kept, now in zip(before, engine.store.snapshot(b), strict=True):
        assert all(torch.equal(kept[name], now[name]) for name in kept)
    engine.store.release(a)
    a = engine.store.add()
    fresh = engine.extend([a], ids(1, 9))
    torch.testing.assert_close(fresh, engine.model(ids(1, 9)), rtol=1e-4, atol=1e-4)
    engine.store.release(a)
    engine.store.release(b)
    assert engine.store.allocated_bytes == 0


@pytest.mark.parametrize("arch", ["swa", "gdn"])
@pytest.mark.parametrize("bad", [-1, 257])
def test_token_ids_beyond_the_vocabulary_are_refused_and_nothing_changes(
    arch: str, bad: int
) -> None:
    engine = engine_for(arch, page_size=1)
    slot = engine.store.add()
    engine.prefill([slot], [[1, 2, 3, 4, 5] * 4])
    before = engine.store.snapshot(slot), engine.store.allocated_bytes
    wrong = torch.tensor([[bad]])
    for refused in (lambda: engine.extend([slot], wrong), lambda: engine.prefill([slot], [[bad]]),
                    lambda: engine.extend_last([slot], wrong)):  # fmt: skip
        with pytest.raises(UserError, match=rf"token ids from {bad} .*0\.\.256"):
            refused()
    assert engine.store.allocated_bytes == before[1]
    for kept, now in zip(before[0], engine.store.snapshot(slot), strict=True):
        assert all(torch.equal(kept[name], now[name]) for name in kept)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
def test_a_step_that_fails_on_the_device_is_undone_too(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with interpreted():
        engine = engine_for("gqa", page_size=16, backend=backend)
        a = engine.store.add()
        engine.extend([a], ids(1, 20))
        b = engine.store.fork(a)
        fails_in_last_layer(engine, FAILURES[0], monkeypatch)([a, b], ids(2, 13))
        got = engine.extend([b, a], ids(2, 2, seed=4))
    for row, tokens in zip(got, ids(2, 2, seed=4), strict=True):
        whole = engine.model.use("torch")(torch.cat((ids(1, 20)[0], tokens))[None])[0, -2:]
        torch.testing.assert_close(row, whole, rtol=1e-4, atol=1e-4)
    pages = 3 * 16 * sum(t.nbytes for spec in engine.store.specs for t in spec.rows)
    assert engine.store.allocated_bytes == pages


def test_more_prompts_than_slots_leave_every_slot_free() -> None:
    engine = engine_for("gqa", max_sequences=2)
    for _ in range(2):
        with pytest.raises(StoreFullError, match=r"3 sequences do not fit .*: 2 of 2 are free"):
            engine.generate([[1], [2], [3]], 2)
    assert len(engine.generate([[1], [2]], 2).tokens) == 2


@pytest.mark.parametrize("stop", [None, 300])
def test_a_generation_that_is_interrupted_leaves_nothing_behind(stop: int | None) -> None:
    engine = engine_for("gdn:swa=1:1", max_sequences=2)

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            engine.generate([[1, 2], [3]], 4, stop=stop, on_token=interrupt)
        assert engine.store.allocated_bytes == 0


def test_one_step_is_open_at_a_time_and_is_committed_once() -> None:
    store = store_of(StateSpec(rows=(ROW,), fixed=(CELL,)))
    a, b = store.add(), store.add()
    step = store.begin([a], 1)
    for refused in (lambda: store.begin([b], 1), lambda: store.fork(a), lambda: store.release(a)):
        with pytest.raises(UserError, match=r"a step of sequences \[0\] is open"):
            refused()
    store.commit(step)
    with pytest.raises(UserError, match="not the open one"):
        store.commit(step)
    assert store.lengths[a] == 1


def test_a_commit_that_is_interrupted_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(StateSpec(rows=(replace(ROW, window=3),)), page_size=1)
    slots = [store.add(), store.add()]
    table = next(iter(store.tables.values()))
    settle = table.settle

    def interrupted(slot: int, length: int) -> None:
        if slot == slots[1]:
            monkeypatch.undo()
            raise KeyboardInterrupt
        settle(slot, length)

    with pytest.raises(KeyboardInterrupt), store.step(slots, 5) as step:
        rows = torch.arange(5.0)[None, :, None, None].expand(2, -1, 2, 3)
        step.layers[0].append("kv", rows)
        monkeypatch.setattr(table, "settle", interrupted)
    assert store.lengths[:2] == [5, 5]
    assert held(store, 0) == held(store, 1) == [2, 3, 4]


def test_a_sequence_named_twice_is_refused() -> None:
    engine = engine_for("gqa")
    slot = engine.store.add()
    with pytest.raises(UserError, match="name one twice"):
        engine.extend([slot, slot], ids(2, 3))
    with pytest.raises(UserError, match="name one twice"):
        engine.store.fill([slot, slot], 3)
    assert engine.store.lengths[slot] == 0 and engine.store.allocated_bytes == 0


def test_shapes_that_do_not_fit_the_sequences_are_refused() -> None:
    engine = engine_for("gqa")
    slot = engine.store.add()
    for tokens in (ids(2, 1), ids(1, 1)[0]):
        with pytest.raises(UserError, match="for 1 sequences"):
            engine.extend([slot], tokens)
    for bad in (ids(1, 0), ids(0, 1)):
        with pytest.raises(UserError, match="at least one of each"):
            engine.extend([slot][: len(bad)], bad)
    with pytest.raises(UserError, match="one count per sequence"):
        engine.extend([slot], ids(1, 2), torch.tensor([1, 1]))


COUNT = FixedSpec(name="count", shape=(2,), format=Format.of(torch.int8))


@pytest.mark.parametrize("window", [None, 5])
def test_fill_touches_its_own_sequences_alone(window: int | None) -> None:
    store = store_of(
        StateSpec(rows=(replace(ROW, window=window),), fixed=(CELL, COUNT)),
        max_sequences=3,
        lookback=2,
    )
    a, c = store.add(), store.add()
    feed(store, [a, c], [1, 2, 3, 4, 5, 6])
    b = store.fork(a)
    before = {s: store.snapshot(s)[0] for s in (a, c)}
    store.fill([b], 9)
    for slot, kept in before.items():
        assert all(torch.equal(kept[n], now) for n, now in store.snapshot(slot)[0].items())
    seen = store.snapshot(b)[0]
    assert store.lengths[b] == 15 and seen["cell"].tolist() == [pytest.approx(0.01)] * 4
    assert seen["count"].tolist() == [1, 1]
    rows = seen["kv"][0, :, 0]
    own = 6 if window is None else 0
    assert rows[:own].tolist() == [1, 2, 3, 4, 5, 6][:own]
    assert rows[own:].tolist() == [pytest.approx(0.01)] * (len(rows) - own)
    assert len(rows) == (15 if window is None else window)
    with pytest.raises(UserError, match="larger lookback"):
        store.rollback(b, 10)


def test_fill_beyond_the_context_is_refused_and_keeps_no_page() -> None:
    store = store_of(StateSpec(rows=(ROW,)))
    a, b = store.add(), store.add()
    store.fill([a], 30)
    allocated = store.allocated_bytes
    with pytest.raises(UserError, match="context 41 exceeds max_context=40"):
        store.fill([b, a], 11)
    with pytest.raises(UserError, match="a step of -1 tokens"):
        store.fill([b], -1)
    assert store.allocated_bytes == allocated and store.lengths == [30, 0, 0]


def test_a_filled_sequence_survives_a_failed_step() -> None:
    store: StateStore = store_of(StateSpec(fixed=(CELL,)), lookback=2)
    slot = store.add()
    store.fill([slot], 7)
    with pytest.raises(KeyboardInterrupt), store.step([slot], 1) as step:
        step.layers[0].get("cell").zero_()
        raise KeyboardInterrupt
    assert store.snapshot(slot)[0]["cell"].tolist() == [pytest.approx(0.01)] * 4
