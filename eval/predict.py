"""What any architecture would cost to decode on any hardware, from declarations alone.

Each operation takes the longer of its bytes at full bandwidth and its FLOPs at full rate; their
sum is the step. No weights are made, so a 70B-token context on an H200 is answered at once.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from archs.cost import Cost, Step
from archs.errors import UserError, unknown_name
from archs.registry import ModelSpec
from archs.sizes import get_scale
from eval.hardware import Roofline, measure_roofline


@dataclass(frozen=True, kw_only=True, slots=True)
class Accelerator:
    """Datasheet figures: dense bf16 rate without sparsity, bandwidth, memory."""

    name: str
    matrix_flops_per_s: float
    bandwidth_bytes_per_s: float
    memory_bytes: int

    @property
    def roofline(self) -> Roofline:
        """The two ceilings."""
        return Roofline(self.bandwidth_bytes_per_s, self.matrix_flops_per_s, torch.bfloat16)


#: From the makers' datasheets (SXM or OAM parts; dense bf16 with fp32 accumulation).
ACCELERATORS: dict[str, Accelerator] = {
    key: Accelerator(
        name=name,
        matrix_flops_per_s=tflops * 1e12,
        bandwidth_bytes_per_s=tbytes * 1e12,
        memory_bytes=int(gbytes * 1e9),
    )
    for key, name, tflops, tbytes, gbytes in (
        ("a100", "NVIDIA A100 80GB SXM", 312, 2.039, 80),
        ("h100", "NVIDIA H100 SXM", 989, 3.35, 80),
        ("h200", "NVIDIA H200 SXM", 989, 4.8, 141),
        ("b200", "NVIDIA B200", 2250, 8.0, 180),
        ("mi300x", "AMD Instinct MI300X", 1307, 5.3, 192),
        ("l4", "NVIDIA L4", 121, 0.3, 24),
        ("rtx4090", "NVIDIA GeForce RTX 4090", 165, 1.008, 24),
    )
}
THIS_MACHINE = "this-machine"


def roofline_of(hardware: str) -> Roofline:
    """A datasheet's roofline, or this machine's, measured now. Raises UserError."""
    if hardware == THIS_MACHINE:
        cuda = torch.cuda.is_available()
        return measure_roofline(*(("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)))
    if hardware not in ACCELERATORS:
        raise unknown_name("hardware", hardware, [*ACCELERATORS, THIS_MACHINE])
    return ACCELERATORS[hardware].roofline


def predict(
    archs: Iterable[str],
    scale: str,
    hardware: Iterable[str],
    batches: Iterable[int],
    contexts: Iterable[int],
) -> list[dict[str, object]]:
    """One row per architecture, hardware, batch and context, with the Measures' names."""
    rooflines = {name: roofline_of(name) for name in hardware}
    grid = [(b, c) for b in batches for c in contexts]
    rows: list[dict[str, object]] = []
    for arch in archs:
        for name, roofline in rooflines.items():
            model = ModelSpec(arch=arch, scale=get_scale(scale)).outline(roofline.dtype)
            for batch, context in grid:
                cost = model.cost(Step(batch, 1, context))
                tpot_ms = sum(roofline.time_ms(op.flops, op.bytes) for op in cost.ops)
                rows.append(
                    {
                        "arch": arch, "scale": scale, "hardware": name, "batch": batch,
                        "context": context, "state_bytes": model.state_bytes(context),
                        "weight_bytes": cost.weight_bytes, "step_bytes": cost.bytes,
                        "step_flops": cost.flops,
                        "arith_intensity_pred": cost.intensity_flop_per_byte,
                        "ridge_flop_per_byte": roofline.ridge_flop_per_byte,
                        "tpot_ms": tpot_ms, "output_tok_per_s": 1e3 * batch / tpot_ms,
                        "output_tok_per_s_per_user": 1e3 / tpot_ms,
                        "bound_by": bound_by(cost, roofline),
                    }
                )  # fmt: skip
    return rows


def bound_by(cost: Cost, roofline: Roofline) -> str:
    """What most of the step's time goes to: weights, state or compute."""
    spent = {"weights": 0.0, "state": 0.0, "compute": 0.0}
    for op in cost.ops:
        time_ms = roofline.time_ms(op.flops, op.bytes)
        memory_ms = op.bytes / roofline.copy_bytes_per_s * 1e3
        if time_ms > memory_ms:
            spent["compute"] += time_ms
        else:
            spent["weights"] += time_ms * op.weight_bytes / max(op.bytes, 1)
            spent["state"] += time_ms * (1 - op.weight_bytes / max(op.bytes, 1))
    return max(spent, key=lambda k: spent[k])


def parse_counts(text: str) -> list[int]:
    """`1,8,64`, or `1:512` for powers of two; k and m are 1,024 and 1,048,576."""
    counts: list[int] = []
    for part in text.split(","):
        first, colon, last = part.partition(":")
        low = _count(first)
        high = _count(last) if colon else low
        if high < low:
            raise UserError(f"range '{part}' ends before it begins; write low:high")
        while low <= high:
            counts.append(low)
            low *= 2
    return counts


def _count(text: str) -> int:
    factor = {"k": 1024, "m": 1024**2}.get(text[-1:].lower(), 1)
    digits = text[:-1] if factor > 1 else text
    if not digits.isdecimal() or int(digits) < 1:
        raise UserError(f"'{text}' is not a positive count; write for example 1, 64, 4k or 1:512")
    return int(digits) * factor
