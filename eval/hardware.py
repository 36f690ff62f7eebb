"""This machine, measured: copy bandwidth, matrix rate, and what a step's operations cost beside.

Model-bandwidth and model-FLOP utilisation are against the first two, never against a datasheet.
Predictions know two things more. A product of a few rows with a matrix, which is what decode is
made of, reads well below a copy's bandwidth on CPUs, the less the more rows; and each operation
costs a launch: what is left of its time when there is nothing to read. Products are timed with a
small and a large matrix that no cache holds, other calls on a layer too narrow to have work. All
are medians over repeats after a warm-up.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import log

import torch
from torch import Tensor

from archs.backbone import column_major
from archs.backends import why_unusable
from archs.ops.product import product
from eval.calls import IdleLayer
from eval.gpu.cold import time_cold

#: Sides of the square matrices of products, of which so many that no cache holds them.
SIDES = {"cpu": (512, 4096), "cuda": (2048, 16384)}
SMALL_MATRICES = 64
REPEATS = 7
#: Products of more rows take the rate of these; beyond, the matrix rate tells more than bytes.
MOST_ROWS = 64


@dataclass(frozen=True, slots=True)
class ProductRate:
    """A product of `rows` rows with a matrix: its launch, and the bandwidth beyond it."""

    rows: int
    bytes_per_s: float
    launch_us: float = 0.0


@dataclass(frozen=True, slots=True)
class Roofline:
    """Ceilings of one device for one dtype.

    products: rates of products by rows; none where only a datasheet is. call_us: what any other
    operation costs beside its work.
    """

    copy_bytes_per_s: float
    matrix_flops_per_s: float
    dtype: torch.dtype
    products: tuple[ProductRate, ...] = ()
    call_us: float = 0.0

    @property
    def ridge_flop_per_byte(self) -> float:
        """Arithmetic intensity at which compute starts to bound."""
        return self.matrix_flops_per_s / self.copy_bytes_per_s

    def time_ms(self, flops: float, moved_bytes: float, rows: int = 0) -> float:
        """Time of work that moves and computes at these rates; rows: of a product, else 0."""
        work_s = max(flops / self.matrix_flops_per_s, moved_bytes / self.bytes_per_s(rows))
        return work_s * 1e3 + self.launch_us(rows) / 1e3

    def launch_us(self, rows: int = 0) -> float:
        """What an operation costs beside its work; rows: of a product, else 0."""
        product = self.product(rows)
        return self.call_us if product is None else product.launch_us

    def bytes_per_s(self, rows: int = 0) -> float:
        """The bandwidth that an operation can reach: without rows, that of one-row products."""
        product = self.product(rows or 1)
        return self.copy_bytes_per_s if product is None else product.bytes_per_s

    def product(self, rows: int) -> ProductRate | None:
        """The rate of products of nearest as many rows; None without rates, or rows."""
        if not rows:
            return None
        return min(self.products, key=lambda p: abs(log(p.rows / rows)), default=None)


def measure_roofline(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    rows: Sequence[int] = (1,),
) -> Roofline:
    """Measure copies (read + write), a square product, and products of as many rows as told."""
    device = torch.device(device)
    cuda = device.type == "cuda"
    copy_elements = (1 << 30 if cuda else 1 << 27) // dtype.itemsize
    source = torch.ones(copy_elements, dtype=dtype, device=device)
    target = torch.empty_like(source)
    # A kernel: the copy engine, which a captured `copy_` becomes, is a fifth slower on an H100.
    copy_s = _median_s(partial(torch.neg, source, out=target), device)
    del source, target
    size = 8192 if cuda else 1024
    # Random, as a model's: a GPU multiplies equal numbers faster, as fewer of its wires change.
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty_like(a)
    matrix_s = _median_s(lambda: torch.mm(a, b, out=out), device)
    return Roofline(
        copy_bytes_per_s=2 * copy_elements * dtype.itemsize / copy_s,
        matrix_flops_per_s=2 * size**3 / matrix_s,
        dtype=dtype,
        products=tuple(
            _product_rate(n, device, dtype) for n in sorted({1, *(min(n, MOST_ROWS) for n in rows)})
        ),
        call_us=_call_us(device, dtype),
    )


def _call_us(device: torch.device, dtype: torch.dtype) -> float:
    """What a call costs where there is no work: of a captured sum on a GPU, else of our glue."""
    if device.type == "cuda":
        x = torch.ones(1024, dtype=dtype, device=device)
        return 1e6 * _each_s([lambda: x + x] * SMALL_MATRICES, device)
    layer = IdleLayer(dtype)
    return 1e6 * _each_s([layer] * SMALL_MATRICES, device) / layer.calls


def _product_rate(rows: int, device: torch.device, dtype: torch.dtype) -> ProductRate:
    """The line through the times of a small and a large product: launch and bandwidth."""
    nbytes, times_s = [], []
    for side, count in zip(SIDES[device.type], (SMALL_MATRICES, 2), strict=True):
        weights = [torch.randn(side, side, dtype=dtype, device=device) for _ in range(count)]
        if column_major(rows, weights[0]):
            weights = [w.t() for w in weights]
        x = torch.randn(rows, side, dtype=dtype, device=device)
        times_s.append(_each_s([_product_of(x, w) for w in weights], device))
        nbytes.append(weights[0].nbytes)
    # Where noise puts the line below zero, the launch is nothing and all is bandwidth.
    bytes_per_s = (nbytes[1] - nbytes[0]) / max(times_s[1] - times_s[0], 1e-9)
    launch_s = times_s[0] - nbytes[0] / bytes_per_s
    if launch_s < 0:
        return ProductRate(rows, nbytes[1] / times_s[1])
    return ProductRate(rows, bytes_per_s, launch_s * 1e6)


def _product_of(x: Tensor, weight: Tensor) -> Callable[[], object]:
    # As our own model's step makes it.
    own = x.is_cuda and why_unusable(x.device) is None
    return partial(product, x, weight, backend="triton" if own else "torch")


def _each_s(works: Sequence[Callable[[], object]], device: torch.device) -> float:
    """Median seconds of one of several equal works, one after the other as in a decode step.

    On a CPU each call is timed alone: where others share the cores, a mean would be theirs.
    """
    if device.type == "cuda":
        return time_cold(works, device).median_s
    times = []
    for n in range(REPEATS + 1):
        for work in works:
            began = time.perf_counter()
            work()
            if n:
                times.append(time.perf_counter() - began)
    return statistics.median(times)


def _median_s(work: Callable[[], object], device: torch.device) -> float:
    """Median seconds of one call after a warm-up; on a GPU by its own events."""
    if device.type == "cuda":
        return time_cold([work], device).median_s
    times = []
    for n in range(REPEATS + 2):
        began = time.perf_counter()
        work()
        if n >= 2:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def now_s(device: torch.device) -> float:
    """The clock after all work on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
