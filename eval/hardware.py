"""This machine, measured: copy bandwidth and matrix rate, the two lines of its roofline.

Model-bandwidth and model-FLOP utilisation are against these measured figures, never against a
datasheet. A third figure is for predictions: the bandwidth that a product of one row reaches,
which is what decode is made of and on CPUs well below that of a copy. All are medians over
repeats after a warm-up.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Roofline:
    """Ceilings of one device for one dtype; product_bytes_per_s: None where only a datasheet is."""

    copy_bytes_per_s: float
    matrix_flops_per_s: float
    dtype: torch.dtype
    product_bytes_per_s: float | None = None

    @property
    def ridge_flop_per_byte(self) -> float:
        """Arithmetic intensity at which compute starts to bound."""
        return self.matrix_flops_per_s / self.copy_bytes_per_s

    def time_ms(self, flops: float, moved_bytes: float) -> float:
        """Least time of work that moves and computes at these rates."""
        return max(flops / self.matrix_flops_per_s, moved_bytes / self.read_bytes_per_s) * 1e3

    @property
    def read_bytes_per_s(self) -> float:
        """The bandwidth that operations of a decode step can reach."""
        return self.product_bytes_per_s or self.copy_bytes_per_s


def measure_roofline(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Roofline:
    """Measure copy bandwidth (read + write), a one-row product and a square one."""
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
    # The weights as decode reads them: column-major where `archs.backbone.lay_out` makes them so.
    weight = source.view(-1, 4096) if cuda else source.view(4096, -1).t()
    row = torch.ones(1, weight.shape[1], dtype=dtype, device=device)
    product_s = _median_s(lambda: torch.nn.functional.linear(row, weight), device)
    return Roofline(
        copy_bytes_per_s=2 * source.nbytes / copy_s,
        matrix_flops_per_s=2 * size**3 / matrix_s,
        dtype=dtype,
        product_bytes_per_s=weight.nbytes / product_s,
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
