"""Decode and prefill, measured through the one engine: the latency side of every row.

A latency is only given after the model has shown that prefill and decode equal its parallel
form (`agreement`). Steps at a long context run on synthetic state of that length: the time of a
step depends on how many rows are read, not on their values.
"""

import math
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from archs.backbone import Model
from archs.cost import Cost, Step
from archs.registry import ModelSpec
from archs.state_formats import StateFormat
from archs.storage import keep, store
from archs.weights import WeightFormat
from eval.predict.calls import CountCalls
from eval.predict.machine import now_s
from infer.clock import StepClock
from infer.engine import Engine
from infer.memory import DoesNotFitError, require_memory
from infer.pages import StoreFullError
from infer.sampling import Sampler, Sampling, fed

#: Steps before those that are timed: two as written, a capture, a replay.
WARM_UP = 4


@dataclass(frozen=True, slots=True)
class DecodeTiming:
    """Decode at one batch and context; times of single steps, warm-up and compilation apart.

    calls: torch operations that one step dispatched; None where it was compiled or captured.
    """

    batch: int
    context: int
    step_ms: tuple[float, ...]
    warmup_ms: float
    state_bytes: int
    peak_state_bytes: int
    calls: int | None

    @property
    def tpot_ms(self) -> float:
        """Mean time per output token."""
        return statistics.fmean(self.step_ms)

    @property
    def output_tok_per_s(self) -> float:
        """Tokens of the whole batch over the time that its steps took."""
        return 1e3 * self.batch / self.tpot_ms

    def percentile_ms(self, q: float) -> float:
        """A percentile over steps, linear between order statistics."""
        ordered = sorted(self.step_ms)
        at = q / 100 * (len(ordered) - 1)
        low, high = math.floor(at), math.ceil(at)
        return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def build_to_serve(
    spec: ModelSpec, device: torch.device, dtype: torch.dtype, weights: str = "", state: str = ""
) -> Model:
    """A model with random weights, stored in a format (`archs.weights`) where one is named, its
    state kept in another (`archs.state_formats`).

    Raises DoesNotFitError before memory runs out: while they are stored, they are plain numbers.
    """
    stored = WeightFormat.named(weights) if weights else None
    dtype = dtype if stored is None else stored.dtype
    weight_bytes = sum(p.nbytes for p in spec.outline(dtype).parameters())
    require_memory(weight_bytes, device, f"{spec.arch} at scale {spec.scale.name}")
    model = keep(spec.build(device=str(device), dtype=dtype).eval(), StateFormat.named(state))
    return model if stored is None else store(model, stored)


class Decoding:
    """Greedy decode of `batch` sequences on synthetic state, each step fed by the one before.

    graphs: as the engine's; whoever counts kernels wants them launched one by one. replay: as the
    engine's.
    Raises UserError where the state does not fit in memory.
    """

    def __init__(
        self, model: Model, *, batch: int, max_context: int, backend: str, compiled: bool,
        graphs: bool | None = None, replay: int = 0,
    ) -> None:  # fmt: skip
        self.engine = Engine(
            model, max_sequences=batch, max_context=max_context, backend=backend,
            compiled=compiled, graphs=graphs, replay=replay,
        )  # fmt: skip
        self._sampler = Sampler(Sampling(), self.engine.device, backend=backend)
        self._slots = [self.engine.store.add() for _ in range(batch)]
        self._tokens = torch.zeros(batch, 1, dtype=torch.int64, device=self.engine.device)

    def hold(self, context: int) -> int:
        """Fill the state up to a context; the context held now, longer where that was reached."""
        store = self.engine.store
        store.fill(self._slots, max(0, context - store.lengths[self._slots[0]]))
        return store.lengths[self._slots[0]]

    def step(self) -> None:
        """One new token for each sequence."""
        self._tokens = fed(self._sampler(self.engine.extend_last(self._slots, self._tokens)))


def measure_decode(
    model: Model, *, batch: int, contexts: Sequence[int], steps: int, warmup: int = WARM_UP,
    backend: str = "torch", compiled: bool = False, replay: int = 0,
) -> list[DecodeTiming]:  # fmt: skip
    """Time decode steps of `batch` sequences at each context, in ascending order.

    Greedy, each step fed by the one before; on a GPU nothing waits between steps. Compilation and
    the capture of a graph are in the warm-up of the first context.
    Raises UserError where the state does not fit in memory.
    """
    contexts = sorted(contexts)
    most = contexts[-1] + len(contexts) * (steps + warmup)
    decode = Decoding(
        model, batch=batch, max_context=most, backend=backend, compiled=compiled, replay=replay
    )
    store = decode.engine.store
    as_written = decode.engine.device.type == "cpu" and not compiled
    timings = []
    for context in contexts:
        at = decode.hold(context)
        held = store.allocated_bytes // batch
        clock = StepClock(decode.engine.device)
        clock.mark()
        counter = CountCalls()
        for i in range(warmup + steps):
            # Counting is slow, so it is the last step of the warm-up that is counted.
            with counter if as_written and i == warmup - 1 else nullcontext():
                decode.step()
            clock.mark()
        times = clock.spans_ms()
        timings.append(
            DecodeTiming(
                batch=batch, context=at, step_ms=tuple(times[warmup:]),
                warmup_ms=sum(times[:warmup]), state_bytes=held,
                peak_state_bytes=store.peak_bytes, calls=counter.calls or None,
            )
        )  # fmt: skip
    return timings


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory does not suffice."""
    kinds = (DoesNotFitError, StoreFullError, MemoryError, torch.OutOfMemoryError)
    # On a CPU, torch has no exception of its own for this.
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def measure_what_fits(
    model: Model, *, batch: int, contexts: Sequence[int], steps: int, backend: str, compiled: bool,
    replay: int = 0,
) -> tuple[list[DecodeTiming], dict[int, str]]:  # fmt: skip
    """`measure_decode` of the contexts that fit in memory, and why the others do not.

    Raises what the shortest one raised where none fits.
    """
    left, too_long = sorted(contexts), dict[int, str]()
    while True:
        try:
            timings = measure_decode(
                model, batch=batch, contexts=left, steps=steps, backend=backend,
                compiled=compiled, replay=replay,
            )  # fmt: skip
            return timings, too_long
        except Exception as error:
            if len(left) == 1 or not out_of_memory(error):
                raise
            too_long[left.pop()] = " ".join(str(error).split())[:300]


def measure_ttft_ms(
    model: Model, *, batch: int, prompt: int, repeats: int = 3, backend: str = "torch"
) -> tuple[float, list[float]]:
    """Time to the first token of `batch` prompts: (warm-up ms, ms of each repeat)."""
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocab_size, (batch, prompt), generator=generator).tolist()
    times = []
    for _ in range(repeats + 1):
        engine = Engine(model, max_sequences=batch, max_context=prompt + 1, backend=backend)
        slots = [engine.store.add() for _ in range(batch)]
        began = now_s(device)
        engine.prefill(slots, ids).argmax(-1)
        times.append((now_s(device) - began) * 1e3)
    return times[0], times[1:]


def decode_cost(model: Model, batch: int, context: int, replay: int = 0) -> Cost:
    """The cost of one decode step; where states are replayed, its mean over many."""
    return model.cost(Step(batch, 1, context, replay=replay))
