"""Hardware rates that predictions rest on: a datasheet's, or this machine's, measured now.

No datasheet gives the cost of a launch: every part takes the one measured on an H100.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from archs.checks import require_at_least
from archs.errors import UserError, unknown_name
from archs.weights import WeightFormat
from eval.predict.machine import ProductRate, Roofline, measure_roofline, with_products
from eval.results.accelerators import ACCELERATORS, Accelerator, Link
from infer.memory import free_bytes

#: Launches in a captured decode step: of a product of one row by our kernel, of more rows by the
#: library, of any other operation; and where they were measured.
ROW_LAUNCH_US, PRODUCT_LAUNCH_US, CALL_US = 1.00, 3.32, 1.18
LAUNCHES_FROM = (
    "one H100, measured: leaderboards/nvidia-h100-80gb-hbm3/2026-11-27, machine.csv and gemv in "
    "kernels.csv"
)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


THIS_MACHINE = "this-machine"


@dataclass(frozen=True, slots=True)
class Hardware:
    """The rates of one part, by dtype.

    launches_from: where the launch cost was measured. link: None if unknown. as_written: whether
    each operation of torch's is a launch, as on a CPU, where those of steps are counted.
    """

    key: str
    roofline: Roofline
    memory_bytes: int
    launches_from: str
    link: Link | None = None
    as_written: bool = False


def hardware_of(
    key: str,
    dtype: str = "bfloat16",
    batches: Iterable[int] = (1,),
    launch_us: float | None = None,
    stored: WeightFormat | None = None,
) -> Hardware:
    """A part of the table, or this machine, measured now (a CPU in float32, unless it is told how
    weights are stored).

    batches: the rows of products that are measured. launch_us: fixed overhead of every operation,
    instead of the measured one. stored: the weights' format, whose products are measured, too.
    Raises UserError on an unknown part or dtype.
    """
    part = _hardware_of(key, dtype, list(batches), stored)
    if launch_us is None:
        return part
    require_at_least("launch_us", launch_us, 0)
    products = tuple(replace(p, launch_us=launch_us) for p in part.roofline.products)
    roofline = replace(part.roofline, products=products, call_us=launch_us)
    return replace(part, roofline=roofline, launches_from="given")


def _hardware_of(
    key: str, dtype: str, batches: Sequence[int], stored: WeightFormat | None
) -> Hardware:
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)
    if key == THIS_MACHINE:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        told = stored is not None or device.type == "cuda"
        measured = measure_roofline(device, DTYPES[dtype] if told else torch.float32, batches)
        if stored is not None:
            measured = with_products(measured, device, batches, stored.storages)
        return Hardware(
            key, measured, free_bytes(device) or 0, "this machine, measured now",
            as_written=device.type == "cpu",
        )  # fmt: skip
    if key not in ACCELERATORS:
        raise unknown_name("hardware", key, [*ACCELERATORS, THIS_MACHINE])
    part = ACCELERATORS[key]
    return Hardware(key, roofline_of(part, dtype), part.memory_bytes, LAUNCHES_FROM, part.link)


def roofline_of(part: Accelerator, dtype: str) -> Roofline:
    """The ceilings and launches. Raises UserError for a dtype the table has no rate for."""
    bandwidth = part.bandwidth_bytes_per_s
    return Roofline(
        bandwidth, part.flops_per_s(dtype), DTYPES[dtype],
        products=(
            ProductRate(1, bandwidth, ROW_LAUNCH_US), ProductRate(2, bandwidth, PRODUCT_LAUNCH_US),
        ),
        call_us=CALL_US,
    )  # fmt: skip


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
