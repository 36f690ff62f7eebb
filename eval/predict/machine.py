"""This machine, measured: bandwidth, matrix rate, and the fixed overhead of an operation.

Model-bandwidth and model-FLOP utilisation are against the first two, never against a datasheet.
These are ceilings: of several repeats the fastest counts, of copying and reading the faster (a
CPU reads a line before it writes it, so a copy moves more than it is credited with), and they are
measured again beside what is timed, since another program may have had the machine before.
Predictions use two figures more. A GEMM of a few rows, which decode consists of, reads well below
a copy's bandwidth on CPUs, the more rows the slower; and each operation costs a launch, the time
that remains when there is nothing to read. GEMMs are timed with a small and a large matrix that no
cache holds, other calls on a layer too narrow to have work; these are medians over repeats after
a warm-up.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import log

import torch
from torch import Tensor

from archs.backbone import column_major
from archs.backends import why_unusable
from archs.cost import Coded
from archs.formats import Format
from archs.ops.dense import product
from archs.ops.matrix import Weight
from archs.packed import Packed, nearest
from archs.weights import Number
from eval.predict.calls import IdleLayer
from eval.predict.cold import time_cold
from eval.predict.neighbours import BUSY, Neighbours

#: Sides of the square matrices of GEMMs; enough of each that no cache holds them.
SIDES = {"cpu": (512, 4096), "cuda": (2048, 16384)}
SMALL_MATRICES = 64
REPEATS = 7
#: Repeats of a ceiling that is measured again.
FEW_REPEATS = 3
#: Attempts on a busy machine before its quietest one is taken.
ATTEMPTS = 3
#: GEMMs of more rows take the rate of this many: beyond it the matrix rate decides.
MOST_ROWS = 64


@dataclass(frozen=True, slots=True)
class ProductRate:
    """A GEMM of `rows` rows: its launch, and the bandwidth beyond it.

    storage: the format of the weights where it is none of plain numbers (`archs.weights`).
    """

    rows: int
    bytes_per_s: float
    launch_us: float = 0.0
    storage: str = ""


@dataclass(frozen=True, slots=True)
class CodingRate:
    """Seconds in which torch makes a number of what is kept of it, and keeps one.

    format, run, given: as `archs.cost.Coded`'s.
    """

    format: Format
    run: int
    given: torch.dtype
    decode_s: float
    encode_s: float


@dataclass(frozen=True, slots=True)
class Roofline:
    """Ceilings of one device for one dtype.

    read_bytes_per_s: reading alone; 0 where it was not measured. products: rates of products by
    rows; none from a datasheet alone. call_us: fixed overhead of any other operation.
    other_load: share of the cores that other programs took meanwhile; None if unknown.
    codings: of states in few bits (`eval.predict.coding`); none where kernels read them as they
    are kept.
    """

    copy_bytes_per_s: float
    matrix_flops_per_s: float
    dtype: torch.dtype
    products: tuple[ProductRate, ...] = ()
    call_us: float = 0.0
    read_bytes_per_s: float = 0.0
    other_load: float | None = None
    codings: tuple[CodingRate, ...] = ()

    @property
    def peak_bytes_per_s(self) -> float:
        """The most that this device moves, copying or reading: the ceiling of a step."""
        return max(self.copy_bytes_per_s, self.read_bytes_per_s)

    @property
    def ridge_flop_per_byte(self) -> float:
        """Arithmetic intensity at which compute starts to bound."""
        return self.matrix_flops_per_s / self.peak_bytes_per_s

    def raised(self, other: "Roofline") -> "Roofline":
        """The higher of both for each ceiling; all else, and the load, as here."""
        return replace(
            self,
            copy_bytes_per_s=max(self.copy_bytes_per_s, other.copy_bytes_per_s),
            read_bytes_per_s=max(self.read_bytes_per_s, other.read_bytes_per_s),
            matrix_flops_per_s=max(self.matrix_flops_per_s, other.matrix_flops_per_s),
        )

    def time_ms(self, flops: float, moved_bytes: float, rows: int = 0, storage: str = "") -> float:
        """Time of moving and computing at these rates; rows: M of a GEMM, else 0."""
        bytes_per_s = self.bytes_per_s(rows, storage)
        work_s = max(flops / self.matrix_flops_per_s, moved_bytes / bytes_per_s)
        return work_s * 1e3 + self.launch_us(rows, storage) / 1e3

    def coding_ms(self, coded: Iterable[Coded]) -> float:
        """Time of making numbers of what is kept, and the other way; 0 of what has no rate."""
        known = {(r.format, r.run, r.given): r for r in self.codings}
        found = ((c, known.get((c.format, c.run, c.given))) for c in coded)
        return 1e3 * sum(c.decoded * r.decode_s + c.encoded * r.encode_s for c, r in found if r)

    def launch_us(self, rows: int = 0, storage: str = "") -> float:
        """Fixed overhead of an operation; rows: M of a GEMM, else 0."""
        product = self.product(rows, storage)
        return self.call_us if product is None else product.launch_us

    def bytes_per_s(self, rows: int = 0, storage: str = "") -> float:
        """The bandwidth that an operation can reach; without rows, that of a GEMM of one row."""
        product = self.product(rows or 1, storage)
        return self.copy_bytes_per_s if product is None else product.bytes_per_s

    def product(self, rows: int, storage: str = "") -> ProductRate | None:
        """The rate of the GEMM with the nearest number of rows; None without rates, or rows.

        Weights of a format that was not measured are read as fast as plain ones: a datasheet's
        bandwidth says no more.
        """
        if not rows:
            return None
        same = [p for p in self.products if p.storage == storage]
        same = same or [p for p in self.products if not p.storage]
        return min(same, key=lambda p: abs(log(p.rows / rows)), default=None)


def measure_roofline(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    rows: Sequence[int] = (1,),
) -> Roofline:
    """Measure copies, reads, a square GEMM, and GEMMs of each of `rows` rows with plain weights.

    On a busy machine up to `ATTEMPTS` times, and what was measured at the quietest counts.
    """
    device = torch.device(device)
    found = _measured(device, dtype, rows)
    for _ in range(ATTEMPTS - 1):
        if not found.other_load or found.other_load < BUSY:
            break
        again = _measured(device, dtype, rows)
        quieter = (again.other_load or 0.0) < found.other_load
        found = again.raised(found) if quieter else found.raised(again)
    return found


def measured_again(known: Roofline, device: torch.device) -> Roofline:
    """A CPU's rates with ceilings raised to what it reaches now; a GPU's unchanged."""
    if device.type == "cuda":
        return known
    return known.raised(_ceilings(device, known.dtype, FEW_REPEATS))


def with_products(
    known: Roofline, device: torch.device, rows: Sequence[int], storages: Iterable[str] = ("",)
) -> Roofline:
    """These rates with those of GEMMs of each of `rows` rows with weights of each of these formats,
    measured where missing.
    """
    wanted = {(n, storage) for n in _timed_rows(rows) for storage in storages}
    lacking = sorted(wanted - {(p.rows, p.storage) for p in known.products})
    if not lacking:
        return known
    with torch.inference_mode():
        made = [_product_rate(n, device, known.dtype, storage) for n, storage in lacking]
    ordered = sorted((*known.products, *made), key=lambda p: (p.storage, p.rows))
    return replace(known, products=tuple(ordered))


def _timed_rows(rows: Sequence[int]) -> list[int]:
    return sorted({min(n, MOST_ROWS) for n in rows})


def _measured(device: torch.device, dtype: torch.dtype, rows: Sequence[int]) -> Roofline:
    # Without gradients, as a step runs: with them a single row takes the library's product.
    with Neighbours() as others, torch.inference_mode():
        found = replace(
            _ceilings(device, dtype, REPEATS),
            products=tuple(_product_rate(n, device, dtype) for n in _timed_rows((1, *rows))),
            call_us=_call_us(device, dtype),
        )
    return replace(found, other_load=others.share)


def _ceilings(device: torch.device, dtype: torch.dtype, repeats: int) -> Roofline:
    cuda = device.type == "cuda"
    elements = (1 << 30 if cuda else 1 << 27) // dtype.itemsize
    source = torch.ones(elements, dtype=dtype, device=device)
    target = torch.empty_like(source)
    # A kernel: the copy engine, which a captured `copy_` becomes, is a fifth slower on an H100.
    copy_s = _best_s(partial(torch.neg, source, out=target), device, repeats)
    read_s = _best_s(source.sum, device, repeats)
    del source, target
    size = 8192 if cuda else 1024
    # Random, as a model's: a GPU multiplies equal numbers faster, as fewer of its wires change.
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    matrix_s = _best_s(partial(torch.mm, a, b, out=torch.empty_like(a)), device, repeats)
    return Roofline(
        copy_bytes_per_s=2 * elements * dtype.itemsize / copy_s,
        read_bytes_per_s=elements * dtype.itemsize / read_s,
        matrix_flops_per_s=2 * size**3 / matrix_s,
        dtype=dtype,
    )


def _call_us(device: torch.device, dtype: torch.dtype) -> float:
    """Cost of a call without work: a captured sum on a GPU, an idle layer's operations on a CPU."""
    if device.type == "cuda":
        x = torch.ones(1024, dtype=dtype, device=device)
        return 1e6 * each_s([lambda: x + x] * SMALL_MATRICES, device)
    layer = IdleLayer(dtype)
    return 1e6 * each_s([layer] * SMALL_MATRICES, device) / layer.calls


def _product_rate(
    rows: int, device: torch.device, dtype: torch.dtype, storage: str = ""
) -> ProductRate:
    """The line through the times of a small and a large product: launch and bandwidth."""
    nbytes, times_s = [], []
    for side, count in zip(SIDES[device.type], (SMALL_MATRICES, 2), strict=True):
        weights = [_weight(side, device, dtype, storage, rows) for _ in range(count)]
        x = torch.randn(rows, side, dtype=dtype, device=device)
        times_s.append(each_s([_product_of(x, w) for w in weights], device))
        nbytes.append(weights[0].nbytes)
    # Where noise puts the line below zero, the launch is nothing and all is bandwidth.
    bytes_per_s = (nbytes[1] - nbytes[0]) / max(times_s[1] - times_s[0], 1e-9)
    launch_s = times_s[0] - nbytes[0] / bytes_per_s
    if launch_s < 0:
        return ProductRate(rows, nbytes[1] / times_s[1], storage=storage)
    return ProductRate(rows, bytes_per_s, launch_s * 1e6, storage)


def _weight(side: int, device: torch.device, dtype: torch.dtype, storage: str, rows: int) -> Weight:
    """A random square matrix, as a model that steps so many rows holds it."""
    weight = torch.randn(side, side, dtype=dtype, device=device)
    if not storage:
        return weight.t() if column_major(rows, weight) else weight
    number = Number.named(storage)
    packed = Packed(nearest(weight.float(), number), number, side, dtype)
    packed.lay_out()
    return packed


def _product_of(x: Tensor, weight: Weight) -> Callable[[], object]:
    # As our own model's step makes it.
    own = x.is_cuda and why_unusable(x.device) is None
    return partial(product, x, weight, backend="triton" if own else "torch")


def each_s(works: Sequence[Callable[[], object]], device: torch.device) -> float:
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


def _best_s(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of the fastest call after a warm-up; on a GPU, that nobody shares, the median."""
    if device.type == "cuda":
        return time_cold([work], device).median_s
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def now_s(device: torch.device) -> float:
    """The clock after all work on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
