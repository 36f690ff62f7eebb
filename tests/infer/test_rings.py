"""Values that are replayed from rings of inputs: when they are written, shared, copied and lost."""

import pytest
import torch
from torch import Tensor

from archs.errors import UserError
from archs.spec import RECURRENT_LIMIT, Replay
from infer.engine import Engine
from infer.rings import RingTable
from infer.slots import ZERO, State
from infer.speculate import generate
from tests.infer.speculating import DRAFTERS, double, engine_of, random_prompts
from tests.infer.test_machine import CONTEXT, KINDS, VOCAB, Failed, model_of

REPLAYED = ["retention", "delta rule", "low rank", "state and rows", "state and window"]


def engine_with(kind: str, **options: int) -> Engine:
    return Engine(model_of(kind), max_sequences=4, max_context=CONTEXT, **options)


def tokens_of(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(VOCAB, (1, count), generator=generator)


def values_of(engine: Engine, sequence: int) -> list[Tensor]:
    names = [layer.inputs for layer in engine.store.pools.layers]
    return [
        value
        for layer, replayed in zip(engine.store.snapshot(sequence), names, strict=True)
        for name, value in layer.items()
        if name in replayed
    ]


@pytest.mark.parametrize("kind", REPLAYED)
def test_decode_writes_a_value_once_in_many_steps(kind: str) -> None:
    engine = engine_with(kind, replay=16)
    sequence = engine.store.add()
    engine.extend([sequence], tokens_of(12))
    written, held = 0, values_of(engine, sequence)
    for i in range(32):
        engine.extend_last([sequence], tokens_of(40)[:, i : i + 1])
        now = values_of(engine, sequence)
        written += any(not torch.equal(a, b) for a, b in zip(held, now, strict=True))
        held = now
    # Fifteen inputs are held, the next token needs the sixteenth row.
    assert written == 2


@pytest.mark.parametrize("kind", REPLAYED)
def test_synthetic_state_lies_where_the_next_step_reads_it(kind: str) -> None:
    engine = engine_with(kind, lookback=4, replay=16)
    sequences = [engine.store.add() for _ in range(4)]
    engine.store.fill(sequences[1:], 20)
    for sequence in sequences[1:]:
        assert all((value == 0.01).all() for value in values_of(engine, sequence))
    assert not any(value.any() for value in values_of(engine, sequences[0]))


def test_a_sequence_without_tokens_is_neither_read_nor_written() -> None:
    engine = engine_with("delta rule", replay=16)
    store = engine.store
    idle, busy = store.add(), store.add()
    engine.extend([idle], tokens_of(12))
    engine.extend_last([idle], tokens_of(1))
    before = values_of(engine, idle)
    child = store.fork(idle)
    tokens = torch.cat([tokens_of(20)] * 3)
    # A long step takes all that is held into the value of the others.
    engine.extend([idle, busy, child], tokens, torch.tensor([0, 20, 20]))
    for held, now in zip(before, values_of(engine, idle), strict=True):
        assert torch.equal(held, now)
    assert store.rings is not None and store.rings.values[idle].length == 12
    logits = engine.extend_last([idle], tokens_of(1))
    told = torch.cat((tokens_of(12), tokens_of(1), tokens_of(1)), 1)
    expected = model_of("delta rule")(told)[:, -1]
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_folding_leaves_what_may_be_taken_back() -> None:
    replay = Replay(16, 4)
    assert [replay.folds(held, 1) for held in (0, 10, 11)] == [0, 0, 8]
    assert [replay.folds(held, 5) for held in (6, 7)] == [0, 7]
    assert replay.folds(11, 0) == 0
    assert not replay.overflows(7, 9) and replay.overflows(8, 9) and replay.overflows(0, 10)
    # A longer step than those that are taken back leaves room for one of them.
    assert not Replay(14, 4).overflows(0, 9) and Replay(13, 4).overflows(0, 9)


@pytest.mark.parametrize(("rows", "lookback"), [(2, 0), (4, 1), (5, 1), (10, 4), (16, 4), (18, 8)])
def test_every_step_can_be_taken_back_as_far_as_is_said(rows: int, lookback: int) -> None:
    tokens = range(1, RECURRENT_LIMIT + 2)
    table = RingTable(sequences=1, replay=Replay(rows, lookback))
    # What may be held before a step, from every history of steps.
    seen, left = set[int](), [0]
    while left:
        held = left.pop()
        if held in seen:
            continue
        seen.add(held)
        for count in tokens:
            table.values[0] = State(100 - held, ZERO)
            change = table.reserve([0], [100], [count], count)
            table.settle(change)
            held_after = 100 + count - table.oldest(0)
            if count <= lookback + 1:
                assert not change.whole and min(held + count, lookback) <= held_after
            assert held_after <= rows
            # A rollback forgets any number of them.
            left += range(held_after + 1)
            table.release(0)


@pytest.mark.parametrize("kind", REPLAYED)
def test_a_fork_shares_a_value_until_either_goes_on(kind: str) -> None:
    engine = engine_with(kind, lookback=2, replay=16)
    store = engine.store
    parent = store.add()
    engine.extend([parent], tokens_of(12))
    child = store.fork(parent)
    assert store.rings is not None and store.rings.used == 1
    for i in range(3):
        engine.extend_last([child], tokens_of(3)[:, i : i + 1])
    assert store.rings.used == 2
    # What the child has done is not seen by its parent.
    lone = engine_with(kind, lookback=2, replay=16)
    again = lone.store.add()
    lone.extend([again], tokens_of(12))
    token = tokens_of(1)
    torch.testing.assert_close(
        engine.extend_last([parent], token), lone.extend_last([again], token), rtol=0, atol=0
    )
    store.release(parent)
    store.release(child)
    assert store.rings.used == 0 and store.allocated_bytes == 0


@pytest.mark.parametrize("replay", [0, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sequence_that_is_taken_back_to_nothing_holds_nothing(kind: str, replay: int) -> None:
    engine = engine_with(kind, lookback=2, replay=replay, page_size=4)
    store = engine.store
    sequence = store.add()
    first = engine.extend([sequence], tokens_of(2))
    assert store.allocated_bytes == store.declared_bytes(2)
    store.rollback(sequence, 2)
    assert store.allocated_bytes == store.declared_bytes(0) == 0
    assert torch.equal(engine.extend([sequence], tokens_of(2)), first)


@pytest.mark.parametrize(("before", "lost"), [(3, False), (13, True)])
def test_a_failing_step_loses_a_value_only_where_it_is_written(before: int, lost: bool) -> None:
    model = model_of("delta rule")
    engine = engine_with("delta rule", lookback=2, replay=16)
    sequence = engine.store.add()
    engine.extend([sequence], tokens_of(12))
    for _ in range(before):
        engine.extend_last([sequence], tokens_of(1))
    mixer = model.layers[1].mixer
    extend = mixer.extend

    def failing(*given: object) -> Tensor:
        extend(*given)  # type: ignore[arg-type]
        raise Failed

    mixer.extend = failing  # type: ignore[method-assign]
    try:
        with pytest.raises(Failed):
            engine.extend_last([sequence], tokens_of(1))
    finally:
        del mixer.extend
    if lost:
        with pytest.raises(UserError, match="was lost in a step that failed"):
            engine.extend_last([sequence], tokens_of(1))
        return
    logits = engine.extend_last([sequence], tokens_of(1))
    told = torch.cat((tokens_of(12), *[tokens_of(1)] * (before + 1)), 1)
    torch.testing.assert_close(logits, model(told)[:, -1], rtol=1e-3, atol=1e-3)


def test_sequences_that_share_a_slot_in_one_step_are_undone_together() -> None:
    table = RingTable(sequences=3, replay=Replay(4, 0))
    table.settle(table.reserve([0], [0], [1], 1))
    table.fork(0, 1)
    [slot] = {table.current(0), table.current(1)}
    for written in (False, True):
        change = table.reserve([0, 1], [1, 1], [9, 9], 9)
        # The first takes a slot of its own, so the second may write where both were.
        assert change.whole and len(change.copies) == 1 and change.written >= {slot}
        assert table.undo(change, written=written) == ({0, 1} if written else set())
    assert table.used == 0 and table.current(0) == table.current(1) == ZERO


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("kind", REPLAYED)
def test_greedy_speculation_by_replay_gives_the_targets_tokens(kind: str, drafter: str) -> None:
    model, prompts = double(kind), random_prompts(3, 31)
    plain = engine_of(model, lookback=0).generate(prompts, 40).tokens
    for drafts in (1, 4, 8):
        target = engine_of(model, lookback=drafts, replay=2 * (drafts + 1))
        found = generate(target, DRAFTERS[drafter](model, 3), prompts, 40, drafts=drafts)
        assert found.tokens == plain


def test_what_cannot_be_is_one_line() -> None:
    model = model_of("delta rule")
    with pytest.raises(UserError, match=r"replay=9 with lookback=4: .* take replay=10 or more"):
        Engine(model, lookback=4, replay=9)
    with pytest.raises(UserError, match=r"compiled=True with replay=16: .* take replay=0"):
        Engine(model, compiled=True, replay=16)
    engine = Engine(model, max_context=64, lookback=2, replay=16)
    sequence = engine.store.add()
    engine.extend([sequence], tokens_of(12))
    engine.extend([sequence], tokens_of(3))
    with pytest.raises(UserError, match="rollback of 3 tokens at length 15 reaches before 13"):
        engine.store.rollback(sequence, 3)
