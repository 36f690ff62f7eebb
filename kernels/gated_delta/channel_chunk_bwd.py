"""Gradients of `channel_chunk`: W, T, S and V are computed again, then the chunks taken in reverse.

With D the gradient of the state after a chunk, R = v - (k e^{c}) S and the rest as in
`channel_passes`; ∂A° is the gradient of A before β:
states   X = Tᵀ (Wᵀ dy + (k e^{Λ-c}) D);   dv = β X
         D' = e^{Λ} D + (q e^{c})ᵀ dy - (k e^{c})ᵀ dv
scores   ∂W = dy Vᵀ;   ∂A° = -dv Vᵀ;   dβ_t = X_t·R_t - Σ_s A_ts / β_t X_t·V_s
keys     dq_t = Σ_s ∂W_ts e^{c_t-c_s} k_s + e^{c_t} (dy Sᵀ)_t
         dk_t = Σ_s ∂A°_ts e^{c_t-c_s} k_s - e^{c_t} (dv Sᵀ)_t
              + Σ_u e^{c_u-c_t} (∂W_ut q_u + ∂A°_ut k_u) + e^{Λ-c_t} (V Dᵀ)_t
         and dg from the gradient of c, which is q dq + k (first line of dk - second line)
With strengths by channel and e = β ∘ k, dv = X, ∂A° is ∂A, and k_u beside it becomes e_u; the first
line of dk is de, from which dβ = k ∘ de, and dk has β ∘ de in its place.
Differences c_t - c_s are never formed: as in the forward pass decays only multiply. Channels of N
do not meet in `keys`, and so neither do lanes: each of its two walks through a chunk multiplies one
tile of decays, from a token to all later ones or to it from all earlier ones.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gated_delta.channel_passes import by_head, pairs, sizes_of, states
from kernels.recurrent.step import row_stride

#: Value channels and warps of the sequential pass.
CARRIED = {torch.bfloat16: (16, 2), torch.float16: (16, 2), torch.float32: (8, 4)}
#: Value channels per tile, and warps, of the scores.
SCORES = {torch.bfloat16: (64, 2), torch.float16: (64, 2), torch.float32: (32, 2)}
#: Channels per tile of N and of P, and warps, of the keys.
KEYS = {torch.bfloat16: (32, 32, 4), torch.float16: (32, 32, 4), torch.float32: (16, 32, 2)}


@triton.jit
def kda_chunk_bwd_states_kernel(  # type: ignore[no-untyped-def]
    asked, read, left, kept, weights, inverse, dy, beta, dlast, new, later, x, dv, dfirst,
    b_row, tokens, chunks,
    N: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of P, H, B): D, carried back through the chunks in float32, X and dv.

    asked, ..., inverse: as `kda_chunk_fwd_pairs_kernel` left them; dlast: float32 [B, H, N, P]
    (None: zeros); later: [B, H, chunks, N, P], D after every chunk. beta: None where it is in
    `read`, and then x, too, which is dv.
    """
    head, heads = tl.program_id(1), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    lane = batch * heads + head
    count = tokens
    if new is not None:
        count = tl.minimum(tokens, tl.load(new + batch))
    c, n = tl.arange(0, CHUNK), tl.arange(0, BLOCK_N)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_n, in_p = n < N, p < P
    inside = in_n[:, None] & in_p[None, :]
    tile = n[:, None] * P + p[None, :]
    current = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    if dlast is not None:
        current = tl.load(dlast + lane * N * P + tile, mask=inside, other=0.0)
    for step in range(chunks):
        chunk = chunks - 1 - step
        place = lane * chunks + chunk
        t = chunk * CHUNK + c
        row = batch * tokens + t
        channels = (place * CHUNK + c)[:, None] * N + n[None, :]
        transposed = place * CHUNK * CHUNK + c[None, :] * CHUNK + c[:, None]
        at = (row * heads + head)[:, None] * P + p[None, :]
        dyt = tl.load(dy + at, mask=(t < count)[:, None] & in_p[None, :], other=0.0)
        if beta is not None:
            strength = tl.load(beta + row * b_row + head, mask=t < count, other=0.0).to(tl.float32)
        held = current.to(dyt.dtype)
        tl.store(later + place * N * P + tile, held, mask=inside)
        kt = tl.load(left + channels, mask=in_n[None, :], other=0.0)
        dvalue = tl.dot(kt, held, input_precision=PRECISION)
        seen = tl.load(weights + transposed)
        dvalue = tl.dot(seen, dyt, dvalue, input_precision=PRECISION).to(dyt.dtype)
        xt = tl.dot(tl.load(inverse + transposed), dvalue, input_precision=PRECISION)
        dvt = xt
        if beta is not None:
            dvt = xt * strength[:, None]
        stored = (t < tokens)[:, None] & in_p[None, :]
        if beta is not None:
            tl.store(x + at, xt.to(dyt.dtype), mask=stored)
        tl.store(dv + at, dvt.to(dyt.dtype), mask=stored)
        current *= tl.load(kept + place * N + n, mask=in_n, other=0.0)[:, None]
        qt = tl.load(asked + channels, mask=in_n[None, :], other=0.0)
        current = tl.dot(tl.trans(qt), dyt, current, input_precision=PRECISION)
        kt = tl.load(read + channels, mask=in_n[None, :], other=0.0)
        current = tl.dot(tl.trans(kt), (-dvt).to(dyt.dtype), current, input_precision=PRECISION)
    tl.store(dfirst + lane * N * P + tile, current, mask=inside)


@triton.jit
def kda_chunk_bwd_scores_kernel(  # type: ignore[no-untyped-def]
    dy, x, fresh, error, overlap, beta, new, dweights, doverlap, dbeta,
    b_row, tokens, chunks,
    P: tl.constexpr, CHUNK: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, H, B): ∂W, ∂A° and dβ, by head; where it is by channel error, overlap, beta and
    dbeta are None.

    fresh, error: V and R; dweights, doverlap: float32 [B, H, chunks, CHUNK, CHUNK], of which what
    is not below the diagonal, or not on that of ∂W, means nothing.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    heads, batch = tl.num_programs(1), tl.program_id(2).to(tl.int64)
    place = (batch * heads + head) * chunks + chunk
    count = tokens
    if new is not None:
        count = tl.minimum(tokens, tl.load(new + batch))
    c = tl.arange(0, CHUNK)
    t = chunk * CHUNK + c
    valid = t < count
    row = batch * tokens + t
    lane = row * heads + head
    answers = tl.zeros([CHUNK, CHUNK], tl.float32)
    solved = tl.zeros([CHUNK, CHUNK], tl.float32)
    strength = tl.zeros([CHUNK], tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        in_p = p < P
        at, inside = lane[:, None] * P + p[None, :], valid[:, None] & in_p[None, :]
        vt = tl.load(
            fresh + lane[None, :] * P + p[:, None],
            mask=valid[None, :] & in_p[:, None], other=0.0,
        )  # fmt: skip
        dyt = tl.load(dy + at, mask=inside, other=0.0)
        answers = tl.dot(dyt, vt, answers, input_precision=PRECISION)
        xt = tl.load(x + at, mask=inside, other=0.0)
        solved = tl.dot(xt, vt, solved, input_precision=PRECISION)
        if beta is not None:
            missed = tl.load(error + at, mask=inside, other=0.0)
            strength += tl.sum(xt.to(tl.float32) * missed.to(tl.float32), 1)
    square = place * CHUNK * CHUNK + c[:, None] * CHUNK + c[None, :]
    if beta is not None:
        strength -= tl.sum(solved * tl.load(overlap + square), 1)
        tl.store(dbeta + lane, strength.to(dbeta.dtype.element_ty), mask=t < tokens)
        bt = tl.load(beta + row * b_row + head, mask=valid, other=0.0).to(tl.float32)
    tl.store(dweights + square, answers)
    doverlaps = -solved
    if beta is not None:
        doverlaps *= bt[:, None]
    tl.store(doverlap + square, doverlaps)


@triton.jit
def kda_chunk_bwd_keys_kernel(  # type: ignore[no-untyped-def]
    q, k, log_decay, beta, dy, fresh, dv, before, later, kept, dweights, doverlap, new,
    dq, dk, dg, dbeta, q_row, k_row, g_row, b_row, tokens, chunks,
    SHARE: tl.constexpr, N: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (chunks × tiles of N, H, B): dq, dk [B, T, H, N] and dg, float32; dβ where it is by
    channel: beta and dbeta are None where it is not.
    """
    tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    chunk = tl.program_id(0) // tiles
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
    lane = row * heads + head
    n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < N
    channel = head // SHARE * N + n
    keys_in = valid[:, None] & in_n[None, :]
    square = place * CHUNK * CHUNK
    states_at = place * N * P + n[None, :] * P

    # What each token does with those before it; `since`: decays from s to every later token.
    since = tl.zeros([CHUNK, BLOCK_N], tl.float32)
    asked = tl.zeros([CHUNK, BLOCK_N], tl.float32)
    read = tl.zeros([CHUNK, BLOCK_N], tl.float32)
    for i in range(CHUNK):
        s = CHUNK - 1 - i
        at = batch * tokens + chunk * CHUNK + s
        inside = in_n & (chunk * CHUNK + s < count)
        ks = tl.load(k + at * k_row + channel, mask=inside, other=0.0).to(tl.float32)
        decay = tl.exp(tl.load(log_decay + at * g_row + head * N + n, mask=inside, other=0.0))
        key = since * ks[None, :]
        asked += tl.load(dweights + square + c * CHUNK + s)[:, None] * key
        read += tl.load(doverlap + square + c * CHUNK + s)[:, None] * key
        since = tl.where(c[:, None] == s, 1.0, since) * decay[None, :]
    past = tl.zeros([CHUNK, BLOCK_N], tl.float32)
    taken = tl.zeros([CHUNK, BLOCK_N], tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        in_p = p < P
        at, inside = lane[:, None] * P + p[None, :], valid[:, None] & in_p[None, :]
        held = tl.load(
            before + states_at + p[:, None], mask=in_n[None, :] & in_p[:, None], other=0.0
        )  # fmt: skip
        dyt = tl.load(dy + at, mask=inside, other=0.0)
        past = tl.dot(dyt, held, past, input_precision=PRECISION)
        dvt = tl.load(dv + at, mask=inside, other=0.0)
        taken = tl.dot(dvt, held, taken, input_precision=PRECISION)
    qt = tl.load(q + row[:, None] * q_row + channel[None, :], mask=keys_in, other=0.0)
    kt = tl.load(k + row[:, None] * k_row + channel[None, :], mask=keys_in, other=0.0)
    qt, kt = qt.to(tl.float32), kt.to(tl.float32)
    asked += since * past
    read -= since * taken
    erasing = kt
    if beta is not None:
        bt = tl.load(
            beta + row[:, None] * b_row + (head * N + n)[None, :], mask=keys_in, other=0.0
        ).to(tl.float32)  # fmt: skip
        erasing = kt * bt
    change = qt * asked + erasing * read
    # A token's own key has not decayed: that score is apart, for it says nothing of decays.
    own = tl.load(dweights + square + c * (CHUNK + 1))[:, None]
    out = lane[:, None] * N + n[None, :]
    stored = (t < tokens)[:, None] & in_n[None, :]
    tl.store(dq + out, (asked + own * kt).to(dq.dtype.element_ty), mask=stored)
    if beta is not None:
        tl.store(dbeta + out, (kt * read).to(dbeta.dtype.element_ty), mask=stored)
        read *= bt
    read += own * qt

    # What each token does to those after it; `until`: decays from every earlier token to u.
    until = tl.zeros([CHUNK, BLOCK_N], tl.float32)
    given = tl.zeros([CHUNK, BLOCK_N], tl.float32)
    for u in range(CHUNK):
        at = batch * tokens + chunk * CHUNK + u
        inside = in_n & (chunk * CHUNK + u < count)
        qu = tl.load(q + at * q_row + channel, mask=inside, other=0.0).to(tl.float32)
        ku = tl.load(k + at * k_row + channel, mask=inside, other=0.0).to(tl.float32)
        if beta is not None:
            strength = tl.load(beta + at * b_row + head * N + n, mask=inside, other=0.0)
            ku *= strength.to(tl.float32)
        decay = tl.exp(tl.load(log_decay + at * g_row + head * N + n, mask=inside, other=0.0))
        until *= decay[None, :]
        told = tl.load(dweights + square + u * CHUNK + c)[:, None] * qu[None, :]
        told += tl.load(doverlap + square + u * CHUNK + c)[:, None] * ku[None, :]
        given += told * until
        until = tl.where(c[:, None] == u, 1.0, until)
    left = tl.zeros([CHUNK, BLOCK_N], tl.float32)
    stays = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        in_p = p < P
        at, inside = states_at + p[:, None], in_n[None, :] & in_p[:, None]
        held = tl.load(before + at, mask=inside, other=0.0)
        d = tl.load(later + at, mask=inside, other=0.0)
        stays += tl.sum(held.to(tl.float32) * d.to(tl.float32), 0)
        vt = tl.load(
            fresh + lane[:, None] * P + p[None, :],
            mask=valid[:, None] & in_p[None, :], other=0.0,
        )  # fmt: skip
        left = tl.dot(vt, d, left, input_precision=PRECISION)
    left *= until
    given += left
    tl.store(dk + out, (read + given).to(dk.dtype.element_ty), mask=stored)
    # g_t acts on the sums from t on, on what tokens before t leave behind, and on the old state.
    change -= kt * given
    stays *= tl.load(kept + place * N + n, mask=in_n, other=0.0)
    stays += tl.sum(kt * left, 0)
    grad = tl.cumsum(change, 0, reverse=True) + stays[None, :]
    tl.store(dg + out, tl.where(valid[:, None], grad, 0.0), mask=stored)


Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def gradients(
    inputs: Inputs, dy: Tensor | None, dlast: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay, beta and the first state.

    inputs: q, k, v, log_decay, beta, state and new, as `channel_chunk` has them;
    dy: [B, T, H, P] and dlast: float32 [B, H, N, P], None where nothing comes from y or from the
    last state.
    """
    q, k, v, log_decay, beta, state, new = inputs
    s = sizes_of(q, v)
    dy = torch.zeros(v.shape, dtype=v.dtype, device=v.device) if dy is None else dy.contiguous()
    dlast = None if dlast is None else dlast.contiguous()
    strength, strength_row = by_head(beta)
    found = pairs(s, q, k, log_decay, beta, new, overlap=strength is not None)
    before, fresh, error = states(s, found, v, beta, state, new)
    later, dv = torch.empty_like(before), torch.empty_like(fresh)
    x = None if strength is None else torch.empty_like(fresh)
    dfirst = torch.empty(s.batch, s.heads, s.n, s.p, device=q.device)
    sizes = {"P": s.p, "CHUNK": s.chunk, "PRECISION": "ieee"}
    carried, warps = CARRIED[q.dtype]
    kda_chunk_bwd_states_kernel[(triton.cdiv(s.p, carried), s.heads, s.batch)](
        *found[:6], dy, strength, dlast, new, later, x, dv, dfirst,
        strength_row, s.tokens, s.chunks, N=s.n, **sizes, BLOCK_N=s.block_n, BLOCK_P=carried,
        num_warps=warps, num_stages=1,
    )  # fmt: skip
    dweights, doverlap = (torch.empty(found.weights.shape, device=q.device) for _ in range(2))
    dbeta = torch.empty(beta.shape, dtype=beta.dtype, device=q.device)
    block_p, warps = SCORES[q.dtype]
    kda_chunk_bwd_scores_kernel[(s.chunks, s.heads, s.batch)](
        dy, dv if x is None else x, fresh, error, found.overlap, strength, new, dweights, doverlap,
        None if strength is None else dbeta, strength_row, s.tokens, s.chunks, **sizes,
        BLOCK_P=block_p, num_warps=warps, num_stages=1,
    )  # fmt: skip
    # Heads of one group are summed in float32.
    wide = q.dtype if s.share == 1 else torch.float32
    dq, dk = (
        torch.empty(s.batch, s.tokens, s.heads, s.n, dtype=wide, device=q.device) for _ in range(2)
    )
    dg = torch.empty(dq.shape, device=q.device)
    block_n, block_p, warps = KEYS[q.dtype]
    rows = [row_stride(name, t) for name, t in (("q", q), ("k", k), ("log_decay", log_decay))]
    by_channel = (beta, dbeta, row_stride("beta", beta)) if strength is None else (None,) * 3
    kda_chunk_bwd_keys_kernel[(s.chunks * triton.cdiv(s.n, block_n), s.heads, s.batch)](
        q, k, log_decay, by_channel[0], dy, fresh, dv, before, later, found.kept, dweights,
        doverlap, new, dq, dk, dg, by_channel[1], *rows, by_channel[2], s.tokens, s.chunks,
        SHARE=s.share, N=s.n, **sizes, BLOCK_N=block_n, BLOCK_P=block_p,
        num_warps=warps, num_stages=1,
    )  # fmt: skip
    return s.sum_heads(dq, q.dtype), s.sum_heads(dk, k.dtype), dv, dg, dbeta, dfirst
