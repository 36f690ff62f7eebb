"""The gated RMSNorm of a recurrent step's output within the step's own launch.

A norm row, one head's P channels or those of several heads, is made by several programs. Each
stores its tile of y and counts itself in; the last to arrive sees them all and norms the row in
place, K tokens together, without a second launch. y is rounded in between,
so values are those of `norm.rows` after the step. Padded tokens stay as they are, 0.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import counters
from kernels.norm.rows import is_sigmoid, norm_ref
from kernels.norm.torch import OutputNorm
from kernels.recurrent.step import require_like, row_stride

#: Elements that each warp norms at a time: tokens by channels.
BLOCK = 1024


@triton.jit
def opened(x, SIGMOID: tl.constexpr):  # type: ignore[no-untyped-def]
    """The gate's factor: sigmoid(x), or silu(x)."""
    wide = x.to(tl.float32)
    factor = tl.sigmoid(wide)
    if not SIGMOID:
        factor *= wide
    return factor


@triton.jit
def norm_last(  # type: ignore[no-untyped-def]
    y, gate, weight, arrivals, gate_row, count, K, H, P,
    EPS, GATE_FIRST, SIGMOID, D, W, BLOCK_K, BLOCK_D,
):  # fmt: skip
    """Called by each program of a grid (tiles of P, H, B) that has stored its tile of y
    [B, K, H, P]; D channels of a norm row, W of the weight, which rows share when it is shorter.
    """
    batch = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * P // D * D
    arrived_at = arrivals + (batch * (H * P) + first) // D
    # All threads' stores precede the count, which releases them and acquires the other tiles'.
    tl.debug_barrier()
    arrived = tl.atomic_add(arrived_at, 1, sem="acq_rel", scope="gpu")
    if arrived == tl.num_programs(0) * (D // P) - 1:
        t = tl.arange(0, BLOCK_K)[:, None]
        row = batch * K + t
        out = y + row * (H * P) + first
        z = gate + row * gate_row + first
        scales = weight if W == D else weight + first
        total = tl.zeros([BLOCK_K], tl.float32)
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)[None, :]
            inside = (t < count) & (d < D)
            # Past the first-level cache, which may be older than what other programs stored.
            part = tl.load(out + d, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
            if GATE_FIRST:
                part *= opened(tl.load(z + d, mask=inside, other=0.0), SIGMOID)
            total += tl.sum(part * part, 1)
        scale = tl.rsqrt(total / D + EPS)[:, None]
        for start in range(0, D, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)[None, :]
            inside = (t < count) & (d < D)
            part = tl.load(out + d, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
            factor = opened(tl.load(z + d, mask=inside, other=0.0), SIGMOID)
            if GATE_FIRST:
                part *= factor
            w = tl.load(scales + d, mask=d < D, other=0.0).to(tl.float32)
            part = part * scale * w
            if not GATE_FIRST:
                part *= factor
            tl.store(out + d, part.to(y.dtype.element_ty), mask=inside)
        tl.store(arrived_at, 0)


def norm_arguments(
    norm: OutputNorm | None, arrivals: Tensor | None, y: Tensor, state: Tensor, warps: int
) -> dict[str, Any]:
    """What a step kernel of so many warps takes for its norm of y [B, K, H, P], by name; None: it
    has none.

    arrivals: int32 zeros, one for each norm row of a sequence, left at zero; None: fresh ones.
    Raises ValueError naming the argument, its value and the rule it breaks.
    """
    if norm is None:
        return _NO_NORM
    batch, tokens, heads, p = y.shape
    gate, weight = norm.gate, norm.weight
    shapes = ((batch, tokens, heads, p), (batch, tokens, heads * p))
    if tuple(gate.shape) not in shapes:
        raise ValueError(f"gate has shape {tuple(gate.shape)}; it needs {shapes[0]} or {shapes[1]}")
    width = gate.shape[-1]
    if tuple(weight.shape) != (width,):
        raise ValueError(f"weight has shape {tuple(weight.shape)}; the gate needs {(width,)}")
    require_like(state, gate=gate, weight=weight)
    d = width if norm.group is None else norm.group
    if d < 1 or d % p or width % d:
        raise ValueError(f"group={d} must be a multiple of P={p} and divide the gate's {width}")
    return {
        "gate": gate, "weight": weight, "gate_row": row_stride("gate", gate),
        "arrivals": counters(arrivals, batch * heads * p // d, y.device),
        **norm_constants(
            tokens, d, width, norm.eps, warps, gate_first=norm.gate_first,
            sigmoid=is_sigmoid(norm.opened),
        ),
    }  # fmt: skip


def norm_constants(
    tokens: int,
    d: int,
    width: int,
    eps: float,
    warps: int,
    *,
    gate_first: bool,
    sigmoid: bool = False,
) -> dict[str, Any]:
    """Constants of a step kernel with a norm: rows of d channels under a weight of `width`."""
    block_k = triton.next_power_of_2(tokens)
    return {
        "NORM_EPS": eps, "GATE_FIRST": gate_first, "SIGMOID": sigmoid, "NORM_D": d,
        "WEIGHT_D": width, "BLOCK_K": block_k,
        "BLOCK_D": min(triton.next_power_of_2(d), warps * BLOCK // block_k),
    }  # fmt: skip


_NO_NORM = dict.fromkeys((
    "gate", "weight", "arrivals", "gate_row",
    *norm_constants(1, 1, 1, 0.0, 1, gate_first=False),
))  # fmt: skip


def output_norm_ref(y: Tensor, norm: OutputNorm | None) -> Tensor:
    """The oracle: y [B, K, H, P] normed in float64; None: as it is."""
    if norm is None:
        return y
    return norm_ref(
        y.reshape(norm.gate.shape), norm.weight, norm.eps, norm.gate, gate_first=norm.gate_first,
        group=norm.group, opened=norm.opened,
    ).reshape(y.shape)  # fmt: skip
