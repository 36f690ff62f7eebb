"""Servers, requests and what they should be answered, for tests."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from archs.backbone import Model
from infer.capacity import Capacity
from infer.clock import StepClock
from infer.draft_length import Fixed
from infer.drafts import PromptLookup
from infer.engine import Engine
from infer.executor import EngineExecutor
from infer.policy import Policy
from infer.sampling import Sampler, Sampling, stream
from infer.scheduler import SCHEDULERS
from infer.sequence import Answer, Request
from infer.server import Server
from infer.speculate import Stream, advance
from infer.speculating import SpeculatingExecutor
from infer.turns import Turn
from tests.infer.speculating import lively
from tests.infer.test_machine import CONTEXT, VOCAB, model_of

PAGE, SEQUENCES, BUDGET, CHECKPOINTS = 4, 3, 9, 4


@cache
def served_model(kind: str) -> Model:
    return lively(model_of(kind))


def capacity_of(model: Model, *, share: float = 0.6, drafts: int = 0) -> Capacity:
    """For three sequences, with pages for a share of their full length."""
    full = Capacity.of(
        model.state_specs(), max_sequences=SEQUENCES, max_context=CONTEXT, page_size=PAGE,
        checkpoints=CHECKPOINTS, lookback=drafts,
    )  # fmt: skip
    return replace(full, pages={key: int(share * count) for key, count in full.pages.items()})


def server_of(
    model: Model, *, share: float = 0.6, batching: str = "continuous", backend: str = "torch",
    cache: bool = False, every: int = 0, drafts: int = 0, ahead: bool = False,
) -> tuple[Server, Engine]:  # fmt: skip
    capacity = capacity_of(model, share=share, drafts=drafts)
    engine = Engine(
        model, max_sequences=capacity.max_sequences, max_context=capacity.max_context,
        page_size=capacity.page_size, pages=capacity.pages, kept=capacity.checkpoints,
        lookback=drafts, backend=backend,
    )  # fmt: skip
    policy = Policy(
        batching=batching, token_budget=max(BUDGET, SEQUENCES * (1 + drafts)), reserve=0.1,
        prefix_cache=cache, checkpoint_every=every, drafts=drafts,
    )  # fmt: skip
    scheduler = SCHEDULERS[batching](capacity, policy)
    executor = EngineExecutor(engine, ahead=ahead)
    if drafts:
        executor = SpeculatingExecutor(engine, PromptLookup(device=engine.device), drafts=drafts)
    return Server(scheduler, executor), engine


def request_of(
    number: int, prompt: int, new: int, *, temperature: float = 0.0, priority: int = 0,
    stop: int | None = None, common: int = 0, answers: int = 1,
) -> Request:  # fmt: skip
    """A request whose tokens follow from its number; the first `common` are those of all."""
    numbers = [0 if i < common else 7 * number for i in range(prompt)]
    tokens = tuple((n + 3 * i * i + i) % VOCAB for i, n in enumerate(numbers))
    return Request(
        prompt=tokens, max_new_tokens=new, priority=priority, stop=stop, answers=answers,
        sampling=Sampling(temperature=temperature, seed=number),
    )  # fmt: skip


def alone(kind: str, request: Request) -> Sequence[int]:
    """What a request gets when nobody else is served."""
    return _alone(kind, request.prompt, request.max_new_tokens, request.sampling, request.stop)


def alone_from(kind: str, answer: Answer, made: Sequence[int], drafts: int = 0) -> Sequence[int]:
    """What an answer gets that was forked with `made` tokens, when nobody else is served."""
    request = answer.request
    if answer.copy == 0 and (not drafts or request.sampling.greedy):
        return alone(kind, request)
    return _from(kind, request.prompt, tuple(made), request.max_new_tokens, request.sampling,
                 request.stop, answer.copy, drafts)  # fmt: skip


@cache
def _alone(
    kind: str, prompt: tuple[int, ...], new: int, sampling: Sampling, stop: int | None
) -> Sequence[int]:
    engine = Engine(served_model(kind), max_context=CONTEXT)
    return engine.generate([prompt], new, sampling, stop=stop).tokens[0]


@cache
def _from(
    kind: str, prompt: tuple[int, ...], made: tuple[int, ...], new: int, sampling: Sampling,
    stop: int | None, copy: int, drafts: int,
) -> Sequence[int]:  # fmt: skip
    engine = Engine(served_model(kind), max_context=CONTEXT, lookback=drafts)
    sampler = Sampler(sampling, engine.device)
    numbers = stream(sampling.seed, prompt, copy)
    tokens = list(made)
    if drafts and not sampling.greedy and made:
        return _in_rounds(engine, prompt, tokens, new, sampler, numbers, stop, drafts)
    with engine.store.sequences(1) as opened:
        logits = engine.prefill(opened, [[*prompt, *made]])
        while True:
            drawn = None if sampling.greedy else torch.rand(1, generator=numbers)
            tokens += sampler(logits, drawn).tolist()
            if len(tokens) == new or tokens[-1] == stop:
                return tokens
            if drafts and not sampling.greedy:
                break
            logits = engine.extend_last(opened, torch.tensor([[tokens[-1]]]))
    return _in_rounds(engine, prompt, tokens, new, sampler, numbers, stop, drafts)


def _in_rounds(
    engine: Engine, prompt: tuple[int, ...], tokens: list[int], new: int, sampler: Sampler,
    numbers: torch.Generator, stop: int | None, drafts: int,
) -> Sequence[int]:  # fmt: skip
    drafter = PromptLookup(device=engine.device)
    with engine.store.sequences(1) as opened:
        engine.prefill(opened, [[*prompt, *tokens][:-1]])
        drafter.begin(opened, [[*prompt, *tokens]])
        stream_ = Stream(opened[0], tokens[-1], new - len(tokens), Fixed(drafts), numbers)
        while stream_.room:
            _, ((*made,),) = advance(
                engine, drafter, [stream_], sampler, drafts=drafts, clock=StepClock(engine.device)
            )  # fmt: skip
            tokens += made[: made.index(stop) + 1] if stop in made else made
            if stop in made:
                break
    return tokens


def drain(server: Any) -> None:
    while server.step() is not None:
        pass


def require_nothing_held(server: Any, engine: Engine) -> None:
    assert server.scheduler.idle
    assert not any(server.scheduler.ledger.used)
    server.close()
    assert not server.executor._kept
    assert not server.scheduler.prefixes.cached.nodes
    assert server.scheduler.free_pages == tuple(server.scheduler.capacity.pages.values())
    assert engine.store.allocated_bytes == 0


def followed(server: Server) -> list[Turn]:
    """The turns of a server until it is idle."""
    turns = []
    while (turn := server.step()) is not None:
        turns.append(turn)
    return turns
