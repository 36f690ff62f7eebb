"""Law *company*: what a request is answered depends on nobody else, and nothing leaks."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from archs.errors import UserError
from infer.drafts import ModelDrafter, PromptLookup
from infer.engine import Engine
from infer.executor import EngineExecutor
from infer.policy import Policy
from infer.scheduler import Scheduler
from infer.sequence import Answer, Ending
from infer.server import Server
from infer.speculating import SpeculatingExecutor
from infer.turns import Ran
from tests.infer.serving import (
    BUDGET,
    PAGE,
    SEQUENCES,
    alone,
    alone_from,
    capacity_of,
    drain,
    request_of,
    require_nothing_held,
    served_model,
    server_of,
)
from tests.infer.test_machine import CONTEXT, KINDS


class Company(RuleBasedStateMachine):
    """Requests that come, go on and leave in any order, on pages that do not suffice for all."""

    kind = "rows"

    def __init__(self) -> None:
        super().__init__()
        self.answers: list[Answer] = []
        #: Tokens that forked answers began with.
        self.made: dict[Answer, list[int]] = {}

    @initialize(
        share=st.sampled_from([0.34, 0.5, 1.0]),
        policy=st.sampled_from(
            [{"batching": "static"}, {}, {"cache": True}, {"cache": True, "every": PAGE},
             {"cache": True, "every": 7}, {"drafts": 2}, {"cache": True, "drafts": 3}]
        ),
    )  # fmt: skip
    def open(self, share: float, policy: dict[str, Any]) -> None:
        self.server, self.engine = server_of(served_model(self.kind), share=share, **policy)

    @rule(
        prompt=st.sampled_from([1, 2, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, BUDGET, 2 * BUDGET + 1]),
        new=st.integers(1, 14),
        temperature=st.sampled_from([0.0, 0.0, 0.9]),
        priority=st.sampled_from([0, 0, 0, 1]),
        stop=st.sampled_from([None, None, 5]),
        common=st.sampled_from([0, PAGE, PAGE + 1, 2 * PAGE + 3]),
        answers=st.sampled_from([1, 1, 2, 3]),
    )
    def arrive(self, prompt: int, new: int, **options: Any) -> None:
        first = self.server.submit(request_of(len(self.answers) % 5, prompt, new, **options))
        self.answers += [first, *first.siblings]

    @rule(data=st.data(), new=st.integers(1, 14))
    def go_on_talking(self, data: st.DataObject, new: int) -> None:
        """What was answered becomes part of the next prompt."""
        ended = [a for a in self.answers if a.ending is Ending.LENGTH]
        if ended:
            answer = data.draw(st.sampled_from(ended))
            said = (*answer.request.prompt, *answer.tokens, 3, 1)
            request = replace(answer.request, prompt=said, max_new_tokens=new, answers=1)
            self.answers.append(self.server.submit(request))

    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        going = [a for a in self.answers if a.ending is None]
        if going and self.server.scheduler.policy.shares:
            answer = data.draw(st.sampled_from(going))
            child = self.server.fork(answer)
            self.made[child] = list(child.tokens)
            self.answers.append(child)

    @rule(steps=st.integers(1, 6))
    def go_on(self, steps: int) -> None:
        for _ in range(steps):
            self.server.step()

    @precondition(lambda self: self.answers)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        self.server.cancel(data.draw(st.sampled_from(self.answers)))

    @invariant()
    def books_agree(self) -> None:
        if not self.answers:
            return
        scheduler, store = self.server.scheduler, self.engine.store
        ledger, cached = scheduler.ledger, scheduler.prefixes.cached
        assert min(*ledger.free, *ledger.idle) >= 0
        in_use = {
            node for past in scheduler.prefixes._pasts.values() for node in past.node.path()
        }  # fmt: skip
        assert sum(n.users > 0 for n in cached.nodes.values()) == len(in_use)
        points = [p for n in (cached.root, *cached.nodes.values())
                  for alike in n.points.values() for p in alike.values()]  # fmt: skip
        for at, (key, count) in enumerate(scheduler.capacity.pages.items()):
            own = sum(a.pages[at] for a in scheduler.running)
            assert own + sum(node.pages[at] for node in in_use) == ledger.used[at]
            # The store never needs a page that the scheduler did not set aside.
            assert store.tables[key].used <= count - ledger.free[at]
            whole = sum(a.pages[at] + a.shared[at] for a in scheduler.running)
            assert ledger.copies[at] == whole >= ledger.used[at]
        if store.slots is not None:
            assert ledger.used[-1] == len(scheduler.running)
            assert ledger.idle[-1] == len(points)
            lookback = store.lookback * len(scheduler.running)
            assert store.slots.used <= ledger.total[-1] - ledger.free[-1] + lookback
        assert set(self.server.executor._kept) == {*cached.nodes.values(), *points}
        assert len(scheduler.running) <= SEQUENCES

    @invariant()
    def answers_are_their_own(self) -> None:
        for answer in self.answers:
            drafts = self.server.scheduler.policy.drafts
            expected = alone_from(self.kind, answer, self.made.get(answer, ()), drafts)
            assert answer.tokens == expected[: len(answer.tokens)]
            if answer.ending in (Ending.LENGTH, Ending.STOP):
                assert answer.tokens == expected

    def teardown(self) -> None:
        if not self.answers:
            return
        drain(self.server)
        self.answers_are_their_own()
        assert all(a.ending is not None for a in self.answers)
        require_nothing_held(self.server, self.engine)


@pytest.mark.parametrize("kind", KINDS)
def test_company(kind: str) -> None:
    machine = type("CompanyOfKind", (Company,), {"kind": kind})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=10,
            stateful_step_count=16,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_answers_stream_and_end_at_their_stop_token() -> None:
    server, engine = server_of(served_model("rows"))
    whole = alone("rows", request_of(1, 5, 12))
    stop = whole[4]
    answer = server.submit(request_of(1, 5, 12, stop=stop))
    got = []
    while (turn := server.step()) is not None:
        got += [a.tokens[-1] for a, _ in turn.got]
    end = whole.index(stop) + 1
    assert got == answer.tokens == whole[:end]
    assert answer.ending is Ending.STOP
    require_nothing_held(server, engine)


def test_a_full_pool_preempts_the_last_and_recomputes_it() -> None:
    server, engine = server_of(served_model("state and rows"), share=0.4)
    requests = [request_of(n, 9, 20) for n in range(3)]
    answers = [server.submit(r) for r in requests]
    drain(server)
    assert [a.tokens for a in answers] == [alone("state and rows", r) for r in requests]
    assert answers[0].preemptions == 0
    assert answers[-1].preemptions > 0
    assert answers[-1].recomputed > 0
    require_nothing_held(server, engine)


def test_a_request_that_never_fits_is_refused_alone() -> None:
    server, engine = server_of(served_model("rows"), share=0.25)
    good = server.submit(request_of(0, 5, 4))
    too_long = server.submit(request_of(1, CONTEXT, 2))
    too_much = server.submit(request_of(2, 30, 20))
    drain(server)
    assert good.ending is Ending.LENGTH
    assert too_long.ending is too_much.ending is Ending.REFUSED
    assert f"exceeds max_context={CONTEXT}" in too_long.note
    assert "give the server more memory" in too_much.note
    require_nothing_held(server, engine)


def test_an_answer_without_finite_logits_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    server, engine = server_of(served_model("rows"))
    answers = [server.submit(request_of(n, 4, 6)) for n in (3, 0)]
    server.step()
    (lost,) = [s for a, s in server.executor._sequences.items() if a is answers[0]]
    extend = engine.extend_last

    def spoilt(sequences: list[int], *given: Any) -> torch.Tensor:
        logits = extend(sequences, *given).clone()
        logits[sequences.index(lost)] = math.nan
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(engine, "extend_last", spoilt)
        server.step()
    drain(server)
    assert answers[0].ending is Ending.FAILED
    assert "NaN" in answers[0].note
    assert answers[0].made == len(answers[0].tokens) == 1
    assert answers[1].tokens == alone("rows", answers[1].request)
    require_nothing_held(server, engine)


def test_a_drafted_answer_without_finite_logits_fails_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, engine = server_of(served_model("rows"), share=1.0, drafts=2)
    answers = [server.submit(request_of(n, 4, 9)) for n in (3, 0)]
    while answers[0].made < 2:
        server.step()
    (lost,) = [s for a, s in server.executor._sequences.items() if a is answers[0]]
    made, verify = answers[0].made, engine.verify

    def spoilt(sequences: list[int], *given: Any) -> Any:
        found = verify(sequences, *given)
        logits = found.logits.clone()
        logits[sequences.index(lost)] = math.nan
        return found._replace(logits=logits)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "verify", spoilt)
        server.step()
    drain(server)
    assert answers[0].ending is Ending.FAILED
    assert answers[0].made == len(answers[0].tokens) == made
    assert answers[1].tokens == alone("rows", answers[1].request)
    require_nothing_held(server, engine)


def drafted_by_itself(kind: str) -> tuple[Server, Engine, SpeculatingExecutor]:
    """A server whose draft is the target: nearly every draft is right."""
    server, engine = server_of(served_model(kind), share=0.6, drafts=2, cache=True)
    draft = Engine(engine.model, max_sequences=SEQUENCES, max_context=CONTEXT + 2, lookback=2)
    executor = SpeculatingExecutor(engine, ModelDrafter(draft), drafts=2)
    return Server(server.scheduler, executor), draft, executor


def test_another_model_drafts_in_a_running_batch() -> None:
    server, draft, executor = drafted_by_itself("state and rows")
    requests = [request_of(n, 3 + 2 * n, 15, common=4) for n in range(6)]
    answers = [server.submit(r) for r in requests]
    drain(server)
    assert [a.tokens for a in answers] == [alone("state and rows", r) for r in requests]
    assert executor.kept > 1.5 * executor.verified
    require_nothing_held(server, executor.engine)
    assert draft.store.allocated_bytes == 0


def test_an_answer_ends_at_a_stop_token_among_right_drafts() -> None:
    """What was right behind it goes; the next turn goes on from what was left."""
    server, _, executor = drafted_by_itself("state and rows")
    whole = alone("state and rows", request_of(1, 5, 24))
    for at in range(4, 16):
        stop = whole[at]
        answer = server.submit(request_of(1, 5, 24, stop=stop))
        drain(server)
        assert answer.tokens == whole[: whole.index(stop) + 1]
    assert executor.kept > executor.verified
    require_nothing_held(server, executor.engine)


def test_what_cannot_be_drafted_for_is_refused() -> None:
    model = served_model("state and rows")
    with pytest.raises(UserError, match="open it with lookback=2"):
        plain = Engine(model, max_sequences=SEQUENCES, max_context=CONTEXT, page_size=PAGE)
        SpeculatingExecutor(plain, PromptLookup(device=plain.device), drafts=2)
    with pytest.raises(UserError, match="drafts=2 with batching='static'"):
        Policy(batching="static", drafts=2)
    with pytest.raises(UserError, match="12 tokens of 3 sequences with drafts=3"):
        Scheduler(capacity_of(model), Policy(token_budget=11, drafts=3))
    server, engine = server_of(model, drafts=2)
    with pytest.raises(UserError, match="capacity of lookback=0"):
        Server(Scheduler(capacity_of(model), Policy(token_budget=9)), server.executor)
    reading = PromptLookup(device=engine.device)
    reading.read = lambda sequences, hidden, counts: None
    with pytest.raises(UserError, match="reads the target's hidden states"):
        SpeculatingExecutor(engine, reading, drafts=2)


def test_where_the_engine_fails_nothing_stays_held(monkeypatch: pytest.MonkeyPatch) -> None:
    server, engine = server_of(served_model("state and rows"))
    answers = [server.submit(request_of(n, 6, 5)) for n in range(5)]
    server.step()

    def fail(*args: Any, **options: Any) -> Ran:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(engine, "extend_last", fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        server.step()
    assert all(a.ending is Ending.CANCELLED for a in answers)
    require_nothing_held(server, engine)


def test_equal_requests_get_equal_answers_and_seeds_tell_them_apart() -> None:
    server, _ = server_of(served_model("rows"))
    same = [server.submit(request_of(2, 5, 8, temperature=1.0)) for _ in range(2)]
    other = server.submit(request_of(4, 5, 8, temperature=1.0))
    drain(server)
    assert same[0].tokens == same[1].tokens == alone("rows", same[0].request)
    assert other.tokens == alone("rows", other.request)


def test_compiled_engines_are_refused() -> None:
    engine = Engine(served_model("rows"), compiled=True)
    with pytest.raises(UserError, match="compiled=True compiles steps of one fixed batch"):
        EngineExecutor(engine)


@pytest.mark.parametrize(
    "more", [{"kept": 0}, {"max_sequences": 2}, {"page_size": 8}, {"pages": 3}]
)
def test_engines_with_less_than_the_scheduler_hands_out_are_refused(more: dict[str, int]) -> None:
    model = served_model("state and rows")
    capacity = capacity_of(model)
    options = {
        "max_sequences": SEQUENCES, "max_context": CONTEXT, "page_size": PAGE,
        "kept": capacity.checkpoints, **more,
    }  # fmt: skip
    engine = Engine(model, **options)
    with pytest.raises(UserError, match="does not hold what the scheduler may hand out"):
        Server(Scheduler(capacity, Policy(token_budget=BUDGET)), EngineExecutor(engine))
