"""Triton form of `torch.gdn_chunk` with decays by key channel: S_t = (I - β_t k_t k_tᵀ) e^{g_t}
S_{t-1} + β_t k_t v_tᵀ, y_t = S_tᵀ q_t, e^{g_t} a diagonal matrix.

Kimi Delta Attention (arXiv 2510.26692, section 3), chunked by the WY form (arXiv 2406.06484), in
two passes. With c the running sum of g in a chunk, Λ its last value and S the state before it:
pairs    A_ts = β_t Σ_n k_t e^{c_t - c_s} k_s, s < t;   W_ts = Σ_n q_t e^{c_t - c_s} k_s, s <= t;
         T = (I + A)^-1;   k e^{c}, q e^{c} and k e^{Λ-c}
states   V = T β (v - (k e^{c}) S);   y = W V + (q e^{c}) S;   S' = e^{Λ} S + (k e^{Λ-c})ᵀ V
`pairs` walks through a chunk and keeps each key as it has decayed since: decays only ever multiply,
so nothing is exponentiated but g <= 0 and no sum of them loses a small one beside a large one.
Decays, T and carried states are float32; operands of products keep the inputs' dtype. The
oracle is `gdn_ref` of `torch`.

B batch, T tokens, G groups of q and k, H heads of v, N key channels, P value channels.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.aot.ahead import TOKEN_LOADS, Variant
from kernels.aot.recorded import Expected, NamedCall, meta, variants_of
from kernels.checks import form, require
from kernels.gated_delta import torch as plain
from kernels.gated_delta.chunk_passes import unit_inverse
from kernels.recurrent.calls import TOKENS, floats, loads_of, narrow_products, scan_call
from kernels.recurrent.scan import ScanSizes, check_scan
from kernels.recurrent.step import row_stride

MAX_N, MAX_P = 128, 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Tokens per chunk, 16 or 32; value channels per tile of `states`; warps of the two passes."""

    chunk: int
    carried: int
    pairs_warps: int
    states_warps: int


_NARROW = Config(chunk=32, carried=32, pairs_warps=4, states_warps=4)
#: Products of float32 are exact ("ieee"), without the matrix unit: larger tiles would spill.
_WIDE = Config(chunk=16, carried=8, pairs_warps=2, states_warps=4)
CONFIGS = {torch.bfloat16: _NARROW, torch.float16: _NARROW, torch.float32: _WIDE}


@triton.jit
def kda_chunk_fwd_pairs_kernel(  # type: ignore[no-untyped-def]
    q, k, log_decay, beta, new, asked, read, left, kept, weights, inverse,
    q_row, k_row, g_row, b_row, tokens, chunks,
    SHARE: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, H, B): all that a chunk's tokens do to each other.

    asked, read, left: [B, H, chunks, CHUNK, N], q e^{c}, k e^{c} and k e^{Λ-c}, weights, inverse:
    [B, H, chunks, CHUNK, CHUNK], W and T, in the inputs' dtype; kept: float32 [B, H, chunks, N].
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
        keys *= decay[None, :]
        since *= decay
        here = c[:, None] == i
        before = tl.where(here, tl.sum(keys * kt[None, :], 1)[None, :], before)
        keys = tl.where(here, kt[None, :], keys)
        scores = tl.where(here, tl.sum(keys * qt[None, :], 1)[None, :], scores)
        to = (place * CHUNK + i) * N + n
        tl.store(asked + to, (qt * since).to(kind), mask=in_n)
        tl.store(read + to, (kt * since).to(kind), mask=in_n)
    to = (place * CHUNK + c)[:, None] * N + n[None, :]
    tl.store(left + to, keys.to(kind), mask=in_n[None, :])
    tl.store(kept + place * N + n, since, mask=in_n)
    t = chunk * CHUNK + c
    strength = tl.load(beta + (batch * tokens + t) * b_row + head, mask=t < count, other=0.0)
    solved = unit_inverse(before * strength.to(tl.float32)[:, None], CHUNK)
    square = place * CHUNK * CHUNK + c[:, None] * CHUNK + c[None, :]
    tl.store(weights + square, scores.to(kind))
    tl.store(inverse + square, solved.to(kind))


@triton.jit
def kda_chunk_fwd_states_kernel(  # type: ignore[no-untyped-def]
    asked, read, left, kept, weights, inverse, v, beta, first, new, y, last,
    v_row, b_row, tokens, chunks,
    N: tl.constexpr, P: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of P, H, B): S, carried through the chunks in float32, and y [B, T, H, P].

    first (None: zeros), last: float32 [B, H, N, P]; the others as `kda_chunk_fwd_pairs_kernel`
    left them.
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
        kt = tl.load(read + channels, mask=in_n[None, :], other=0.0)
        vt = tl.load(
            v + row[:, None] * v_row + (head * P + p)[None, :], mask=values_in, other=0.0
        )  # fmt: skip
        strength = tl.load(beta + row * b_row + head, mask=t < count, other=0.0).to(tl.float32)
        held = current.to(kt.dtype)
        missed = vt.to(tl.float32) - tl.dot(kt, held, input_precision=PRECISION)
        missed = (missed * strength[:, None]).to(kt.dtype)
        value = tl.dot(tl.load(inverse + square), missed, input_precision=PRECISION).to(kt.dtype)
        qt = tl.load(asked + channels, mask=in_n[None, :], other=0.0)
        out = tl.dot(qt, held, input_precision=PRECISION)
        out = tl.dot(tl.load(weights + square), value, out, input_precision=PRECISION)
        tl.store(
            y + (row * heads + head)[:, None] * P + p[None, :], out.to(y.dtype.element_ty),
            mask=(t < tokens)[:, None] & in_p[None, :],
        )  # fmt: skip
        kt = tl.load(left + channels, mask=in_n[None, :], other=0.0)
        current *= tl.load(kept + place * N + n, mask=in_n, other=0.0)[:, None]
        current = tl.dot(tl.trans(kt), value, current, input_precision=PRECISION)
    tl.store(last + lane * N * P + tile, current, mask=inside)


def kda_chunk(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None = None,
    *, new: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The chunked form; differentiable: backward goes through `torch.gdn_chunk`, computed again.

    q, k: [B, T, G, N], normalised and q scaled; v: [B, T, H, P], all of one dtype (float32,
    bfloat16, float16), N a multiple of 16 up to 128, P up to 256; log_decay: float32
    [B, T, H, N], <= 0; beta: [B, T, H] of any of these dtypes; tokens evenly spaced and each
    token's channels contiguous; state: float32 [B, H, N, P] before the first token (None: zeros);
    new: int32 [B] valid tokens of right-padded rows (None: T): padded tokens leave the state as it
    is, and what they hold is not read.
    Returns y [B, T, H, P] in v's dtype, 0 at padded tokens, and the state after the last valid
    token, float32 [B, H, N, P].
    Raises ValueError naming the argument, its value and the rule it breaks.
    """
    _check(q, k, v, log_decay, beta, state, new)
    y, last = _KdaChunk.apply(q, k, v, log_decay, beta, state, new)
    return y, last


class _KdaChunk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor,
        state: Tensor | None, new: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(q, k, v, log_decay, beta, state, new)
        ctx.set_materialize_grads(False)
        return _forward(q, k, v, log_decay, beta, state, new)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, state, new = ctx.saved_tensors
        given = [t.detach().requires_grad_() for t in inputs]
        first = None if state is None else state.detach().requires_grad_()
        wanted = given if first is None else [*given, first]
        with torch.enable_grad():
            q, k, v, log_decay, beta = (
                given if new is None else [_valid(t, new) for t in given]
            )  # fmt: skip
            outputs = plain.gdn_chunk(q, k, v, log_decay, beta, first)
        told = [
            (out, grad if new is None or out is outputs[1] else _valid(grad, new))
            for out, grad in zip(outputs, (dy, dlast), strict=True)
            if grad is not None
        ]
        grads = torch.autograd.grad(
            [out for out, _ in told], wanted, [grad for _, grad in told], materialize_grads=True
        )
        return *grads, *([None] if first is None else []), None


def _valid(t: Tensor, new: Tensor) -> Tensor:
    """t [B, T, ...] with zeros at padded tokens."""
    own = torch.arange(t.shape[1], device=t.device) < new[:, None]
    return torch.where(own.view(*own.shape, *[1] * (t.dim() - 2)), t, 0)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None,
    new: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    config = CONFIGS[q.dtype]
    s = ScanSizes.of(q, v, config.chunk)
    lead = s.batch, s.heads, s.chunks
    asked, read, left = (q.new_empty(*lead, s.chunk, s.n) for _ in range(3))
    weights, inverse = (q.new_empty(*lead, s.chunk, s.chunk) for _ in range(2))
    kept = torch.empty(*lead, s.n, dtype=torch.float32, device=q.device)
    sizes = {"N": s.n, "CHUNK": s.chunk, "BLOCK_N": triton.next_power_of_2(s.n)}
    rows = (("q", q), ("k", k), ("log_decay", log_decay), ("beta", beta))
    kda_chunk_fwd_pairs_kernel[(s.chunks, s.heads, s.batch)](
        q, k, log_decay, beta, new, asked, read, left, kept, weights, inverse,
        *(row_stride(name, t) for name, t in rows), s.tokens, s.chunks,
        SHARE=s.share, **sizes, num_warps=config.pairs_warps, num_stages=1,
    )  # fmt: skip
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    last = torch.empty(s.batch, s.heads, s.n, s.p, dtype=torch.float32, device=q.device)
    kda_chunk_fwd_states_kernel[(triton.cdiv(s.p, config.carried), s.heads, s.batch)](
        asked, read, left, kept, weights, inverse, v, beta, state, new, y, last,
        row_stride("v", v), row_stride("beta", beta), s.tokens, s.chunks,
        P=s.p, **sizes, BLOCK_P=config.carried, PRECISION="ieee",
        num_warps=config.states_warps, num_stages=1,
    )  # fmt: skip
    return y, last


def _check(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor,
    state: Tensor | None, new: Tensor | None,
) -> None:  # fmt: skip
    check_scan(
        kda_chunk_fwd_states_kernel, q, k, v, state, new, CONFIGS, (MAX_N, MAX_P),
        log_decay=log_decay, beta=beta,
    )  # fmt: skip
    by_channel = [*v.shape[:3], q.shape[3]]
    gates = (
        ("log_decay", log_decay, by_channel, [torch.float32]),
        ("beta", beta, by_channel[:3], list(CONFIGS)),
    )
    for name, gate, shape, dtypes in gates:
        require(list(gate.shape) == shape, name, form(gate), "must be {}", shape)
        require(gate.dtype in dtypes, name, form(gate), "must be of {}", dtypes)
        row_stride(name, gate)


def variants() -> list[Variant]:
    """Both passes, every dtype and tile; the first are the outputs at the published sizes."""
    narrow, half, wide = torch.bfloat16, torch.float16, torch.float32

    def call(dtype: torch.dtype, n: int, p: int, options: str = "ragged given") -> NamedCall:
        rows = partial(meta, 1, TOKENS, dtype=dtype)
        inputs = [rows(16, n), rows(16, n), rows(16, p), floats(1, TOKENS, 16, n), rows(16)]
        return scan_call(kda_chunk, inputs, (16, n, p), options)

    tiles = [f"{t} CHUNK BLOCK_N" for t in ("asked", "read", "left")]
    tiles += [f"{t} CHUNK CHUNK" for t in ("weights", "inverse")] + ["v CHUNK BLOCK_P"]
    # Loads in loops are narrow where they are of one token: gates, and the rows of `pairs`.
    expected = {
        kda_chunk_fwd_states_kernel: Expected(
            wide_loads=loads_of(*tiles), narrow_in_loops=TOKEN_LOADS, matrix=narrow_products
        ),
        kda_chunk_fwd_pairs_kernel: Expected(wide_loads=0, narrow_in_loops=TOKEN_LOADS),
    }
    calls = (
        call(narrow, 128, 128, ""), call(narrow, 96, 192), call(narrow, 16, 16),
        call(half, 128, 128, ""),
        call(wide, 128, 128, ""), call(wide, 96, 192), call(wide, 16, 16),
    )  # fmt: skip
    return variants_of(calls, expected)
