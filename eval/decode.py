"""Decode and prefill, measured through the one engine: the latency side of every row.

A latency is only given after the model has shown that prefill and decode equal its parallel
form. Steps at a long context run on synthetic state of that length: the time of a step depends
on how many rows are read, not on their values.
"""

import math
import statistics
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from archs.backbone import Model
from archs.backends import NoFormError
from archs.cost import Cost, Step
from archs.registry import ModelSpec
from eval.calls import CountCalls
from eval.hardware import now_s
from infer.clock import StepClock
from infer.engine import Engine
from infer.memory import require_memory
from infer.sampling import Sampler, Sampling

#: How far extend may be from forward before its latency is withheld, relative to the logits'
#: largest value. The recurrent and chunked forms sum in different orders.
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 2e-2}

#: After the prompt: single steps (as written, captured and replayed, with graphs) and a draft.
SHORT_PIECES = (1, 1, 5, 1, 1, 1)
LEAST_ON_GPU = 1200


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

    def percentile_ms(self, q: float) -> float:
        """A percentile over steps, linear between order statistics."""
        ordered = sorted(self.step_ms)
        at = q / 100 * (len(ordered) - 1)
        low, high = math.floor(at), math.ceil(at)
        return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def build_to_serve(spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> Model:
    """A model with random weights. Raises DoesNotFitError before memory runs out."""
    weight_bytes = sum(p.nbytes for p in spec.outline(dtype).parameters())
    require_memory(weight_bytes, device, f"{spec.arch} at scale {spec.scale.name}")
    return spec.build(device=str(device), dtype=dtype).eval()


def agreement_error(
    model: Model,
    *,
    tokens: int | None = None,
    seed: int = 0,
    backend: str = "torch",
    compiled: bool = False,
) -> float:
    """Largest difference of extend (prefill, decode, a short piece) from the torch form of
    forward, relative.

    tokens: length of the sequences (None: enough to reach every path that is timed).
    backend, compiled: single tokens go through the step that will be timed, graphs included.
    Raises NoFormError where the backend has no form for the model, or its kernels refuse the shape.
    """
    try:
        return _agreement_error(model, tokens, seed, backend, compiled)
    except ValueError as why:
        # Kernels refuse a shape before any launch, naming it and the rule; torch forms do not.
        if backend == "torch":
            raise
        raise NoFormError(f"backend '{backend}' refuses the shape: {why}") from why


def _agreement_error(
    model: Model, tokens: int | None, seed: int, backend: str, compiled: bool
) -> float:
    device = model.embedding.weight.device
    tokens = tokens or _telling_length(model)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.vocab_size, (2, tokens), generator=generator).to(device)
    first = tokens - sum(SHORT_PIECES)
    with torch.inference_mode():
        hidden = model.use("torch").hidden_states(ids)[:, first - 1 :]
        expected = model.logits(hidden).float()
        del hidden
        engine = Engine(
            model, max_sequences=2, max_context=tokens, backend=backend, compiled=compiled
        )
        slots = [engine.store.add(), engine.store.add()]
        pieces = [engine.prefill(slots, ids[:, :first].tolist())[:, None]]
        for size in SHORT_PIECES:
            piece = ids[:, first : first + size]
            # Cloned: the next replay of a graph writes to the same logits.
            pieces.append(
                engine.extend_last(slots, piece)[:, None].clone()
                if size == 1
                else engine.extend(slots, piece)
            )
            first += size
        got = torch.cat(pieces, 1).float()
    return ((got - expected).abs().max() / expected.abs().max()).item()


def _telling_length(model: Model) -> int:
    """Tokens after which what is timed has been at work. On a GPU: several splits of a context,
    their combination, and windows that have wrapped; elsewhere there is one path for all lengths.
    """
    if model.embedding.weight.device.type != "cuda":
        return 37
    windows = [spec.window or 0 for spec in model.state_specs()]
    return max(LEAST_ON_GPU, *windows) + 64


def agrees(error: float, dtype: torch.dtype) -> bool:
    """Whether extend is close enough to forward for a latency to be worth printing."""
    return error <= AGREEMENT[dtype]


class Decoding:
    """Greedy decode of `batch` sequences on synthetic state, each step fed by the one before.

    graphs: as the engine's; whoever counts kernels wants them launched one by one.
    Raises UserError where the state does not fit in memory.
    """

    def __init__(
        self, model: Model, *, batch: int, max_context: int, backend: str, compiled: bool,
        graphs: bool | None = None,
    ) -> None:  # fmt: skip
        self.engine = Engine(
            model, max_sequences=batch, max_context=max_context, backend=backend,
            compiled=compiled, graphs=graphs,
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
        self._tokens = self._sampler(self.engine.extend_last(self._slots, self._tokens))[:, None]


def measure_decode(
    model: Model,
    *,
    batch: int,
    contexts: Sequence[int],
    steps: int,
    warmup: int = 3,
    backend: str = "torch",
    compiled: bool = False,
) -> list[DecodeTiming]:
    """Time decode steps of `batch` sequences at each context, in ascending order.

    Greedy, each step fed by the one before; on a GPU nothing waits between steps. Compilation and
    the capture of a graph are in the warm-up of the first context.
    Raises UserError where the state does not fit in memory.
    """
    contexts = sorted(contexts)
    most = contexts[-1] + len(contexts) * (steps + warmup)
    decode = Decoding(model, batch=batch, max_context=most, backend=backend, compiled=compiled)
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


def decode_cost(model: Model, batch: int, context: int) -> Cost:
    """The cost of one decode step."""
    return model.cost(Step(batch, 1, context))
