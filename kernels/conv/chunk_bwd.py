"""The gradients of `chunk.causal_conv` in x, weight, bias and tail, in two passes.

First dz, the gradient of what SiLU is applied to, computed again from x, and with it the sums
dw_i = Σ_t dz_t x_{t-W+1+i} and db = Σ_t dz_t, per block of tokens in float32, added up afterwards
in a fixed order; then dx_t = Σ_i w_i dz_{t+W-1-i}, in which tail and x are one run of rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.conv.chunk_rows import convolve, load_rows, load_taps, tap_of

#: BLOCK_T, BLOCK_C, num_warps: of the sums, and of dx.
SUMS_CONFIG = (64, 64, 8)
ROWS_CONFIG = (64, 64, 4)
#: Tiles of tokens that one program sums over, at most.
MAX_TILES = 4


@triton.jit
def conv_chunk_bwd_sums_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, tail, new, dy, dz, sums, tokens, x_batch, x_row, tail_stride,
    SILU: tl.constexpr, C: tl.constexpr, W: tl.constexpr, TAPS: tl.constexpr, SUMS: tl.constexpr,
    TILES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of C, blocks of TILES tiles, B); all but x and tail is dense.

    bias, tail and new may be None, dz is unless SILU. sums: [B, blocks, W + 1, C], for every tap,
    then for the bias; SUMS: at least W + 1.
    """
    block = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    count = tokens
    if new is not None:
        count = tl.minimum(tl.load(new + batch), tokens)
    held = None
    if tail is not None:
        held = tail + batch * tail_stride
    x += batch * x_batch
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    taps = load_taps(weight, c, W, C, TAPS)
    which = tl.arange(0, SUMS)
    acc = tl.zeros((SUMS, BLOCK_C), tl.float32)
    for tile in range(TILES):
        t = (block * TILES + tile).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
        at = (batch * tokens + t)[:, None] * C + c[None, :]
        inside = (t < count)[:, None] & (c < C)[None, :]
        grad = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        if SILU:
            z = convolve(x, taps, bias, held, t, c, count, x_row, W, C)
            sig = tl.sigmoid(z)
            grad *= sig * (1.0 + z * (1.0 - sig))
        # Not unrolled: rows of every tap at once would not fit the registers.
        for i in range(W):
            product = grad * load_rows(x, held, t + i, c, count, x_row, W, C)
            acc += tl.where((which == i)[:, None], tl.sum(product, 0)[None, :], 0.0)
        acc += tl.where((which == W)[:, None], tl.sum(grad, 0)[None, :], 0.0)
        if SILU:
            tl.store(dz + at, grad.to(dz.dtype.element_ty), mask=inside)
    row = (batch * tl.num_programs(1) + block) * (W + 1) + which
    to = sums + row[:, None] * C + c[None, :]
    tl.store(to, acc, mask=(which <= W)[:, None] & (c < C)[None, :])


@triton.jit
def conv_chunk_bwd_rows_kernel(  # type: ignore[no-untyped-def]
    dz, weight, new, dx, d_tail, tokens,
    C: tl.constexpr, W: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of C, tiles of rows, B): dx, and with d_tail, if any, the tail's rows before."""
    batch = tl.program_id(2).to(tl.int64)
    count = tokens
    if new is not None:
        count = tl.minimum(tl.load(new + batch), tokens)
    first = W - 1
    if d_tail is not None:
        first = 0
    dz += batch * tokens * C
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = (c < C)[None, :]
    row = first + tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    taps = load_taps(weight, c, W, C, TAPS)
    acc = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    for i in tl.static_range(W):
        t = row - i
        inside = ((t >= 0) & (t < count))[:, None] & in_c
        grad = tl.load(dz + t[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
        acc += tap_of(taps, i) * grad
    own = row - (W - 1)
    to = dx + (batch * tokens + own)[:, None] * C + c[None, :]
    inside = ((own >= 0) & (own < tokens))[:, None] & in_c
    tl.store(to, acc.to(dx.dtype.element_ty), mask=inside)
    if d_tail is not None:
        to = d_tail + (batch * (W - 1) + row)[:, None] * C + c[None, :]
        tl.store(to, acc.to(d_tail.dtype.element_ty), mask=(own < 0)[:, None] & in_c)


def conv_bwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, new: Tensor | None,
    dy: Tensor, *, silu: bool, with_tail: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """dx, d_weight, d_bias, d_tail (where wanted) of what `causal_conv` has checked.

    dy [B, T, C] is copied where it is not dense; dz is kept in x's dtype between the passes.
    """
    batch, tokens, channels = x.shape
    width, dy = weight.shape[1], dy.contiguous()
    sizes = {"C": channels, "W": width, "TAPS": triton.next_power_of_2(width)}
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_tail = None
    if with_tail and tail is not None:
        d_tail = torch.empty(tail.shape, dtype=tail.dtype, device=x.device)

    block_t, block_c, warps = SUMS_CONFIG
    steps = triton.cdiv(tokens, block_t)
    tiles = min(MAX_TILES, triton.next_power_of_2(steps))
    blocks = triton.cdiv(steps, tiles)
    sums = torch.empty(batch, blocks, width + 1, channels, dtype=torch.float32, device=x.device)
    dz = torch.empty(x.shape, dtype=x.dtype, device=x.device) if silu else None
    conv_chunk_bwd_sums_kernel[(triton.cdiv(channels, block_c), blocks, batch)](
        x, weight, bias, tail, new, dy, dz, sums, tokens, x.stride(0), x.stride(1),
        0 if tail is None else tail.stride(0), SILU=silu, **sizes,
        SUMS=triton.next_power_of_2(width + 1), TILES=tiles, BLOCK_T=block_t, BLOCK_C=block_c,
        num_warps=warps, num_stages=1,
    )  # fmt: skip
    block_t, block_c, warps = ROWS_CONFIG
    rows = tokens if d_tail is None else tokens + width - 1
    conv_chunk_bwd_rows_kernel[(triton.cdiv(channels, block_c), triton.cdiv(rows, block_t), batch)](
        dy if dz is None else dz, weight, new, dx, d_tail, tokens, **sizes, BLOCK_T=block_t,
        BLOCK_C=block_c, num_warps=warps,
    )  # fmt: skip
    total = sums.sum((0, 1))
    d_weight = total[:width].t().to(weight.dtype).contiguous()
    return dx, d_weight, None if bias is None else total[width].to(bias.dtype), d_tail
