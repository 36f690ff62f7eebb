"""Accelerators by their datasheets: what predictions stand on where nothing was measured.

Rates are dense (no sparsity), with float32 accumulation; bandwidth is the device memory's.
"""

from dataclasses import dataclass

from archs.errors import unknown_name


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

    @property
    def memory_bytes(self) -> int:
        """Of the device."""
        return int(self.memory_gbyte * 1e9)

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """Of its memory."""
        return self.bandwidth_tbyte_per_s * 1e12

    def flops_per_s(self, dtype: str) -> float:
        """Matrix rate. Raises UserError for a dtype the table has no rate for."""
        if dtype not in self.tflops_per_s:
            raise unknown_name(f"dtype of {self.name}", dtype, self.tflops_per_s)
        return self.tflops_per_s[dtype] * 1e12

    def ridge_flop_per_byte(self, dtype: str) -> float:
        """Intensity from which on arithmetic takes longer than memory."""
        return self.flops_per_s(dtype) / self.bandwidth_bytes_per_s


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
