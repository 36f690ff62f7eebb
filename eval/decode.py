"""Decode and prefill, measured through the one engine: the latency side of every row.

A latency is only given after the model has shown that prefill and decode equal its parallel
form. Steps at a long context run on synthetic state of that length: the time of a step depends
on how many rows are read, not on their values.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from archs.backbone import Model
from archs.cost import Cost, Step
from archs.registry import ModelSpec
from eval.hardware import now_s
from infer.engine import Engine
from infer.memory import require_memory

#: How far extend may be from forward before its latency is withheld, relative to the logits'
#: largest value. The recurrent and chunked forms sum in different orders.
AGREEMENT = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 2e-2}


@dataclass(frozen=True, slots=True)
class DecodeTiming:
    """Decode at one batch and context; times of single steps, warm-up apart."""

    batch: int
    context: int
    step_ms: tuple[float, ...]
    warmup_ms: float
    state_bytes: int
    peak_state_bytes: int

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
    model: Model, *, tokens: int = 37, seed: int = 0, compiled: bool = False
) -> float:
    """Largest difference of extend (prefill, decode, a short piece) from forward, relative.

    compiled: single tokens go through the compiled step, as they will when it is timed.
    """
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.vocab_size, (2, tokens), generator=generator).to(device)
    with torch.inference_mode():
        expected = model(ids).float()
        engine = Engine(model, max_sequences=2, max_context=tokens, page_size=16, compiled=compiled)
        slots = [engine.store.add(), engine.store.add()]
        pieces, start = [], 0
        for size in (tokens - 9, 1, 1, 5, 1, 1):
            piece = ids[:, start : start + size]
            single = size == 1
            pieces.append(
                engine.extend_last(slots, piece)[:, None] if single else engine.extend(slots, piece)
            )
            start += size
        got = torch.cat(pieces, 1).float()
    return ((got - expected).abs().max() / expected.abs().max()).item()


def agrees(error: float, dtype: torch.dtype) -> bool:
    """Whether extend is close enough to forward for a latency to be worth printing."""
    return error <= AGREEMENT[dtype]


def measure_decode(
    model: Model,
    *,
    batch: int,
    contexts: Sequence[int],
    steps: int,
    warmup: int = 3,
    compiled: bool = False,
) -> list[DecodeTiming]:
    """Time decode steps of `batch` sequences at each context, in ascending order.

    compiled: through `infer.compiled`; the compile time is then in the first warm-up.
    Raises UserError where the state does not fit in memory.
    """
    contexts = sorted(contexts)
    device = model.embedding.weight.device
    most = contexts[-1] + len(contexts) * (steps + warmup)
    engine = Engine(model, max_sequences=batch, max_context=most, page_size=64, compiled=compiled)
    store = engine.store
    slots = [store.add() for _ in range(batch)]
    tokens = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    timings = []
    for context in contexts:
        store.fill(slots, max(0, context - store.lengths[slots[0]]))
        at = store.lengths[slots[0]]
        held = store.allocated_bytes // batch
        times = []
        for _ in range(warmup + steps):
            began = now_s(device)
            tokens = engine.extend_last(slots, tokens).argmax(-1, keepdim=True)
            times.append((now_s(device) - began) * 1e3)
        timings.append(
            DecodeTiming(
                batch=batch, context=at, step_ms=tuple(times[warmup:]),
                warmup_ms=sum(times[:warmup]), state_bytes=held,
                peak_state_bytes=store.peak_bytes,
            )
        )  # fmt: skip
    return timings


def measure_ttft_ms(
    model: Model, *, batch: int, prompt: int, repeats: int = 3
) -> tuple[float, list[float]]:
    """Time to the first token of `batch` prompts: (warm-up ms, ms of each repeat)."""
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocab_size, (batch, prompt), generator=generator).tolist()
    times = []
    for _ in range(repeats + 1):
        engine = Engine(model, max_sequences=batch, max_context=prompt + 1)
        slots = [engine.store.add() for _ in range(batch)]
        began = now_s(device)
        engine.prefill(slots, ids).argmax(-1)
        times.append((now_s(device) - began) * 1e3)
    return times[0], times[1:]


def decode_cost(model: Model, batch: int, context: int) -> Cost:
    """The cost of one decode step."""
    return model.cost(Step(batch, 1, context))
