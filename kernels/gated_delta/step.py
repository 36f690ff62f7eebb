"""The gated delta rule for 1 to 9 new tokens on states in slots (arXiv 2412.06464, eq. 10):
S_t = (I - β_t k_t k_tᵀ) e^{g_t} S_{t-1} + β_t k_t v_tᵀ, y_t = S_tᵀ q_t / √N, with
g = -e^{A_log} softplus(a + dt_bias), β = β_max sigmoid(b) and normalised q and k computed here.
Decays are one a head, or with dt_bias one for each key channel (arXiv 2510.26692, eq. 1).
Strengths may be by key channel, too: S_t = (I - k_t (β_t ∘ k_t)ᵀ) e^{g_t} S_{t-1} + k_t v_tᵀ (arXiv
2605.22791). With several products a token its keys, values and strengths are taken one by one after
one decay, and then the state is read (arXiv 2502.10297).

B sequences, K new tokens, H heads (of v), G heads of q and k, N key channels, P value channels.
One program updates a [N, BLOCK_P] tile: loaded once, K tokens in float32, stored once, or with
a ring seldom. The output norm spans a head's P channels, several tiles: the last of their programs
does it.
"""

import math
from dataclasses import replace
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
    torch.bfloat16: (32, 2),
}

#: Added to the squared length of q and k (`norm.torch.l2_norm`).
NORM_EPS = 1e-6


@triton.jit
def load_wide(at, mask):  # type: ignore[no-untyped-def]
    """What lies there in float32, and 0 where it is masked."""
    return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def advanced(  # type: ignore[no-untyped-def]
    s, kt, vt, at, beta, valid, rate, bias, EPS, BY_CHANNEL: tl.constexpr, ERASES: tl.constexpr,
    DECAYS: tl.constexpr,
):  # fmt: skip
    """The tile s after one product: its key, values and decays as they came, and β, by channel
    where it ERASES alone; DECAYS: whether it is a token's first product.
    """
    kt *= tl.rsqrt(tl.sum(kt * kt, 0) + EPS)
    if DECAYS:
        # A padded token has k = 0; without decay the state passes through it unchanged.
        decay = tl.exp(rate * tl.where(valid, softplus(at + bias), 0.0))
        if BY_CHANNEL:
            s *= decay[:, None]
        else:
            s *= decay
    if ERASES:
        delta = vt - tl.sum((kt * beta)[:, None] * s, 0)
    else:
        delta = (vt - tl.sum(kt[:, None] * s, 0)) * beta
    return tl.fma(kt[:, None], delta[None, :], s)


@triton.jit
def gdn_step_fwd_kernel(  # type: ignore[no-untyped-def]
    q, k, v, a, b, a_log, dt_bias, state, read, write, new, y,
    q_row, k_row, v_row, a_row, b_row, slot_stride, gate, weight, arrivals, gate_row,
    ring, ring_past, held, fold, ring_slot,
    EPS: tl.constexpr, SCALE: tl.constexpr, BETA_MAX: tl.constexpr, K: tl.constexpr,
    EACH: tl.constexpr, BY_CHANNEL: tl.constexpr, ERASES: tl.constexpr, PRODUCTS: tl.constexpr,
    G: tl.constexpr, H: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, NORM_EPS: tl.constexpr,
    GATE_FIRST: tl.constexpr, SIGMOID: tl.constexpr, NORM_D: tl.constexpr,
    WEIGHT_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    R: tl.constexpr, ROW: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of P, H, B). Rows of q, k, v, a, b, y, gate are tokens; new may be None,
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
    n = tl.arange(0, BLOCK_N)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    in_n, in_p = n < N, p < P
    inside = in_n[:, None] & in_p[None, :]
    tile = n[:, None] * P + p[None, :]
    own = state + head * N * P + tile
    s = tl.load(own + source * slot_stride, mask=inside, other=0.0).to(tl.float32)
    rate = -tl.exp(tl.load(a_log + head).to(tl.float32))
    gates: tl.constexpr = H * N if BY_CHANNEL else H
    if BY_CHANNEL:
        gate_at, in_gate = head * N + n, in_n
    else:
        gate_at, in_gate = head, True
    if ERASES:
        strength_at, in_strength = head * N + n, in_n
    else:
        strength_at, in_strength = head, True
    bias = tl.load(dt_bias + gate_at, mask=in_gate, other=0.0).to(tl.float32)
    if write is not None:
        last = last_slot(write + batch * K, count, K)
    if ring is not None:
        rows = ring + source * ring_slot
        begun, behind = tl.load(ring_past + batch), tl.load(held + batch)
        folded = tl.load(fold + batch)
        first_tile = tl.program_id(0) == 0
        first_head = first_tile & (head % (H // G) == 0)
        for i in range(behind):
            held_row = ring_row(rows, begun - behind + i, R, ROW)
            for j in tl.static_range(PRODUCTS):
                kt = load_wide(held_row + (j * G + group) * N + n, mask=in_n)
                vt = load_wide(held_row + PRODUCTS * G * N + (j * H + head) * P + p, mask=in_p)
                raw = held_row + PRODUCTS * G * N + PRODUCTS * H * P
                if j == 0:
                    at = load_wide(raw + gate_at, mask=in_gate)
                strength = raw + (gates + j * H) + strength_at
                bt = load_wide(strength, mask=in_n) if ERASES else tl.load(strength).to(tl.float32)
                beta = tl.sigmoid(bt) * BETA_MAX
                s = advanced(s, kt, vt, at, beta, True, rate, bias, EPS, BY_CHANNEL, ERASES, j == 0)
            if i + 1 == folded:
                store_as(own + source * slot_stride, s, inside)
    for t in range(K):
        row = batch * K + t
        valid = t < count
        qt = load_wide(q + row * q_row + group * N + n, mask=in_n & valid)
        for j in tl.static_range(PRODUCTS):
            kt = load_wide(k + row * k_row + (j * G + group) * N + n, mask=in_n & valid)
            vt = load_wide(v + row * v_row + (j * H + head) * P + p, mask=in_p & valid)
            if j == 0:
                at = load_wide(a + row * a_row + gate_at, mask=in_gate & valid)
            bt = load_wide(b + row * b_row + j * H + strength_at, mask=in_strength & valid)
            if ring is not None:
                to = ring_row(rows, begun + t, R, ROW)
                store_as(to + (j * G + group) * N + n, kt, in_n & valid & first_head)
                values = to + PRODUCTS * G * N + (j * H + head) * P + p
                store_as(values, vt, in_p & valid)
                raw = to + PRODUCTS * G * N + PRODUCTS * H * P
                if j == 0:
                    store_as(raw + gate_at, at, in_gate & valid & first_tile)
                store_as(raw + (gates + j * H) + strength_at, bt, in_strength & valid & first_tile)
            beta = tl.sigmoid(bt) * BETA_MAX
            if j == 0:
                qt *= tl.rsqrt(tl.sum(qt * qt, 0) + EPS) * SCALE
            s = advanced(s, kt, vt, at, beta, valid, rate, bias, EPS, BY_CHANNEL, ERASES, j == 0)
        yt = tl.sum(qt[:, None] * s, 0)
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


def gdn_ring_row(
    groups: int, heads: int, n: int, p: int, *, by_channel: bool = False, erases: bool = False,
    products: int = 1,
) -> int:  # fmt: skip
    """Elements of a ring's row: a token's k, v, a and b."""
    strengths = n if erases else products
    return products * (groups * n + heads * p) + heads * ((n if by_channel else 1) + strengths)


def gdn_step(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor,
    state: Tensor, read: Tensor, write: Tensor | None, *, beta_max: float = 1.0,
    each: bool = False, new: Tensor | None = None, norm: OutputNorm | None = None,
    arrivals: Tensor | None = None, ring: Ring | None = None,
) -> Tensor:  # fmt: skip
    """Advance the states of B sequences by K tokens, from slot to slot.

    q, k: [B, K, G, N], as the convolution left them; v: [B, K, H, P]; a, b: [B, K, H], the raw
    gates, or by channel, a alone or both: [B, K, H, N]; with n products a token k, v and b are
    [B, K, n, ...] and gates by head; a_log: [H]; dt_bias: [H], by channel [H, N]; state:
    [slots, H, N, P] in float32 or bfloat16; read: int32 [B], write: int32 [B, K], each: the slots
    of states, as `recurrent.step` says; beta_max: β is so many times the sigmoid of b; new: int32
    [B] valid tokens of right-padded rows (None: K); norm: of y, head by head (None: y as it is);
    arrivals: int32 zeros, at least B * H, left at zero, for a norm: pass the same one on each call
    of a stream to save the launch that clears a fresh one; ring: k, v, a and b of tokens that the
    states lack, in place of write, as `recurrent.ring` says.
    Returns y [B, K, H, P] in v's dtype, 0 at padded tokens.
    Raises ValueError naming the argument, its value and the rule it breaks.
    """
    require_dims("q", q, 4)
    products = (k.shape[2],) if k.dim() == 5 else ()
    require_dims("v", v, 4 + len(products))
    batch, tokens, groups, n = q.shape
    heads, p = v.shape[-2:]
    require_shape("k", k, (batch, tokens, *products, groups, n))
    require_shape("v", v, (batch, tokens, *products, heads, p))
    require_heads("v", heads, groups)
    inputs = {"q": q, "k": k, "v": v, "a": a, "b": b, "a_log": a_log, "dt_bias": dt_bias}
    by_channel = a.dim() == 4 and not products
    erases = by_channel and b.dim() == 4
    gates, times = (heads, n) if by_channel else (heads,), math.prod(products)
    require_shape("a", a, (batch, tokens, *gates))
    require_shape("b", b, (batch, tokens, *(gates if erases else (*products, heads))))
    require_shape("a_log", a_log, (heads,))
    require_shape("dt_bias", dt_bias, gates)
    require_state(gdn_step_fwd_kernel, state, read, write, new, (batch, tokens, heads, n, p))
    require_like(state, **inputs)
    ringed = ring_arguments(
        ring, state, write, each, tokens,
        gdn_ring_row(groups, heads, n, p, by_channel=by_channel, erases=erases, products=times),
        k=k, v=v, a=a, b=b,
    )  # fmt: skip
    y = torch.empty(batch, tokens, heads, p, dtype=v.dtype, device=v.device)
    block_p, warps = CONFIGS[state.dtype]
    normed = norm_arguments(norm, arrivals, y, state, warps)
    gdn_step_fwd_kernel[(triton.cdiv(p, block_p), heads, batch)](
        q, k, v, a, b, a_log, dt_bias, state, read, write, new, y,
        *(row_stride(name, inputs[name]) for name in "qkvab"), state.stride(0),
        EPS=NORM_EPS, SCALE=n**-0.5, BETA_MAX=beta_max, K=tokens, EACH=each and tokens > 1,
        BY_CHANNEL=by_channel, ERASES=erases, PRODUCTS=times, G=groups, H=heads, N=n, P=p,
        BLOCK_N=triton.next_power_of_2(n), BLOCK_P=block_p, num_warps=warps, **normed,
        **ringed, **overlapped(q.device),
    )  # fmt: skip
    return y


def gdn_step_ref(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor,
    state: Tensor, *, norm: OutputNorm | None = None, beta_max: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The oracle: float64, one token at a time; state [B, H, N, P] already taken from its slots.

    Returns y [B, K, H, P] and the state after every token [B, K, H, N, P].
    """
    share = v.shape[-2] // q.shape[-2]
    q, k = (t.double().repeat_interleave(share, -2) for t in (q, k))
    q, k = (t * (t.square().sum(-1, keepdim=True) + NORM_EPS).rsqrt() for t in (q, k))
    steps = F.softplus(a.double() + dt_bias.double())
    decay = (-a_log.double().exp()[:, None] * steps.reshape(*a.shape[:3], -1)).exp()
    beta, v = beta_max * b.double().sigmoid(), v.double()
    erases = k.dim() == 4 and b.dim() == 4
    if k.dim() == 4:
        k, v, beta = k[:, :, None], v[:, :, None], beta[:, :, None]
    s, rows, states = state.double(), [], []
    for t in range(v.shape[1]):
        s = decay[:, t, :, :, None] * s
        for j in range(v.shape[2]):
            key, strength = k[:, t, j, :, :, None], beta[:, t, j]
            if erases:
                written = v[:, t, j] - (strength[..., None] * key * s).sum(-2)
            else:
                written = strength[..., None] * (v[:, t, j] - (key * s).sum(-2))
            s = s + key * written[:, :, None]
        rows.append((q[:, t, :, :, None] * s).sum(-2) * q.shape[-1] ** -0.5)
        states.append(s)
    return output_norm_ref(torch.stack(rows, 1), norm), torch.stack(states, 1)


#: For a Blackwell ptxas stops at 80 registers where decays are by channel and there is a norm, and
#: keeps a pair of them in memory, once a program.
CHANNEL_SPILLS = 8


def variants() -> list[Variant]:
    """Every shape and option that is compiled ahead of time; the first are the published sizes."""
    wide, narrow = torch.float32, torch.bfloat16

    def call(dtype: torch.dtype, n: int, p: int, tokens: int, options: str = "") -> NamedCall:
        rows, chosen = partial(meta, 1, tokens, 16), options.split()
        products = (2,) if "twice" in chosen else ()
        each = partial(meta, 1, tokens, *products, 16)
        opened, gates = ("sigmoid", (n,)) if "channels" in chosen else ("silu", ())
        norm = output_norm(rows(p), opened=opened) if "norm" in chosen else None
        erases = "erasing" in chosen
        inputs = [
            rows(n), each(n), each(p), rows(*gates), rows(n) if erases else each(), floats(16),
            floats(16, *gates),
        ]  # fmt: skip
        return step_call(
            gdn_step, inputs, (16, n, p), dtype, tokens, options, norm,
            row=gdn_ring_row(
                16, 16, n, p, by_channel=bool(gates), erases=erases, products=math.prod(products)
            ),
            beta_max=2.0 if "beta2" in chosen else 1.0,
        )  # fmt: skip

    calls = (
        call(wide, 128, 128, 1, "norm"), call(wide, 128, 128, 1),
        call(wide, 128, 128, 8, "ragged each"), call(wide, 128, 128, 8, "ragged each norm"),
        call(wide, 64, 100, 4, "ragged"), call(wide, 64, 100, 3, "ragged norm"),
        call(narrow, 128, 128, 1), call(narrow, 128, 128, 1, "norm"),
        call(narrow, 128, 128, 8, "ragged each"),
        call(wide, 128, 128, 1, "norm ring"), call(wide, 128, 128, 5, "ragged norm ring"),
        call(wide, 128, 128, 1, "channels norm"), call(wide, 128, 128, 8, "channels ragged each"),
        call(wide, 64, 100, 3, "channels ragged norm"), call(narrow, 128, 128, 1, "channels norm"),
        call(wide, 128, 128, 1, "channels norm ring"), call(wide, 128, 128, 1, "beta2 norm ring"),
        call(wide, 128, 128, 5, "channels ragged norm ring"),
        call(wide, 128, 128, 1, "twice beta2 norm"),
        call(wide, 64, 100, 3, "twice ragged each norm"),
        call(narrow, 128, 128, 1, "twice norm"),
        call(wide, 128, 128, 1, "twice beta2 norm ring"),
        call(wide, 128, 128, 5, "twice ragged norm ring"),
        call(wide, 128, 128, 1, "channels erasing norm"),
        call(wide, 64, 100, 3, "channels erasing ragged each norm"),
        call(narrow, 128, 128, 1, "channels erasing norm"),
        call(wide, 128, 128, 1, "channels erasing norm ring"),
        call(wide, 128, 128, 5, "channels erasing ragged norm ring"),
    )  # fmt: skip
    by_channel = replace(
        MATRIX_STEP, spills=lambda v: CHANNEL_SPILLS if v.constexprs["BY_CHANNEL"] else 0
    )
    return variants_of(calls, {gdn_step_fwd_kernel: by_channel})
