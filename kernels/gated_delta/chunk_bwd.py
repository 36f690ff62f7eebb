"""Gradients of `chunk`: S and V are computed again, then the chunks taken in reverse.

With D the gradient of the state after a chunk and R = v - e^{c} k S (`chunk_passes`):
states   dV = (Lᵀ ∘ k qᵀ) dy + e^{Λ-c} k D;   X = Tᵀ dV;   dv = β X
         D' = e^{Λ} D + qᵀ e^{c} dy - kᵀ e^{c} dv
rows     dq = (L ∘ dy Vᵀ) k + e^{c} dy Sᵀ
keys     dk = (Lᵀ ∘ V dyᵀ) q + e^{Λ-c} V Dᵀ - (L° ∘ dv Vᵀ) k - e^{c} dv Sᵀ - (L°ᵀ ∘ V dvᵀ) k
gates    dβ_t = X_t·R_t - Σ_s L°_ts X_t·V_s k_t·k_s, and dg from the gradient of c
where L° is L without its diagonal. The gradient of T's inverse is -X Vᵀ, so no T is in it, and no
product takes the transpose of another product: scores of both directions are computed twice.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.decay.running_sums import gaps
from kernels.gated_delta.chunk_passes import BACKWARD, WARPS, rows, sizes_of, solve, states
from kernels.recurrent.step import row_stride

#: Value channels and warps of the sequential pass; channels per tile of N and of P of the keys.
CARRIED = {torch.bfloat16: (16, 2), torch.float16: (16, 2), torch.float32: (8, 4)}
KEYS = {torch.bfloat16: (32, 32), torch.float16: (32, 32), torch.float32: (16, 32)}


@triton.jit
def gdn_chunk_bwd_states_kernel(  # type: ignore[no-untyped-def]
    q, k, dy, beta, local, error, dlast, total, inverse, new, later, x, dv, strength, dfirst,
    q_row, k_row, b_row, tokens, chunks,
    SHARE: tl.constexpr, N: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of P, H, B): D, carried back through the chunks in float32, X and dv.

    local: (Lᵀ ∘ k qᵀ) dy; error: R; later: [B, H, chunks, N, P], D after every chunk; strength
    [tiles, B, H, chunks, CHUNK] receives this tile's part of X·R. dlast may be None (zeros).
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
    channel = (head // SHARE * N + n)[None, :]
    current = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    if dlast is not None:
        current = tl.load(dlast + lane * N * P + tile, mask=inside, other=0.0)
    for step in range(chunks):
        chunk = chunks - 1 - step
        place = lane * chunks + chunk
        t = chunk * CHUNK + c
        valid = t < count
        row = batch * tokens + t
        keys_in = valid[:, None] & in_n[None, :]
        values_in = valid[:, None] & in_p[None, :]
        kt = tl.load(k + row[:, None] * k_row + channel, mask=keys_in, other=0.0)
        at = (row * heads + head)[:, None] * P + p[None, :]
        dvalue = tl.load(local + at, mask=values_in, other=0.0).to(tl.float32)
        rest = tl.load(error + at, mask=values_in, other=0.0).to(tl.float32)
        bt = tl.load(beta + row * b_row + head, mask=valid, other=0.0).to(tl.float32)
        sums = total + place * 2 * CHUNK
        running = tl.load(sums + c)
        end = tl.load(sums + CHUNK - 1)
        left = end - running + (tl.load(sums + 2 * CHUNK - 1) - tl.load(sums + CHUNK + c))
        solve = tl.load(inverse + place * CHUNK * CHUNK + c[None, :] * CHUNK + c[:, None])
        held = current.to(kt.dtype)
        tl.store(later + place * N * P + tile, held, mask=inside)
        dvalue += tl.dot(kt, held, input_precision=PRECISION) * tl.exp(left)[:, None]
        xt = tl.dot(solve, dvalue.to(kt.dtype), input_precision=PRECISION)
        part = (tl.program_id(0) * tl.num_programs(2) * heads * chunks + place) * CHUNK
        tl.store(strength + part + c, tl.sum(xt * rest, 1))
        stored = (t < tokens)[:, None] & in_p[None, :]
        tl.store(x + at, xt.to(kt.dtype), mask=stored)
        dvt = xt * bt[:, None]
        tl.store(dv + at, dvt.to(kt.dtype), mask=stored)
        grown = tl.exp(running)[:, None]
        current *= tl.exp(end)
        qt = tl.load(q + row[:, None] * q_row + channel, mask=keys_in, other=0.0)
        dyt = tl.load(dy + at, mask=values_in, other=0.0)
        read = (dyt.to(tl.float32) * grown).to(kt.dtype)
        current = tl.dot(tl.trans(qt), read, current, input_precision=PRECISION)
        taken = (-dvt * grown).to(kt.dtype)
        current = tl.dot(tl.trans(kt), taken, current, input_precision=PRECISION)
    tl.store(dfirst + lane * N * P + tile, current, mask=inside)


@triton.jit
def _weights(gap, past):  # type: ignore[no-untyped-def]
    """e^{gap} where `past`, else 0; masked before exp, which sees nothing positive."""
    return tl.exp(tl.where(past, gap, float("-inf")))


@triton.jit
def gdn_chunk_bwd_keys_kernel(  # type: ignore[no-untyped-def]
    q, k, fresh, dy, x, dv, beta, before, later, total, new, dk, change, left, strength, kept,
    q_row, k_row, b_row, tokens, chunks,
    SHARE: tl.constexpr, N: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (chunks × tiles of N, H, B): dk, and this tile's parts of the gates' gradients.

    change: gradient of c from V's part; left: k·(e^{Λ-c} V Dᵀ); strength: of β, by way of A;
    all [tiles, B, H, chunks, CHUNK]; kept [tiles, B, H, chunks]: e^{Λ} <S, D>.
    """
    tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    chunk = tl.program_id(0) // tiles
    tile = tl.program_id(0) % tiles
    head, heads = tl.program_id(1), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    place = (batch * heads + head) * chunks + chunk
    part = tile * tl.num_programs(2) * heads * chunks + place
    count = tokens
    if new is not None:
        count = tl.minimum(tokens, tl.load(new + batch))
    c = tl.arange(0, CHUNK)
    t = chunk * CHUNK + c
    valid = t < count
    row = batch * tokens + t
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < N
    keys_in = valid[:, None] & in_n[None, :]
    channel = (head // SHARE * N + n)[None, :]
    out_row = row * heads + head
    sums = total + place * 2 * CHUNK + c

    scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    out = tl.zeros([CHUNK, BLOCK_N], tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        in_p = p < P
        rows_in, columns_in = valid[:, None] & in_p[None, :], valid[None, :] & in_p[:, None]
        xt = tl.load(x + out_row[:, None] * P + p[None, :], mask=rows_in, other=0.0)
        vt = tl.load(fresh + out_row[None, :] * P + p[:, None], mask=columns_in, other=0.0)
        s = tl.load(
            before + place * N * P + n[None, :] * P + p[:, None],
            mask=in_n[None, :] & in_p[:, None], other=0.0,
        )  # fmt: skip
        scores = tl.dot(xt, vt, scores, input_precision=PRECISION)
        out = tl.dot(xt, s, out, input_precision=PRECISION)
    kt = tl.load(k + row[:, None] * k_row + channel, mask=keys_in, other=0.0)
    bt = tl.load(beta + row * b_row + head, mask=valid, other=0.0).to(tl.float32)
    running = tl.load(sums)
    scores *= -_weights(gaps(running, tl.load(sums + CHUNK)), c[:, None] > c[None, :])
    out *= -(bt * tl.exp(running))[:, None]
    moved = tl.sum(out * kt.to(tl.float32), 1)
    pairs = scores * tl.dot(kt, tl.trans(kt), input_precision=PRECISION)
    tl.store(strength + part * CHUNK + c, tl.sum(pairs, 1))
    pairs *= bt[:, None]
    tl.store(change + part * CHUNK + c, moved + tl.sum(pairs, 1) - tl.sum(pairs, 0))
    scores *= bt[:, None]
    out = tl.dot(scores.to(kt.dtype), kt, out, input_precision=PRECISION)

    scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        in_p = p < P
        rows_in, columns_in = valid[:, None] & in_p[None, :], valid[None, :] & in_p[:, None]
        vt = tl.load(fresh + out_row[:, None] * P + p[None, :], mask=rows_in, other=0.0)
        dvt = tl.load(dv + out_row[None, :] * P + p[:, None], mask=columns_in, other=0.0)
        scores = tl.dot(vt, dvt, scores, input_precision=PRECISION)
    gap = gaps(tl.load(sums), tl.load(sums + CHUNK))
    scores *= -_weights(-gap, c[:, None] < c[None, :])
    out = tl.dot(scores.to(kt.dtype), kt, out, input_precision=PRECISION)

    scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    past = tl.zeros([CHUNK, BLOCK_N], tl.float32)
    stays = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        in_p = p < P
        rows_in, columns_in = valid[:, None] & in_p[None, :], valid[None, :] & in_p[:, None]
        vt = tl.load(fresh + out_row[:, None] * P + p[None, :], mask=rows_in, other=0.0)
        dyt = tl.load(dy + out_row[None, :] * P + p[:, None], mask=columns_in, other=0.0)
        states_in = in_n[None, :] & in_p[:, None]
        at = place * N * P + n[None, :] * P + p[:, None]
        s = tl.load(before + at, mask=states_in, other=0.0)
        d = tl.load(later + at, mask=states_in, other=0.0)
        stays += tl.sum(s.to(tl.float32) * d.to(tl.float32), 0)
        scores = tl.dot(vt, dyt, scores, input_precision=PRECISION)
        past = tl.dot(vt, d, past, input_precision=PRECISION)
    running, rest = tl.load(sums), tl.load(sums + CHUNK)
    ends = total + place * 2 * CHUNK + CHUNK - 1
    end = tl.load(ends)
    tl.store(kept + part, tl.exp(end) * tl.sum(stays, 0))
    past *= tl.exp(end - running + (tl.load(ends + CHUNK) - rest))[:, None]
    tl.store(left + part * CHUNK + c, tl.sum(past * kt.to(tl.float32), 1))
    out += past
    qt = tl.load(q + row[:, None] * q_row + channel, mask=keys_in, other=0.0)
    scores *= _weights(-gaps(running, rest), c[:, None] <= c[None, :])
    out = tl.dot(scores.to(qt.dtype), qt, out, input_precision=PRECISION)
    tl.store(
        dk + out_row[:, None] * N + n[None, :], out.to(dk.dtype.element_ty),
        mask=(t < tokens)[:, None] & in_n[None, :],
    )  # fmt: skip


@triton.jit
def gdn_chunk_bwd_gates_kernel(  # type: ignore[no-untyped-def]
    asked, moved, left, kept, told, missed, new, dg, dbeta, tokens, chunks,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, H, B): dg from the gradient of c, and dβ; parts, by tile, are summed here.

    g_t acts on the sums from t on, on what tokens before t leave behind, and on the old state:
    Σ_{u >= t} change_u + Σ_{u < t} left_u + kept, change = asked + moved.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    heads, batch = tl.num_programs(1), tl.program_id(2).to(tl.int64)
    parts = heads.to(tl.int64) * tl.num_programs(2) * chunks
    place = (batch * heads + head) * chunks + chunk
    c = tl.arange(0, CHUNK)
    change = tl.zeros([CHUNK], tl.float32)
    stays = tl.zeros([CHUNK], tl.float32)
    strength = tl.zeros([CHUNK], tl.float32)
    old = 0.0
    for tile in range(QUERIES):
        change += tl.load(asked + (tile * parts + place) * CHUNK + c)
    for tile in range(KEYS):
        at = (tile * parts + place) * CHUNK + c
        change += tl.load(moved + at)
        stays += tl.load(left + at)
        strength += tl.load(told + at)
        old += tl.load(kept + tile * parts + place)
    for tile in range(VALUES):
        strength += tl.load(missed + (tile * parts + place) * CHUNK + c)
    grad = tl.cumsum(change, 0, reverse=True) + (tl.cumsum(stays, 0) - stays) + old
    t = chunk * CHUNK + c
    if new is not None:
        valid = t < tl.load(new + batch)
        grad = tl.where(valid, grad, 0.0)
        strength = tl.where(valid, strength, 0.0)
    out = (batch * tokens + t) * heads + head
    tl.store(dg + out, grad, mask=t < tokens)
    tl.store(dbeta + out, strength.to(dbeta.dtype.element_ty), mask=t < tokens)


Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def gradients(
    inputs: Inputs, dy: Tensor | None, dlast: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay, beta and the first state.

    inputs: q, k, v, log_decay, beta, state and new, as `chunk` has them;
    dy: [B, T, H, P] and dlast: float32 [B, H, N, P], None where nothing comes from y or from the
    last state.
    """
    q, k, v, log_decay, beta, state, new = inputs
    s = sizes_of(q, v, BACKWARD)
    dy = torch.zeros(v.shape, dtype=v.dtype, device=v.device) if dy is None else dy.contiguous()
    dlast = None if dlast is None else dlast.contiguous()
    total, inverse = solve(s, k, log_decay, beta, new)
    before, fresh, error, _ = states(s, k, v, beta, state, total, inverse, new, error=True)
    local, _ = rows(s, k, q, dy, None, total, new, v.dtype, reverse=True)
    later, x, dv = torch.empty_like(before), torch.empty_like(fresh), torch.empty_like(fresh)
    carried, warps = CARRIED[q.dtype]
    tiles_p = triton.cdiv(s.p, carried)
    tokens = s.batch, s.heads, s.chunks * s.chunk
    missed = torch.empty(tiles_p, *tokens, device=q.device)
    dfirst = torch.empty(s.batch, s.heads, s.n, s.p, device=q.device)
    strides = [row_stride(name, t) for name, t in (("q", q), ("k", k), ("beta", beta))]
    sizes = {"SHARE": s.share, "N": s.n, "P": s.p, "CHUNK": s.chunk, "PRECISION": "ieee"}
    gdn_chunk_bwd_states_kernel[(tiles_p, s.heads, s.batch)](
        q, k, dy, beta, local, error, dlast, total, inverse, new, later, x, dv, missed, dfirst,
        *strides, s.tokens, s.chunks, **sizes, BLOCK_N=s.block_n, BLOCK_P=carried,
        num_warps=warps, num_stages=1,
    )  # fmt: skip
    # Heads of one group are summed in float32.
    wide = q.dtype if s.share == 1 else torch.float32
    dq, asked = rows(s, dy, fresh, k, before, total, new, wide, transpose=True, w=q)
    assert asked is not None
    dk = torch.empty_like(dq)
    block_n, block_p = KEYS[q.dtype]
    tiles_n = triton.cdiv(s.n, block_n)
    moved, left, told = (
        torch.empty(tiles_n, s.batch, s.heads, s.chunks * s.chunk, device=q.device)
        for _ in range(3)
    )
    kept = torch.empty(tiles_n, s.batch, s.heads, s.chunks, device=q.device)
    gdn_chunk_bwd_keys_kernel[(s.chunks * tiles_n, s.heads, s.batch)](
        q, k, fresh, dy, x, dv, beta, before, later, total, new, dk, moved, left, told, kept,
        *strides, s.tokens, s.chunks, **sizes, BLOCK_N=block_n, BLOCK_P=block_p,
        num_warps=WARPS, num_stages=1,
    )  # fmt: skip
    dg = torch.empty(s.batch, s.tokens, s.heads, device=q.device)
    dbeta = torch.empty(dg.shape, dtype=beta.dtype, device=q.device)
    gdn_chunk_bwd_gates_kernel[(s.chunks, s.heads, s.batch)](
        asked, moved, left, kept, told, missed, new, dg, dbeta, s.tokens, s.chunks,
        QUERIES=asked.shape[0], KEYS=tiles_n, VALUES=tiles_p, CHUNK=s.chunk, num_warps=1,
    )  # fmt: skip
    return s.sum_heads(dq, q.dtype), s.sum_heads(dk, k.dtype), dv, dg, dbeta, dfirst
