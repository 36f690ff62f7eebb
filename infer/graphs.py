"""The decode step as a CUDA graph: one launch for all of its kernels, ragged lengths inside.

Everything that differs between steps lies in tensors that the graph reads: tokens, slots,
lengths, block tables. One graph per batch size: its first steps run as written, which compiles the
kernels, the next is captured, and from then on steps are replays. All graphs share one memory
pool. Where a layer gathers rows instead of leaving them to a kernel, a graph serves contexts up to
a bound, and longer ones get graphs of their own.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from archs.backbone import Model
from infer.device import DeviceState, DeviceStep
from infer.view import StepView

#: Steps of one batch size that run as written before one is captured.
CAPTURE_AFTER = 2
#: A bound on gathered rows lies at most this share above what is needed.
BOUND_SLACK = 8


class Recorded(Protocol):
    """Captured work: `replay` runs it again on the same memory; `output` is what it writes."""

    output: Tensor

    def replay(self) -> None:
        """Run the work again."""
        ...


#: Captures a function's work without running it.
Recorder = Callable[[Callable[[], Tensor]], Recorded]


class CudaGraphs:
    """Captures work by `torch.cuda.graph`, all of it in one memory pool."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, work: Callable[[], Tensor]) -> Recorded:
        """The captured work."""
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        return _CudaGraph(work, self._pool)


@contextmanager
def capture(graph: Any, **options: Any) -> Iterator[None]:
    """`torch.cuda.graph`, which leaves its own stream current where a capture fails; this does not.

    options: as `torch.cuda.graph`'s.
    """
    current = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, **options):
            yield
    finally:
        torch.cuda.set_stream(current)


class _CudaGraph:
    def __init__(self, work: Callable[[], Tensor], pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with capture(self._graph, pool=pool):
            self.output = work()

    def replay(self) -> None:
        self._graph.replay()


Key = tuple[int, int]


class GraphedStep:
    """`Model.extend_last` for one new token per sequence, captured once per batch size.

    prepare_s: seconds spent on steps as written and on captures, compilation included.
    """

    def __init__(self, model: Model, state: DeviceState, recorder: Recorder | None = None) -> None:
        self.model = model
        self.state = state
        self.recorder = recorder or CudaGraphs()
        self.prepare_s = 0.0
        self._gathers = False
        self._steps: dict[Key, int] = {}
        self._graphs: dict[Key, tuple[Tensor, Tensor, Recorded]] = {}
        self._weights = self._weights_at()

    def __call__(self, tokens: Tensor, step: StepView) -> Tensor:
        """Logits [B, V] of tokens [B, 1]; valid until the next step."""
        books = self.state.send(step)
        if self._weights_at() != self._weights:
            # Weights that were cast or loaded anew lie elsewhere; graphs hold the old addresses.
            self._graphs.clear()
            self._weights = self._weights_at()
        key = len(step.slots), self._bound(step)
        if key in self._graphs:
            held_books, held_tokens, graph = self._graphs[key]
            held_books.copy_(books)
            held_tokens.copy_(tokens)
            graph.replay()
            return graph.output
        began = time.perf_counter()
        done = self._steps.get(key, 0)
        self._steps[key] = done + 1
        logits = (
            self._run(tokens, books, key)
            if done < CAPTURE_AFTER
            else self._capture(tokens, books, key)
        )
        if tokens.is_cuda:
            torch.cuda.synchronize(tokens.device)
        self.prepare_s += time.perf_counter() - began
        return logits

    def _bound(self, step: StepView) -> int:
        """Tokens that the step's graph must reach; all that fit, where nothing gathers."""
        most = self.state.store.max_context
        if not self._gathers:
            return most
        needed = max(step.lengths) + 1
        grain = max(64, (1 << needed.bit_length()) // (2 * BOUND_SLACK))
        return min(-(-needed // grain) * grain, most)

    def _run(self, tokens: Tensor, books: Tensor, key: Key) -> Tensor:
        step = DeviceStep(self.state, books, key[0], 1, key[1], None)
        try:
            logits = self.model.extend_last(tokens, step.layers)
            self._gathers = self._gathers or step.gathered
        finally:
            step.close()
        return logits

    def _capture(self, tokens: Tensor, books: Tensor, key: Key) -> Tensor:
        tokens, books = tokens.clone(), books.clone()
        graph = self.recorder(lambda: self._run(tokens, books, key))
        self._graphs[key] = books, tokens, graph
        graph.replay()
        return graph.output

    def _weights_at(self) -> int:
        return self.model.embedding.weight.data_ptr()
