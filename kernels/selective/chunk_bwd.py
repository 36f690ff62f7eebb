"""Gradients of `chunk`: states are recomputed, first by chunks, then within one.

With g_t the gradient of h_t, taken from the last token to the first, and f_t = Δ_t x_t:
g_t = dy_t C_t + e^{Δ_{t+1} A} g_{t+1}, dC_t = Σ_E dy_t h_t, dB_t = Σ_E f_t g_t, df_t = Σ_N g_t B_t,
and through the decay, p_t = g_t e^{Δ_t A} h_{t-1}: dA = Σ_t Δ_t p_t, dΔ_t = Σ_N A p_t + x_t df_t.
The sums over programs are taken by torch: no atomics, so that results repeat bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.recurrent.step import row_stride
from kernels.selective.chunk_passes import CHUNK, LOG2E, Sizes, carry, selective_chunk_token, states

#: Tokens whose states a program stores at a time; their number and the blocks' add up to 16.
SUB = 8
#: One would spill where rows of odd length are read float by float.
WARPS = 2


@triton.jit
def selective_chunk_bwd_rows_kernel(  # type: ignore[no-untyped-def]
    x, dt, a, b, c, d, dy, new, states, later, scratch, dx, ddt, da, db, dc, dd,
    x_row, dt_row, b_row, c_row, dy_row, tokens, chunks,
    CHUNK: tl.constexpr, SUB: tl.constexpr, E: tl.constexpr, N: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (chunks × tiles of E, B): every gradient of a chunk, from the states around it.

    scratch: CHUNK // SUB + SUB states per chunk: those that blocks of SUB tokens start from, and
    those before each token of one block. da, dd: parts by chunk; db, dc: parts by tile of E.
    """
    tiles: tl.constexpr = (E + BLOCK_E - 1) // BLOCK_E
    chunk, part = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    batch = tl.program_id(1).to(tl.int64)
    count = tokens
    if new is not None:
        count = tl.minimum(tokens, tl.load(new + batch))
    count -= chunk * CHUNK
    e = part * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    in_e, in_n = e < E, n < N
    inside = in_e[:, None] & in_n[None, :]
    tile = e[:, None] * N + n[None, :]
    lane = batch * chunks + chunk
    rate = tl.load(a + tile, mask=inside, other=0.0) * LOG2E
    skip = tl.load(d + e, mask=in_e, other=0.0).to(tl.float32)
    h = tl.load(states + lane * E * N + tile, mask=inside, other=0.0)
    first = batch * tokens + chunk * CHUNK
    blocks = tl.cdiv(tl.minimum(CHUNK, tokens - chunk * CHUNK), SUB)
    starts = scratch + lane * (CHUNK // SUB + SUB) * E * N + tile
    each = starts + CHUNK // SUB * E * N
    for block in range(blocks):
        tl.store(starts + block * E * N, h, mask=inside)
        for i in range(SUB):
            t = block * SUB + i
            row = first + t
            h, _, _ = selective_chunk_token(
                h, rate, x + row * x_row + e, dt + row * dt_row + e, b + row * b_row + n,
                in_e & (t < count), in_n & (t < count),
            )  # fmt: skip
    # Stores and loads of the scratch get one layout, so that a thread reads what it wrote itself;
    # the barriers keep this right on NVIDIA even where it were otherwise.
    tl.debug_barrier()
    grad = tl.load(later + lane * E * N + tile, mask=inside, other=0.0)
    grad_a = tl.zeros([BLOCK_E, BLOCK_N], tl.float32)
    grad_d = tl.zeros([BLOCK_E], tl.float32)
    held = (part * tl.num_programs(1).to(tl.int64) * tokens + first) * N
    for back in range(blocks):
        block = blocks - 1 - back
        h = tl.load(starts + block * E * N, mask=inside, other=0.0)
        for i in range(SUB):
            t = block * SUB + i
            row = first + t
            tl.store(each + i * E * N, h, mask=inside)
            h, _, _ = selective_chunk_token(
                h, rate, x + row * x_row + e, dt + row * dt_row + e, b + row * b_row + n,
                in_e & (t < count), in_n & (t < count),
            )  # fmt: skip
        tl.debug_barrier()
        for back_i in range(SUB):
            i = SUB - 1 - back_i
            t = block * SUB + i
            row = first + t
            valid = t < count
            in_et, in_nt = in_e & valid, in_n & valid
            step = tl.load(dt + row * dt_row + e, mask=in_et, other=0.0)
            xt = tl.load(x + row * x_row + e, mask=in_et, other=0.0).to(tl.float32)
            gy = tl.load(dy + row * dy_row + e, mask=in_et, other=0.0).to(tl.float32)
            bt = tl.load(b + row * b_row + n, mask=in_nt, other=0.0).to(tl.float32)
            ct = tl.load(c + row * c_row + n, mask=in_nt, other=0.0).to(tl.float32)
            before = tl.load(each + i * E * N, mask=inside, other=0.0)
            decay = tl.exp2(step[:, None] * rate)
            fed = step * xt
            kept = decay * before
            grad += gy[:, None] * ct[None, :]
            grad_c = tl.sum(gy[:, None] * (kept + fed[:, None] * bt[None, :]), 0)
            grad_b = tl.sum(fed[:, None] * grad, 0)
            grad_fed = tl.sum(grad * bt[None, :], 1)
            through = grad * kept
            # rate is A log₂e.
            grad_dt = tl.sum(through * rate, 1) / LOG2E + grad_fed * xt
            grad_x = grad_fed * step + skip * gy
            grad_a += through * step[:, None]
            grad_d += xt * gy
            grad *= decay
            written = chunk * CHUNK + t < tokens
            tl.store(dx + row * E + e, grad_x.to(dx.dtype.element_ty), mask=in_e & written)
            tl.store(ddt + row * E + e, tl.where(valid, grad_dt, 0.0), mask=in_e & written)
            tl.store(db + held + t * N + n, grad_b, mask=in_n & written)
            tl.store(dc + held + t * N + n, grad_c, mask=in_n & written)
        tl.debug_barrier()
    tl.store(da + lane * E * N + tile, grad_a, mask=inside)
    tl.store(dd + lane * E + e, grad_d, mask=in_e)


def gradients(
    dy: Tensor | None, dlast: Tensor | None,
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor,
    state: Tensor | None, new: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of x, dt, a, b, c, d and the first state, in their dtypes.

    dy: [B, T, E] and dlast: float32 [B, E, N], None where nothing comes from y or from the last
    state; the rest is as `chunk` has it.
    """
    s, device = Sizes.of(x, a), x.device
    dy = torch.zeros(x.shape, dtype=x.dtype, device=device) if dy is None else dy.contiguous()
    dlast = None if dlast is None else dlast.contiguous()
    total = torch.empty(s.batch, s.chunks, s.width, device=device)
    starts = states(s, x, dt, a, b, new, total)
    carry(s, state, a, total, starts)
    later = states(s, dy, dt, a, c, new, total, reverse=True)
    dstate = carry(s, dlast, a, total, later, reverse=True)
    scratch = torch.empty(s.batch, s.chunks, CHUNK // SUB + SUB, s.width, s.n, device=device)
    dx = torch.empty(x.shape, dtype=x.dtype, device=device)
    ddt = torch.empty(x.shape, device=device)
    da, dd = torch.empty_like(starts), torch.empty_like(total)
    db, dc = torch.empty(2, s.tiles, s.batch, s.tokens, s.n, device=device)
    selective_chunk_bwd_rows_kernel[s.grid](
        x, dt, a, b, c, d, dy, new, starts, later, scratch, dx, ddt, da, db, dc, dd,
        row_stride("x", x), row_stride("dt", dt), row_stride("b", b), row_stride("c", c),
        s.width, s.tokens, s.chunks, CHUNK=CHUNK, SUB=SUB, **s.blocks, num_warps=WARPS,
    )  # fmt: skip
    db, dc = db.sum(0).to(b.dtype), dc.sum(0).to(c.dtype)
    return dx, ddt, da.sum((0, 1)), db, dc, dd.sum((0, 1)).to(d.dtype), dstate
