"""The three passes of `chunk`, each of them serving both directions of time.

c is the running sum of g within a chunk, Λ its last value, S the state before a chunk and D the
gradient of the state after it. Forward, and backward with time reversed (arXiv 2405.21060, 6):
contributions  Σ e^{Λ-c} k vᵀ;                            Σ e^{c} q dyᵀ
carry          S' = e^{Λ} S + contribution;               D' = e^{Λ} D + contribution
rows           y = (L ∘ q kᵀ) v + e^{c} q S,              dv = (Lᵀ ∘ k qᵀ) dy + e^{Λ-c} k D,
               dq = (L ∘ dy vᵀ) k + e^{c} dy Sᵀ,          dk = (Lᵀ ∘ v dyᵀ) q + e^{Λ-c} v Dᵀ
with L_ts = e^{c_t - c_s} where s <= t, else 0. No product takes the transpose of another product.

B batch, T tokens, G groups of q and k, H heads of v, N key channels, P value channels.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.decay.running_sums import gaps, running_sums
from kernels.recurrent.scan import ScanSizes
from kernels.recurrent.step import row_stride

#: Warps of the first pass: with four, ptxas spills to keep 64 registers on sm_100.
CONTRIBUTION_WARPS = 2
#: Elements of a state per program of one warp: its sum needs no barrier.
CARRY_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Config:
    """Tokens per chunk, channels per tile (fewer are masked), warps of the third pass."""

    chunk: int
    tile: int
    warps: int


#: Products of float32 are exact ("ieee"), without the matrix unit: larger tiles would spill.
CONFIGS: dict[torch.dtype, Config] = {
    torch.bfloat16: Config(64, 64, 4),
    torch.float16: Config(64, 64, 4),
    torch.float32: Config(32, 32, 2),
}


@triton.jit
def decay_chunk_fwd_contributions_kernel(  # type: ignore[no-untyped-def]
    a, b, log_decay, new, total, fresh,
    a_row, b_row, g_batch, g_token, g_head, tokens, chunks,
    SHARE: tl.constexpr, N: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """Grid (chunks × tiles of [N, P], H, B): what a chunk adds to the state, Σ e^{..} a bᵀ.

    a is q or k, b is v or dy. The running sums `total` [B, H, chunks, 2, CHUNK], float32 and the
    rest, are written forward, read reversed.
    """
    tiles_p: tl.constexpr = (P + BLOCK_P - 1) // BLOCK_P
    tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N * tiles_p
    chunk = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    lane = (batch * tl.num_programs(1) + head) * chunks + chunk
    count = tokens
    if new is not None:
        count = tl.minimum(tokens, tl.load(new + batch))
    c = tl.arange(0, CHUNK)
    t = chunk * CHUNK + c
    valid = t < count
    n = tile // tiles_p * BLOCK_N + tl.arange(0, BLOCK_N)
    p = tile % tiles_p * BLOCK_P + tl.arange(0, BLOCK_P)
    row = batch * tokens + chunk * CHUNK
    at = tl.load(
        a + row * a_row + head // SHARE * N + (c * a_row)[None, :] + n[:, None],
        mask=valid[None, :] & (n < N)[:, None], other=0.0,
    )  # fmt: skip
    bt = tl.load(
        b + row * b_row + head * P + (c * b_row)[:, None] + p[None, :],
        mask=valid[:, None] & (p < P)[None, :], other=0.0,
    )  # fmt: skip
    sums = total + lane * 2 * CHUNK + c
    if REVERSED:
        weight = tl.exp(tl.load(sums))
    else:
        g = log_decay + batch * g_batch + t.to(tl.int64) * g_token + head * g_head
        g = tl.load(g, mask=valid, other=0.0).to(tl.float32)
        near, rest = running_sums(g)
        last = c == CHUNK - 1
        weight = tl.sum(tl.where(last, near, 0.0), 0) - near
        weight = tl.exp(weight + (tl.sum(tl.where(last, rest, 0.0), 0) - rest))
        if tile == 0:
            tl.store(sums, near)
            tl.store(sums + CHUNK, rest)
    bt = (bt.to(tl.float32) * weight[:, None]).to(at.dtype)
    added = tl.dot(at, bt, input_precision=PRECISION)
    inside = (n < N)[:, None] & (p < P)[None, :]
    tl.store(fresh + lane * N * P + n[:, None] * P + p[None, :], added, mask=inside)


@triton.jit
def decay_chunk_fwd_carry_kernel(  # type: ignore[no-untyped-def]
    first, fresh, total, last, states, kept, chunks,
    SIZE: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of N·P, H, B): from what every chunk adds to what every chunk starts from.

    `fresh` is overwritten; `first` (None: zeros) precedes the first chunk taken, `last` follows
    the last one. Reversed, `kept` receives this block's part of e^{Λ} <S, D> where it is given.
    """
    lane = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < SIZE
    current = tl.zeros([BLOCK], tl.float32)
    if first is not None:
        current = tl.load(first + lane * SIZE + i, mask=inside, other=0.0)
    place = lane * chunks * SIZE + i
    sign = 1
    if REVERSED:
        place = (lane * chunks + chunks - 1) * SIZE + i
        sign = -1
    part = (tl.program_id(0) * tl.num_programs(2) * tl.num_programs(1) + lane) * chunks
    # Two loads ahead of their use: one would leave the memory idle between chunks.
    added = tl.load(fresh + place, mask=inside, other=0.0)
    after = tl.load(fresh + place + sign * SIZE, mask=inside & (chunks > 1), other=0.0)
    for step in range(chunks):
        ahead = inside & (step + 2 < chunks)
        later = tl.load(fresh + place + 2 * sign * SIZE, mask=ahead, other=0.0)
        chunk = chunks - 1 - step if REVERSED else step
        decay = tl.exp(tl.load(total + (lane * chunks + chunk) * 2 * CHUNK + CHUNK - 1))
        tl.store(fresh + place, current, mask=inside)
        if kept is not None:
            before = tl.load(states + place, mask=inside, other=0.0)
            tl.store(kept + part + chunk, decay * tl.sum(before * current, 0))
        current = decay * current + added
        added, after = after, later
        place += sign * SIZE
    tl.store(last + lane * SIZE + i, current, mask=inside)


@triton.jit
def decay_chunk_fwd_rows_kernel(  # type: ignore[no-untyped-def]
    a, b, x, w, states, total, new, y, change,
    a_row, b_row, x_row, w_row, tokens, chunks,
    A_SHARE: tl.constexpr, X_SHARE: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    STATE_IN: tl.constexpr, STATE_OUT: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr,
    PRECISION: tl.constexpr, REVERSED: tl.constexpr,
):  # fmt: skip
    """Grid (chunks × tiles of OUT, H, B): y = (L ∘ a bᵀ) x + e^{..} a S, IN channels in, OUT out.

    `change` (None: unwanted) receives this tile's part of the gradient of the running sums from
    w, which is q where y is dq, k where y is dk: Σ_s W_ts - Σ_s W_st + w·(e^{c} a S)_t with
    W = L ∘ a bᵀ ∘ w xᵀ, and reversed only the last term, which acts with the opposite sign.
    """
    tiles: tl.constexpr = (OUT + BLOCK_OUT - 1) // BLOCK_OUT
    chunk = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    head, heads = tl.program_id(1), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    lane = batch * heads + head
    count = tokens
    if new is not None:
        count = tl.minimum(tokens, tl.load(new + batch))
    c = tl.arange(0, CHUNK)
    t = chunk * CHUNK + c
    valid = t < count
    # Only where a chunk starts can be far away; within it, 32 bits count.
    row = batch * tokens + chunk * CHUNK
    o = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    held = states + (lane * chunks + chunk) * IN * OUT
    scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    past = tl.zeros([CHUNK, BLOCK_OUT], tl.float32)
    for start in range(0, IN, BLOCK_IN):
        k = start + tl.arange(0, BLOCK_IN)
        in_k = k < IN
        at = tl.load(
            a + row * a_row + head // A_SHARE * IN + (c * a_row)[:, None] + k[None, :],
            mask=valid[:, None] & in_k[None, :], other=0.0,
        )  # fmt: skip
        bt = tl.load(
            b + row * b_row + head // A_SHARE * IN + (c * b_row)[None, :] + k[:, None],
            mask=valid[None, :] & in_k[:, None], other=0.0,
        )  # fmt: skip
        s = tl.load(
            held + k[:, None] * STATE_IN + o[None, :] * STATE_OUT,
            mask=in_k[:, None] & (o < OUT)[None, :], other=0.0,
        )  # fmt: skip
        scores = tl.dot(at, bt, scores, input_precision=PRECISION)
        past = tl.dot(at, s.to(at.dtype), past, input_precision=PRECISION)
    sums = total + (lane * chunks + chunk) * 2 * CHUNK
    near, rest = tl.load(sums + c), tl.load(sums + CHUNK + c)
    # Masked before exp, so that nothing positive is ever exponentiated.
    gap = gaps(near, rest)
    if REVERSED:
        scale = tl.load(sums + CHUNK - 1) - near
        scale = tl.exp(scale + (tl.load(sums + 2 * CHUNK - 1) - rest))
        gap = tl.where(c[:, None] <= c[None, :], -gap, float("-inf"))
    else:
        scale = tl.exp(near)
        gap = tl.where(c[:, None] >= c[None, :], gap, float("-inf"))
    scores *= tl.exp(gap)
    past *= scale[:, None]
    inside = valid[:, None] & (o < OUT)[None, :]
    part = head // X_SHARE * OUT
    xt = x + row * x_row + part + (c * x_row)[:, None] + o[None, :]
    xt = tl.load(xt, mask=inside, other=0.0)
    if change is not None:
        wt = w + row * w_row + part + (c * w_row)[:, None] + o[None, :]
        wt = tl.load(wt, mask=inside, other=0.0)
        moved = tl.sum(past * wt.to(tl.float32), 1)
        if not REVERSED:
            pairs = scores * tl.dot(wt, tl.trans(xt), input_precision=PRECISION)
            moved += tl.sum(pairs, 1) - tl.sum(pairs, 0)
        place = tile * tl.num_programs(2) * heads + lane
        tl.store(change + (place * chunks + chunk) * CHUNK + c, moved)
    out = tl.dot(scores.to(xt.dtype), xt, past, input_precision=PRECISION)
    tl.store(
        y + (row * heads + head) * OUT + (c * heads * OUT)[:, None] + o[None, :],
        out.to(y.dtype.element_ty), mask=(t < tokens)[:, None] & (o < OUT)[None, :],
    )  # fmt: skip


def empty(like: Tensor, *shape: int) -> Tensor:
    """Uninitialised float32, on the device of `like`."""
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def sums(sizes: ScanSizes, like: Tensor) -> Tensor:
    """Room for the running sums, each a float32 and what its rounding left."""
    return empty(like, sizes.batch, sizes.heads, sizes.chunks, 2, sizes.chunk)


def contributions(
    sizes: ScanSizes, a: Tensor, b: Tensor, log_decay: Tensor, new: Tensor | None, total: Tensor,
    *, reverse: bool = False,
) -> Tensor:  # fmt: skip
    """What every chunk adds: float32 [B, H, chunks, N, P]; forward, `total` is written."""
    s = sizes
    fresh = empty(a, s.batch, s.heads, s.chunks, s.n, s.p)
    tile = CONFIGS[a.dtype].tile
    tiles = triton.cdiv(s.n, tile) * triton.cdiv(s.p, tile)
    log_decay = log_decay.expand(s.batch, s.tokens, s.heads)
    decay_chunk_fwd_contributions_kernel[(s.chunks * tiles, s.heads, s.batch)](
        a, b, log_decay, new, total, fresh,
        row_stride("a", a), row_stride("b", b), *log_decay.stride(), s.tokens, s.chunks,
        SHARE=s.share, N=s.n, P=s.p, CHUNK=s.chunk, BLOCK_N=tile, BLOCK_P=tile,
        PRECISION="ieee", REVERSED=reverse,
        num_warps=CONTRIBUTION_WARPS, num_stages=1,
    )  # fmt: skip
    return fresh


def carry(
    sizes: ScanSizes, first: Tensor | None, fresh: Tensor, total: Tensor,
    *, reverse: bool = False, states: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Turn contributions into the states between chunks, in place.

    Returns the state at the far end [B, H, N, P] and, where `states` are given,
    parts [blocks, B, H, chunks] of e^{Λ} <S, D>.
    """
    s, kept = sizes, None
    last = empty(fresh, s.batch, s.heads, s.n, s.p)
    blocks = triton.cdiv(s.n * s.p, CARRY_BLOCK)
    if states is not None:
        kept = empty(fresh, blocks, s.batch, s.heads, s.chunks)
    decay_chunk_fwd_carry_kernel[(blocks, s.heads, s.batch)](
        first, fresh, total, last, states, kept, s.chunks,
        SIZE=s.n * s.p, CHUNK=s.chunk, BLOCK=CARRY_BLOCK, REVERSED=reverse, num_warps=1,
    )  # fmt: skip
    return last, kept


def rows(
    sizes: ScanSizes, a: Tensor, b: Tensor, x: Tensor, states: Tensor, total: Tensor,
    new: Tensor | None, out: torch.dtype,
    *, reverse: bool = False, transpose: bool = False, w: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The third pass. a, b [B, T, ., IN] and x, w [B, T, ., OUT] with G or H heads; transpose: Sᵀ.

    Returns [B, T, H, OUT] in the dtype `out` and, where w is given, parts
    [tiles, B, H, chunks · chunk] of the gradient of the running sums.
    """
    s, change = sizes, None
    channels, wide = a.shape[3], x.shape[3]
    y = torch.empty(s.batch, s.tokens, s.heads, wide, dtype=out, device=a.device)
    tile, warps = CONFIGS[a.dtype].tile, CONFIGS[a.dtype].warps
    tiles = triton.cdiv(wide, tile)
    if w is not None:
        change = empty(a, tiles, s.batch, s.heads, s.chunks * s.chunk)
    decay_chunk_fwd_rows_kernel[(s.chunks * tiles, s.heads, s.batch)](
        a, b, x, w, states, total, new, y, change,
        row_stride("a", a), row_stride("b", b), row_stride("x", x),
        0 if w is None else row_stride("w", w), s.tokens, s.chunks,
        A_SHARE=s.heads // a.shape[2], X_SHARE=s.heads // x.shape[2], IN=channels, OUT=wide,
        STATE_IN=1 if transpose else wide, STATE_OUT=channels if transpose else 1, CHUNK=s.chunk,
        BLOCK_IN=tile, BLOCK_OUT=tile, PRECISION="ieee", REVERSED=reverse,
        num_warps=warps, num_stages=1,
    )  # fmt: skip
    return y, change
