"""The two passes of `channel_chunk`, which backward runs again.

With c the running sum of g in a chunk, Λ its last value and S the state before it:
pairs    A_ts = β_t Σ_n k_t e^{c_t - c_s} k_s, s < t;   W_ts = Σ_n q_t e^{c_t - c_s} k_s, s <= t;
         T = (I + A)^-1;   k e^{c}, q e^{c} and k e^{Λ-c}
states   V = T β (v - (k e^{c}) S);   y = W V + (q e^{c}) S;   S' = e^{Λ} S + (k e^{Λ-c})ᵀ V
Where strengths are by channel (arXiv 2605.22791) the erasing keys e = β ∘ k take β's place: A_ts =
Σ_n e_t e^{c_t - c_s} k_s, V = T (v - (e e^{c}) S).
`pairs` walks through a chunk and keeps each key as it has decayed since: decays only ever multiply,
so nothing is exponentiated but g <= 0 and no sum of them loses a small one beside a large one.

B batch, T tokens, G groups of q and k, H heads of v, N key channels, P value channels.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.gated_delta.chunk_passes import unit_inverse
from kernels.recurrent.scan import ScanSizes
from kernels.recurrent.step import row_stride


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Tokens per chunk, 16 or 32; value channels per tile of `states`."""

    chunk: int
    carried: int


_NARROW = Config(chunk=32, carried=32)
#: Products of float32 are exact ("ieee"), without the matrix unit: larger tiles would spill.
_WIDE = Config(chunk=16, carried=8)
CONFIGS = {torch.bfloat16: _NARROW, torch.float16: _NARROW, torch.float32: _WIDE}

#: Warps of both passes.
WARPS = 4


@dataclass(frozen=True, slots=True)
class Sizes(ScanSizes):
    """Every size of one call, and its tiles."""

    config: Config

    @property
    def block_n(self) -> int:
        """Key channels of a whole head, padded."""
        return int(triton.next_power_of_2(self.n))


def sizes_of(q: Tensor, v: Tensor) -> Sizes:
    """The sizes of q [B, T, G, N] and v [B, T, H, P]."""
    config = CONFIGS[q.dtype]
    return Sizes.of(q, v, config.chunk, config)


@triton.jit
def kda_chunk_fwd_pairs_kernel(  # type: ignore[no-untyped-def]
    q, k, log_decay, beta, new, asked, read, left, kept, weights, inverse, overlap,
    q_row, k_row, g_row, b_row, tokens, chunks,
    SHARE: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
    ERASES: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, H, B): all that a chunk's tokens do to each other.

    asked, read, left: [B, H, chunks, CHUNK, N], q e^{c}, k e^{c} and k e^{Λ-c}, weights, inverse:
    [B, H, chunks, CHUNK, CHUNK], W and T, in the inputs' dtype; kept: float32 [B, H, chunks, N];
    overlap (None: unwanted): float32 as `weights`, A without β. ERASES: β is by channel; read is
    e e^{c} then.
    """
    chunk, head = tl.program_id(0), tl.program_id(1)
    heads, batch = tl.num_programs(1), tl.program_id(2).to(tl.int64)
    place = (batch * heads + head) * chunks + chunk
    count = tokens
    if new is not None:
        count = tl.minimum(tokens, tl.load(new + batch))
    c, n = tl.arange(0, CHUNK), tl.arange(0, BLOCK_N)
    in_n = n < N
    kind = inverse.dtype.element_ty
    keys = tl.zeros([CHUNK, BLOCK_N], tl.float32)
    since = tl.zeros([BLOCK_N], tl.float32) + 1.0
    before = tl.zeros([CHUNK, CHUNK], tl.float32)
    scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    for i in range(CHUNK):
        t = chunk * CHUNK + i
        row = batch * tokens + t
        inside = in_n & (t < count)
        channel = head // SHARE * N + n
        qt = tl.load(q + row * q_row + channel, mask=inside, other=0.0).to(tl.float32)
        kt = tl.load(k + row * k_row + channel, mask=inside, other=0.0).to(tl.float32)
        decay = tl.exp(tl.load(log_decay + row * g_row + head * N + n, mask=inside, other=0.0))
        erasing = kt
        if ERASES:
            strength = tl.load(beta + row * b_row + head * N + n, mask=inside, other=0.0)
            erasing = kt * strength.to(tl.float32)
        keys *= decay[None, :]
        since *= decay
        here = c[:, None] == i
        before = tl.where(here, tl.sum(keys * erasing[None, :], 1)[None, :], before)
        keys = tl.where(here, kt[None, :], keys)
        scores = tl.where(here, tl.sum(keys * qt[None, :], 1)[None, :], scores)
        to = (place * CHUNK + i) * N + n
        tl.store(asked + to, (qt * since).to(kind), mask=in_n)
        tl.store(read + to, (erasing * since).to(kind), mask=in_n)
    to = (place * CHUNK + c)[:, None] * N + n[None, :]
    tl.store(left + to, keys.to(kind), mask=in_n[None, :])
    tl.store(kept + place * N + n, since, mask=in_n)
    square = place * CHUNK * CHUNK + c[:, None] * CHUNK + c[None, :]
    tl.store(weights + square, scores.to(kind))
    if overlap is not None:
        tl.store(overlap + square, before)
    if not ERASES:
        t = chunk * CHUNK + c
        strength = tl.load(beta + (batch * tokens + t) * b_row + head, mask=t < count, other=0.0)
        before *= strength.to(tl.float32)[:, None]
    solved = unit_inverse(before, CHUNK)
    tl.store(inverse + square, solved.to(kind))


@triton.jit
def kda_chunk_fwd_states_kernel(  # type: ignore[no-untyped-def]
    asked, read, left, kept, weights, inverse, v, beta, first, new, y, last, states, fresh, error,
    v_row, b_row, tokens, chunks,
    N: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of P, H, B): S, carried through the chunks in float32, and what is wanted of y
    [B, T, H, P] and last [B, H, N, P], or of states, S before every chunk, [B, H, chunks, N, P],
    fresh, V, and error, v - (k e^{c}) S, both [B, T, H, P]; the others are None.

    first (None: zeros), last: float32; asked, ..., inverse: as `kda_chunk_fwd_pairs_kernel` left
    them, asked and weights None where y is; beta: None where it is in `read`.
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
    if first is not None:
        current = tl.load(first + lane * N * P + tile, mask=inside, other=0.0)
    for chunk in range(chunks):
        place = lane * chunks + chunk
        t = chunk * CHUNK + c
        row = batch * tokens + t
        values_in = (t < count)[:, None] & in_p[None, :]
        channels = (place * CHUNK + c)[:, None] * N + n[None, :]
        square = place * CHUNK * CHUNK + c[:, None] * CHUNK + c[None, :]
        out = (row * heads + head)[:, None] * P + p[None, :]
        stored = (t < tokens)[:, None] & in_p[None, :]
        kt = tl.load(read + channels, mask=in_n[None, :], other=0.0)
        vt = tl.load(
            v + row[:, None] * v_row + (head * P + p)[None, :], mask=values_in, other=0.0
        )  # fmt: skip
        if beta is not None:
            strength = tl.load(beta + row * b_row + head, mask=t < count, other=0.0).to(tl.float32)
        held = current.to(kt.dtype)
        missed = vt.to(tl.float32) - tl.dot(kt, held, input_precision=PRECISION)
        if error is not None:
            tl.store(error + out, missed.to(kt.dtype), mask=stored)
        if beta is not None:
            missed *= strength[:, None]
        missed = missed.to(kt.dtype)
        value = tl.dot(tl.load(inverse + square), missed, input_precision=PRECISION).to(kt.dtype)
        if y is not None:
            qt = tl.load(asked + channels, mask=in_n[None, :], other=0.0)
            seen = tl.dot(qt, held, input_precision=PRECISION)
            seen = tl.dot(tl.load(weights + square), value, seen, input_precision=PRECISION)
            tl.store(y + out, seen.to(y.dtype.element_ty), mask=stored)
        if states is not None:
            tl.store(states + place * N * P + tile, held, mask=inside)
            tl.store(fresh + out, value, mask=stored)
        kt = tl.load(left + channels, mask=in_n[None, :], other=0.0)
        current *= tl.load(kept + place * N + n, mask=in_n, other=0.0)[:, None]
        current = tl.dot(tl.trans(kt), value, current, input_precision=PRECISION)
    if last is not None:
        tl.store(last + lane * N * P + tile, current, mask=inside)


class Pairs(NamedTuple):
    """What `kda_chunk_fwd_pairs_kernel` leaves."""

    asked: Tensor
    read: Tensor
    left: Tensor
    kept: Tensor
    weights: Tensor
    inverse: Tensor
    overlap: Tensor | None


def pairs(
    s: Sizes, q: Tensor, k: Tensor, log_decay: Tensor, beta: Tensor, new: Tensor | None,
    *, overlap: bool = False,
) -> Pairs:  # fmt: skip
    """The first pass; overlap: whether A without β is wanted."""
    lead = s.batch, s.heads, s.chunks
    asked, read, left = (q.new_empty(*lead, s.chunk, s.n) for _ in range(3))
    weights, inverse = (q.new_empty(*lead, s.chunk, s.chunk) for _ in range(2))
    wide = torch.empty(*weights.shape, device=q.device) if overlap else None
    kept = torch.empty(*lead, s.n, device=q.device)
    found = Pairs(asked, read, left, kept, weights, inverse, wide)
    rows = (("q", q), ("k", k), ("log_decay", log_decay), ("beta", beta))
    kda_chunk_fwd_pairs_kernel[(s.chunks, s.heads, s.batch)](
        q, k, log_decay, beta, new, *found,
        *(row_stride(name, t) for name, t in rows), s.tokens, s.chunks,
        SHARE=s.share, N=s.n, CHUNK=s.chunk, BLOCK_N=s.block_n, ERASES=beta.dim() == 4,
        num_warps=WARPS, num_stages=1,
    )  # fmt: skip
    return found


def by_head(beta: Tensor) -> tuple[Tensor | None, int | None]:
    """Strengths as the passes over states take them, and their row stride: None by channel."""
    return (None, None) if beta.dim() == 4 else (beta, row_stride("beta", beta))


def outputs(
    s: Sizes, found: Pairs, v: Tensor, beta: Tensor, first: Tensor | None, new: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The second pass: y, in v's dtype, and the last state (float32)."""
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    last = torch.empty(s.batch, s.heads, s.n, s.p, device=v.device)
    _carry(s, found, v, beta, first, new, y, last, None, None, None)
    return y, last


def states(
    s: Sizes, found: Pairs, v: Tensor, beta: Tensor, first: Tensor | None, new: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The second pass again: S before every chunk, V and v - (k e^{c}) S, in v's dtype; the last
    one serves the gradient of strengths by head, and is None where they are by channel.
    """
    before = v.new_empty(s.batch, s.heads, s.chunks, s.n, s.p)
    fresh = v.new_empty(s.batch, s.tokens, s.heads, s.p)
    error = torch.empty_like(fresh) if beta.dim() == 3 else None
    _carry(s, found, v, beta, first, new, None, None, before, fresh, error)
    return before, fresh, error


def _carry(
    s: Sizes, found: Pairs, v: Tensor, beta: Tensor, first: Tensor | None, new: Tensor | None,
    y: Tensor | None, *wanted: Tensor | None,
) -> None:  # fmt: skip
    asked, weights = (None, None) if y is None else (found.asked, found.weights)
    strength, strength_row = by_head(beta)
    kda_chunk_fwd_states_kernel[(triton.cdiv(s.p, s.config.carried), s.heads, s.batch)](
        asked, found.read, found.left, found.kept, weights, found.inverse, v, strength, first, new,
        y, *wanted,
        row_stride("v", v), strength_row, s.tokens, s.chunks,
        N=s.n, P=s.p, CHUNK=s.chunk, BLOCK_N=s.block_n, BLOCK_P=s.config.carried,
        PRECISION="ieee", num_warps=WARPS, num_stages=1,
    )  # fmt: skip
