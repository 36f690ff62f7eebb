"""Mamba-3's recurrent update for 1 to 9 new tokens on states in slots (arXiv 2603.15569), from the
tokens' projected inputs to gated outputs: norms, biases and rotation of B and C, the trapezoidal
rule, skip, gate and the sum over columns in one launch. Letters as in `torch`.

One program has a head's whole [N, P] tile, loaded once, K tokens in float32, stored once: so nobody
else reads the head's angles and last token, which lie beside it and are updated in place, too.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot.ahead import TOKEN_LOADS, Variant
from kernels.aot.recorded import Expected, NamedCall, meta, tile_loads, variants_of
from kernels.checks import form, require
from kernels.overlap import overlapped, start_next, wait_for_previous
from kernels.recurrent.calls import floats, step_call
from kernels.recurrent.ring import store_as
from kernels.recurrent.step import (
    require_dims,
    require_like,
    require_shape,
    require_state,
    row_stride,
    softplus,
)
from kernels.trapezoid.torch import (
    TrapezoidSizes,
    TrapezoidWeights,
    before_of,
    finished,
    tokens_of,
    trapezoid_ref,
)

#: Elements of a tile to a warp, and those of the largest: two tiles lie in registers.
WARP, MAX_WARPS = 1024, 8
MAX_TILE = 128 * 128


@triton.jit
def cos_sin(turn):  # type: ignore[no-untyped-def]
    """Cosine and sine of an angle in turns, from 0 to 1, by their series within an eighth of one.

    Those of the library also serve angles so large that a thread needs a stack for them.
    """
    quarter = tl.floor(4.0 * turn + 0.5)
    x = 6.283185307179586 * (turn - 0.25 * quarter)
    z = x * x
    sin = x * (1 + z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880)))))
    cos = 1 + z * (-1 / 2 + z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320))))
    at = quarter.to(tl.int32) % 4
    odd = at % 2 == 1
    first, second = tl.where(odd, sin, cos), tl.where(odd, cos, sin)
    return tl.where((at == 1) | (at == 2), -first, first), tl.where(at >= 2, -second, second)


@triton.jit
def column(  # type: ignore[no-untyped-def]
    raw, weight, bias, cos, sin, EPS: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr
):
    """A column of B or C [BLOCK_N], normed, biased, turned in pairs, in float32.

    It is rounded to the inputs' dtype where the torch form rounds it.
    """
    wide = raw.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 0) / N + EPS)
    normed = (normed.to(raw.dtype).to(tl.float32) * weight).to(raw.dtype).to(tl.float32)
    even, odd = tl.split(tl.reshape(normed + bias, (BLOCK_N // 2, 2)))
    pairs = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(pairs, (BLOCK_N,)).to(raw.dtype).to(tl.float32)


@triton.jit
def scaled(x, mimo, at, mask):  # type: ignore[no-untyped-def]
    """x times a column's vector, rounded to x's dtype; mimo None: x. In float32."""
    if mimo is not None:
        x = (x.to(tl.float32) * tl.load(mimo + at, mask=mask, other=0.0)).to(x.dtype)
    return x.to(tl.float32)


@triton.jit
def trapezoid_step_fwd_kernel(  # type: ignore[no-untyped-def]
    inputs, dt_bias, d, b_norm, c_norm, b_bias, c_bias, mimo_x, mimo_z, mimo_o,
    last, angle, state, read, write, new, y, row_stride, last_stride, angle_stride, slot_stride,
    K: tl.constexpr, EACH: tl.constexpr, G: tl.constexpr, H: tl.constexpr, N: tl.constexpr,
    P: tl.constexpr, R: tl.constexpr, A: tl.constexpr, EPS: tl.constexpr, FLOOR: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (H, B). Rows of inputs and y are tokens; mimo_*, angle and new may be None."""
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    head = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    group = head // (H // G)
    count = K
    if new is not None:
        count = tl.load(new + batch)
    source = tl.load(read + batch).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    p = tl.arange(0, BLOCK_P)
    pair = tl.arange(0, BLOCK_N // 2)
    in_n, in_p, in_pair = n < N, p < P, pair < A
    inside = in_n[:, None] & in_p[None, :]
    channel = head * P + p
    own = state + head * N * P + n[:, None] * P + p[None, :]
    own_last = last + head * (R * N + P)
    s = tl.load(own + source * slot_stride, mask=inside, other=0.0).to(tl.float32)
    turn = tl.zeros([BLOCK_N // 2], tl.float32)
    if angle is not None:
        own_angle = angle + head * A + pair
        turn = tl.load(own_angle + source * angle_stride, mask=in_pair, other=0.0)
    # What the previous token still gives, for each unit of (1 - λ) Δ.
    before = own_last + source * last_stride
    x = tl.load(before + R * N + p, mask=in_p, other=0.0).to(inputs.dtype.element_ty)
    given = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    for r in tl.static_range(R):
        k = tl.load(before + r * N + n, mask=in_n, other=0.0).to(tl.float32)
        given += k[:, None] * scaled(x, mimo_x, r * H * P + channel, in_p)[None, :]
    # Warps hold copies of the vectors: all have read them before any writes.
    tl.debug_barrier()
    bias = tl.load(dt_bias + head).to(tl.float32)
    skip = tl.load(d + head).to(tl.float32)
    weight_b = tl.load(b_norm + n, mask=in_n, other=0.0).to(tl.float32)
    weight_c = tl.load(c_norm + n, mask=in_n, other=0.0).to(tl.float32)
    for t in range(K):
        valid = t < count
        token = inputs + (batch * K + t) * row_stride
        z = tl.load(token + channel, mask=in_p & valid, other=0.0)
        x = tl.load(token + H * P + channel, mask=in_p & valid, other=0.0)
        columns = token + 2 * H * P + group * N + n
        gates = token + 2 * H * P + 2 * R * G * N
        raw = tl.load(gates + head, mask=valid, other=0.0).to(tl.float32)
        raw_a = tl.load(gates + H + head, mask=valid, other=0.0).to(tl.float32)
        share = tl.load(gates + 2 * H + head, mask=valid, other=0.0).to(tl.float32)
        step = tl.where(valid, softplus(raw + bias), 0.0)
        decay = tl.exp(-step * tl.maximum(softplus(raw_a), FLOOR))
        now = step * tl.sigmoid(share)
        if angle is not None:
            theta = tl.load(gates + 3 * H + pair, mask=in_pair & valid, other=0.0).to(tl.float32)
            # tanh(θ) / 2 = sigmoid(2θ) - 1/2. Whole turns go without a rounding.
            turn += (tl.sigmoid(2.0 * theta) - 0.5) * step
            turn -= tl.floor(turn)
        cos, sin = cos_sin(turn)
        slot = tl.load(write + batch * K + t).to(tl.int64)
        kept = valid & (slot >= 0)
        if not EACH:
            kept &= t == count - 1
        to_last = own_last + slot * last_stride
        s = decay * (s + (step - now) * given)
        given = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
        for r in tl.static_range(R):
            raw_b = tl.load(columns + r * G * N, mask=in_n & valid, other=0.0)
            bias_b = tl.load(b_bias + (r * H + head) * N + n, mask=in_n, other=0.0)
            k = column(raw_b, weight_b, bias_b, cos, sin, EPS, N, BLOCK_N)
            given += k[:, None] * scaled(x, mimo_x, r * H * P + channel, in_p)[None, :]
            store_as(to_last + r * N + n, k, in_n & kept)
        store_as(to_last + R * N + p, x, in_p & kept)
        s += now * given
        total = tl.zeros([BLOCK_P], tl.float32)
        for r in tl.static_range(R):
            raw_c = tl.load(columns + (R + r) * G * N, mask=in_n & valid, other=0.0)
            bias_c = tl.load(c_bias + (r * H + head) * N + n, mask=in_n, other=0.0)
            q = column(raw_c, weight_c, bias_c, cos, sin, EPS, N, BLOCK_N)
            out = tl.sum(q[:, None] * s, 0)
            out += skip * scaled(x, mimo_x, r * H * P + channel, in_p)
            gate = scaled(z, mimo_z, r * H * P + channel, in_p)
            out *= gate * tl.sigmoid(gate)
            if mimo_o is not None:
                out *= tl.load(mimo_o + r * H * P + channel, mask=in_p, other=0.0)
            total += out
        store_as(y + (batch * K + t) * (H * P) + channel, tl.where(valid, total, 0.0), in_p)
        store_as(own + slot * slot_stride, s, inside & kept)
        if angle is not None:
            tl.store(own_angle + slot * angle_stride, turn, mask=in_pair & kept)


def trapezoid_step(
    inputs: Tensor, sizes: TrapezoidSizes, weights: TrapezoidWeights, last: Tensor,
    angle: Tensor | None, state: Tensor, read: Tensor, write: Tensor, *, each: bool = False,
    new: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Advance the states of B sequences by K tokens, from slot to slot.

    inputs: [B, K, sum(sizes.parts)], as projected; weights: biases and vectors float32; last:
    [slots, 1, sizes.last], rows of `rows_of`; angle: float32 [slots, H, A],
    in turns, None where there are none; state: [slots, H, N, P] in float32 or
    bfloat16; read: int32 [B], write: int32 [B, K], each: the slots of all three, as
    `recurrent.step` says; new: int32 [B] valid tokens of right-padded rows (None: K).
    Returns y [B, K, H·P] in the inputs' dtype, 0 at padded tokens.
    Raises ValueError naming the argument, its value and the rule it breaks.
    """
    s = sizes
    require_dims("inputs", inputs, 3)
    batch, tokens = inputs.shape[:2]
    require_shape("inputs", inputs, (batch, tokens, sum(s.parts)))
    require_state(
        trapezoid_step_fwd_kernel, state, read, write, new, (batch, tokens, s.heads, s.n, s.p)
    )
    block_n, block_p = (triton.next_power_of_2(size) for size in (s.n, s.p))
    require(s.n > 1, "N", s.n, "must be at least 2")
    if block_n * block_p > MAX_TILE:
        raise ValueError(f"N={s.n}, P={s.p} take a tile of {block_n}x{block_p}; at most {MAX_TILE}")
    require_like(state, inputs=inputs, last=last)
    strides = [_slot_stride("last", last, (1, s.last), state), 0]
    if s.angles or angle is not None:
        require(angle is not None, "angle", None, "needs a tensor for {} angles", s.angles)
        assert angle is not None
        require(angle.dtype == torch.float32, "angle", form(angle), "must be float32")
        strides[1] = _slot_stride("angle", angle, (s.heads, s.angles), state)
    _check_weights(s, weights, state)
    y = torch.empty(batch, tokens, s.inner, dtype=inputs.dtype, device=inputs.device)
    w = weights
    trapezoid_step_fwd_kernel[(s.heads, batch)](
        inputs, w.dt_bias, w.d, w.b_norm, w.c_norm, w.b_bias, w.c_bias, w.mimo_x, w.mimo_z,
        w.mimo_o, last, angle, state, read, write, new, y,
        row_stride("inputs", inputs), *strides, state.stride(0),
        K=tokens, EACH=each and tokens > 1, G=s.groups, H=s.heads, N=s.n, P=s.p, R=s.rank,
        A=s.angles, EPS=w.eps, FLOOR=w.floor, BLOCK_N=block_n, BLOCK_P=block_p,
        num_warps=min(MAX_WARPS, max(1, block_n * block_p // WARP)), **overlapped(inputs.device),
    )  # fmt: skip
    return y


def _slot_stride(name: str, pool: Tensor, shape: tuple[int, ...], state: Tensor) -> int:
    """Elements between slots of a pool [slots, *shape]; raises ValueError where it does not fit."""
    require_shape(name, pool, (len(state), *shape))
    require(pool.device == state.device and pool[0].is_contiguous(),
            name, form(pool), "must be on {}, each slot contiguous", state.device)  # fmt: skip
    return pool.stride(0)


def _check_weights(s: TrapezoidSizes, weights: TrapezoidWeights, state: Tensor) -> None:
    shapes = {
        **dict.fromkeys(("dt_bias", "d"), (s.heads,)),
        **dict.fromkeys(("b_norm", "c_norm"), (s.n,)),
        **dict.fromkeys(("b_bias", "c_bias"), (s.rank, s.heads, s.n)),
        **dict.fromkeys(("mimo_x", "mimo_z", "mimo_o"), (s.rank, s.inner) if s.rank > 1 else None),
    }
    for name, shape in shapes.items():
        weight: Tensor | None = getattr(weights, name)
        if shape is None:
            if weight is not None:
                raise ValueError(f"{name}={form(weight)} needs a rank above 1, not {s.rank}")
            continue
        if weight is None:
            raise ValueError(f"{name}=None needs a tensor of {shape}")
        require_shape(name, weight, shape)
        require_like(state, **{name: weight})
        require(weight.is_contiguous(), name, form(weight), "must be contiguous")


def trapezoid_step_ref(
    inputs: Tensor, sizes: TrapezoidSizes, weights: TrapezoidWeights, last: Tensor,
    angle: Tensor | None, state: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The oracle: float64, one token at a time; last, angle, state already taken from their slots.

    Returns y [B, K, H·P] and the state after every token [B, K, H, N, P].
    """
    wide = TrapezoidWeights(
        *(w.double() if isinstance(w, Tensor) else w for w in weights)  # type: ignore[arg-type]
    )
    tokens = tokens_of(inputs.double(), sizes, wide, None if angle is None else angle.double())
    before = before_of(state.double(), last.double(), sizes, wide)
    y, states = trapezoid_ref(tokens, before)
    z = inputs[..., : sizes.inner].double()
    return finished(y, tokens.v, z, sizes, wide), states


def variants() -> list[Variant]:
    """Every shape and option that is compiled ahead of time; the first is the 1b shape."""
    wide, narrow = torch.float32, torch.bfloat16

    def call(
        dtype: torch.dtype, n: int, p: int, tokens: int, options: str = "", *, rank: int = 1,
        heads: int = 64, angles: int | None = None,
    ) -> NamedCall:  # fmt: skip
        s = TrapezoidSizes(
            heads=heads, groups=1, n=n, p=p, rank=rank, angles=n // 4 if angles is None else angles
        )
        weights = TrapezoidWeights(
            floats(heads), floats(heads), meta(n), meta(n), floats(rank, heads, n),
            floats(rank, heads, n), 1e-5, 1e-4,
            *[floats(rank, s.inner)] * 3 * (rank > 1),
        )  # fmt: skip
        inputs = meta(1, tokens, sum(s.parts))
        slot = partial(meta, 1)
        beside = slot(1, s.last), slot(heads, s.angles, dtype=wide) if s.angles else None
        options += f" rank{rank}" * (rank > 1)
        return step_call(
            trapezoid_step, [inputs, s, weights, *beside], (heads, n, p), dtype, tokens, options
        )

    calls = (
        call(wide, 128, 64, 1), call(wide, 128, 64, 1, rank=4), call(wide, 64, 64, 1),
        call(wide, 128, 64, 8, "ragged each"), call(wide, 128, 64, 8, "ragged each", rank=4),
        call(wide, 128, 100, 2, "ragged"), call(wide, 128, 64, 1, "still", angles=0),
        call(narrow, 128, 64, 1), call(narrow, 128, 64, 8, "ragged each"),
    )  # fmt: skip
    expected = Expected(
        wide_loads=tile_loads("state", "BLOCK_N", "BLOCK_P"), narrow_in_loops=TOKEN_LOADS
    )
    return variants_of(calls, {trapezoid_step_fwd_kernel: expected})
