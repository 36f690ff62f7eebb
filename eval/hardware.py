"""This machine, measured: copy bandwidth and matrix rate, the two lines of its roofline.

Model-bandwidth and model-FLOP utilisation are against these measured figures, never against a
datasheet. Both are medians over repeats after a warm-up.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Roofline:
    """Measured ceilings of one device for one dtype."""

    copy_bytes_per_s: float
    matrix_flops_per_s: float
    dtype: torch.dtype

    @property
    def ridge_flop_per_byte(self) -> float:
        """Arithmetic intensity at which compute starts to bound."""
        return self.matrix_flops_per_s / self.copy_bytes_per_s

    def time_ms(self, flops: float, moved_bytes: float) -> float:
        """Least time of work that moves and computes at these rates."""
        seconds = max(flops / self.matrix_flops_per_s, moved_bytes / self.copy_bytes_per_s)
        return seconds * 1e3


def measure_roofline(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Roofline:
    """Measure copy bandwidth (read + write) and square matrix multiplication."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    copy_elements = (1 << 30 if cuda else 1 << 27) // dtype.itemsize
    source = torch.ones(copy_elements, dtype=dtype, device=device)
    target = torch.empty_like(source)
    copy_s = _median_s(lambda: target.copy_(source), device)
    size = 8192 if cuda else 1024
    a = torch.ones(size, size, dtype=dtype, device=device)
    b = torch.ones(size, size, dtype=dtype, device=device)
    out = torch.empty_like(a)
    matrix_s = _median_s(lambda: torch.mm(a, b, out=out), device)
    return Roofline(
        copy_bytes_per_s=2 * source.nbytes / copy_s,
        matrix_flops_per_s=2 * size**3 / matrix_s,
        dtype=dtype,
    )


def _median_s(work: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    """Median seconds of one call after two warm-up calls."""
    times = []
    for n in range(repeats + 2):
        began = now_s(device)
        work()
        if n >= 2:
            times.append(now_s(device) - began)
        else:
            now_s(device)
    return statistics.median(times)


def now_s(device: torch.device) -> float:
    """The clock after all work on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
