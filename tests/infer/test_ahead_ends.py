"""Forks, cancellations and failures while a step is under way: nobody gets what is not theirs."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from infer.coming import Coming
from infer.sequence import Answer, Ending, Request
from infer.server import Server, drive
from infer.turns import Turn
from tests.infer.serving import (
    PAGE,
    alone,
    alone_from,
    drain,
    followed,
    request_of,
    require_nothing_held,
    served_model,
    server_of,
)

#: Rows, windows, recurrent states, and a mixture.
FEW = ["rows", "window 9", "scan", "state and rows"]


def test_forks_have_what_the_step_under_way_brings_and_its_turn_is_told_once() -> None:
    server, engine = server_of(served_model("state and rows"), share=1.0, ahead=True)
    request = request_of(2, 5, 9, temperature=1.0)
    answer = server.submit(request)
    told, children = list[int](), list[tuple[Answer, list[int]]]()
    while (turn := server.step()) is not None:
        told += [a.tokens[-1] for a, _ in turn.got if a is answer and len(told) < a.made]
        if answer in [a for a, _ in turn.got] and answer.ending is None and len(told) % 2:
            seen = list(answer.tokens)
            child = server.fork(answer)
            # One token more, but for the one that would have been the last.
            assert child.tokens == (seen if answer.ending else answer.tokens)
            assert answer.tokens[:-1] == seen
            assert child.first_token_s == answer.first_token_s
            children.append((child, list(child.tokens)))
    assert answer.tokens == alone("state and rows", request)
    assert [len(began) for _, began in children] == [2, 4, 6, 8]
    for child, began in children:
        assert child.tokens == alone_from("state and rows", child, began)
    require_nothing_held(server, engine)


@pytest.mark.parametrize("ending", [Ending.LENGTH, Ending.STOP, Ending.FAILED])
@pytest.mark.parametrize("kind", FEW)
def test_a_fork_of_an_answer_that_ends_with_the_step_under_way_goes_on_from_what_was_told(
    kind: str, ending: Ending, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cache in (False, True):
        server, engine = server_of(served_model(kind), share=1.0, ahead=True, cache=cache)
        request = request_of(1, 5, 4 if ending is Ending.LENGTH else 12, temperature=0.9)
        if ending is Ending.STOP:
            request = replace(request, stop=alone(kind, request)[3])
        answer = server.submit(request)
        while answer.made < 2:
            server.step()
        with monkeypatch.context() as patch:
            if ending is Ending.FAILED:
                spoil(server, patch, answer)
            turn = server.step()
        assert turn is not None and not turn.ended and len(answer.tokens) == 3
        child = server.fork(answer)
        assert answer.ending is ending
        assert child.tokens == answer.tokens[:3]
        if ending is Ending.FAILED:
            assert offered(server) <= len(request.prompt)
        seen = followed(server)
        assert [a for turn in seen for a in turn.ended] == [answer, child]
        assert child.tokens == alone_from(kind, child, answer.tokens[:3])
        require_nothing_held(server, engine)


def test_who_is_cancelled_keeps_the_token_under_way_and_who_ends_with_it_has_ended() -> None:
    server, engine = server_of(served_model("state and rows"), share=1.0, ahead=True)
    answers = [server.submit(request_of(n, 3, new)) for n, new in ((0, 20), (1, 6), (2, 20))]
    turns = []
    while answers[1].made < 5:
        turns.append(server.step())
    for answer in answers[:2]:
        server.cancel(answer)
    assert [a.ending for a in answers] == [Ending.CANCELLED, Ending.LENGTH, None]
    assert [len(a.tokens) for a in answers] == [a.made for a in answers] == [6, 6, 6]
    assert server.cancelled == answers[:1]
    turns += followed(server)
    told = Counter(a for turn in turns if turn is not None for a, _ in turn.got)
    assert told == {a: a.made for a in answers}
    for answer in answers:
        assert answer.tokens == alone("state and rows", answer.request)[: answer.made]
    require_nothing_held(server, engine)


def spoil(server: Server, patch: pytest.MonkeyPatch, answer: Answer) -> None:
    """Make the logits of an answer NaN in every step that it is in."""
    executor = server.executor
    extend = executor.engine.extend_last

    def spoilt(sequences: list[int], *given: Any) -> torch.Tensor:
        logits = extend(sequences, *given).clone()
        lost = executor._sequences.get(answer)
        if lost in sequences:
            logits[sequences.index(lost)] = math.nan
        return logits

    patch.setattr(executor.engine, "extend_last", spoilt)


def offered(server: Server) -> int:
    """Tokens of the longest past that others could go on from."""
    cached = server.scheduler.prefixes.cached
    nodes = [cached.root, *cached.nodes.values()]
    points = [p.tokens for n in nodes for alike in n.points.values() for p in alike.values()]
    return max([*(n.depth * PAGE for n in nodes), *points])


@pytest.mark.parametrize("new", [4, 20], ids=["at its last token", "in the middle"])
@pytest.mark.parametrize("kind", FEW)
def test_what_nothing_follows_from_is_offered_to_nobody(
    kind: str, new: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    offers = []
    for ahead in (False, True):
        server, engine = server_of(served_model(kind), share=1.0, cache=True, ahead=ahead)
        answer = server.submit(request_of(1, 7, new))
        other = server.submit(request_of(2, 3, 9))
        while answer.made < 3 - ahead:
            server.step()
        with monkeypatch.context() as patch:
            spoil(server, patch, answer)
            server.step()
        while answer.ending is None:
            server.step()
        assert answer.ending is Ending.FAILED and "NaN" in answer.note
        assert answer.made == len(answer.tokens) == 3
        server.step()
        server.cancel(other)
        offers.append(offered(server))
        require_nothing_held(server, engine)
    assert offers[0] == offers[1] <= 8


@pytest.mark.parametrize("kind", FEW)
def test_a_stop_token_that_nothing_follows_from_is_offered_to_nobody(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_of(1, 7, 20)
    stop = alone(kind, request)[3]
    server, engine = server_of(served_model(kind), share=1.0, cache=True, ahead=True)
    answer, made = server.submit(replace(request, stop=stop)), alone(kind, request).index(stop)
    while len(answer.tokens) < made:
        server.step()
    with monkeypatch.context() as patch:
        # Launched now is the step that extends it by its stop token.
        spoil(server, patch, answer)
        server.step()
    drain(server)
    assert answer.ending is Ending.STOP and answer.tokens[-1] == stop
    assert offered(server) <= 7
    require_nothing_held(server, engine)


def test_an_answer_that_failed_and_was_preempted_since_does_not_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server, engine = server_of(served_model("rows"), share=1.0, cache=True, ahead=True)
    first, last = (server.submit(request_of(n, 7, 20)) for n in (1, 2))
    while last.made < 4:
        server.step()
    scheduler = server.scheduler
    grow = scheduler._grow
    with monkeypatch.context() as patch:
        spoil(server, patch, last)
        server.step()
        patch.setattr(scheduler, "_grow", lambda a, n: a is not last and grow(a, n))
        turn = server.step()
    assert turn is not None and turn.ended == [last]
    assert last.preemptions == 1 and last in scheduler.waiting
    server.step()
    assert last not in scheduler.waiting
    assert offered(server) <= 8
    drain(server)
    assert last.made == len(last.tokens) == 5
    assert first.tokens == alone("rows", first.request)
    require_nothing_held(server, engine)


@pytest.mark.parametrize("ahead", [False, True])
def test_who_is_cancelled_after_a_preemption_leaves_no_random_numbers(ahead: bool) -> None:
    server, engine = server_of(served_model("rows"), share=0.34, ahead=ahead)
    answers = [server.submit(request_of(n, 9, 20, temperature=0.9)) for n in range(3)]
    while not answers[-1].preemptions:
        server.step()
    assert answers[-1] in server.scheduler.waiting
    for answer in answers:
        server.cancel(answer)
    drain(server)
    require_nothing_held(server, engine)
    assert not server.executor._streams and not server.executor._sequences


@pytest.mark.parametrize("at", ["launch", "read", "fork", "between"])
@pytest.mark.parametrize("stop", [False, True])
def test_whatever_ends_it_early_nothing_stays_held(
    at: str, stop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While an answer's last token is on its way, another has just ended by its stop token."""
    server, engine = server_of(served_model("state and rows"), share=1.0, cache=True, ahead=True)
    whole = alone("state and rows", request_of(1, 3, 20))
    stops = whole[4] if stop else None
    assert whole.index(whole[4]) == 4
    requests = [request_of(0, 3, 6), request_of(1, 3, 20, stop=stops), request_of(2, 3, 20)]
    answers = [server.submit(request) for request in requests]
    while answers[0].made < 5:
        server.step()

    def fail(*_: Any) -> Any:
        raise RuntimeError("the device is gone")

    if at == "between":
        server.close()
    else:
        owner, name = (engine, "extend_last") if at == "launch" else (Coming, "read")
        monkeypatch.setattr(owner, name, fail)
        with pytest.raises(RuntimeError, match="the device is gone"):
            _ = server.fork(answers[2]) if at == "fork" else server.step()
    expected = [Ending.CANCELLED, Ending.STOP if stop else Ending.CANCELLED, Ending.CANCELLED]
    assert [a.ending for a in answers] == expected
    assert [a.made for a in answers] == [len(a.tokens) for a in answers] == [5, 5, 5]
    assert set(server.cancelled) == {a for a in answers if a.ending is Ending.CANCELLED}
    assert server.step() is None
    require_nothing_held(server, engine)
    assert not server.executor._streams and not server.executor._sequences


class Once:
    """Requests that come at once, and others for those that have ended."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.coming = list(requests)
        self.over: list[Answer] = []

    @property
    def next_s(self) -> float:
        return 0.0 if self.coming else math.inf

    def due(self, now_s: float) -> list[Request]:
        found, self.coming = self.coming, []
        return found

    def ended(self, answer: Answer, now_s: float) -> None:
        self.over.append(answer)
        if len(self.over) == 3:
            self.coming = [request_of(4, 3, 5)]


def test_a_driven_server_tells_every_answer_once_and_its_times_follow_one_another() -> None:
    server, engine = server_of(served_model("state and rows"), ahead=True)
    source, turns = Once([request_of(n, 2 + 3 * n, 4 + n) for n in range(4)]), list[Turn]()

    def meddle(turn: Turn) -> None:
        turns.append(turn)
        for answer, before in turn.got:
            if before is None and answer.ending is None and answer.number == 1:
                server.fork(answer)
            if before is None and answer.number == 3:
                server.cancel(answer)

    answers = drive(server, source, meddle)
    assert len(answers) == 5 and all(a.ending is not None for a in answers)
    assert Counter(source.over) == Counter([*answers, *(a for t in turns for a in t.ended
                                                        if a not in answers)])  # fmt: skip
    assert answers[3].ending is Ending.CANCELLED
    for before, after in pairwise(turns):
        assert before.began_s < before.ended_s <= after.began_s
    for turn in turns:
        for answer in turn.ended:
            assert answer.ended_s == answer.last_token_s == turn.ended_s
    for answer in answers:
        assert answer.admitted_s is not None and answer.first_token_s is not None
        assert answer.admitted_s < answer.first_token_s
    assert 0 < server.executor.model_s < sum(t.ended_s - t.began_s for t in turns)
    require_nothing_held(server, engine)
    with pytest.raises(ZeroDivisionError):
        drive(server, Once([request_of(1, 9, 9)]), lambda turn: 1 // 0)
    require_nothing_held(server, engine)
