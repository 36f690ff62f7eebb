"""The host's work for a decode step, which a GPU must not wait for: who runs, books, plan, what is
sent.
"""

import gc
import statistics
import time
from collections.abc import Sequence
from typing import cast

import torch

from archs.registry import ModelSpec
from archs.sizes import get_scale
from infer.capacity import Capacity
from infer.engine import Engine
from infer.executor import EngineExecutor
from infer.policy import Policy
from infer.scheduler import Scheduler
from infer.sequence import Request
from infer.server import Server
from infer.store import StateStore

ARCH, SCALE, BATCH = "gdn:gqa=3:1", "1b", 64
#: Steps at one length: every 64th turns a page of all sequences at once.
STEPS, WARMUP = 1024, 64


def host_work_ms(lookback: int) -> tuple[float, float]:
    """Median and 99th percentile of the host's milliseconds for one step of the 1b hybrid.

    The state has no memory (device meta): nothing but the host is timed.
    """
    specs = ModelSpec(arch=ARCH, scale=get_scale(SCALE)).outline(torch.bfloat16).state_specs()
    store = StateStore(
        specs, max_sequences=BATCH, max_context=8192, lookback=lookback, device="meta",
        kernels=True,
    )  # fmt: skip
    times = []
    with store.sequences(BATCH) as sequences:
        store.fill(sequences, 4096)
        gc.collect()
        for _ in range(WARMUP + STEPS):
            began = time.perf_counter()
            with store.step(sequences, 1) as step:
                step.send(BATCH)
            times.append((time.perf_counter() - began) * 1e3)
    spans = statistics.quantiles(times[WARMUP:], n=100)
    return spans[49], spans[98]


class _NoModel:
    """An engine whose steps are books alone: a server without its layers."""

    compiled = graphed = None
    backend = "torch"
    device = torch.device("cpu")

    def __init__(self, store: StateStore) -> None:
        self.store = store
        self._logits = torch.zeros(BATCH, 8)

    def extend_last(
        self, sequences: Sequence[int], tokens: torch.Tensor, new: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `Engine.extend_last`, of logits that are all the same."""
        with self.store.step(sequences, tokens.shape[1], new) as step:
            step.send(BATCH)
        return self._logits[: len(sequences)]


def server_work_ms(*, ahead: bool) -> tuple[float, float]:
    """As `host_work_ms`, of a whole server: scheduler, tokens in and out, sampling, books.

    ahead: whether it looks ahead, as it does on a GPU.
    """
    server = decoding_server(ahead=ahead)
    gc.collect()
    times = []
    for _ in range(WARMUP + STEPS):
        began = time.perf_counter()
        server.step()
        times.append((time.perf_counter() - began) * 1e3)
    server.close()
    spans = statistics.quantiles(times[WARMUP:], n=100)
    return spans[49], spans[98]


def decoding_server(*, ahead: bool) -> Server:
    """A server without layers whose sequences all decode."""
    specs = ModelSpec(arch=ARCH, scale=get_scale(SCALE)).outline(torch.bfloat16).state_specs()
    capacity = Capacity.of(specs, max_sequences=BATCH, max_context=2048, page_size=64)
    store = StateStore(
        specs, max_sequences=BATCH, max_context=2048, page_size=64, pages=capacity.pages,
        device="meta", kernels=True,
    )  # fmt: skip
    engine = cast(Engine, _NoModel(store))
    scheduler = Scheduler(capacity, Policy(token_budget=BATCH))
    server = Server(scheduler, EngineExecutor(engine, ahead=ahead))
    for first in range(BATCH):
        # Of unlike lengths, so that pages turn at unlike steps.
        prompt = [1] * (1 + first)
        server.submit(Request(prompt=prompt, max_new_tokens=WARMUP + STEPS + 2 * BATCH))
    while any(a.made == 0 for a in scheduler.running) or scheduler.queued:
        server.step()
    return server
