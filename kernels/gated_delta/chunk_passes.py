"""The three passes of `chunk`, which backward runs again on chunks of its own.

c is the running sum of g within a chunk, Λ its last value, S the state before a chunk; L_ts =
e^{c_t - c_s} where s <= t, else 0; A_ts = β_t L_ts k_t·k_s where s < t (arXiv 2406.06484, gated):
solve    T = (I + A)^-1
states   V = T β (v - e^{c} k S);   S' = e^{Λ} S + kᵀ e^{Λ-c} V
rows     y = (L ∘ q kᵀ) V + e^{c} q S
V, what the tokens add to the state, is solved from the error itself, which is what u - w S stands
for: no u and w lie in memory, and the error is rounded once, after the subtraction.

B batch, T tokens, G groups of q and k, H heads of v, N key channels, P value channels.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.decay.running_sums import after, gaps, running_sums
from kernels.recurrent.scan import ScanSizes
from kernels.recurrent.step import row_stride


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Tokens per chunk; channels per tile and warps of `rows`, and of the sequential `states`.

    Heads narrower than a tile are masked: no configuration is theirs alone.
    """

    chunk: int
    tile: int
    warps: int
    carried: int
    carried_warps: int
    stages: int


_NARROW = Config(chunk=64, tile=64, warps=4, carried=64, carried_warps=4, stages=1)
#: Products of float32 are exact ("ieee"), without the matrix unit: larger tiles would spill.
_WIDE = Config(chunk=16, tile=32, warps=2, carried=8, carried_warps=4, stages=1)
FORWARD = {torch.bfloat16: _NARROW, torch.float16: _NARROW, torch.float32: _WIDE}

#: Three score matrices of 64 tokens would spill, and two warps keep off wgmma, whose register
#: operands some compilers spoil: backward takes chunks of its own.
_NARROW_BACK = Config(chunk=32, tile=64, warps=2, carried=32, carried_warps=2, stages=2)
BACKWARD = {torch.bfloat16: _NARROW_BACK, torch.float16: _NARROW_BACK, torch.float32: _WIDE}

#: Most tokens that are solved at once, by exact products.
HALF = 32

#: Warps of what is neither of these.
WARPS = 2


@dataclass(frozen=True, slots=True)
class Sizes(ScanSizes):
    """Every size of one call, and its tiles."""

    config: Config

    @property
    def block_n(self) -> int:
        """Key channels of a whole head, padded."""
        return int(triton.next_power_of_2(self.n))


def sizes_of(q: Tensor, v: Tensor, table: dict[torch.dtype, Config]) -> Sizes:
    """The sizes of q [B, T, G, N] and v [B, T, H, P]."""
    config = table[q.dtype]
    return Sizes.of(q, v, config.chunk, config)


@triton.jit
def _overlap(  # type: ignore[no-untyped-def]
    k, row, valid, near, rest, other, other_valid, other_near, other_rest, k_row,
    N: tl.constexpr, HALF: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """L ∘ k kᵀ, [HALF, HALF], for the tokens `row` against `other`; 0 where `other` is no past."""
    product = tl.zeros([HALF, HALF], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        a = tl.load(
            k + row[:, None] * k_row + n[None, :],
            mask=valid[:, None] & (n < N)[None, :], other=0.0,
        )  # fmt: skip
        b = tl.load(
            k + other[None, :] * k_row + n[:, None],
            mask=other_valid[None, :] & (n < N)[:, None], other=0.0,
        )  # fmt: skip
        product = tl.dot(a, b, product, input_precision="ieee")
    # Masked before exp, so that nothing positive is ever exponentiated.
    gap = (near[:, None] - other_near[None, :]) + (rest[:, None] - other_rest[None, :])
    return product * tl.exp(tl.where(row[:, None] > other[None, :], gap, float("-inf")))


@triton.jit
def unit_inverse(a, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """(I + a)^-1 of a strictly lower [HALF, HALF], HALF 16 or 32; row by row in blocks of 16."""
    BLOCKS: tl.constexpr = HALF // 16
    i = tl.arange(0, 16)
    block = tl.arange(0, BLOCKS)
    same = block[:, None, None, None] == block[None, None, :, None]
    small = tl.sum(tl.where(same, tl.reshape(a, [BLOCKS, 16, BLOCKS, 16]), 0.0), 2)
    solved = tl.zeros([BLOCKS, 16, 16], tl.float32)
    solved += tl.where(i[None, :, None] == i[None, None, :], 1.0, 0.0)
    for step in range(1, 16):
        here = i[None, :, None] == step
        line = tl.sum(tl.where(here, small, 0.0), 1)
        line = tl.sum(line[:, :, None] * solved, 1)
        solved -= tl.where(here, line[:, None, :], 0.0)
    inverse = tl.reshape(tl.where(same, solved[:, :, None, :], 0.0), [HALF, HALF])
    if BLOCKS > 1:
        c = tl.arange(0, HALF) // 16
        below = tl.where(c[:, None] > c[None, :], a, 0.0)
        left = tl.dot(inverse, below, input_precision="ieee")
        inverse -= tl.dot(left, inverse, input_precision="ieee")
    return inverse


@triton.jit
def gdn_chunk_fwd_solve_kernel(  # type: ignore[no-untyped-def]
    k, log_decay, beta, new, total, inverse, k_row, g_row, b_row, tokens, chunks,
    SHARE: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, H, B): the running sums c and T, in one or two steps of HALF tokens.

    total: [B, H, chunks, 2, CHUNK], each sum a float32 and what its rounding left;
    inverse: [B, H, chunks, CHUNK, CHUNK], zeros above the diagonal.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    heads, batch = tl.num_programs(1), tl.program_id(2).to(tl.int64)
    lane = (batch * heads + head) * chunks + chunk
    count = tokens
    if new is not None:
        count = tl.minimum(tokens, tl.load(new + batch))
    c = tl.arange(0, HALF)
    t0 = chunk * CHUNK + c
    valid0 = t0 < count
    row0 = batch * tokens + t0
    g0 = tl.load(log_decay + row0 * g_row + head, mask=valid0, other=0.0)
    beta0 = tl.load(beta + row0 * b_row + head, mask=valid0, other=0.0).to(tl.float32)
    near0, rest0 = running_sums(g0)
    keys = k + head // SHARE * N
    a = _overlap(
        keys, row0, valid0, near0, rest0, row0, valid0, near0, rest0, k_row, N, HALF, BLOCK_N
    )
    first = unit_inverse(a * beta0[:, None], HALF)
    tile = c[:, None] * CHUNK + c[None, :]
    out = inverse + lane * CHUNK * CHUNK + tile
    kind = inverse.dtype.element_ty
    sums = total + lane * 2 * CHUNK + c
    tl.store(sums, near0)
    tl.store(sums + CHUNK, rest0)
    tl.store(out, first.to(kind))
    if CHUNK > HALF:
        valid1 = t0 + HALF < count
        row1 = row0 + HALF
        g1 = tl.load(log_decay + row1 * g_row + head, mask=valid1, other=0.0)
        beta1 = tl.load(beta + row1 * b_row + head, mask=valid1, other=0.0).to(tl.float32)
        near1, rest1 = running_sums(g1)
        a = _overlap(
            keys, row1, valid1, near1, rest1, row1, valid1, near1, rest1, k_row, N, HALF, BLOCK_N
        )
        second = unit_inverse(a * beta1[:, None], HALF)
        near1, rest1 = after(near0, rest0, near1, rest1)
        a = _overlap(
            keys, row1, valid1, near1, rest1, row0, valid0, near0, rest0, k_row, N, HALF, BLOCK_N
        )
        below = tl.dot(a * beta1[:, None], first, input_precision="ieee")
        below = -tl.dot(second, below, input_precision="ieee")
        tl.store(sums + HALF, near1)
        tl.store(sums + CHUNK + HALF, rest1)
        tl.store(out + HALF, tl.zeros([HALF, HALF], kind))
        tl.store(out + HALF * CHUNK, below.to(kind))
        tl.store(out + HALF * CHUNK + HALF, second.to(kind))


@triton.jit
def gdn_chunk_fwd_states_kernel(  # type: ignore[no-untyped-def]
    k, v, beta, first, total, inverse, new, states, fresh, error, last,
    k_row, v_row, b_row, tokens, chunks,
    SHARE: tl.constexpr, N: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of P, H, B): S, carried through the chunks in float32, and V (`fresh`).

    states: [B, H, chunks, N, P], S before every chunk; fresh and error (v - e^{c} k S; None:
    unwanted): [B, T, H, P], all in the inputs' dtype; first (None: zeros), last: [B, H, N, P].
    """
    head, heads = tl.program_id(1), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    lane = batch * heads + head
    count = tokens
    if new is not None:
        count = tl.minimum(tokens, tl.load(new + batch))
    c = tl.arange(0, CHUNK)
    n = tl.arange(0, BLOCK_N)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_n, in_p = n < N, p < P
    inside = in_n[:, None] & in_p[None, :]
    tile = n[:, None] * P + p[None, :]
    current = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    if first is not None:
        current = tl.load(first + lane * N * P + tile, mask=inside, other=0.0)
    for chunk in range(chunks):
        place = lane * chunks + chunk
        t = chunk * CHUNK + c
        valid = t < count
        row = batch * tokens + t
        kt = tl.load(
            k + row[:, None] * k_row + (head // SHARE * N + n)[None, :],
            mask=valid[:, None] & in_n[None, :], other=0.0,
        )  # fmt: skip
        vt = tl.load(
            v + row[:, None] * v_row + (head * P + p)[None, :],
            mask=valid[:, None] & in_p[None, :], other=0.0,
        )  # fmt: skip
        strength = tl.load(beta + row * b_row + head, mask=valid, other=0.0).to(tl.float32)
        sums = total + place * 2 * CHUNK
        running = tl.load(sums + c)
        end = tl.load(sums + CHUNK - 1)
        left = end - running + (tl.load(sums + 2 * CHUNK - 1) - tl.load(sums + CHUNK + c))
        solve = tl.load(inverse + place * CHUNK * CHUNK + c[:, None] * CHUNK + c[None, :])
        held = current.to(kt.dtype)
        tl.store(states + place * N * P + tile, held, mask=inside)
        missed = tl.dot(kt, held, input_precision=PRECISION)
        missed = vt.to(tl.float32) - missed * tl.exp(running)[:, None]
        out = (row * heads + head)[:, None] * P + p[None, :]
        stored = (t < tokens)[:, None] & in_p[None, :]
        if error is not None:
            tl.store(error + out, missed.to(kt.dtype), mask=stored)
        missed = (missed * strength[:, None]).to(kt.dtype)
        value = tl.dot(solve, missed, input_precision=PRECISION)
        tl.store(fresh + out, value.to(kt.dtype), mask=stored)
        value = (value * tl.exp(left)[:, None]).to(kt.dtype)
        current *= tl.exp(end)
        current = tl.dot(tl.trans(kt), value, current, input_precision=PRECISION)
    tl.store(last + lane * N * P + tile, current, mask=inside)


@triton.jit
def gdn_chunk_fwd_rows_kernel(  # type: ignore[no-untyped-def]
    a, b, x, w, states, total, new, y, change, a_row, b_row, x_row, w_row, tokens, chunks,
    A_SHARE: tl.constexpr, X_SHARE: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
    STATE_IN: tl.constexpr, STATE_OUT: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_IN: tl.constexpr, BLOCK_OUT: tl.constexpr, PRECISION: tl.constexpr,
    REVERSED: tl.constexpr,
):  # fmt: skip
    """Grid (chunks × tiles of OUT, H, B): y = (L ∘ a bᵀ) x + e^{c} a S; reversed (Lᵀ ∘ a bᵀ) x.

    states (None: no such term) have strides STATE_IN, STATE_OUT. `change` (None: unwanted) receives
    this tile's part of the gradient of c where y is dq and w is q: Σ_s W_ts - Σ_s W_st +
    w·(e^{c} a S)_t with W = L ∘ a bᵀ ∘ w xᵀ.
    """
    tiles: tl.constexpr = (OUT + BLOCK_OUT - 1) // BLOCK_OUT
    chunk = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    head, heads = tl.program_id(1), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    place = (batch * heads + head) * chunks + chunk
    count = tokens
    if new is not None:
        count = tl.minimum(tokens, tl.load(new + batch))
    c = tl.arange(0, CHUNK)
    t = chunk * CHUNK + c
    valid = t < count
    row = batch * tokens + t
    o = tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    in_o = o < OUT
    scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    past = tl.zeros([CHUNK, BLOCK_OUT], tl.float32)
    for start in range(0, IN, BLOCK_IN):
        i = start + tl.arange(0, BLOCK_IN)
        in_i = i < IN
        channel = head // A_SHARE * IN + i
        at = tl.load(
            a + row[:, None] * a_row + channel[None, :],
            mask=valid[:, None] & in_i[None, :], other=0.0,
        )  # fmt: skip
        bt = tl.load(
            b + row[None, :] * b_row + channel[:, None],
            mask=valid[None, :] & in_i[:, None], other=0.0,
        )  # fmt: skip
        scores = tl.dot(at, bt, scores, input_precision=PRECISION)
        if states is not None:
            s = tl.load(
                states + place * IN * OUT + i[:, None] * STATE_IN + o[None, :] * STATE_OUT,
                mask=in_i[:, None] & in_o[None, :], other=0.0,
            )  # fmt: skip
            past = tl.dot(at, s, past, input_precision=PRECISION)
    sums = total + place * 2 * CHUNK + c
    running = tl.load(sums)
    # Masked before exp, so that nothing positive is ever exponentiated.
    gap = gaps(running, tl.load(sums + CHUNK))
    if REVERSED:
        gap = tl.where(c[:, None] <= c[None, :], -gap, float("-inf"))
    else:
        gap = tl.where(c[:, None] >= c[None, :], gap, float("-inf"))
    scores *= tl.exp(gap)
    past *= tl.exp(running)[:, None]
    inside = valid[:, None] & in_o[None, :]
    channel = head // X_SHARE * OUT + o
    xt = tl.load(x + row[:, None] * x_row + channel[None, :], mask=inside, other=0.0)
    if change is not None:
        wt = tl.load(w + row[:, None] * w_row + channel[None, :], mask=inside, other=0.0)
        moved = tl.sum(past * wt.to(tl.float32), 1)
        pairs = scores * tl.dot(wt, tl.trans(xt), input_precision=PRECISION)
        moved += tl.sum(pairs, 1) - tl.sum(pairs, 0)
        part = (tile * tl.num_programs(2) * heads * chunks + place) * CHUNK
        tl.store(change + part + c, moved)
    out = tl.dot(scores.to(xt.dtype), xt, past, input_precision=PRECISION)
    tl.store(
        y + (row * heads + head)[:, None] * OUT + o[None, :],
        out.to(y.dtype.element_ty), mask=(t < tokens)[:, None] & in_o[None, :],
    )  # fmt: skip


def solve(
    s: Sizes, k: Tensor, log_decay: Tensor, beta: Tensor, new: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The running sums, float32 [B, H, chunks, 2, chunk], and T [B, H, chunks, chunk, chunk]."""
    size = s.chunk
    total = torch.empty(s.batch, s.heads, s.chunks, 2, size, device=k.device)
    inverse = torch.empty(s.batch, s.heads, s.chunks, size, size, dtype=k.dtype, device=k.device)
    gdn_chunk_fwd_solve_kernel[(s.chunks, s.heads, s.batch)](
        k, log_decay, beta, new, total, inverse,
        row_stride("k", k), row_stride("log_decay", log_decay), row_stride("beta", beta),
        s.tokens, s.chunks,
        SHARE=s.share, N=s.n, CHUNK=size, HALF=min(size, HALF), BLOCK_N=s.config.tile,
        num_warps=WARPS, num_stages=1,
    )  # fmt: skip
    return total, inverse


def states(
    s: Sizes, k: Tensor, v: Tensor, beta: Tensor, first: Tensor | None, total: Tensor,
    inverse: Tensor, new: Tensor | None, *, error: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """S before every chunk, V, v - e^{c} k S where `error`, and the last state (float32)."""
    before = torch.empty(s.batch, s.heads, s.chunks, s.n, s.p, dtype=k.dtype, device=k.device)
    fresh = torch.empty(s.batch, s.tokens, s.heads, s.p, dtype=k.dtype, device=k.device)
    missed = torch.empty_like(fresh) if error else None
    last = torch.empty(s.batch, s.heads, s.n, s.p, device=k.device)
    gdn_chunk_fwd_states_kernel[(triton.cdiv(s.p, s.config.carried), s.heads, s.batch)](
        k, v, beta, first, total, inverse, new, before, fresh, missed, last,
        row_stride("k", k), row_stride("v", v), row_stride("beta", beta), s.tokens, s.chunks,
        SHARE=s.share, N=s.n, P=s.p, CHUNK=s.chunk,
        BLOCK_N=s.block_n, BLOCK_P=s.config.carried, PRECISION="ieee",
        num_warps=s.config.carried_warps, num_stages=s.config.stages,
    )  # fmt: skip
    return before, fresh, missed, last


def rows(
    s: Sizes, a: Tensor, b: Tensor, x: Tensor, before: Tensor | None, total: Tensor,
    new: Tensor | None, out: torch.dtype,
    *, reverse: bool = False, transpose: bool = False, w: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The third pass. a, b [B, T, ., IN] and x, w [B, T, ., OUT] with G or H heads; transpose: Sᵀ.

    Returns [B, T, H, OUT] in the dtype `out` and, where w is given, parts
    [tiles, B, H, chunks · chunk] of the gradient of the running sums.
    """
    change, channels, wide = None, a.shape[3], x.shape[3]
    y = torch.empty(s.batch, s.tokens, s.heads, wide, dtype=out, device=a.device)
    tile = s.config.tile
    tiles = triton.cdiv(wide, tile)
    if w is not None:
        change = torch.empty(tiles, s.batch, s.heads, s.chunks * s.chunk, device=a.device)
    gdn_chunk_fwd_rows_kernel[(s.chunks * tiles, s.heads, s.batch)](
        a, b, x, w, before, total, new, y, change,
        row_stride("a", a), row_stride("b", b), row_stride("x", x),
        0 if w is None else row_stride("w", w), s.tokens, s.chunks,
        A_SHARE=s.heads // a.shape[2], X_SHARE=s.heads // x.shape[2], IN=channels, OUT=wide,
        STATE_IN=1 if transpose else wide, STATE_OUT=channels if transpose else 1,
        CHUNK=s.chunk, BLOCK_IN=tile, BLOCK_OUT=tile, PRECISION="ieee",
        REVERSED=reverse, num_warps=s.config.warps, num_stages=1,
    )  # fmt: skip
    return y, change
