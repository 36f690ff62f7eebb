"""The gradients of the norms of `rows`, plain, after an add, or gated in either order.

With u what is normed, r = 1 / sqrt(mean(u²) + eps), û = u r and g the gradient of û · w:
dw = Σ_rows g û and du = r (g w - û mean(g w û)). Statistics are computed again, nothing but the
inputs is kept; dw is summed per block of rows in float32, then over blocks, in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.norm.row_parts import block_of, row_strides

#: BLOCK_D -> (BLOCK_R, num_warps). Longer rows go in pieces of WIDE_BLOCK, read twice.
BWD_CONFIGS: dict[int, tuple[int, int]] = {
    16: (32, 1), 32: (16, 1), 64: (8, 1), 128: (4, 1), 256: (2, 1), 512: (1, 1), 1024: (1, 2),
    2048: (1, 4), 4096: (1, 8),
}  # fmt: skip
WIDE_BLOCK, WIDE_WARPS = 4096, 8
#: Blocks of rows, and so partial sums, of a weight's gradient.
MAX_PARTIALS = 512


@triton.jit
def load_normed(  # type: ignore[no-untyped-def]
    x, gate, dy, at, gate_at, dense, inside, GATE_FIRST: tl.constexpr, SIGMOID: tl.constexpr
):
    """u and the gradient of û · w; the gate's factor, silu(z) or sigmoid(z), and dz over what
    multiplies it (x without a gate).
    """
    xt = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dy + dense, mask=inside, other=0.0).to(tl.float32)
    factor, slope = xt, xt
    if gate is not None:
        z = tl.load(gate + gate_at, mask=inside, other=0.0).to(tl.float32)
        sig = tl.sigmoid(z)
        if SIGMOID:
            factor = sig
            slope = sig * (1.0 - sig)
        else:
            factor = z * sig
            slope = sig * (1.0 + z * (1.0 - sig))
        if GATE_FIRST:
            slope *= xt
            xt *= factor
        else:
            slope *= grad
            grad *= factor
    return xt, grad, factor, slope


@triton.jit
def store_gradients(  # type: ignore[no-untyped-def]
    dx, d_gate, d_summed, unit, grad, factor, slope, w, scale, along, dense, inside,
    GATE_FIRST: tl.constexpr,
):  # fmt: skip
    """dx and d_gate of a tile; along: mean(g w û) of its rows."""
    du = (grad * w - unit * along) * scale
    if d_gate is not None:
        if GATE_FIRST:
            dz = du * slope
            du *= factor
        else:
            dz = slope * unit * w
        tl.store(d_gate + dense, dz.to(d_gate.dtype.element_ty), mask=inside)
    if d_summed is not None:
        du += tl.load(d_summed + dense, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + dense, du.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def norm_bwd_kernel(  # type: ignore[no-untyped-def]
    x, gate, weight, dy, d_summed, dx, d_gate, d_weight, rows, inner,
    x_outer, x_inner, g_outer, g_inner,
    EPS: tl.constexpr, GATE_FIRST: tl.constexpr, SIGMOID: tl.constexpr, D: tl.constexpr,
    GROUPS: tl.constexpr, TILES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of TILES · BLOCK_R rows, GROUPS); all but x and gate are dense.

    gate (with d_gate) and d_summed, which joins dx, may be None; d_weight: [blocks, GROUPS, D].
    """
    block, group = tl.program_id(0), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    w = tl.load(weight + group * D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for tile in range(TILES):
        first = (block * TILES + tile) * BLOCK_R
        row = (first + tl.arange(0, BLOCK_R)) * GROUPS + group
        inside = (row < rows)[:, None] & (d < D)[None, :]
        outer, head = (row // inner).to(tl.int64), (row % inner).to(tl.int64)
        at = (outer * x_outer + head * x_inner)[:, None] + d[None, :]
        gate_at = (outer * g_outer + head * g_inner)[:, None] + d[None, :]
        dense = row.to(tl.int64)[:, None] * D + d[None, :]
        xt, grad, factor, slope = load_normed(
            x, gate, dy, at, gate_at, dense, inside, GATE_FIRST, SIGMOID
        )
        scale = tl.rsqrt(tl.sum(xt * xt, 1) / D + EPS)[:, None]
        unit = xt * scale
        acc += grad * unit
        along = (tl.sum(grad * w * unit, 1) / D)[:, None]
        store_gradients(
            dx, d_gate, d_summed, unit, grad, factor, slope, w, scale, along, dense, inside,
            GATE_FIRST,
        )  # fmt: skip
    partial = d_weight + (block * GROUPS + group).to(tl.int64) * D + d
    tl.store(partial, tl.sum(acc, 0), mask=d < D)


@triton.jit
def norm_bwd_wide_kernel(  # type: ignore[no-untyped-def]
    x, gate, weight, dy, d_summed, dx, d_gate, d_weight, rows, inner,
    x_outer, x_inner, g_outer, g_inner,
    EPS: tl.constexpr, GATE_FIRST: tl.constexpr, SIGMOID: tl.constexpr, D: tl.constexpr,
    GROUPS: tl.constexpr, TILES: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """As `norm_bwd_kernel`, one row in pieces of BLOCK_D: sums first, then gradients."""
    block, group = tl.program_id(0), tl.program_id(1)
    partial = d_weight + (block * GROUPS + group).to(tl.int64) * D
    weight += group * D
    lane = tl.arange(0, BLOCK_D)
    for tile in range(TILES):
        row = (block * TILES + tile) * GROUPS + group
        outer, head = (row // inner).to(tl.int64), (row % inner).to(tl.int64)
        start, gate_start = outer * x_outer + head * x_inner, outer * g_outer + head * g_inner
        dense = row.to(tl.int64) * D
        square = tl.zeros((BLOCK_D,), tl.float32)
        product = tl.zeros((BLOCK_D,), tl.float32)
        for piece in range(0, D, BLOCK_D):
            d = piece + lane
            inside = (d < D) & (row < rows)
            xt, grad, factor, slope = load_normed(
                x, gate, dy, start + d, gate_start + d, dense + d, inside, GATE_FIRST, SIGMOID
            )
            w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
            square += xt * xt
            product += grad * w * xt
        scale = tl.rsqrt(tl.sum(square, 0) / D + EPS)
        along = tl.sum(product, 0) * scale / D
        for piece in range(0, D, BLOCK_D):
            d = piece + lane
            inside = (d < D) & (row < rows)
            xt, grad, factor, slope = load_normed(
                x, gate, dy, start + d, gate_start + d, dense + d, inside, GATE_FIRST, SIGMOID
            )
            w = tl.load(weight + d, mask=d < D, other=0.0).to(tl.float32)
            unit = xt * scale
            store_gradients(
                dx, d_gate, d_summed, unit, grad, factor, slope, w, scale, along, dense + d, inside,
                GATE_FIRST,
            )  # fmt: skip
            acc = tl.load(partial + d, mask=(d < D) & (tile > 0), other=0.0)
            tl.store(partial + d, acc + grad * unit, mask=d < D)
        # The next row reads these partial sums, perhaps in other threads.
        tl.debug_barrier()


def norm_bwd(
    x: Tensor, gate: Tensor | None, weight: Tensor, dy: Tensor, d_summed: Tensor | None, eps: float,
    first: bool, groups: int, sigmoid: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """dx, d_gate and d_weight of what `rows` has checked; gradients that come are copied
    where they are not dense. d_summed: what the sum's other uses add to dx."""
    size = x.shape[-1] // groups
    inner, strides = row_strides(groups, x=x, gate=gate)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_gate = None if gate is None else torch.empty(x.shape, dtype=gate.dtype, device=x.device)
    rows = x.numel() // size
    block_d = block_of(size)
    wide = block_d not in BWD_CONFIGS
    block_r, warps = (1, WIDE_WARPS) if wide else BWD_CONFIGS[block_d]
    steps = triton.cdiv(rows // groups, block_r)
    tiles = triton.next_power_of_2(triton.cdiv(steps, max(1, MAX_PARTIALS // groups)))
    blocks = triton.cdiv(steps, tiles)
    partials = torch.empty(blocks, groups * size, dtype=torch.float32, device=x.device)
    kernel = norm_bwd_wide_kernel if wide else norm_bwd_kernel
    tile = {"BLOCK_D": WIDE_BLOCK} if wide else {"BLOCK_R": block_r, "BLOCK_D": block_d}
    kernel[(blocks, groups)](
        x, gate, weight, dy.contiguous(), None if d_summed is None else d_summed.contiguous(),
        dx, d_gate, partials, rows, inner, *strides, EPS=eps, GATE_FIRST=first,
        SIGMOID=sigmoid, D=size, GROUPS=groups, TILES=tiles, **tile, num_warps=warps, num_stages=1,
    )  # fmt: skip
    return dx, d_gate, partials.sum(0).to(weight.dtype)
