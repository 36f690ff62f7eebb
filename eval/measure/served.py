"""What a server did, as figures: latencies over requests, throughput, memory, the queue."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from infer.scheduler import Scheduler
from infer.sequence import Answer, Ending
from infer.turns import Turn

#: Percentiles of every latency.
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a request must keep to count as good: milliseconds to the first token, and per token."""

    ttft_ms: float
    tpot_ms: float


@dataclass(slots=True)
class Log:
    """Follows a server turn by turn (`infer.server.drive`).

    schedule: who ran in each step, where it is kept: numbers and counts.
    """

    scheduler: Scheduler
    keep_schedule: bool = False
    schedule: list[tuple[tuple[int, int], ...]] = field(default_factory=list)
    busy_s: float = 0.0
    _gaps: dict[tuple[float, int], int] = field(default_factory=dict)
    _running_s: float = 0.0
    _held_s: float = 0.0
    _paged_s: float = 0.0
    _cached_byte_s: float = 0.0
    _used_byte_s: float = 0.0
    _copied_byte_s: float = 0.0

    def __call__(self, turn: Turn) -> None:
        """Take a turn in."""
        span_s = turn.ended_s - turn.began_s
        self.busy_s += span_s
        for _, before in turn.got:
            if before is not None:
                # All of a leap's gaps are taken to be alike.
                gap = (turn.ended_s - before) / turn.times
                self._gaps[gap, turn.times] = self._gaps.get((gap, turn.times), 0) + turn.times
        batch = turn.batch
        answers = batch.answers
        self._running_s += span_s * len(answers)
        # In the middle of the turn; who ended in it has given its pages back.
        held = turn.held - len(batch.decode) * turn.times / 2
        self._held_s += span_s * held
        capacity = self.scheduler.capacity
        growing = [key.every for key in capacity.pages if key.window is None]
        copies = _mean(batch.memory.copies, batch.grown.copies)
        for at, key in enumerate(capacity.pages):
            # Of tables that grow with the context the one with most rows speaks for all; rows that
            # several share are counted with those that they have for themselves.
            if key.window is None and key.every == min(growing):
                self._paged_s += span_s * copies[at] * capacity.page_size * key.every
                break
        if capacity.page_bytes.keys() == capacity.pages.keys():
            used = _mean(batch.memory.used, batch.grown.used)
            idle = _mean(batch.memory.idle, batch.grown.idle)
            self._used_byte_s += span_s * capacity.bytes_of(used)
            self._copied_byte_s += span_s * capacity.bytes_of(copies)
            self._cached_byte_s += span_s * capacity.bytes_of(idle)
        if self.keep_schedule:
            ran = [(a.number, 1) for a in batch.decode]
            ran += [(a.number, count) for a, count in batch.chunks]
            self.schedule += [tuple(ran)] * turn.times

    def figures(self, answers: Sequence[Answer], limits: Limits) -> dict[str, float]:
        """Measures by name, over the answers that ended as they should.

        Figures that nothing was measured for are left out.
        """
        ended = [a for a in answers if _is_whole(a)]
        asked = [(a, *a.siblings) for a in answers if a.leader is None]
        served = [family for family in asked if all(_is_whole(a) for a in family)]
        found: dict[str, float] = {"served_requests": len(served)}
        found["refused_requests"] = sum(f[0].ending is Ending.REFUSED for f in asked)
        if not ended:
            return found
        began_s = min(a.request.arrival_s for a in answers)
        span_s = max(_s(a.ended_s) for a in ended) - began_s
        ttft = np.array([_s(a.first_token_s) - a.request.arrival_s for a in ended])
        e2e = np.array([_s(a.ended_s) - a.request.arrival_s for a in ended])
        made = np.array([a.made for a in ended])
        queue = np.array([_s(a.admitted_s) - a.request.arrival_s for a in ended])
        several = made > 1
        tpot = (e2e - ttft)[several] / (made[several] - 1)
        met = ttft * 1e3 <= limits.ttft_ms
        met[several] &= tpot * 1e3 <= limits.tpot_ms
        good = {a for a, kept in zip(ended, met, strict=True) if kept}
        found["request_per_s"] = len(served) / span_s
        found["goodput_req_per_s"] = sum(good.issuperset(f) for f in served) / span_s
        found["output_tok_per_s"] = float(made.sum()) / span_s
        if tpot.size:
            found["output_tok_per_s_per_user"] = float(np.mean(1 / tpot))
        for name, times in (("ttft", ttft), ("tpot", tpot), ("e2e", e2e), ("queue", queue)):
            if times.size:
                for q in PERCENTILES:
                    found[f"{name}_p{q}_ms"] = float(np.percentile(times, q)) * 1e3
        if self._gaps:
            gaps = np.array([gap for gap, _ in self._gaps])
            weights = np.array([*self._gaps.values()])
            for q in PERCENTILES:
                found[f"itl_p{q}_ms"] = weighted_percentile(gaps, weights, q) * 1e3
        found["running_sequences"] = self._running_s / self.busy_s
        found["held_tokens"] = self._held_s / self.busy_s
        if self._paged_s:
            found["page_waste"] = max(0.0, 1 - self._held_s / self._paged_s)
            whole = self._running_s * self.scheduler.capacity.max_context
            found["page_waste_contiguous"] = 1 - self._held_s / whole
        if self.scheduler.policy.prefix_cache:
            tokens = sum(len(a.request.prompt) for a in ended)
            found["hit_rate"] = sum(a.hit or 0 for a in ended) / tokens
            found["cached_state_bytes"] = self._cached_byte_s / self.busy_s
        if self._copied_byte_s and self.scheduler.policy.shares:
            found["shared_state"] = 1 - self._used_byte_s / self._copied_byte_s
        found["preemptions"] = sum(a.preemptions for a in answers)
        found["recomputed_tokens"] = sum(a.recomputed for a in answers)
        return found


def weighted_percentile(values: np.ndarray, weights: np.ndarray, q: float) -> float:
    """The least value that at least q % of the weight do not exceed."""
    order = np.argsort(values)
    share = np.cumsum(weights[order]) / weights.sum()
    at = int(np.searchsorted(share, q / 100 - 1e-12))
    return float(values[order][min(at, len(order) - 1)])


def _mean(before: Sequence[int], after: Sequence[int]) -> list[float]:
    """Of what grows evenly while steps are taken in a row."""
    return [(b + a) / 2 for b, a in zip(before, after, strict=True)]


def _is_whole(answer: Answer) -> bool:
    return answer.ending in (Ending.LENGTH, Ending.STOP)


def _s(moment: float | None) -> float:
    return math.nan if moment is None else moment
