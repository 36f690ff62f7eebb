"""What a memory holds: never more than it, and what a store then allocates is within it."""

import pytest

from archs.errors import UserError
from archs.registry import HYBRIDS, REGISTRY, ModelSpec
from archs.sizes import get_scale
from infer.capacity import Capacity
from infer.memory import DoesNotFitError
from infer.pages import TableKey
from infer.store import StateStore
from tests.infer.test_machine import CONTEXT, KINDS, model_of

PAGE = 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("sequences", "checkpoints", "lookback"), [(1.6, 0, 0), (5.5, 0, 0), (5.5, 3, 0), (9.5, 2, 2)]
)
def test_a_store_allocates_no_more_than_the_memory_that_was_given(
    kind: str, sequences: float, checkpoints: int, lookback: int
) -> None:
    specs = model_of(kind).state_specs()
    slots = sum(s.fixed_bytes for s in specs)
    rows = PAGE * sum(t.nbytes for s in specs for t in s.owned)
    memory = sequences * (slots + 4 * rows) + 2 * slots + rows
    held = Capacity.of(
        specs, max_sequences=9, max_context=CONTEXT, page_size=PAGE, memory_bytes=memory,
        typical_tokens=CONTEXT // 2, checkpoints=checkpoints,
        lookback=lookback,
    )  # fmt: skip
    assert held.checkpoints == (checkpoints if slots else 0)
    store = StateStore(
        specs, max_sequences=held.max_sequences, max_context=CONTEXT, page_size=PAGE,
        pages=held.pages, kept=held.checkpoints, lookback=lookback,
    )  # fmt: skip
    pools = [p for layer in store.pools.layers for _, p, _ in layer.rows.values()]
    values = [p for layer in store.pools.layers for p in layer.fixed.values()]
    assert sum(p.nbytes for p in (*pools, *values)) <= memory
    assert all(store.tables[key].n_pages == count for key, count in held.pages.items())


def test_without_a_limit_all_sequences_fit_at_full_length() -> None:
    specs = model_of("pooled rows").state_specs()
    held = Capacity.of(specs, max_sequences=3, max_context=CONTEXT, page_size=PAGE)
    store = StateStore(specs, max_sequences=3, max_context=CONTEXT, page_size=PAGE)
    assert {key: store.tables[key].n_pages for key in held.pages} == held.pages


def test_a_hybrid_leaves_pages_to_the_sequences_it_has_slots_for() -> None:
    specs = ModelSpec(arch="gdn:gqa=3:1", scale=get_scale("1b")).outline().state_specs()
    few, many = (
        Capacity.of(
            specs,
            max_sequences=512,
            max_context=8192,
            page_size=64,
            memory_bytes=8e9,
            typical_tokens=typical,
        )
        for typical in (4096, 256)
    )
    assert few.max_sequences < many.max_sequences
    for held, typical in ((few, 4096), (many, 256)):
        (pages,) = held.pages.values()
        assert 64 * pages >= 0.9 * typical * held.max_sequences


@pytest.mark.parametrize("arch", [*REGISTRY, *HYBRIDS])
def test_a_memory_without_room_for_one_sequence_is_refused(arch: str) -> None:
    specs = ModelSpec(arch=arch, scale=get_scale("70m")).outline().state_specs()
    with pytest.raises(DoesNotFitError, match="do not hold one sequence of 64 tokens, which takes"):
        Capacity.of(specs, max_sequences=4, max_context=512, page_size=64, memory_bytes=1000)


def test_room_and_pages_are_each_others_inverse() -> None:
    held = Capacity(
        max_sequences=1, max_context=500, page_size=4,
        pages={TableKey(1, None, 0): 100, TableKey(3, None, 0): 40},
    )  # fmt: skip
    for tokens in range(1, 200):
        room = held.room_of(held.pages_of(tokens))
        assert room >= tokens
        assert held.pages_of(room) == held.pages_of(tokens)
        assert held.pages_of(room + 1) != held.pages_of(tokens)


def test_requests_that_can_never_fit_are_told_why() -> None:
    held = Capacity(max_sequences=2, max_context=64, page_size=8, pages={TableKey(1, None, 0): 4})
    held.require_fit(32)
    with pytest.raises(UserError, match="takes 5 pages of 8 tokens and the memory holds 4"):
        held.require_fit(33)
    with pytest.raises(UserError, match="exceeds max_context=64"):
        held.require_fit(65)
