"""Times of consecutive pieces of work on a device, taken without waiting for it.

On CUDA the marks are events in the stream, read when everything is done; elsewhere they are
readings of the host's clock.
"""

import time
from itertools import pairwise

import torch


class StepClock:
    """Marks points in the work of a device and tells the milliseconds between them."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []

    def mark(self) -> None:
        """Mark the end of all work issued so far."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())

    def spans_ms(self) -> list[float]:
        """Milliseconds between consecutive marks; waits for the device."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return [first.elapsed_time(second) for first, second in pairwise(self._events)]
        return [(second - first) * 1e3 for first, second in pairwise(self._times)]
