"""An engine's own steps beside their prediction: with these ratios a clock keeps the engine's time.

A roofline knows bytes, FLOPs and calls; a library's kernels differ by shape and rows as well, and
an operation takes longer than its call. So steps are timed at a few batches, contexts and widths of
chunks, and the ratios to what is predicted of them hold for all between. What is then left between
a server and its clock is the server's own: what company costs, gathers, the host.
"""

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import log

import numpy as np
import torch

from eval.predict.machine import now_s
from infer.engine import Engine
from infer.pages import StoreFullError
from infer.sampling import Sampler, Sampling
from infer.store import StateStore

REPEATS = 3
#: Of decode steps in a row the last is timed: all but a server's first are behind another.
DECODED = 2
#: Every batch up to this one is timed, then doublings.
EACH = 8
#: Widths of chunks that are timed, up to the token budget.
WIDTHS = 2, 8, 32, 128, 512, 2048

#: Predicted milliseconds: of steps of so many tokens for sequences that hold so many each.
Predicted = Callable[[Sequence[int], int], float]


@dataclass(frozen=True, slots=True)
class Calibration:
    """Measured over predicted times, by tokens held before the step.

    decode: by batch. chunks: by the new tokens of one sequence.
    """

    decode: Mapping[int, Mapping[int, float]]
    chunks: Mapping[int, Mapping[int, float]]

    def ratios(self, batch: int, new_tokens: int, held: np.ndarray) -> np.ndarray:
        """At each of some numbers of held tokens; several sequences' chunks go as one's."""
        known, size = (self.decode, batch) if new_tokens == 1 else (self.chunks, batch * new_tokens)
        low = max((n for n in known if n <= size), default=min(known))
        high = min((n for n in known if n >= size), default=max(known))
        below, above = (np.interp(held, [*known[n]], [*known[n].values()]) for n in (low, high))
        part = log(size / low) / log(high / low) if low < size < high else 0.0
        return below + part * (above - below)


def calibrate(
    engine: Engine, predicted: Predicted, *, token_budget: int, shared: bool
) -> Calibration:
    """Time steps, greedy sampling included, of an engine that is warm and that nobody uses.

    Sequences hold synthetic state and unlike numbers of tokens, as a server's do, in pages that
    others computed where they are `shared`; contexts that the store has no room for are left out.
    """
    most, longest = len(engine.store.lengths), engine.store.max_context
    decode: dict[int, dict[int, float]] = {}
    for batch in _batches(most):
        contexts = {batch - 1, longest // 2, longest - DECODED}
        for held in sorted(n for n in contexts if batch <= n + 1 <= longest):
            ratio = _ratio(engine, predicted, [held - n for n in range(batch)], 1, shared)
            if ratio is not None:
                decode.setdefault(batch, {})[held] = ratio
    chunks: dict[int, dict[int, float]] = {}
    limit = min(token_budget, longest)
    for width in sorted({n for n in (*WIDTHS, limit) if 1 < n <= limit}):
        for held in (0, (longest - width) // 2):
            ratio = _ratio(engine, predicted, [held], width, shared)
            if ratio is not None:
                chunks.setdefault(width, {})[held] = ratio
    return Calibration(decode, chunks)


def _batches(most: int) -> list[int]:
    doublings = {EACH << n for n in range(most.bit_length())}
    return [n for n in sorted({*range(1, EACH + 1), *doublings, most}) if n <= most]


def _ratio(
    engine: Engine, predicted: Predicted, held: Sequence[int], new_tokens: int, shared: bool
) -> float | None:
    """Of the median of some equal steps; None where the store has no room for them."""
    tokens = torch.zeros(len(held), new_tokens, dtype=torch.int64, device=engine.device)
    sampler = Sampler(Sampling(), engine.device, backend=engine.backend)
    steps = DECODED if new_tokens == 1 else 1
    ratios = []
    try:
        for repeat in range(REPEATS + 1):
            with _holding(engine.store, held, shared) as sequences:
                for _ in range(min(steps, engine.store.max_context - max(held))):
                    # What filled the sequences may still be under way.
                    began = now_s(engine.device)
                    sampler(engine.extend_last(sequences, tokens), None).tolist()
                    spent_ms = (now_s(engine.device) - began) * 1e3
                if repeat:
                    ratios.append(spent_ms / predicted(held, new_tokens))
    except StoreFullError:
        return None
    return statistics.median(ratios)


@contextmanager
def _holding(store: StateStore, held: Sequence[int], shared: bool) -> Iterator[list[int]]:
    """Sequences that hold so many tokens each, in order of their numbers."""
    opened: list[int] = []
    try:
        for length in held:
            opened.append(store.add())
            store.fill(opened[-1:], length)
            if shared and len(opened) < len(store.lengths):
                # Its pages go on under another number, away from that one's home.
                opened.append(store.fork(opened[-1]))
                store.release(opened.pop(-2))
        opened.sort()
        yield opened
    finally:
        for sequence in opened:
            store.release(sequence)
