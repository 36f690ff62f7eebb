"""Who runs when: order, budget, chunks, preemption, and books that balance, without any model."""

import numpy as np
import pytest

from archs.errors import UserError
from infer.capacity import Capacity
from infer.pages import TableKey
from infer.policy import BATCHING, Policy
from infer.scheduler import SCHEDULERS, Scheduler
from infer.sequence import Answer, Ending, Request

ROWS = TableKey(1, None, 0)


def capacity(pages: int = 12, sequences: int = 4) -> Capacity:
    return Capacity(max_sequences=sequences, max_context=64, page_size=8, pages={ROWS: pages})


def request(prompt: int, new: int, priority: int = 0) -> Request:
    return Request(prompt=range(prompt), max_new_tokens=new, priority=priority)


def run(scheduler: Scheduler) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Steps to the end, one at a time: who decoded, and whose prompt was read how far."""
    steps = []
    while (batch := scheduler.next()) is not None:
        steps.append(([a.number for a in batch.decode], [(a.number, n) for a, n in batch.chunks]))
        scheduler.done(batch)
    return steps


def test_prompts_are_cut_to_the_budget_beside_decode() -> None:
    scheduler = Scheduler(capacity(), Policy(token_budget=6))
    scheduler.add(request(3, 3))
    scheduler.add(request(10, 2))
    assert run(scheduler) == [
        ([], [(0, 3), (1, 3)]),
        ([0], [(1, 5)]),
        ([0], [(1, 2)]),
        ([1], []),
    ]


def test_a_prompt_of_one_token_decodes_at_once() -> None:
    scheduler = Scheduler(capacity(), Policy(token_budget=6))
    scheduler.add(request(1, 2))
    assert run(scheduler) == [([0], []), ([0], [])]


def test_priority_goes_first_and_then_who_came_first() -> None:
    scheduler = Scheduler(capacity(sequences=1), Policy(token_budget=8))
    answers = [scheduler.add(request(4, 1, priority)) for priority in (0, 0, 5)]
    ended = []
    while (batch := scheduler.next()) is not None:
        ended += scheduler.done(batch).ended
    assert ended == [answers[2], answers[0], answers[1]]


def test_nobody_overtakes_a_request_that_waits_for_memory() -> None:
    scheduler = Scheduler(capacity(pages=6), Policy(reserve=0))
    scheduler.add(request(32, 4))
    scheduler.add(request(24, 1))
    scheduler.add(request(1, 1))
    batch = scheduler.next()
    assert batch is not None
    assert [a.number for a in batch.answers] == [0]
    assert [a.number for a in scheduler.waiting] == [1, 2]


def test_the_last_in_rank_gives_way_and_comes_back_first() -> None:
    scheduler = Scheduler(capacity(pages=4), Policy(reserve=0))
    first, second = scheduler.add(request(8, 20)), scheduler.add(request(8, 20))
    third = scheduler.add(request(8, 1))
    preempted: list[Answer] = []
    ended: list[Answer] = []
    while (batch := scheduler.next()) is not None:
        for answer in scheduler.changes().released:
            if answer.ending is None:
                preempted.append(answer)
                assert answer.held == 0
                assert answer.pages == (0,)
        ended += scheduler.done(batch).ended
    assert first not in preempted
    assert second in preempted
    assert ended == [third, first, second]
    assert second.made == 20
    assert scheduler.free_pages == (4,)


def test_the_reserve_stays_free_while_others_run() -> None:
    scheduler = Scheduler(capacity(pages=10), Policy(reserve=0.5))
    scheduler.add(request(16, 2))
    scheduler.add(request(40, 1))
    batch = scheduler.next()
    assert batch is not None
    assert [a.number for a in batch.answers] == [0]
    scheduler.done(batch)
    run(scheduler)
    assert scheduler.idle


def test_static_batches_run_until_their_last_answer() -> None:
    scheduler = SCHEDULERS["static"](capacity(sequences=2), Policy(batching="static"))
    for new in (2, 5, 1):
        scheduler.add(request(4, new))
    assert [decode for decode, _ in run(scheduler)] == [
        [], [0, 1], [0, 1], [0, 1], [0, 1], []
    ]  # fmt: skip
    assert scheduler.free_pages == (12,)


def test_who_has_ended_in_a_static_batch_never_outgrows_its_pages() -> None:
    policy = Policy(batching="static", token_budget=9)
    scheduler = SCHEDULERS["static"](capacity(), policy)
    # The last token of the longest prompt is read alone.
    answers = [scheduler.add(request(prompt, new)) for prompt, new in ((3, 1), (3, 1), (4, 14))]
    while (batch := scheduler.next()) is not None:
        rooms = [a.room for a in answers]
        scheduler.done(batch)
        assert all(a.held <= room for a, room in zip(answers, rooms, strict=True))
    assert [a.held for a in answers] == [16, 16, 17]


def test_contiguous_allocation_sets_the_longest_context_aside() -> None:
    paged, whole = (
        Scheduler(capacity(pages=16), Policy(allocation=a, reserve=0))
        for a in ("paged", "contiguous")
    )
    for scheduler in (paged, whole):
        for _ in range(4):
            scheduler.add(request(8, 4))
        scheduler.next()
    assert len(paged.running) == 4
    assert len(whole.running) == 2


@pytest.mark.parametrize("batching", SCHEDULERS)
def test_leaps_are_the_steps_they_stand_for(batching: str) -> None:
    def steps(leaping: bool) -> list[list[tuple[int, int]]]:
        scheduler = SCHEDULERS[batching](capacity(pages=9), Policy(batching=batching))
        numbers = np.random.default_rng(3)
        for _ in range(40):
            prompt, new = (int(n) for n in numbers.integers(1, 30, 2))
            scheduler.add(request(prompt, new))
        found = []
        while (batch := scheduler.next()) is not None:
            times = scheduler.repeats(batch) if leaping else 1
            ran = [(a.number, 1) for a in batch.decode]
            ran += [(a.number, n) for a, n in batch.chunks]
            found += [ran] * times
            scheduler.done(batch, times)
        assert scheduler.free_pages == (9,)
        return found

    assert steps(leaping=True) == steps(leaping=False)


@pytest.mark.parametrize("batching", SCHEDULERS)
@pytest.mark.parametrize("allocation", ["paged", "contiguous"])
def test_nothing_leaks_after_ten_thousand_requests(batching: str, allocation: str) -> None:
    held = Capacity(
        max_sequences=16, max_context=64, page_size=8,
        pages={ROWS: 40, TableKey(4, None, 0): 12},
    )  # fmt: skip
    policy = Policy(batching=batching, allocation=allocation, token_budget=48)
    scheduler = SCHEDULERS[batching](held, policy)
    numbers = np.random.default_rng(0)
    answers = []
    for n in range(10_000):
        prompt, new = int(numbers.integers(1, 40)), int(numbers.integers(1, 40))
        answers.append(scheduler.add(request(prompt, new, int(n % 5 == 0))))
        if n % 7 == 0:
            scheduler.cancel(answers[int(numbers.integers(n + 1))])
        batch = scheduler.next()
        if batch is None:
            continue
        assert batch.tokens <= policy.token_budget
        scheduler.done(batch, endings=lambda a: Ending.STOP if a.made == 17 else None)
    leap(scheduler)
    assert scheduler.idle
    assert scheduler.free_pages == (40, 12)
    assert all(a.ending is not None for a in answers)
    refused = {a.number for a in answers if a.ending is Ending.REFUSED}
    assert refused == {a.number for a in answers if a.request.most_held > 64}


def leap(scheduler: Scheduler) -> None:
    while (batch := scheduler.next()) is not None:
        scheduler.done(batch, scheduler.repeats(batch))


def test_every_way_to_batch_has_its_scheduler() -> None:
    assert SCHEDULERS.keys() == BATCHING.keys()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"batching": "dynamic"}, "batching 'dynamic'"),
        ({"allocation": "page"}, "Did you mean 'paged'"),
        ({"token_budget": 0}, "token_budget=0 must be at least 1"),
        ({"reserve": 1.0}, "reserve=1.0 must be a share"),
    ],
)
def test_impossible_policies_are_refused(options: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Policy(**options)  # type: ignore[arg-type]


def test_a_budget_below_the_batch_is_refused() -> None:
    with pytest.raises(UserError, match="token_budget=3 is less than the 4 tokens of 4"):
        Scheduler(capacity(), Policy(token_budget=3))


def test_contiguous_allocation_needs_memory_for_one_whole_context() -> None:
    with pytest.raises(UserError, match="takes 8 pages of 8 tokens and the memory holds 7"):
        Scheduler(capacity(pages=7), Policy(allocation="contiguous"))
