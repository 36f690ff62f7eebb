"""Accelerators by their datasheets: what predictions stand on where nothing was measured.

Rates are dense (no sparsity), with float32 accumulation; bandwidth is the device memory's. No
datasheet says what a launch costs: that is what was measured of one H100, for every part.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from archs.checks import require_at_least
from archs.errors import UserError, unknown_name
from eval.hardware import ProductRate, Roofline, measure_roofline
from infer.memory import free_bytes

#: Launches in a captured decode step: of a product of one row by our kernel, of more rows by the
#: library, of any other operation; and where they were measured.
ROW_LAUNCH_US, PRODUCT_LAUNCH_US, CALL_US = 1.00, 3.32, 1.18
LAUNCHES_FROM = (
    "one H100, measured: leaderboards/nvidia-h100-80gb-hbm3/2026-11-27, machine.csv and gemv in "
    "kernels.csv"
)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True, slots=True)
class Link:
    """What joins the parts of one machine.

    gbyte_per_s: of one part to its neighbours, in one direction (half of a datasheet's total).
    hop_us, start_us: latency of a step of a ring, and of a collective beside its steps.
    """

    gbyte_per_s: float
    hop_us: float
    start_us: float
    source: str


#: Latencies of NCCL's own tuning table: a ring with flags in the data (LL).
NCCL = "latencies of NCCL's tuning table (ring, LL)"
PCIE_4 = Link(gbyte_per_s=32, hop_us=1.0, start_us=6.6, source=f"PCIe 4.0 x16; {NCCL}")


def _nvlink(gbyte_per_s: float, source: str) -> Link:
    return Link(gbyte_per_s=gbyte_per_s, hop_us=0.6, start_us=6.6, source=f"{source}; {NCCL}")


NVLINK_3, NVLINK_4 = _nvlink(300, "NVLink 3"), _nvlink(450, "NVLink 4")
NVLINK_5 = _nvlink(900, "NVLink 5")
INFINITY = Link(
    gbyte_per_s=448, hop_us=0.8, start_us=12.0,
    source="7 Infinity Fabric links; latencies of RCCL's tuning table (ring, LL)",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Accelerator:
    """One part. tflops_per_s: dense rate by dtype, in 10^12 FLOP/s; source: the datasheet."""

    name: str
    tflops_per_s: dict[str, float]
    bandwidth_tbyte_per_s: float
    memory_gbyte: float
    link: Link
    source: str

    def roofline(self, dtype: str) -> Roofline:
        """The ceilings and launches. Raises UserError for a dtype the table has no rate for."""
        if dtype not in self.tflops_per_s:
            raise unknown_name(f"dtype of {self.name}", dtype, self.tflops_per_s)
        bandwidth = self.bandwidth_tbyte_per_s * 1e12
        return Roofline(
            bandwidth,
            self.tflops_per_s[dtype] * 1e12,
            DTYPES[dtype],
            products=(
                ProductRate(1, bandwidth, ROW_LAUNCH_US),
                ProductRate(2, bandwidth, PRODUCT_LAUNCH_US),
            ),
            call_us=CALL_US,
        )


def _part(
    name: str, half: float, single: float, bandwidth: float, memory: float, link: Link, source: str
) -> Accelerator:
    """A part whose bfloat16 and float16 rates are the same."""
    rates = {"bfloat16": half, "float16": half, "float32": single}
    return Accelerator(
        name=name, tflops_per_s=rates, bandwidth_tbyte_per_s=bandwidth, memory_gbyte=memory,
        link=link, source=source,
    )  # fmt: skip


ACCELERATORS: dict[str, Accelerator] = {
    "a100": _part("NVIDIA A100 80GB SXM", 312, 19.5, 2.039, 80, NVLINK_3, "A100 datasheet, 2021"),
    "h100": _part("NVIDIA H100 SXM", 989, 67, 3.35, 80, NVLINK_4, "H100 datasheet, 2023"),
    "h200": _part("NVIDIA H200 SXM", 989, 67, 4.8, 141, NVLINK_4, "H200 datasheet, 2023"),
    "b200": _part("NVIDIA B200", 2250, 80, 8.0, 180, NVLINK_5, "HGX B200 datasheet, 2024, per GPU"),
    "mi300x": _part(
        "AMD Instinct MI300X", 1307, 163.4, 5.3, 192, INFINITY, "MI300X data sheet, 2023"
    ),
    "l4": _part("NVIDIA L4", 121, 30.3, 0.3, 24, PCIE_4, "L4 datasheet, 2023"),
    "l40s": _part("NVIDIA L40S", 362, 91.6, 0.864, 48, PCIE_4, "L40S datasheet, 2023"),
    "rtx4090": _part(
        "NVIDIA GeForce RTX 4090", 165.2, 82.6, 1.008, 24, PCIE_4, "Ada whitepaper, 2022"
    ),
}
THIS_MACHINE = "this-machine"


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a prediction needs to know of a part.

    launches_from: where their cost was taken. link: None where nothing is known of one.
    """

    key: str
    roofline: Roofline
    memory_bytes: int
    launches_from: str
    link: Link | None = None


def hardware_of(
    key: str,
    dtype: str = "bfloat16",
    batches: Iterable[int] = (1,),
    launch_us: float | None = None,
) -> Hardware:
    """A part of the table, or this machine, measured now (a CPU always in float32).

    batches: the rows of products that are measured. launch_us: what every operation costs beside
    its work, instead of what was measured. Raises UserError on an unknown part or dtype.
    """
    part = _hardware_of(key, dtype, batches)
    if launch_us is None:
        return part
    require_at_least("launch_us", launch_us, 0)
    products = tuple(replace(p, launch_us=launch_us) for p in part.roofline.products)
    roofline = replace(part.roofline, products=products, call_us=launch_us)
    return replace(part, roofline=roofline, launches_from="given")


def _hardware_of(key: str, dtype: str, batches: Iterable[int]) -> Hardware:
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    if key == THIS_MACHINE:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        served = DTYPES[dtype] if device.type == "cuda" else torch.float32
        measured = measure_roofline(device, served, list(batches))
        return Hardware(key, measured, free_bytes(device) or 0, "this machine, measured now")
    if key not in ACCELERATORS:
        raise unknown_name("hardware", key, [*ACCELERATORS, THIS_MACHINE])
    part = ACCELERATORS[key]
    memory_bytes = int(part.memory_gbyte * 1e9)
    return Hardware(key, part.roofline(dtype), memory_bytes, LAUNCHES_FROM, part.link)


def prices_of(text: str, hardware: list[str]) -> dict[str, float]:
    """Prices in $ per hour by part: one number for all, or `h100=2.5,h200=3.2`."""
    prices: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        key, equals, number = part.rpartition("=")
        try:
            price = float(number)
        except ValueError:
            price = -1.0
        if not 0 < price < float("inf") or (equals and key not in hardware):
            raise UserError(
                f"price '{part}' must be a positive number of $ per hour, alone or as PART=NUMBER "
                f"with a part of {', '.join(hardware)}"
            )
        prices.update({key: price} if equals else dict.fromkeys(hardware, price))
    return prices
