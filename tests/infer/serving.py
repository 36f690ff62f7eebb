"""Servers, requests and what they should be answered, for tests."""

from collections.abc import Sequence
from functools import cache

from archs.backbone import Model
from infer.capacity import Capacity
from infer.engine import Engine
from infer.sampling import Sampling
from infer.scheduler import SCHEDULERS, Policy
from infer.sequence import Request
from infer.server import EngineExecutor, Server
from tests.infer.speculating import lively
from tests.infer.test_machine import CONTEXT, VOCAB, model_of

PAGE, SEQUENCES, BUDGET = 4, 3, 9


@cache
def served_model(kind: str) -> Model:
    return lively(model_of(kind))


def capacity_of(model: Model, *, share: float = 0.6) -> Capacity:
    """For three sequences, with pages for a share of their full length."""
    full = Capacity.of(
        model.state_specs(), max_sequences=SEQUENCES, max_context=CONTEXT, page_size=PAGE
    )
    pages = {key: int(share * count) for key, count in full.pages.items()}
    return Capacity(max_sequences=SEQUENCES, max_context=CONTEXT, page_size=PAGE, pages=pages)


def server_of(
    model: Model, *, share: float = 0.6, batching: str = "continuous", backend: str = "torch"
) -> tuple[Server, Engine]:
    capacity = capacity_of(model, share=share)
    engine = Engine(
        model, max_sequences=capacity.max_sequences, max_context=capacity.max_context,
        page_size=capacity.page_size, pages=capacity.pages, backend=backend,
    )  # fmt: skip
    policy = Policy(batching=batching, token_budget=BUDGET, reserve=0.1)
    scheduler = SCHEDULERS[batching](capacity, policy)
    return Server(scheduler, EngineExecutor(engine)), engine


def request_of(
    number: int, prompt: int, new: int, *, temperature: float = 0.0, priority: int = 0,
    stop: int | None = None,
) -> Request:  # fmt: skip
    """A request whose tokens follow from its number."""
    tokens = tuple((7 * number + 3 * i * i + i) % VOCAB for i in range(prompt))
    return Request(
        prompt=tokens, max_new_tokens=new, priority=priority, stop=stop,
        sampling=Sampling(temperature=temperature, seed=number),
    )  # fmt: skip


def alone(kind: str, request: Request) -> Sequence[int]:
    """What a request gets when nobody else is served."""
    return _alone(kind, request.prompt, request.max_new_tokens, request.sampling, request.stop)


@cache
def _alone(
    kind: str, prompt: tuple[int, ...], new: int, sampling: Sampling, stop: int | None
) -> Sequence[int]:
    engine = Engine(served_model(kind), max_context=CONTEXT)
    return engine.generate([prompt], new, sampling, stop=stop).tokens[0]
