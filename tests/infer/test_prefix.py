"""What is found of a prefix, what stays in memory and what goes, and pages that several hold."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from archs.errors import UserError
from infer.capacity import Capacity
from infer.engine import Engine
from infer.kept import keep, resume
from infer.pages import TableKey
from infer.policy import Policy
from infer.sampling import Sampling
from infer.scheduler import Scheduler
from infer.sequence import Answer, Ending, Request, Unspoken
from tests.infer.serving import CHECKPOINTS, PAGE, request_of, served_model, server_of
from tests.infer.test_server import drain, require_nothing_held

ROWS, WINDOW = TableKey(1, None, 0), TableKey(1, 16, 0)
SIZE = 8


def scheduler_of(
    pages: int = 40, *, slots: int = 0, window: int = 0, every: int = 0, cache: bool = True,
    budget: int = 64,
) -> Scheduler:  # fmt: skip
    tables = {ROWS: pages} | ({WINDOW: window} if window else {})
    capacity = Capacity(
        max_sequences=4, max_context=256, page_size=SIZE, pages=tables, slots=slots,
        page_bytes=dict.fromkeys(tables, 10), slot_bytes=7,
    )  # fmt: skip
    policy = Policy(
        token_budget=budget, reserve=0, prefix_cache=cache, checkpoint_every=every
    )  # fmt: skip
    return Scheduler(capacity, policy)


def said(*pieces: tuple[str, int]) -> Unspoken:
    return Unspoken(pieces)


def answered(scheduler: Scheduler, prompt: Sequence[int], new: int = 1, **more: int) -> Answer:
    """An answer that is served alone, to its end."""
    number = scheduler._count
    answer = scheduler.add(
        Request(prompt=prompt, max_new_tokens=new, name=str(number), **more)  # type: ignore[arg-type]
    )
    while (batch := scheduler.next()) is not None:
        scheduler.done(batch)
    return answer


def test_rows_are_found_page_by_page_and_one_token_is_left_to_compute() -> None:
    scheduler = scheduler_of()
    assert answered(scheduler, said(("a", 20))).hit == 0
    # The prompt itself: its last token must be computed; then the part that others share.
    assert answered(scheduler, said(("a", 20))).hit == 16
    assert answered(scheduler, said(("a", 16))).hit == 8
    assert answered(scheduler, said(("a", 21), ("b", 9))).hit == 20
    assert answered(scheduler, said(("a", 15), ("b", 9))).hit == 8
    assert answered(scheduler, said(("b", 15))).hit == 0


def test_tokens_and_their_names_find_the_same() -> None:
    """An engine, which sees tokens, and a clock, which sees their origin, agree."""
    by_name = {"a": range(100, 160), "b": range(200, 260), "c": range(300, 360)}
    numbers = np.random.default_rng(0)
    hits: list[list[int | None]] = [[], []]
    schedulers = scheduler_of(30, slots=7, window=24), scheduler_of(30, slots=7, window=24)
    for _ in range(80):
        pieces = [(str(numbers.choice([*by_name])), int(numbers.integers(1, 30))) for _ in range(3)]
        tokens = tuple(t for name, count in pieces for t in by_name[name][:count])
        for found, scheduler, prompt in zip(hits, schedulers, (tokens, said(*pieces)), strict=True):
            found.append(answered(scheduler, prompt).hit)
    assert hits[0] == hits[1]
    assert sum(hit or 0 for hit in hits[0]) > 200


def test_an_answer_goes_on_where_its_last_turn_ended() -> None:
    for scheduler in (scheduler_of(), scheduler_of(slots=6), scheduler_of(slots=6, window=20)):
        first = answered(scheduler, said(("a", 13)), new=10)
        turn = Unspoken([*first.request.prompt.pieces, *first.pieces, ("b", 5)])  # type: ignore[attr-defined]
        # Of the ten tokens the last was not computed.
        assert answered(scheduler, turn).hit == 22


def test_where_prompts_part_the_second_leaves_a_checkpoint_for_the_third() -> None:
    scheduler = scheduler_of(slots=8)
    hits = [answered(scheduler, said(("system", 20), (user, 9))).hit for user in "abc"]
    assert hits == [0, 0, 16]


@pytest.mark.parametrize(("every", "expected"), [(8, 16), (5, 20), (64, 0)])
def test_checkpoints_at_an_interval_serve_the_second(every: int, expected: int) -> None:
    scheduler = scheduler_of(slots=12, every=every)
    hits = [answered(scheduler, said(("system", 20), (user, 9))).hit for user in "ab"]
    assert hits == [0, expected]


def test_what_was_used_longest_ago_makes_room() -> None:
    scheduler = scheduler_of(pages=8)
    for name in "abab":
        answered(scheduler, said((name, 24)))
    assert scheduler.ledger.idle[0] == 6
    answered(scheduler, said(("c", 24)))
    # b was used last: of a, its last page gave way first.
    assert answered(scheduler, said(("b", 24))).hit == 16
    assert answered(scheduler, said(("c", 24))).hit == 16
    assert (answered(scheduler, said(("a", 24))).hit or 0) < 16


def test_a_request_takes_the_whole_cache_back_where_it_needs_it() -> None:
    scheduler = scheduler_of(pages=10, slots=5, window=12)
    for name in "abcd":
        answered(scheduler, said((name, 16)), new=4)
    assert scheduler.ledger.idle[0] > 0
    big = answered(scheduler, said(("e", 60)), new=20)
    assert big.ending is Ending.LENGTH
    assert big.preemptions == 0


def test_one_who_waits_for_memory_does_not_empty_the_cache() -> None:
    scheduler = scheduler_of(pages=10)
    answered(scheduler, said(("a", 24)))
    kept = scheduler.ledger.idle[0]
    scheduler.add(Request(prompt=said(("b", 40)), max_new_tokens=9))
    batch = scheduler.next()
    assert batch is not None
    scheduler.done(batch)
    # Six pages run, three are kept, and the next needs five.
    scheduler.add(Request(prompt=said(("c", 40)), max_new_tokens=1))
    assert len(scheduler.running) == 1
    scheduler.next()
    assert scheduler.ledger.idle[0] == kept


def test_several_answers_hold_their_prompt_once() -> None:
    scheduler = scheduler_of(cache=False, budget=128)
    first = scheduler.add(Request(prompt=said(("a", 61)), max_new_tokens=9, answers=4))
    while len(scheduler.running) < 4:
        batch = scheduler.next()
        assert batch is not None
        scheduler.done(batch)
    scheduler.next()
    assert [a.hit for a in (first, *first.siblings)] == [0, 60, 60, 60]
    # Seven full pages of the prompt, and two of each.
    used = scheduler.ledger.used[0]
    assert used <= 7 + 4 * 2
    assert sum(a.pages[0] + a.shared[0] for a in scheduler.running) >= 4 * 8
    while (batch := scheduler.next()) is not None:
        scheduler.done(batch)
    assert scheduler.free_pages == (40,)


def test_siblings_of_one_who_is_cancelled_are_answered() -> None:
    scheduler = scheduler_of(budget=8)
    first = scheduler.add(Request(prompt=said(("a", 30)), max_new_tokens=2, answers=3))
    scheduler.next()
    scheduler.cancel(first)
    while (batch := scheduler.next()) is not None:
        scheduler.done(batch)
    assert [a.ending for a in first.siblings] == [Ending.LENGTH] * 2


def test_nothing_leaks_after_ten_thousand_requests_that_share() -> None:
    tables = {ROWS: 40, TableKey(4, None, 0): 12, WINDOW: 30}
    held = Capacity(max_sequences=8, max_context=64, page_size=8, pages=tables, slots=14)
    scheduler = Scheduler(
        held, Policy(token_budget=48, prefix_cache=True, checkpoint_every=8)
    )  # fmt: skip
    numbers, running = np.random.default_rng(0), list[Answer]()
    for n in range(10_000):
        system, length = int(numbers.integers(12)), int(numbers.integers(1, 24))
        prompt = said((f"system {system}", length), (f"user {n}", int(numbers.integers(1, 12))))
        first = scheduler.add(
            Request(prompt=prompt, max_new_tokens=int(numbers.integers(1, 20)), name=str(n),
                    answers=1 + int(n % 9 == 0))
        )  # fmt: skip
        running = [a for a in (*running, first, *first.siblings) if a.ending is None]
        if n % 7 == 0 and running:
            scheduler.cancel(running[int(numbers.integers(len(running)))])
        if n % 11 == 0 and scheduler.running:
            running.append(scheduler.fork(scheduler.running[0]))
        batch = scheduler.next()
        if batch is not None:
            scheduler.done(batch, endings=lambda a: Ending.STOP if a.made == 17 else None)
        assert min(*scheduler.ledger.free, *scheduler.ledger.idle) >= 0
    while (batch := scheduler.next()) is not None:
        scheduler.done(batch, scheduler.repeats(batch))
    assert scheduler.idle
    assert not any(scheduler.ledger.used)
    assert any(scheduler.ledger.idle)
    changes = scheduler.changes()
    assert len(changes.kept) > 10_000
    scheduler.clear()
    assert tuple(scheduler.ledger.free) == scheduler.ledger.total
    forgotten = {*changes.forgotten, *scheduler.changes().forgotten}
    assert {unit for _, unit in changes.kept} == forgotten


def test_a_checkpoint_makes_way_for_the_sequence_that_goes_on_from_it() -> None:
    """As many slots as sequences, and one runs for long: a hit waits no longer than a miss."""
    waited = []
    for prompt in (said(("a", 30), ("c", 3)), said(("b", 33))):
        scheduler = scheduler_of(slots=4, budget=40, every=8)
        for _ in range(4):
            answered(scheduler, said(("a", 30)))
        for name in "xyz":
            scheduler.add(Request(prompt=said((name, 9)), max_new_tokens=100))
        scheduler.next()
        last = scheduler.add(Request(prompt=prompt, max_new_tokens=1))
        steps = 0
        while last.ending is None:
            batch = scheduler.next()
            assert batch is not None
            scheduler.done(batch)
            steps += 1
        waited.append(steps)
        if not waited[1:]:
            assert last.hit == 30
    assert waited[0] <= waited[1] < 10


def test_what_was_kept_for_nobody_is_not_remembered_either() -> None:
    scheduler = scheduler_of(cache=False)
    for n in range(2000):
        scheduler.add(Request(prompt=said((str(n), 20)), max_new_tokens=2, answers=3))
        while (batch := scheduler.next()) is not None:
            scheduler.done(batch)
        scheduler.changes()
    cached = scheduler.prefixes.cached
    assert not cached.nodes and not cached.points
    assert len(cached._old_points) < 300
    assert not scheduler.prefixes._pasts and not scheduler.prefixes._waits


def test_a_drawn_fork_finds_what_it_began_with() -> None:
    for scheduler in (scheduler_of(), scheduler_of(slots=6)):
        parent = scheduler.add(
            Request(prompt=said(("a", 20)), max_new_tokens=40, sampling=Sampling(temperature=1.0))
        )
        for _ in range(20):
            batch = scheduler.next()
            assert batch is not None
            scheduler.done(batch)
        child = scheduler.fork(parent)
        scheduler.next()
        assert child.held == parent.held == 39
        assert child.told(0, 39) == parent.told(0, 39)
        child.made = parent.made = 30
        assert child.told(0, 50) != parent.told(0, 50)


def test_prompts_that_are_not_tokens_are_refused_at_once() -> None:
    for prompt in ("text", [None], [1 << 63]):
        with pytest.raises(UserError, match="a prompt is not made of token ids"):
            Request(prompt=prompt, max_new_tokens=1)  # type: ignore[arg-type]


# -- on an engine --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rows", "state and rows", "window 9"])
def test_best_of_four_takes_less_memory_than_copies(kind: str) -> None:
    request = request_of(1, 17, 3, temperature=1.0, answers=3)
    held = {}
    for batching in ("continuous", "static"):
        server, engine = server_of(served_model(kind), share=1.0, batching=batching)
        first = server.submit(request)
        while any(a.made < 2 for a in (first, *first.siblings)):
            server.step()
        held[batching] = engine.store.allocated_bytes
        drain(server)
        texts = [a.tokens for a in (first, *first.siblings)]
        assert len({tuple(t) for t in texts}) > 1
        require_nothing_held(server, engine)
    # Full pages of the prompt that are still kept are held once, instead of three times.
    shared = 0
    for key, count in engine.store.pools.page_bytes.items():
        oldest = 0 if key.window is None else (18 - key.window) // PAGE
        shared += 2 * (17 // PAGE - oldest) * count
    assert held["static"] - held["continuous"] == shared
    assert shared > 0


def test_a_fork_goes_on_from_where_it_stands_and_shares_until_then() -> None:
    server, engine = server_of(served_model("rows"), share=1.0)
    answer = server.submit(request_of(2, 9, 12, temperature=1.0))
    while answer.made < 5 or answer.held % PAGE != 2:
        server.step()
    pages = engine.store.tables[ROWS].used
    child = server.fork(answer)
    assert engine.store.tables[ROWS].used == pages
    server.step()
    assert child.made == answer.made
    assert child.tokens[:-1] == answer.tokens[: child.made - 1]
    # Each has a copy of the page that is written to.
    assert engine.store.tables[ROWS].used == pages + 1
    drain(server)
    assert child.tokens != answer.tokens
    with pytest.raises(UserError, match="has ended"):
        server.fork(answer)
    require_nothing_held(server, engine)


def test_batches_that_share_nothing_refuse_forks_and_caches() -> None:
    server, _ = server_of(served_model("rows"), batching="static")
    answer = server.submit(request_of(2, 9, 12))
    with pytest.raises(UserError, match="shares nothing, so nothing can be forked"):
        server.fork(answer)
    for options in ({"batching": "static"}, {"allocation": "contiguous"}):
        with pytest.raises(UserError, match="prefixes are shared by continuous batches on pages"):
            Policy(prefix_cache=True, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="checkpoint_every=64 without prefix_cache=true"):
        Policy(checkpoint_every=64)


def test_a_hit_computes_only_what_is_new() -> None:
    server, engine = server_of(served_model("state and rows"), share=1.0, cache=True, every=PAGE)
    drain_one(server, request_of(0, 14, 1))
    fed: list[int] = []
    extend = engine.extend_last

    def counting(sequences: list[int], tokens: torch.Tensor, *more: object) -> torch.Tensor:
        fed.append(tokens.numel())
        return extend(sequences, tokens, *more)  # type: ignore[arg-type]

    engine.extend_last = counting  # type: ignore[method-assign]
    again = drain_one(server, request_of(0, 15, 1))
    assert again.hit == 14
    assert fed == [1]
    require_nothing_held(server, engine)


def drain_one(server: object, request: Request) -> Answer:
    answer = server.submit(request)  # type: ignore[attr-defined]
    drain(server)
    return answer  # type: ignore[no-any-return]


def test_parts_of_a_past_that_do_not_follow_each_other_are_refused() -> None:
    engine = Engine(
        served_model("state and rows"), max_sequences=2, max_context=32, page_size=PAGE,
        kept=CHECKPOINTS,
    )  # fmt: skip
    store = engine.store
    sequence = store.add()
    engine.prefill([sequence], [[1, 2, 3, 4, 5, 6, 7, 8, 9]])
    with pytest.raises(UserError, match="as a whole part, which ends where the sequence does"):
        keep(store, sequence, 0, 8, whole=True)
    with pytest.raises(UserError, match="tokens 0 to 12 of a sequence of 9 cannot be kept"):
        keep(store, sequence, 0, 12, whole=False)
    page, rest = keep(store, sequence, 4, 8, whole=False), keep(store, sequence, 4, 9, whole=True)
    with pytest.raises(UserError, match="do not follow one another from 0 on"):
        resume(store, [page, rest])
    first = keep(store, sequence, 0, 4, whole=False)
    with pytest.raises(UserError, match="cannot go on from token 8"):
        resume(store, [first, page])
    assert store.lengths[resume(store, [first, rest])] == 9
