"""A server's steps on an engine: one wait for the device in each, and graphs that are replayed."""

from dataclasses import replace

import pytest
import torch

from archs.registry import ModelSpec
from archs.sizes import get_scale
from infer.capacity import Capacity
from infer.engine import Engine
from infer.executor import EngineExecutor
from infer.graphs import GraphedStep
from infer.policy import Policy
from infer.sampling import Sampling
from infer.scheduler import Scheduler
from infer.sequence import Request
from infer.server import Server
from tests.infer.recorded import Again
from tests.infer.serving import (
    BUDGET,
    SEQUENCES,
    capacity_of,
    drain,
    request_of,
    require_nothing_held,
)
from tests.infer.test_machine import model_of
from tests.kernels.interpreter import interpreted

SMALL = get_scale("tiny").with_options(
    {"d_model": 64, "head_dim": 32, "n_layers": 2, "vocab_size": 31, "seq_len": 16}
)


def test_tokens_are_read_once_when_all_of_a_step_is_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Decode of two rules of sampling, a prompt's end and a chunk in its middle, in one step."""
    model = ModelSpec(arch="gqa", scale=SMALL, hidden=16).build().eval()
    capacity = Capacity.of(model.state_specs(), max_sequences=4, max_context=64, page_size=8)
    engine = Engine(model, max_sequences=4, max_context=64, page_size=8, pages=capacity.pages)
    server = Server(Scheduler(capacity, Policy(token_budget=16)), EngineExecutor(engine))
    drawn = Sampling(temperature=0.8)
    server.submit(Request(prompt=[1, 2], max_new_tokens=9))
    server.submit(Request(prompt=[3], max_new_tokens=9, sampling=drawn))
    server.step()
    last = server.submit(Request(prompt=[4] * 5, max_new_tokens=3, sampling=drawn))
    long = server.submit(Request(prompt=[5] * 40, max_new_tokens=3))
    told: list[str] = []
    extend_last, tolist = engine.extend_last, torch.Tensor.tolist

    def extending(*given: object) -> torch.Tensor:
        told.append("step")
        return extend_last(*given)  # type: ignore[arg-type]

    def reading(tensor: torch.Tensor) -> object:
        told.append("read")
        return tolist(tensor)

    monkeypatch.setattr(engine, "extend_last", extending)
    monkeypatch.setattr(torch.Tensor, "tolist", reading)
    turn = server.step()
    assert turn is not None and len(turn.batch.decode) == 2 and len(turn.batch.chunks) == 2
    assert told == ["step"] * (1 + len([*turn.batch.chunk_groups()])) + ["read"]
    assert (last.made, long.made, long.held) == (1, 0, 9)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("kind", "cache"), [("rows", False), ("window 9", True), ("state and rows", True)]
)
def test_kernels_and_graphs_serve_the_same_answers(kind: str, cache: bool) -> None:
    """In Triton's interpreter; decode steps are recorded, and replayed in padded batches, the next
    before the tokens of the last are read.
    """
    begun = {"common": 17, "answers": 2} if cache else {}
    requests = [request_of(n, (18 if cache else 3 + 4 * n), 9 - n, **begun) for n in range(5)]
    policy = Policy(token_budget=BUDGET, prefix_cache=cache, checkpoint_every=8 * cache)
    with interpreted():
        served = {}
        for backend in ("torch", "triton"):
            model = model_of(kind).use(backend)
            capacity = replace(
                Capacity.of(
                    model.state_specs(), max_sequences=SEQUENCES, max_context=48, page_size=16,
                    checkpoints=4,
                ),
                pages={key: 6 for key in capacity_of(model).pages},
            )  # fmt: skip
            engine = Engine(
                model, max_sequences=SEQUENCES, max_context=48, page_size=16,
                pages=capacity.pages, kept=capacity.checkpoints, backend=backend,
            )  # fmt: skip
            if backend == "triton":
                engine.graphed = GraphedStep(model, engine.store, recorder=Again)
            executor = EngineExecutor(engine, ahead=backend == "triton")
            server = Server(Scheduler(capacity, policy), executor)
            answers = [server.submit(r) for r in requests]
            drain(server)
            every = [b for a in answers for b in (a, *a.siblings)]
            assert any(b.hit for b in every) == cache
            require_nothing_held(server, engine)
            served[backend] = [b.tokens for b in every]
            if engine.graphed is not None:
                assert engine.graphed._graphs
    assert served["triton"] == served["torch"]
