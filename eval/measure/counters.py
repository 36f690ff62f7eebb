"""Bytes and FLOPs of a decode step, read from the counters of an NVIDIA GPU.

Bytes are all traffic of device memory. FLOPs are executed ones: float32 adds, multiplies and fused
multiply-adds (2) of vector units, and what matrix units do for bfloat16 and TF32 operands, padding
of tiles included. Not among them: half-precision vector instructions (compilers move constants
with them; our arithmetic is float32), exponentials, integers.

Each of the two is a run of its own: bytes are one counter, for which no kernel is replayed, so
that each finds the caches as the one before left them. Counters that miss a known copy or product
are not believed. A missing figure is a status and a reason in its place, never an error
of the measurements beside it.
"""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from eval.measure.counted import STEPS, Work, copied_bytes, product_size
from eval.measure.ncu import NotCountedError, counted
from eval.results.rows import Status

FLOPS = {
    "smsp__sass_thread_inst_executed_op_fadd_pred_on.sum": 1,
    "smsp__sass_thread_inst_executed_op_fmul_pred_on.sum": 1,
    "smsp__sass_thread_inst_executed_op_ffma_pred_on.sum": 2,
    "sm__ops_path_tensor_src_bf16_dst_fp32.sum": 1,
    "sm__ops_path_tensor_src_tf32_dst_fp32.sum": 1,
}
#: Instructions for two float32 at once, from this compute capability on.
PACKED_SINCE = 10
PACKED_FLOPS = {
    "smsp__sass_thread_inst_executed_op_fadd2_pred_on.sum": 2,
    "smsp__sass_thread_inst_executed_op_fmul2_pred_on.sum": 2,
    "smsp__sass_thread_inst_executed_op_ffma2_pred_on.sum": 4,
}


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured figure, or a status and a reason in its place."""

    value: float | None = None
    status: Status = Status.OK
    note: str = ""


@dataclass(frozen=True, slots=True)
class Kind:
    """A quantity to count: its counters, and the known work that calibrates them.

    tolerance: how far the counters may be from the known work, relative.
    scaled: whether figures are divided by what the counters saw of the known work.
    """

    measure: str
    probe: str
    metrics: Callable[[torch.device], Mapping[str, int]]
    known: Callable[[torch.device], float]
    tolerance: float
    scaled: bool


def _flops_metrics(device: torch.device) -> Mapping[str, int]:
    packed = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= PACKED_SINCE
    return {**FLOPS, **PACKED_FLOPS} if packed else FLOPS


#: Bytes are sampled by the memory's own units and may be off by a factor; instructions are counted.
KINDS = (
    Kind("step_bytes_meas", "copy", lambda _: {"dram__bytes.sum": 1}, copied_bytes, 0.3, True),
    Kind(
        "step_flops_meas", "product", _flops_metrics, lambda d: 2 * product_size(d) ** 3, 0.05,
        False,
    ),
)  # fmt: skip
INTENSITY = "arith_intensity_meas"


@dataclass(slots=True)
class Counters:
    """A device's counters, calibrated when first used; a calibration that failed stays so."""

    device: torch.device
    _trusted: dict[str, float | NotCountedError] = field(default_factory=dict)

    def count(self, work: Work) -> dict[str, Figure]:
        """Bytes, FLOPs and FLOP per byte of one step, by measure."""
        found = {kind.measure: self._figure(kind, work) for kind in KINDS}
        moved, done = found.values()
        return {**found, INTENSITY: _ratio(done, moved)}

    def usable(self) -> dict[str, str]:
        """By measure: "usable", or why not, tried on the known work."""
        told = {}
        for kind in KINDS:
            try:
                seen = self._calibrate(kind)
                told[kind.measure] = f"usable; counts {seen:.3f} of a known {kind.probe}"
            except NotCountedError as why:
                told[kind.measure] = str(why)
        return told

    def _figure(self, kind: Kind, work: Work) -> Figure:
        try:
            seen = self._calibrate(kind)
            total = counted(kind.metrics(self.device), self.device, work.to_json())
        except NotCountedError as why:
            return Figure(status=why.status, note=str(why))
        return Figure(total / STEPS / (seen if kind.scaled else 1.0))

    def _calibrate(self, kind: Kind) -> float:
        """The share of the known work that the counters see, 1.0 being all of it."""
        if kind.probe not in self._trusted:
            try:
                self._trusted[kind.probe] = self._probe(kind)
            except NotCountedError as why:
                self._trusted[kind.probe] = why
        seen = self._trusted[kind.probe]
        if isinstance(seen, NotCountedError):
            raise seen
        return seen

    def _probe(self, kind: Kind) -> float:
        reason = why_not(self.device)
        if reason is not None:
            raise NotCountedError(Status.UNSUPPORTED, reason)
        total = counted(kind.metrics(self.device), self.device, kind.probe)
        seen = total / kind.known(self.device)
        if abs(seen - 1) > kind.tolerance:
            raise NotCountedError(
                Status.INCORRECT,
                f"counters see {seen:.2f} of a known {kind.probe}, more than {kind.tolerance:.0%} "
                "off: not to be trusted",
            )
        return seen


def _ratio(above: Figure, below: Figure) -> Figure:
    """above / below, or the reason why one of them is missing."""
    if above.value is None or below.value is None:
        return below if below.value is None else above
    if below.value == 0:
        return Figure(status=Status.INCORRECT, note="no traffic of device memory was counted")
    return Figure(above.value / below.value)


def why_not(device: torch.device) -> str | None:
    """What is missing on this machine; None if counting can be tried."""
    if device.type != "cuda" or torch.version.cuda is None:
        return "counters need an NVIDIA GPU and torch with CUDA"
    if shutil.which("ncu") is None:
        return "counters need Nsight Compute: ncu is not on PATH"
    return None
