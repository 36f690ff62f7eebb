"""Mamba-2's recurrent update for 1 to 9 new tokens on states in slots (arXiv 2405.21060):
S_t = e^{Δ_t A} S_{t-1} + B_t (Δ_t x_t)ᵀ, y_t = S_tᵀ C_t + D x_t, with Δ = softplus(dt + dt_bias)
and A = -e^{A_log} computed here.

B sequences, K new tokens, H heads, G groups of b and c, N states, P channels per head.
One program updates a [N, BLOCK_P] tile: loaded once, K tokens in float32, stored once, or with
a ring seldom. The gated norm spans the heads of a group: the last of their programs does it.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.aot.ahead import Variant
from kernels.aot.recorded import NamedCall, meta, variants_of
from kernels.norm.torch import OutputNorm
from kernels.overlap import overlapped, start_next, wait_for_previous
from kernels.recurrent.calls import MATRIX_STEP, floats, output_norm, step_call
from kernels.recurrent.ring import Ring, ring_arguments, ring_row, store_as
from kernels.recurrent.step import (
    keep_state,
    last_slot,
    require_dims,
    require_heads,
    require_like,
    require_shape,
    require_state,
    row_stride,
    softplus,
)
from kernels.recurrent.step_norm import norm_arguments, norm_last, output_norm_ref

#: State dtype -> (BLOCK_P, num_warps). Tiles of fewer columns are half as fast on an H100: a row's
#: bytes in one tile should fill a line of the cache, or two of its sectors at least.
CONFIGS: dict[torch.dtype, tuple[int, int]] = {
    torch.float32: (32, 4),
    torch.bfloat16: (32, 4),
}


@triton.jit
def advanced(s, bt, xt, step, rate):  # type: ignore[no-untyped-def]
    """The tile s after one token: its b, x and step size."""
    # Fused here: around other code the compiler might fuse the other product, and round otherwise.
    return tl.fma(tl.exp(step * rate), s, bt[:, None] * (step * xt)[None, :])


@triton.jit
def ssm_step_fwd_kernel(  # type: ignore[no-untyped-def]
    x, dt, b, c, a_log, d, dt_bias, state, read, write, new, y,
    x_row, dt_row, b_row, c_row, slot_stride, gate, weight, arrivals, gate_row,
    ring, ring_past, held, fold, ring_slot,
    K: tl.constexpr, EACH: tl.constexpr, G: tl.constexpr, H: tl.constexpr, N: tl.constexpr,
    P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    NORM_EPS: tl.constexpr, GATE_FIRST: tl.constexpr, SIGMOID: tl.constexpr, NORM_D: tl.constexpr,
    WEIGHT_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    R: tl.constexpr, ROW: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of P, H, B). Rows of x, dt, b, c, y, gate are tokens; new may be None,
    and so may all that serves the output norm or the ring.
    """
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    group = head // (H // G)
    count = K
    if new is not None:
        count = tl.load(new + batch)
    source = tl.load(read + batch).to(tl.int64)
    if write is not None:
        last = last_slot(write + batch * K, count, K)
    n = tl.arange(0, BLOCK_N)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_n, in_p = n < N, p < P
    inside = in_n[:, None] & in_p[None, :]
    tile = n[:, None] * P + p[None, :]
    own = state + head * N * P + tile
    s = tl.load(own + source * slot_stride, mask=inside, other=0.0).to(tl.float32)
    rate = -tl.exp(tl.load(a_log + head).to(tl.float32))
    bias = tl.load(dt_bias + head).to(tl.float32)
    skip = tl.load(d + head).to(tl.float32)
    if ring is not None:
        rows = ring + source * ring_slot
        begun, behind = tl.load(ring_past + batch), tl.load(held + batch)
        folded = tl.load(fold + batch)
        first_tile = tl.program_id(0) == 0
        first_head = first_tile & (head % (H // G) == 0)
        for i in range(behind):
            held_row = ring_row(rows, begun - behind + i, R, ROW)
            xt = tl.load(held_row + head * P + p, mask=in_p, other=0.0).to(tl.float32)
            bt = tl.load(held_row + H * P + group * N + n, mask=in_n, other=0.0).to(tl.float32)
            raw = tl.load(held_row + H * P + G * N + head).to(tl.float32)
            s = advanced(s, bt, xt, softplus(raw + bias), rate)
            if i + 1 == folded:
                store_as(own + source * slot_stride, s, inside)
    for t in range(K):
        row = batch * K + t
        valid = t < count
        xt = tl.load(x + row * x_row + head * P + p, mask=in_p & valid, other=0.0).to(tl.float32)
        bt = tl.load(b + row * b_row + group * N + n, mask=in_n & valid, other=0.0).to(tl.float32)
        ct = tl.load(c + row * c_row + group * N + n, mask=in_n & valid, other=0.0).to(tl.float32)
        raw = tl.load(dt + row * dt_row + head, mask=valid, other=0.0).to(tl.float32)
        if ring is not None:
            to = ring_row(rows, begun + t, R, ROW)
            store_as(to + head * P + p, xt, in_p & valid)
            states = to + H * P + group * N + n
            store_as(states, bt, in_n & valid & first_head)
            steps = to + H * P + G * N + head
            store_as(steps, raw, valid & first_tile)
        s = advanced(s, bt, xt, tl.where(valid, softplus(raw + bias), 0.0), rate)
        yt = tl.sum(ct[:, None] * s, 0) + skip * xt
        tl.store(y + (row * H + head) * P + p, yt.to(y.dtype.element_ty), mask=in_p)
        if EACH:
            keep_state(own, write + batch * K, slot_stride, s, inside, t, count)
    if write is not None:
        to = own + last.to(tl.int64) * slot_stride
        tl.store(to, s.to(state.dtype.element_ty), mask=inside & (last >= 0))
    if gate is not None:
        norm_last(
            y, gate, weight, arrivals, gate_row, count, K, H, P,
            NORM_EPS, GATE_FIRST, SIGMOID, NORM_D, WEIGHT_D, BLOCK_K, BLOCK_D,
        )  # fmt: skip


def ssm_ring_row(groups: int, heads: int, n: int, p: int) -> int:
    """Elements of a ring's row: a token's x, b and dt."""
    return heads * (p + 1) + groups * n


def ssm_step(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a_log: Tensor, d: Tensor, dt_bias: Tensor,
    state: Tensor, read: Tensor, write: Tensor | None, *, each: bool = False,
    new: Tensor | None = None, norm: OutputNorm | None = None, arrivals: Tensor | None = None,
    ring: Ring | None = None,
) -> Tensor:  # fmt: skip
    """Advance the states of B sequences by K tokens, from slot to slot.

    x: [B, K, H, P]; dt: [B, K, H] before bias and softplus; b, c: [B, K, G, N]; a_log, d, dt_bias:
    [H]; state: [slots, H, N, P] in float32 or bfloat16; read: int32 [B], write: int32 [B, K], each:
    the slots of the states, as `recurrent.step` says; new: int32 [B] valid tokens of right-padded
    rows (None: K); norm: of y, its groups whole heads (None: y as it is); arrivals: int32 zeros, at
    least B * groups of the norm, left at zero, for a norm: pass the same one on each call of a
    stream to save the launch that clears a fresh one; ring: x, b and dt of tokens that the states
    lack, in place of write, as `recurrent.ring` says.
    Returns y [B, K, H, P] in x's dtype, 0 at padded tokens.
    Raises ValueError naming the argument, its value and the rule it breaks.
    """
    require_dims("x", x, 4)
    require_dims("b", b, 4)
    batch, tokens, heads, p = x.shape
    groups, n = b.shape[2:]
    require_shape("dt", dt, (batch, tokens, heads))
    require_shape("b", b, (batch, tokens, groups, n))
    require_shape("c", c, (batch, tokens, groups, n))
    require_heads("x", heads, groups)
    inputs = {"x": x, "dt": dt, "b": b, "c": c, "a_log": a_log, "d": d, "dt_bias": dt_bias}
    for name in ("a_log", "d", "dt_bias"):
        require_shape(name, inputs[name], (heads,))
    require_state(ssm_step_fwd_kernel, state, read, write, new, (batch, tokens, heads, n, p))
    require_like(state, **inputs)
    ringed = ring_arguments(
        ring, state, write, each, tokens, ssm_ring_row(groups, heads, n, p), x=x, b=b, dt=dt
    )
    y = torch.empty(batch, tokens, heads, p, dtype=x.dtype, device=x.device)
    block_p, warps = CONFIGS[state.dtype]
    normed = norm_arguments(norm, arrivals, y, state, warps)
    ssm_step_fwd_kernel[(triton.cdiv(p, block_p), heads, batch)](
        x, dt, b, c, a_log, d, dt_bias, state, read, write, new, y,
        row_stride("x", x), row_stride("dt", dt), row_stride("b", b), row_stride("c", c),
        state.stride(0),
        K=tokens, EACH=each and tokens > 1, G=groups, H=heads, N=n, P=p,
        BLOCK_N=triton.next_power_of_2(n), BLOCK_P=block_p, num_warps=warps, **normed,
        **ringed, **overlapped(x.device),
    )  # fmt: skip
    return y


def ssm_step_ref(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a_log: Tensor, d: Tensor, dt_bias: Tensor,
    state: Tensor, *, norm: OutputNorm | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The oracle: float64, one token at a time; state [B, H, N, P] already taken from its slots.

    Returns y [B, K, H, P] and the state after every token [B, K, H, N, P].
    """
    share = x.shape[2] // b.shape[2]
    b, c = (t.double().repeat_interleave(share, 2) for t in (b, c))
    x, step = x.double(), F.softplus(dt.double() + dt_bias.double())
    decay = (-a_log.double().exp() * step).exp()[..., None, None]
    fed = step[..., None] * x
    s, rows, states = state.double(), [], []
    for t in range(x.shape[1]):
        s = decay[:, t] * s + b[:, t, :, :, None] * fed[:, t, :, None]
        rows.append((c[:, t, :, :, None] * s).sum(-2) + d.double()[:, None] * x[:, t])
        states.append(s)
    return output_norm_ref(torch.stack(rows, 1), norm), torch.stack(states, 1)


def variants() -> list[Variant]:
    """Every shape and option that is compiled ahead of time; the first are the published sizes."""
    wide, narrow = torch.float32, torch.bfloat16

    def call(
        dtype: torch.dtype, n: int, p: int, tokens: int, options: str = "", groups: int = 0
    ) -> NamedCall:
        """groups: of the output norm, which has none at 0."""
        heads, rows = 64, partial(meta, 1, tokens)
        inner = heads * p
        norm = output_norm(rows(inner), inner // groups) if groups else None
        options += f" norm{groups}" * bool(groups)
        inputs = [rows(heads, p), rows(heads), rows(1, n), rows(1, n), *[floats(heads)] * 3]
        return step_call(
            ssm_step, inputs, (heads, n, p), dtype, tokens, options, norm,
            row=ssm_ring_row(1, heads, n, p),
        )  # fmt: skip

    calls = (
        call(wide, 128, 64, 1, groups=1), call(wide, 128, 64, 1),
        call(wide, 128, 64, 8, "ragged each", groups=1), call(wide, 128, 100, 2, "ragged"),
        call(wide, 128, 100, 3, "ragged", groups=8), call(wide, 64, 64, 4),
        call(narrow, 128, 64, 1), call(narrow, 128, 64, 1, groups=1),
        call(narrow, 128, 64, 8, "ragged each", groups=8),
        call(wide, 128, 64, 1, "ring", groups=1), call(wide, 128, 64, 5, "ragged ring", groups=1),
    )  # fmt: skip
    return variants_of(calls, {ssm_step_fwd_kernel: MATRIX_STEP})
