"""Linear attention for 1 to 9 new tokens on states in slots: S_t = γ S_{t-1} + k_t v_tᵀ,
y_t = scale · S_tᵀ q_t, with one fixed decay γ per head (retention, arXiv 2307.08621); optionally
q and k are turned by their tokens' positions first, and y is normed and gated after.

B sequences, K new tokens, H heads (of v), G heads of q and k, N key channels, P value channels.
One program updates a [N, BLOCK_P] tile: loaded once, K tokens in float32, stored once, or with
a ring seldom. The output norm spans a head's P channels, several tiles: the last of their programs
does it.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot.ahead import Variant
from kernels.aot.recorded import NamedCall, meta, variants_of
from kernels.checks import form, require
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
)
from kernels.recurrent.step_norm import norm_arguments, norm_last, output_norm_ref
from kernels.rope.rotate import rope_rotate_ref

#: State dtype -> (BLOCK_P, num_warps). Tiles of fewer columns are half as fast on an H100: a row's
#: bytes in one tile should fill a line of the cache, or two of its sectors at least.
CONFIGS: dict[torch.dtype, tuple[int, int]] = {
    torch.float32: (32, 4),
    torch.bfloat16: (32, 2),
}


@triton.jit
def turned(x, cos, sin, BLOCK_N):  # type: ignore[no-untyped-def]
    """Channels (0, 1), (2, 3), … of x [BLOCK_N] turned, rounded to x's dtype as if stored."""
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (BLOCK_N // 2, 2)))
    pairs = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(pairs, (BLOCK_N,)).to(x.dtype)


@triton.jit
def advanced(s, kt, vt, decay):  # type: ignore[no-untyped-def]
    """The tile s after one token: its turned key and its values."""
    # Fused here: around other code the compiler might fuse the other product, and round otherwise.
    return tl.fma(decay, s, kt[:, None] * vt[None, :])


@triton.jit
def linear_step_fwd_kernel(  # type: ignore[no-untyped-def]
    q, k, v, log_decay, state, read, write, new, y, q_row, k_row, v_row, slot_stride,
    cos_sin, past, positions, gate, weight, arrivals, gate_row,
    ring, ring_past, held, fold, ring_slot,
    SCALE: tl.constexpr, K: tl.constexpr, EACH: tl.constexpr, G: tl.constexpr, H: tl.constexpr,
    N: tl.constexpr, P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
    NORM_EPS: tl.constexpr, GATE_FIRST: tl.constexpr, SIGMOID: tl.constexpr, NORM_D: tl.constexpr,
    WEIGHT_D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    R: tl.constexpr, ROW: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of P, H, B). Rows of q, k, v, y, gate are tokens; new may be None, and so
    may all that serves the rotation, the output norm or the ring.
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
    decay = tl.exp(tl.load(log_decay + head).to(tl.float32))
    if ring is not None:
        rows = ring + source * ring_slot
        begun, behind = tl.load(ring_past + batch), tl.load(held + batch)
        folded = tl.load(fold + batch)
        first_head = (tl.program_id(0) == 0) & (head % (H // G) == 0)
        for i in range(behind):
            held_row = ring_row(rows, begun - behind + i, R, ROW)
            kt = tl.load(held_row + group * N + n, mask=in_n, other=0.0).to(tl.float32)
            vt = tl.load(held_row + G * N + head * P + p, mask=in_p, other=0.0).to(tl.float32)
            s = advanced(s, kt, vt, decay)
            if i + 1 == folded:
                store_as(own + source * slot_stride, s, inside)
    for t in range(K):
        row = batch * K + t
        valid = t < count
        qt = tl.load(q + row * q_row + group * N + n, mask=in_n & valid, other=0.0)
        kt = tl.load(k + row * k_row + group * N + n, mask=in_n & valid, other=0.0)
        if cos_sin is not None:
            position = tl.load(past + batch) + t
            at = cos_sin + position.to(tl.int64) * N + n
            # A position past the table turns by nothing.
            angle = tl.load(at, mask=in_n & (position < positions), other=1.0 - n % 2)
            cos, sin = tl.split(tl.reshape(angle, (BLOCK_N // 2, 2)))
            qt, kt = turned(qt, cos, sin, BLOCK_N), turned(kt, cos, sin, BLOCK_N)
        qt, kt = qt.to(tl.float32), kt.to(tl.float32)
        vt = tl.load(v + row * v_row + head * P + p, mask=in_p & valid, other=0.0).to(tl.float32)
        if ring is not None:
            to = ring_row(rows, begun + t, R, ROW)
            store_as(to + group * N + n, kt, in_n & valid & first_head)
            values = to + G * N + head * P + p
            store_as(values, vt, in_p & valid)
        s = advanced(s, kt, vt, tl.where(valid, decay, 1.0))
        yt = tl.sum(qt[:, None] * s, 0) * SCALE
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


def linear_ring_row(groups: int, heads: int, n: int, p: int) -> int:
    """Elements of a ring's row: a token's k, turned if it is, and v."""
    return groups * n + heads * p


def linear_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, read: Tensor,
    write: Tensor | None, *, each: bool = False, scale: float = 1.0, new: Tensor | None = None,
    cos_sin: Tensor | None = None, past: Tensor | None = None, norm: OutputNorm | None = None,
    arrivals: Tensor | None = None, ring: Ring | None = None,
) -> Tensor:  # fmt: skip
    """Advance the states of B sequences by K tokens, from slot to slot.

    q, k: [B, K, G, N]; v: [B, K, H, P]; log_decay: [H]; state: [slots, H, N, P] in float32 or
    bfloat16; read: int32 [B], write: int32 [B, K], each: the slots of states, as `recurrent.step`
    says; new: int32 [B] valid tokens of right-padded rows (None: K); cos_sin, past: turn q and k by
    position, as `rope.rotate` by its `cos_sin` and `lengths` and with its rounding (sums
    may differ in float32's last bit); norm: of y, head by head (None: y as it is); arrivals: int32
    zeros, at least B * H, left at zero, for a norm: pass the same one on each call of a stream to
    save the launch that clears a fresh one; ring: k, turned if it is, and v of tokens that the
    states lack, in place of write, as `recurrent.ring` says.
    Returns y [B, K, H, P] in v's dtype, 0 at padded tokens.
    Raises ValueError naming the argument, its value and the rule it breaks.
    """
    require_dims("q", q, 4)
    require_dims("v", v, 4)
    batch, tokens, groups, n = q.shape
    heads, p = v.shape[2:]
    require_shape("k", k, (batch, tokens, groups, n))
    require_shape("v", v, (batch, tokens, heads, p))
    require_shape("log_decay", log_decay, (heads,))
    require_heads("v", heads, groups)
    require_state(linear_step_fwd_kernel, state, read, write, new, (batch, tokens, heads, n, p))
    require_like(state, q=q, k=k, v=v, log_decay=log_decay)
    positions = None
    if cos_sin is not None or past is not None:
        positions = _require_angles(cos_sin, past, batch, n, state.device)
    ringed = ring_arguments(
        ring, state, write, each, tokens, linear_ring_row(groups, heads, n, p), k=k, v=v
    )
    y = torch.empty(batch, tokens, heads, p, dtype=v.dtype, device=v.device)
    block_p, warps = CONFIGS[state.dtype]
    normed = norm_arguments(norm, arrivals, y, state, warps)
    linear_step_fwd_kernel[(triton.cdiv(p, block_p), heads, batch)](
        q, k, v, log_decay, state, read, write, new, y,
        row_stride("q", q), row_stride("k", k), row_stride("v", v), state.stride(0),
        cos_sin, past, positions,
        SCALE=scale, K=tokens, EACH=each and tokens > 1, G=groups, H=heads, N=n, P=p,
        BLOCK_N=triton.next_power_of_2(n), BLOCK_P=block_p, num_warps=warps, **normed,
        **ringed, **overlapped(q.device),
    )  # fmt: skip
    return y


def _require_angles(
    cos_sin: Tensor | None, past: Tensor | None, batch: int, n: int, device: torch.device
) -> int:
    """Raise ValueError unless both serve heads of n channels; returns the table's positions."""
    if cos_sin is None or past is None:
        raise ValueError("one of cos_sin and past is None; a rotation needs both")
    if n % 2:
        raise ValueError(f"N={n} is odd; rotary pairs need an even one")
    require_shape("cos_sin", cos_sin, (cos_sin.shape[0], n // 2, 2))
    require_shape("past", past, (batch,))
    for name, tensor, dtype in (("cos_sin", cos_sin, torch.float32), ("past", past, torch.int32)):
        require(tensor.dtype == dtype and tensor.device == device and tensor.is_contiguous(),
                name, form(tensor), "must be contiguous {} on {}", dtype, device)  # fmt: skip
    return cos_sin.shape[0]


def linear_step_ref(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, *, scale: float = 1.0,
    cos_sin: Tensor | None = None, past: Tensor | None = None, norm: OutputNorm | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The oracle: float64, one token at a time; state [B, H, N, P] already taken from its slots.

    Returns y [B, K, H, P] and the state after every token [B, K, H, N, P].
    """
    if cos_sin is not None and past is not None:
        q, k = (rope_rotate_ref(t, cos_sin, past) for t in (q, k))
    share = v.shape[2] // q.shape[2]
    q, k = (t.double().repeat_interleave(share, 2) for t in (q, k))
    decay = log_decay.double().exp()[:, None, None]
    s, rows, states = state.double(), [], []
    for t in range(v.shape[1]):
        s = decay * s + k[:, t, :, :, None] * v[:, t, :, None].double()
        rows.append((q[:, t, :, :, None] * s).sum(-2) * scale)
        states.append(s)
    return output_norm_ref(torch.stack(rows, 1), norm), torch.stack(states, 1)


def variants() -> list[Variant]:
    """Every shape and option that is compiled ahead of time; the first is the 1b shape."""
    wide, narrow = torch.float32, torch.bfloat16

    def call(dtype: torch.dtype, n: int, p: int, tokens: int, options: str = "") -> NamedCall:
        rows, more = partial(meta, 1, tokens, 8), {"scale": n**-0.5}
        norm = output_norm(rows(p)) if "norm" in options else None
        if "turn" in options:
            more |= {"cos_sin": floats(4096, n // 2, 2), "past": meta(1, dtype=torch.int32)}
        inputs = [rows(n), rows(n), rows(p), floats(8)]
        return step_call(
            linear_step, inputs, (8, n, p), dtype, tokens, options, norm,
            row=linear_ring_row(8, 8, n, p), **more,
        )  # fmt: skip

    calls = (
        call(wide, 128, 256, 1, "turn norm"), call(wide, 128, 256, 1),
        call(wide, 128, 256, 8, "ragged each"), call(wide, 128, 256, 8, "ragged each turn norm"),
        call(wide, 64, 100, 4, "ragged"), call(wide, 64, 100, 3, "ragged turn norm"),
        call(narrow, 128, 256, 1), call(narrow, 128, 256, 1, "turn norm"),
        call(narrow, 128, 256, 8, "ragged each"), call(wide, 128, 256, 1, "turn norm ring"),
        call(wide, 128, 256, 5, "ragged turn norm ring"),
    )  # fmt: skip
    return variants_of(calls, {linear_step_fwd_kernel: MATRIX_STEP})
