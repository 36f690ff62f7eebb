"""Steps that are launched before the tokens of the last are read: nobody's answer is another."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, run_state_machine_as_test

from infer.coming import Coming
from infer.sequence import Ending, Request
from infer.server import Server
from tests.infer.serving import (
    alone,
    alone_from,
    drain,
    followed,
    request_of,
    require_nothing_held,
    served_model,
    server_of,
)
from tests.infer.test_machine import KINDS
from tests.infer.test_server import Company

#: Rows, windows, recurrent states, and a mixture.
FEW = ["rows", "window 9", "scan", "state and rows"]


class AheadCompany(Company):
    """The law of company where the server looks ahead."""

    @initialize(
        share=st.sampled_from([0.34, 0.5, 1.0]),
        policy=st.sampled_from(
            [{}, {"cache": True}, {"cache": True, "every": 7}, {"batching": "static"}]
        ),
    )
    def open(self, share: float, policy: dict[str, Any]) -> None:
        self.server, self.engine = server_of(
            served_model(self.kind), share=share, ahead=True, **policy
        )

    def teardown(self) -> None:
        super().teardown()
        if self.answers:
            assert not self.server.executor._streams
            assert not self.server.executor._sequences


@pytest.mark.parametrize("kind", KINDS)
def test_company_ahead(kind: str) -> None:
    machine = type("AheadCompanyOfKind", (AheadCompany,), {"kind": kind})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=10,
            stateful_step_count=20,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )


def requests_of(kind: str) -> list[Request]:
    """Greedy and drawn ones, of one token and of many, with chunks, siblings and stop tokens that
    come first, last and in the middle.
    """
    plain = [
        request_of(1, 5, 12), request_of(2, 1, 1), request_of(3, 21, 9, temperature=0.9, common=9),
        request_of(4, 9, 20, common=9), request_of(5, 9, 14, temperature=0.7, answers=3),
        request_of(6, 14, 1, temperature=0.9), request_of(7, 10, 16, common=9),
        request_of(8, 3, 17),
    ]  # fmt: skip
    stopped = []
    for request, at in ((plain[0], 4), (plain[3], 0), (plain[6], 15), (plain[2], 3), (plain[7], 9)):
        stop = alone(kind, replace(request, answers=1))[at]
        stopped.append(replace(request, stop=stop))
    return [*plain, *stopped]


@pytest.mark.parametrize(
    "policy",
    [{}, {"share": 0.34}, {"cache": True, "every": 7}, {"cache": True, "share": 0.34},
     {"batching": "static"}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("kind", FEW)
def test_answers_are_the_same_whether_the_server_looks_ahead(
    kind: str, policy: dict[str, Any]
) -> None:
    found = []
    for ahead in (False, True):
        server, engine = server_of(served_model(kind), ahead=ahead, **policy)
        firsts = [server.submit(request) for request in requests_of(kind)]
        answers = [a for first in firsts for a in (first, *first.siblings)]
        turns = followed(server)
        told = Counter(a for turn in turns for a, _ in turn.got)
        assert told == {a: len(a.tokens) for a in answers}
        assert Counter(a for turn in turns for a in turn.ended) == Counter(answers)
        assert all(a.made == len(a.tokens) for a in answers)
        if policy.get("share") and kind != "scan":
            assert any(a.preemptions for a in answers)
        if policy.get("every"):
            assert any(a.hit for a in answers)
        require_nothing_held(server, engine)
        assert not server.executor._streams and not server.executor._sequences
        found.append([(a.tokens, a.ending) for a in answers])
    assert found[0] == found[1]
    assert {ending for _, ending in found[0]} == {Ending.LENGTH, Ending.STOP}
    for answer in answers:
        assert answer.tokens == alone_from(kind, answer, ())


@pytest.mark.parametrize("kind", FEW)
def test_turns_are_the_same_where_answers_end_by_length(kind: str) -> None:
    """Who ran, how far, and what memory that took; answers are preempted and found in a cache."""
    found = []
    for ahead in (False, True):
        server, _ = server_of(served_model(kind), ahead=ahead, cache=True, every=7, share=0.34)
        requests = [request_of(n, 9, 20) for n in range(3)] + requests_of(kind)
        answers = [server.submit(r) for r in requests if r.stop is None]
        turns = followed(server)
        assert "rows" not in kind or any(a.preemptions for a in answers)
        found.append([
            ([a.number for a in t.batch.decode], [(a.number, n) for a, n in t.batch.chunks],
             t.batch.memory, t.batch.grown, t.held, [a.number for a in t.ended])
            for t in turns
        ])  # fmt: skip
    assert found[0] == found[1]


def watched(server: Server, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a server's executor does: steps that are launched, and tokens that are read."""
    told: list[str] = []
    run, read = server.executor.run, Coming.read

    def running(*given: Any) -> Any:
        told.append("launch")
        return run(*given)

    def reading(coming: Coming) -> list[int]:
        told.append("read")
        return read(coming)

    monkeypatch.setattr(server.executor, "run", running)
    monkeypatch.setattr(Coming, "read", reading)
    return told


@pytest.mark.parametrize("ahead", [False, True])
def test_a_step_is_launched_before_the_tokens_of_the_last_are_read(
    ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, _ = server_of(served_model("state and rows"), ahead=ahead)
    told = watched(server, monkeypatch)
    for n in range(3):
        server.submit(request_of(n, 3, 5, temperature=0.5 * n))
    turns = followed(server)
    each = ["launch", "read"]
    if ahead:
        assert told == ["launch", *each * (len(turns) - 1), "read"]
    else:
        assert told == each * len(turns)
    assert len(turns) == 5


def test_a_token_goes_from_step_to_step_without_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one order and in another, beside answers whose tokens only the host has."""
    server, engine = server_of(served_model("rows"), ahead=True, share=1.0)
    executor, extend, fed = server.executor, engine.extend_last, list[list[int]]()

    def extending(sequences: list[int], tokens: torch.Tensor, *more: Any) -> torch.Tensor:
        if tokens.shape[1] == 1:
            by_sequence = {s: a for a, s in executor._sequences.items()}
            given = zip(sequences, tokens[:, 0].tolist(), strict=True)
            fed.extend([by_sequence[s].number, token] for s, token in given if by_sequence[s].made)
        return extend(sequences, tokens, *more)

    monkeypatch.setattr(engine, "extend_last", extending)
    requests = [request_of(n, size, 8, temperature=(n % 2) / 2)
                for n, size in enumerate((1, 7, 2, 1, 5))]  # fmt: skip
    answers = [server.submit(request) for request in requests]
    drain(server)
    for answer in answers:
        assert [token for number, token in fed if number == answer.number] == answer.tokens[:-1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_past_with_its_stop_token_is_found_and_is_what_recomputing_gives(kind: str) -> None:
    whole = alone(kind, request_of(1, 6, 20))
    for stop in dict.fromkeys(whole[2:14]):
        server, engine = server_of(served_model(kind), share=1.0, cache=True, ahead=True)
        first = server.submit(request_of(1, 6, 20, stop=stop))
        drain(server)
        past = (*first.request.prompt, *first.tokens)
        assert first.ending is Ending.STOP and past[-1] == stop
        # The last token that was asked for is never computed.
        held = len(past) - (first.made == 20)
        assert first.held == held
        then = server.submit(Request(prompt=(*past, 3, 1), max_new_tokens=6))
        drain(server)
        assert then.hit == held
        assert then.tokens == alone(kind, then.request)
        require_nothing_held(server, engine)
