"""Mamba's recurrent update for 1 to 9 new tokens on states in slots (S6, arXiv 2312.00752, eq. 2):
h_t = e^{Δ_t A} h_{t-1} + Δ_t B_t x_t, y_t = C_t · h_t + D x_t, times silu(z_t) when z is given,
with Δ = softplus(dt + dt_bias) and A = -e^{A_log} computed here.

B sequences, K new tokens, E channels, N states per channel.
One program updates a [BLOCK_E, N] tile: loaded once, K tokens in float32, stored once.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.aot.ahead import TOKEN_LOADS, Variant
from kernels.aot.recorded import Expected, NamedCall, meta, tile_loads, variants_of
from kernels.overlap import overlapped, start_next, wait_for_previous
from kernels.recurrent.calls import floats, step_call
from kernels.recurrent.step import (
    keep_state,
    last_slot,
    require_dims,
    require_like,
    require_shape,
    require_state,
    row_stride,
    softplus,
)

#: State dtype -> (BLOCK_E, num_warps): rows of N follow each other, so a tile is one run of bytes.
CONFIGS: dict[torch.dtype, tuple[int, int]] = {
    torch.float32: (64, 1),
    torch.bfloat16: (64, 1),
}


@triton.jit
def selective_step_fwd_kernel(  # type: ignore[no-untyped-def]
    x, dt, b, c, z, a_log, d, dt_bias, state, read, write, new, y,
    x_row, dt_row, b_row, c_row, z_row, slot_stride,
    K: tl.constexpr, EACH: tl.constexpr, E: tl.constexpr, N: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of E, B). Rows of x, dt, b, c, z, y are tokens; z, new may be None."""
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    batch = tl.program_id(1).to(tl.int64)
    count = K
    if new is not None:
        count = tl.load(new + batch)
    source = tl.load(read + batch).to(tl.int64)
    last = last_slot(write + batch * K, count, K)
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    n = tl.arange(0, BLOCK_N)
    in_e, in_n = e < E, n < N
    inside = in_e[:, None] & in_n[None, :]
    tile = e[:, None].to(tl.int64) * N + n[None, :]
    own = state + tile
    h = tl.load(own + source * slot_stride, mask=inside, other=0.0).to(tl.float32)
    rate = -tl.exp(tl.load(a_log + tile, mask=inside, other=0.0).to(tl.float32))
    bias = tl.load(dt_bias + e, mask=in_e, other=0.0).to(tl.float32)
    skip = tl.load(d + e, mask=in_e, other=0.0).to(tl.float32)
    for t in range(K):
        row = batch * K + t
        valid = t < count
        xt = tl.load(x + row * x_row + e, mask=in_e & valid, other=0.0).to(tl.float32)
        bt = tl.load(b + row * b_row + n, mask=in_n & valid, other=0.0).to(tl.float32)
        ct = tl.load(c + row * c_row + n, mask=in_n & valid, other=0.0).to(tl.float32)
        raw = tl.load(dt + row * dt_row + e, mask=in_e & valid, other=0.0).to(tl.float32)
        step = tl.where(valid, softplus(raw + bias), 0.0)
        h = h * tl.exp(step[:, None] * rate) + (step * xt)[:, None] * bt[None, :]
        yt = tl.sum(h * ct[None, :], 1) + skip * xt
        if z is not None:
            zt = tl.load(z + row * z_row + e, mask=in_e & valid, other=0.0).to(tl.float32)
            yt = yt * zt * tl.sigmoid(zt)
        tl.store(y + row * E + e, yt.to(y.dtype.element_ty), mask=in_e)
        if EACH:
            keep_state(own, write + batch * K, slot_stride, h, inside, t, count)
    to = own + last.to(tl.int64) * slot_stride
    tl.store(to, h.to(state.dtype.element_ty), mask=inside & (last >= 0))


def selective_step(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a_log: Tensor, d: Tensor, dt_bias: Tensor,
    state: Tensor, read: Tensor, write: Tensor, *, each: bool = False, z: Tensor | None = None,
    new: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Advance the states of B sequences by K tokens, from slot to slot.

    x, z: [B, K, E]; dt: [B, K, E] before bias and softplus; b, c: [B, K, N]; a_log: [E, N]; d,
    dt_bias: [E]; state: [slots, E, N] in float32 or bfloat16; read: int32 [B], write: int32 [B, K],
    each: the slots of the states, as `recurrent.step` says; new: int32 [B] valid tokens of right-
    padded rows (None: K).
    Returns y [B, K, E] in x's dtype, 0 at padded tokens.
    Raises ValueError naming the argument, its value and the rule it breaks.
    """
    require_dims("x", x, 3)
    require_dims("b", b, 3)
    batch, tokens, width = x.shape
    n = b.shape[2]
    inputs = {"x": x, "dt": dt, "b": b, "c": c, "a_log": a_log, "d": d, "dt_bias": dt_bias}
    require_shape("dt", dt, (batch, tokens, width))
    for name in ("b", "c"):
        require_shape(name, inputs[name], (batch, tokens, n))
    require_shape("a_log", a_log, (width, n))
    for name in ("d", "dt_bias"):
        require_shape(name, inputs[name], (width,))
    if z is not None:
        require_shape("z", z, (batch, tokens, width))
        inputs["z"] = z
    require_state(selective_step_fwd_kernel, state, read, write, new, (batch, tokens, width, n))
    require_like(state, **inputs)
    if not a_log.is_contiguous():
        raise ValueError(f"a_log has strides {a_log.stride()}; it must be contiguous")
    y = torch.empty(batch, tokens, width, dtype=x.dtype, device=x.device)
    block_e, warps = CONFIGS[state.dtype]
    selective_step_fwd_kernel[(triton.cdiv(width, block_e), batch)](
        x, dt, b, c, z, a_log, d, dt_bias, state, read, write, new, y,
        row_stride("x", x), row_stride("dt", dt), row_stride("b", b), row_stride("c", c),
        None if z is None else row_stride("z", z), state.stride(0),
        K=tokens, EACH=each and tokens > 1, E=width, N=n,
        BLOCK_E=block_e, BLOCK_N=triton.next_power_of_2(n), num_warps=warps, **overlapped(x.device),
    )  # fmt: skip
    return y


def selective_step_ref(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a_log: Tensor, d: Tensor, dt_bias: Tensor,
    state: Tensor, *, z: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The oracle: float64, one token at a time; state [B, E, N] already taken from its slots.

    Returns y [B, K, E] and the state after every token [B, K, E, N].
    """
    x, b, c = x.double(), b.double(), c.double()
    step = F.softplus(dt.double() + dt_bias.double())
    decay = (step[..., None] * -a_log.double().exp()).exp()
    h, rows, states = state.double(), [], []
    for t in range(x.shape[1]):
        h = decay[:, t] * h + (step[:, t] * x[:, t])[..., None] * b[:, t, None]
        rows.append((h * c[:, t, None]).sum(-1) + d.double() * x[:, t])
        states.append(h)
    y = torch.stack(rows, 1)
    return y if z is None else y * F.silu(z.double()), torch.stack(states, 1)


def variants() -> list[Variant]:
    """Every shape and option that is compiled ahead of time; the first is of a published size."""
    wide, narrow = torch.float32, torch.bfloat16

    def call(dtype: torch.dtype, width: int, tokens: int, options: str = "") -> NamedCall:
        rows = partial(meta, 1, tokens)
        inputs = [
            rows(width),
            rows(width),
            rows(16),
            rows(16),
            floats(width, 16),
            floats(width),
            floats(width),
        ]
        return step_call(selective_step, inputs, (width, 16), dtype, tokens, options, z=rows(width))

    def loads(v: Variant) -> int:
        """Of the state's tile and of A's."""
        return sum(tile_loads(t, "BLOCK_E", "BLOCK_N")(v) for t in ("state", "a_log"))

    calls = (
        call(wide, 4096, 1), call(wide, 8192, 8, "ragged each"), call(wide, 1008, 4, "ragged"),
        call(narrow, 4096, 1), call(narrow, 4096, 8, "ragged each"),
    )  # fmt: skip
    expected = Expected(wide_loads=loads, narrow_in_loops=TOKEN_LOADS)
    return variants_of(calls, {selective_step_fwd_kernel: expected})
