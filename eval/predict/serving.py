"""A server's clock: every step takes what it is predicted to take, and nothing is computed.

Steps of a server are ragged: sequences at unlike contexts, prompts in chunks beside decode. A
rectangle of B sequences by K tokens is given the mean, over its sequences, of what a uniform one at
their context takes: exact wherever an operation is bound by the same thing at all of them. Steps
that are alike are taken in one leap, so that the time of a simulation grows with what happens in
it, not with its tokens.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from copy import copy
from functools import cache
from typing import ClassVar, Self

import numpy as np

from archs.backbone import Block, Model, first_layers
from archs.checks import require_at_least
from archs.cost import Cost, Step
from eval.predict.calibration import Calibration
from eval.predict.machine import Roofline
from eval.predict.roofline import step_ms
from infer.batch import Batch, Changes
from infer.capacity import Capacity
from infer.graphs import bucket
from infer.turns import Ran

#: Prompts of more tokens are interpolated between multiples of powers of two of this many parts.
PARTS = 4
#: Steps that tell kinds of layers apart.
PROBES = Step(1, 1, 0), Step(3, 2, 1000), Step(2, 64, 5000)


class StepTimes:
    """Predicted times of a model's ragged steps on a machine.

    max_context: of a sequence. host_ms: of the host's own work for a step, added to each. padded:
    whether batches are padded to buckets, as captured steps are (`infer.graphs`). calls: torch
    operations of a decode step as written; None: one for each operation of the cost model.
    to_longest: whether as many rows are read of every sequence as of the longest, as torch's forms
    do.
    """

    def __init__(
        self, model: Model, rates: Roofline, *, max_context: int, host_ms: float = 0.0,
        padded: bool = True, calls: int | None = None, to_longest: bool = False,
    ) -> None:  # fmt: skip
        require_at_least("host_ms", host_ms, 0)
        self.max_context = max_context
        self.host_ms = host_ms
        self._rates = rates
        self._padded = padded
        self._to_longest = to_longest
        self._calibration: Calibration | None = None
        self._rest, self._layers = _apart(model)
        # What is dispatched beside the operations that the cost model knows.
        known = len(model.cost(PROBES[0]).ops)
        self._more_ms = max(0, (calls or 0) - known) * rates.call_us / 1e3
        rows = [t for s in model.state_specs() for t in s.rows]
        bends = {n for t in rows for n in (t.window, t.picks and t.picks * t.every) if n}
        powers = {1 << n for n in range(max_context.bit_length())}
        points = {0, max_context, *powers, *(n + d for n in bends for d in (-1, 0))}
        self._points = sorted(p for p in points if 0 <= p <= max_context)
        self._at = cache(self._uniform_ms)
        self._sums = cache(self._summed_ms)

    def calibrated(self, found: Calibration) -> Self:
        """The same, with the ratios of an engine's times to these."""
        times = copy(self)
        times._calibration = found
        times._at = cache(times._uniform_ms)
        times._sums = cache(times._summed_ms)
        return times

    def rectangle_ms(self, contexts: Sequence[int], new_tokens: int) -> float:
        """Time of extending sequences that hold so many tokens by `new_tokens` each."""
        batch, contexts = self._batch(len(contexts)), self._read(contexts)
        low, high = _neighbours(new_tokens)
        times = self._at(batch, low)[contexts]
        if high > low:
            times = times + (new_tokens - low) / (high - low) * (
                self._at(batch, high)[contexts] - times
            )
        return float(times.mean())

    def decode_ms(self, contexts: Sequence[int]) -> Callable[[int], float]:
        """The time of the next n decode steps of sequences that hold so many tokens."""
        sums = self._sums(self._batch(len(contexts)))
        held = np.asarray(self._read(contexts))
        count = len(held)
        began = float(np.add.reduce(sums[held])) / count

        def spent_ms(times: int) -> float:
            ended = float(np.add.reduce(sums[held + times])) / count
            return ended - began + times * self.host_ms

        return spent_ms

    def _batch(self, count: int) -> int:
        return bucket(count) if self._padded else count

    def _read(self, contexts: Sequence[int]) -> Sequence[int]:
        """Contexts whose mean time is the step's."""
        return [max(contexts)] if self._to_longest else contexts

    def _uniform_ms(self, batch: int, new_tokens: int) -> np.ndarray:
        """Times of a uniform step by the tokens held before it."""
        times = []
        for at in self._points:
            step = Step(batch, new_tokens, at)
            layers = sum(n * step_ms(layer.cost(step), self._rates) for layer, n in self._layers)
            times.append(step_ms(self._rest.cost(step), self._rates) + layers + self._more_ms)
        held = np.arange(self.max_context + 1)
        found = np.interp(held, self._points, times)
        if self._calibration is not None:
            found *= self._calibration.ratios(batch, new_tokens, held)
        return found

    def _summed_ms(self, batch: int) -> np.ndarray:
        """Times of all decode steps from an empty sequence to one of so many tokens."""
        return np.concatenate(([0.0], np.cumsum(self._at(batch, 1))))


def _apart(model: Model) -> tuple[Model, list[tuple[Block, int]]]:
    """A model's first layer with all that is no layer, and how many more there are of each kind."""
    layers = list(model.layers)
    if len(layers) == 1:
        return model, []
    kinds: dict[tuple[Cost, ...], tuple[Block, int]] = {}
    for layer in layers[1:]:
        # Layers that cost the same at unlike steps are of one kind: a step's cost is made once.
        known = tuple(map(layer.cost, PROBES))
        kinds[known] = layer, kinds.get(known, (layer, 0))[1] + 1
    return first_layers(model, 1), list(kinds.values())


class ConstantTimes:
    """Steps that all take the same time, for what can be computed exactly."""

    def __init__(self, ms: float) -> None:
        self.host_ms = 0.0
        self._ms = ms

    def rectangle_ms(self, contexts: Sequence[int], new_tokens: int) -> float:
        """As `StepTimes.rectangle_ms`: nothing, beside the decode step."""
        return 0.0

    def decode_ms(self, contexts: Sequence[int]) -> Callable[[int], float]:
        """As `StepTimes.decode_ms`."""
        return lambda times: times * self._ms


def _neighbours(tokens: int) -> tuple[int, int]:
    """The numbers of tokens between which times are interpolated."""
    grain = max(1, (1 << (tokens - 1).bit_length()) // (2 * PARTS)) if tokens > 1 else 1
    low = tokens // grain * grain
    return low, low if low == tokens else low + grain


class ClockExecutor:
    """Takes a server's steps on a clock (`infer.turns.Executor`)."""

    leaps: ClassVar[bool] = True
    ahead: ClassVar[bool] = False

    def __init__(self, times: StepTimes | ConstantTimes) -> None:
        self._times = times
        self._now_s = 0.0

    def require(self, capacity: Capacity) -> None:
        """As `Executor.require`: a clock holds nothing."""

    def now_s(self) -> float:
        """As `Executor.now_s`."""
        return self._now_s

    def wait(self, until_s: float) -> None:
        """As `Executor.wait`."""
        self._now_s = max(self._now_s, until_s)

    def run(self, batch: Batch, times: int, until_s: float) -> Ran:
        """As `Executor.run`; makes no tokens."""
        spent_ms = self._times.decode_ms([a.held for a in batch.decode]) if batch.decode else None
        if not batch.chunks:
            assert spent_ms is not None
            if times > 1 and self._now_s + spent_ms(times) / 1e3 > until_s:
                left_ms = (until_s - self._now_s) * 1e3
                times = min(times, 1 + bisect_left(range(1, times), left_ms, key=spent_ms))
            self._now_s += spent_ms(times) / 1e3
            return Ran(times, None)
        ms = self._times.host_ms if spent_ms is None else spent_ms(1)
        for group in batch.chunk_groups():
            held = [answer.held for answer, _ in group]
            ms += self._times.rectangle_ms(held, max(count for _, count in group))
        self._now_s += ms / 1e3
        return Ran(1, None)

    def follow(self, changes: Changes) -> None:
        """As `Executor.follow`: nothing is held."""
