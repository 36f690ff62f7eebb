"""Times of single kernels with a cold cache: copies of the operands in one CUDA graph.

The copies together are several times the L2, so none finds its data there, and a graph leaves no
launch gaps between them. A call that cannot be captured is timed between events after a flush.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from infer.graphs import capture

#: Copies of the operands cover the L2 this many times.
COVER = 4
MOST_COPIES = 64
#: Device memory that all copies together may take.
MOST_BYTES = 24 << 30
#: An idle GPU runs at low clocks: work of this long brings them up before anything is timed.
WARM_UP_S = 0.2
MOST_WARM_UPS = 1000


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call: median and the 5th and 95th percentile of repeats.

    method: "graph" (copies in a graph) or "flush" (events around a call after an L2 flush).
    """

    median_s: float
    low_s: float
    high_s: float
    method: str


def copies_for(moved_bytes: int, each_bytes: int, device: torch.device) -> int:
    """How many copies of the operands, each of `each_bytes`, keep the cache cold."""
    l2 = int(torch.cuda.get_device_properties(device).L2_cache_size)
    wanted = max(2, min(MOST_COPIES, -(-COVER * l2 // max(moved_bytes, 1))))
    return max(1, min(wanted, MOST_BYTES // max(each_bytes, 1)))


def time_cold(
    runs: Sequence[Callable[[], object]], device: torch.device, repeats: int = 25
) -> Timing:
    """Time one call out of several equal ones on different copies of their operands."""
    stream = torch.cuda.Stream(device)
    # The operands may still be on their way on the current stream.
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for run in runs:
            run()
    torch.cuda.synchronize(device)
    try:
        graph = torch.cuda.CUDAGraph()
        with capture(graph, stream=stream):
            for run in runs:
                run()
    except RuntimeError:
        torch.cuda.synchronize(device)
        return _flushed(runs[0], device, repeats)
    return _of([t / len(runs) for t in _events(graph.replay, device, repeats, None)], "graph")


def _flushed(run: Callable[[], object], device: torch.device, repeats: int) -> Timing:
    l2 = int(torch.cuda.get_device_properties(device).L2_cache_size)
    flush = torch.empty(COVER * l2, dtype=torch.int8, device=device)
    return _of(_events(run, device, repeats, flush), "flush")


def _events(
    run: Callable[[], object], device: torch.device, repeats: int, flush: torch.Tensor | None
) -> list[float]:
    pairs = []
    began = time.perf_counter()
    for _ in range(MOST_WARM_UPS):
        run()
        torch.cuda.synchronize(device)
        if time.perf_counter() - began >= WARM_UP_S:
            break
    for _ in range(repeats):
        if flush is not None:
            flush.zero_()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        run()
        last.record()
        pairs.append((first, last))
    torch.cuda.synchronize(device)
    return [first.elapsed_time(last) / 1e3 for first, last in pairs]


def _of(times_s: list[float], method: str) -> Timing:
    cuts = statistics.quantiles(times_s, n=20, method="inclusive")
    return Timing(statistics.median(times_s), cuts[0], cuts[-1], method)
