"""The decode step as a CUDA graph: one launch for all of its kernels, ragged lengths inside.

Everything that differs between steps lies in tensors that the graph reads: tokens, slots,
lengths, block tables. One graph per shape, of batches that are padded to a bucket by sequences
whose rows and values nobody reads: its first steps run as written, which compiles the kernels, the
next is captured, and from then on steps are replays. All graphs share one memory pool. Where a
layer gathers rows instead of leaving them to a kernel, a graph serves contexts up to a bound, and
longer ones get graphs of their own.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from archs.backbone import Model, Output
from archs.spec import RECURRENT_LIMIT
from infer.books import Books
from infer.plan import DeviceStep, StepPlan, Store, keeps_each

#: Steps of one shape that run as written before one is captured.
CAPTURE_AFTER = 2
#: A bound on gathered rows lies at most this share above what is needed.
BOUND_SLACK = 8


class Recorded(Protocol):
    """Captured work: `replay` runs it again on the same memory; `output` is what it writes."""

    output: Output

    def replay(self) -> None:
        """Run the work again."""
        ...


#: Captures a function's work without running it.
Recorder = Callable[[Callable[[], Output]], Recorded]


class CudaGraphs:
    """Captures work by `torch.cuda.graph`, all of it in one memory pool."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, work: Callable[[], Output]) -> Recorded:
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
    def __init__(self, work: Callable[[], Output], pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with capture(self._graph, pool=pool):
            self.output = work()

    def replay(self) -> None:
        self._graph.replay()


class Key(NamedTuple):
    """What steps of one graph have in common.

    batch: a bucket, which smaller batches are padded to. bound: tokens that gathered rows reach.
    every_token: whether logits of all tokens come out of it, not of the last alone.
    """

    batch: int
    new_tokens: int
    bound: int
    every_token: bool


class _Given(NamedTuple):
    """What a graph reads: the step's books, tokens [B, K], and a head's hidden states [B, K, D]."""

    books: Tensor
    tokens: Tensor
    hidden: Tensor | None


def _rows(output: Output, batch: int) -> Output:
    return Output(output.logits[:batch], output.hidden[:batch])


def bucket(batch: int) -> int:
    """The batch that a graph is captured for: at most a quarter more than `batch`."""
    grain = max(1, (1 << (batch - 1).bit_length()) // 8)
    return -(-batch // grain) * grain


class GraphedStep:
    """Steps of a few new tokens per sequence, captured once per shape.

    prepare_s: seconds spent on steps as written and on captures, compilation included.
    """

    def __init__(self, model: Model, store: Store, recorder: Recorder | None = None) -> None:
        self.model = model
        self.store = store
        self.recorder = recorder or CudaGraphs()
        self.prepare_s = 0.0
        self._gathers = False
        self._steps: dict[Key, int] = {}
        self._graphs: dict[Key, tuple[_Given, Recorded]] = {}
        self._weights = self._weights_at()

    def serves(self, step: StepPlan) -> bool:
        """Whether a step can be a replay: short, without padding, no rows to join, and
        room for its inputs where values are replayed.
        """
        few = step.new_tokens <= RECURRENT_LIMIT and step.full
        if step.rings is not None and step.rings.whole:
            return False
        return few and not any(table.joins for table in step.tables.values())

    def __call__(
        self, tokens: Tensor, step: StepPlan, hidden: Tensor | None = None, *, every_token: bool
    ) -> Output:
        """What an open step gives for tokens [B, K]; valid until the next one."""
        if self._weights_at() != self._weights:
            # Weights that were cast or loaded anew lie elsewhere; graphs hold the old addresses.
            self._graphs.clear()
            self._weights = self._weights_at()
        batch = len(step.sequences)
        key = Key(bucket(batch), step.new_tokens, self._bound(step), every_token)
        books = step.send(padded=key.batch)
        if batch < key.batch:
            tokens = F.pad(tokens, (0, 0, 0, key.batch - batch))
            hidden = None if hidden is None else F.pad(hidden, (0, 0, 0, 0, 0, key.batch - batch))
        given = _Given(books, tokens, hidden)
        if key in self._graphs:
            held, graph = self._graphs[key]
            for own, fresh in zip(held, given, strict=True):
                if own is not None and fresh is not None:
                    own.copy_(fresh)
            graph.replay()
            return _rows(graph.output, batch)
        began = time.perf_counter()
        done = self._steps.get(key, 0)
        self._steps[key] = done + 1
        found = self._run(given, key) if done < CAPTURE_AFTER else self._capture(given, key)
        if tokens.is_cuda:
            torch.cuda.synchronize(tokens.device)
        self.prepare_s += time.perf_counter() - began
        return _rows(found, batch)

    def _bound(self, step: StepPlan) -> int:
        """Tokens that the step's graph must reach; all that fit, where nothing gathers."""
        most = self.store.max_context
        if not self._gathers:
            return most
        grain = max(64, (1 << step.bound.bit_length()) // (2 * BOUND_SLACK))
        return min(-(-step.bound // grain) * grain, most)

    def _run(self, given: _Given, key: Key) -> Output:
        store, (books, tokens, hidden) = self.store, given
        step = DeviceStep(
            store, Books(store.on_device, books, key.batch, key.new_tokens, ragged=False),
            key.bound, keeps_each(store.lookback, key.new_tokens),
        )  # fmt: skip
        layers = step.layers
        found = self.model.step(tokens, layers, hidden, every_token=key.every_token)
        self._gathers = self._gathers or any(layer.gathered for layer in layers)
        return found

    def _capture(self, given: _Given, key: Key) -> Output:
        books, tokens, hidden = given
        held = _Given(books.clone(), tokens.clone(), None if hidden is None else hidden.clone())
        graph = self.recorder(lambda: self._run(held, key))
        self._graphs[key] = held, graph
        graph.replay()
        return graph.output

    def _weights_at(self) -> int:
        return self.model.embedding.weight.data_ptr()
