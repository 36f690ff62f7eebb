"""RWKV-7's recurrence for 1 to 9 new tokens on states in slots (arXiv 2503.14456, section 4), from
raw gates to normed outputs: S_t = (diag(e^{g_t}) - (κ̂_t ∘ a_t) κ̂_tᵀ) S_{t-1} + k̃_t v_tᵀ,
y_t = norm(S_tᵀ r_t) + (r_t · (ρ ∘ k̃_t)) v_t, with a = σ(rate + its bias), κ̂ the normalised k ∘ ξ,
k̃ = k ∘ (1 + (a - 1) ∘ α) and g = -e^{-1/2} σ(decay + its bias), all computed here.

B sequences, K new tokens, H heads, N key channels, P value channels. One program has a head's whole
[N, P] tile, as its norm takes the mean over P: loaded once, K tokens in float32, stored once, or
with a ring seldom.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.aot.ahead import TOKEN_LOADS, Variant
from kernels.aot.recorded import Expected, NamedCall, meta, tile_loads, variants_of
from kernels.checks import form, require
from kernels.dplr.torch import LEAST_DECAY, dplr_ref
from kernels.overlap import overlapped, start_next, wait_for_previous
from kernels.recurrent.calls import floats, step_call
from kernels.recurrent.ring import Ring, ring_arguments, ring_row, store_as
from kernels.recurrent.step import (
    keep_state,
    last_slot,
    require_dims,
    require_like,
    require_shape,
    require_state,
    row_stride,
)

#: Elements of the largest tile.
MAX_TILE = 128 * 128
#: The least squared length by which a key is divided (`torch.nn.functional.normalize`).
NORM_EPS = 1e-24


@triton.jit
def advanced(  # type: ignore[no-untyped-def]
    s, k, v, decay, rate, valid, decay_bias, rate_bias, removal, scale, LEAST: tl.constexpr,
    EPS: tl.constexpr,
):  # fmt: skip
    """The tile s after one token, and the key along which it wrote."""
    # A padded token has k = 0; without decay the state passes through it unchanged.
    kept = tl.where(valid, tl.exp(LEAST * tl.sigmoid(decay + decay_bias)), 1.0)
    rate = tl.sigmoid(rate + rate_bias)
    unit = k * removal
    unit *= tl.rsqrt(tl.maximum(tl.sum(unit * unit, 0), EPS))
    key = k + k * (rate - 1.0) * scale
    erased = tl.sum(unit[:, None] * s, 0)
    s = kept[:, None] * s - (unit * rate)[:, None] * erased[None, :]
    return tl.fma(key[:, None], v[None, :], s), key


@triton.jit
def wkv_step_fwd_kernel(  # type: ignore[no-untyped-def]
    r, k, v, decay, rate, decay_bias, rate_bias, removal_scale, rate_scale, bonus, norm_weight,
    norm_bias, state, read, write, new, y, r_row, k_row, v_row, decay_row, rate_row, slot_stride,
    ring, ring_past, held, fold, ring_slot,
    K: tl.constexpr, EACH: tl.constexpr, H: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
    LEAST: tl.constexpr, NORM_EPS: tl.constexpr, EPS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr, R: tl.constexpr, ROW: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (H, B). Rows of r, k, v, decay, rate and y are tokens; new may be None, and so may all
    that serves the ring.
    """
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    head = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    count = K
    if new is not None:
        count = tl.load(new + batch)
    source = tl.load(read + batch).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    p = tl.arange(0, BLOCK_P)
    in_n, in_p = n < N, p < P
    inside = in_n[:, None] & in_p[None, :]
    keys, values = head * N + n, head * P + p
    own = state + head * N * P + n[:, None] * P + p[None, :]
    s = tl.load(own + source * slot_stride, mask=inside, other=0.0).to(tl.float32)
    decay_b = tl.load(decay_bias + keys, mask=in_n, other=0.0).to(tl.float32)
    rate_b = tl.load(rate_bias + keys, mask=in_n, other=0.0).to(tl.float32)
    removal = tl.load(removal_scale + keys, mask=in_n, other=0.0).to(tl.float32)
    scale = tl.load(rate_scale + keys, mask=in_n, other=0.0).to(tl.float32)
    shown = tl.load(bonus + keys, mask=in_n, other=0.0).to(tl.float32)
    weight = tl.load(norm_weight + values, mask=in_p, other=0.0).to(tl.float32)
    shift = tl.load(norm_bias + values, mask=in_p, other=0.0).to(tl.float32)
    if write is not None:
        last = last_slot(write + batch * K, count, K)
    if ring is not None:
        rows = ring + source * ring_slot
        begun, behind = tl.load(ring_past + batch), tl.load(held + batch)
        folded = tl.load(fold + batch)
        for i in range(behind):
            row = ring_row(rows, begun - behind + i, R, ROW)
            kt = tl.load(row + keys, mask=in_n, other=0.0).to(tl.float32)
            vt = tl.load(row + H * N + values, mask=in_p, other=0.0).to(tl.float32)
            raw = row + H * (N + P)
            dt = tl.load(raw + keys, mask=in_n, other=0.0).to(tl.float32)
            at = tl.load(raw + H * N + keys, mask=in_n, other=0.0).to(tl.float32)
            s, _ = advanced(s, kt, vt, dt, at, True, decay_b, rate_b, removal, scale, LEAST, EPS)
            if i + 1 == folded:
                store_as(own + source * slot_stride, s, inside)
    for t in range(K):
        token = batch * K + t
        valid = t < count
        here = in_n & valid
        rt = tl.load(r + token * r_row + keys, mask=here, other=0.0).to(tl.float32)
        kt = tl.load(k + token * k_row + keys, mask=here, other=0.0).to(tl.float32)
        vt = tl.load(v + token * v_row + values, mask=in_p & valid, other=0.0).to(tl.float32)
        dt = tl.load(decay + token * decay_row + keys, mask=here, other=0.0).to(tl.float32)
        at = tl.load(rate + token * rate_row + keys, mask=here, other=0.0).to(tl.float32)
        if ring is not None:
            to = ring_row(rows, begun + t, R, ROW)
            store_as(to + keys, kt, here)
            store_as(to + H * N + values, vt, in_p & valid)
            store_as(to + H * (N + P) + keys, dt, here)
            store_as(to + H * (2 * N + P) + keys, at, here)
        s, key = advanced(s, kt, vt, dt, at, valid, decay_b, rate_b, removal, scale, LEAST, EPS)
        yt = tl.sum(rt[:, None] * s, 0)
        centred = tl.where(in_p, yt - tl.sum(yt, 0) / P, 0.0)
        yt = centred * tl.rsqrt(tl.sum(centred * centred, 0) / P + NORM_EPS) * weight + shift
        yt += tl.sum(rt * key * shown, 0) * vt
        store_as(y + token * (H * P) + values, tl.where(valid, yt, 0.0), in_p)
        if EACH:
            keep_state(own, write + batch * K, slot_stride, s, inside, t, count)
    if write is not None:
        to = own + last.to(tl.int64) * slot_stride
        tl.store(to, s.to(state.dtype.element_ty), mask=inside & (last >= 0))


def wkv_ring_row(heads: int, n: int, p: int) -> int:
    """Elements of a ring's row: a token's k, v, decay and rate."""
    return heads * (3 * n + p)


def wkv_step(
    r: Tensor, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor, decay_bias: Tensor,
    rate_bias: Tensor, removal_scale: Tensor, rate_scale: Tensor, bonus: Tensor,
    norm_weight: Tensor, norm_bias: Tensor, state: Tensor, read: Tensor, write: Tensor | None, *,
    eps: float, each: bool = False, new: Tensor | None = None, ring: Ring | None = None,
) -> Tensor:  # fmt: skip
    """Advance the states of B sequences by K tokens, from slot to slot.

    r, k, decay, rate: [B, K, H, N], as projected; v: [B, K, H, P]; decay_bias, rate_bias,
    removal_scale (ξ), rate_scale (α), bonus (ρ): [H, N]; norm_weight, norm_bias: [H, P]; state:
    [slots, H, N, P] in float32 or bfloat16; read: int32 [B], write: int32 [B, K], each: the slots
    of states, as `recurrent.step` says; eps: of the norm; new: int32 [B] valid tokens of
    right-padded rows (None: K); ring: k, v, decay and rate of tokens that the states lack, in place
    of write, as `recurrent.ring` says.
    Returns y [B, K, H, P] in v's dtype, 0 at padded tokens.
    Raises ValueError naming the argument, its value and the rule it breaks.
    """
    require_dims("r", r, 4)
    require_dims("v", v, 4)
    batch, tokens, heads, n = r.shape
    p = v.shape[3]
    for name, tensor in {"k": k, "decay": decay, "rate": rate}.items():
        require_shape(name, tensor, (batch, tokens, heads, n))
    require_shape("v", v, (batch, tokens, heads, p))
    require_state(wkv_step_fwd_kernel, state, read, write, new, (batch, tokens, heads, n, p))
    block_n, block_p = (triton.next_power_of_2(size) for size in (n, p))
    if block_n * block_p > MAX_TILE:
        raise ValueError(f"N={n}, P={p} take a tile of {block_n}x{block_p}; at most {MAX_TILE}")
    of_keys = {
        "decay_bias": decay_bias, "rate_bias": rate_bias, "removal_scale": removal_scale,
        "rate_scale": rate_scale, "bonus": bonus,
    }  # fmt: skip
    of_values = {"norm_weight": norm_weight, "norm_bias": norm_bias}
    for size, weights in ((n, of_keys), (p, of_values)):
        for name, weight in weights.items():
            require_shape(name, weight, (heads, size))
            require_like(state, **{name: weight})
            require(weight.is_contiguous(), name, form(weight), "must be contiguous")
    inputs = {"r": r, "k": k, "v": v, "decay": decay, "rate": rate}
    require_like(state, **inputs)
    ringed = ring_arguments(
        ring, state, write, each, tokens, wkv_ring_row(heads, n, p), k=k, v=v, decay=decay,
        rate=rate,
    )  # fmt: skip
    y = torch.empty(batch, tokens, heads, p, dtype=v.dtype, device=v.device)
    wkv_step_fwd_kernel[(heads, batch)](
        r, k, v, decay, rate, *of_keys.values(), *of_values.values(), state, read, write, new, y,
        *(row_stride(name, tensor) for name, tensor in inputs.items()), state.stride(0),
        K=tokens, EACH=each and tokens > 1, H=heads, N=n, P=p, LEAST=LEAST_DECAY, NORM_EPS=eps,
        EPS=NORM_EPS, BLOCK_N=block_n, BLOCK_P=block_p,
        num_warps=_warps(block_n * block_p), **ringed, **overlapped(r.device),
    )  # fmt: skip
    return y


def _warps(tile: int) -> int:
    """As few as hold a published head, since as many threads as there are keys load each of the
    tokens' vectors once; more for larger tiles, where threads would run out of registers.
    """
    return max(1, tile // 2048) if tile <= 64 * 64 else min(8, tile // 1024)


def wkv_step_ref(
    r: Tensor, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor, decay_bias: Tensor,
    rate_bias: Tensor, removal_scale: Tensor, rate_scale: Tensor, bonus: Tensor,
    norm_weight: Tensor, norm_bias: Tensor, state: Tensor, *, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The oracle: float64, one token at a time; state [B, H, N, P] already taken from its slots.

    Returns y [B, K, H, P] and the state after every token [B, K, H, N, P].
    """
    r, k, v, s = r.double(), k.double(), v.double(), state.double()
    rate = (rate.double() + rate_bias.double()).sigmoid()
    unit = F.normalize(k * removal_scale.double(), dim=-1)
    key = k * (1 + (rate - 1) * rate_scale.double())
    g = LEAST_DECAY * (decay.double() + decay_bias.double()).sigmoid()
    rows, states = [], []
    for t in range(v.shape[1]):
        at = slice(t, t + 1)
        y, s = dplr_ref(r[:, at], key[:, at], v[:, at], g[:, at], -unit[:, at],
                        (unit * rate)[:, at], s)  # fmt: skip
        rows.append(y)
        states.append(s)
    y = F.layer_norm(torch.cat(rows, 1), v.shape[3:], eps=eps)
    y = y * norm_weight.double() + norm_bias.double()
    return y + (r * key * bonus.double()).sum(-1, keepdim=True) * v, torch.stack(states, 1)


def variants() -> list[Variant]:
    """Every shape and option that is compiled ahead of time; the first is the published shape."""
    wide, narrow = torch.float32, torch.bfloat16

    def call(dtype: torch.dtype, n: int, p: int, tokens: int, options: str = "") -> NamedCall:
        rows, heads = partial(meta, 1, tokens, 32), 32
        inputs = [
            rows(n), rows(n), rows(p), rows(n), rows(n), floats(heads, n),
            *[meta(heads, n) for _ in range(4)], meta(heads, p), meta(heads, p),
        ]  # fmt: skip
        return step_call(
            wkv_step, inputs, (heads, n, p), dtype, tokens, options,
            row=wkv_ring_row(heads, n, p), eps=64e-5,
        )  # fmt: skip

    calls = (
        call(wide, 64, 64, 1), call(wide, 64, 128, 1), call(wide, 64, 64, 8, "ragged each"),
        call(wide, 64, 128, 8, "ragged each"), call(wide, 40, 100, 3, "ragged"),
        call(narrow, 64, 64, 1), call(narrow, 64, 64, 8, "ragged each"),
        call(wide, 64, 64, 1, "ring"), call(wide, 64, 128, 5, "ragged ring"),
    )  # fmt: skip
    expected = Expected(
        wide_loads=tile_loads("state", "BLOCK_N", "BLOCK_P"), narrow_in_loops=TOKEN_LOADS
    )
    return variants_of(calls, {wkv_step_fwd_kernel: expected})
