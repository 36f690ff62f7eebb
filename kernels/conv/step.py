"""Causal convolution of 1 to 9 new tokens with its tail in slots: y_t = Σ_i w_i · x_{t-W+1+i}
(+ bias), then SiLU; depthwise, as before every recurrent mixer (arXiv 2312.00752, § 3.4).

B sequences, K new tokens, C channels, W taps; the tail is the last W - 1 inputs of a sequence.
One program serves one sequence and BLOCK_C channels, in float32.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.aot.ahead import Variant
from kernels.aot.recorded import Expected, NamedCall, meta, tile_loads, variants_of
from kernels.overlap import overlapped, start_next, wait_for_previous
from kernels.recurrent.calls import step_call
from kernels.recurrent.step import (
    last_slot,
    require_dims,
    require_like,
    require_shape,
    require_state,
    row_stride,
)

#: Tail dtype -> (BLOCK_C, num_warps): 16 bytes per thread.
CONFIGS: dict[torch.dtype, tuple[int, int]] = {
    torch.float32: (128, 1),
    torch.bfloat16: (256, 1),
}


@triton.jit
def rows_of(x, tail, source, c, inside, x_row, C: tl.constexpr, W: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows `source` of the tail followed by the new inputs, float32 [len(source), BLOCK_C]."""
    at = source[:, None]
    is_old, is_new = at < W - 1, at >= W - 1
    old = tl.load(tail + at * C + c[None, :], mask=inside & is_old, other=0.0)
    fresh = tl.load(x + (at - (W - 1)) * x_row + c[None, :], mask=inside & is_new, other=0.0)
    return tl.where(is_old, old.to(tl.float32), fresh.to(tl.float32))


@triton.jit
def conv_step_fwd_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, tail, read, write, new, y, x_row, slot_stride,
    SILU: tl.constexpr, K: tl.constexpr, EACH: tl.constexpr, C: tl.constexpr, W: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of C, B). Rows of x and y are tokens; bias and new may be None."""
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    batch = tl.program_id(1).to(tl.int64)
    count = K
    if new is not None:
        # Rows outside the tail and the new inputs must not be reached, whatever `new` says.
        count = tl.minimum(tl.maximum(tl.load(new + batch), 0), K)
    source = tl.load(read + batch).to(tl.int64)
    target = last_slot(write + batch * K, count, K)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < C
    x += batch * K * x_row
    held = tail + source * slot_stride
    t = tl.arange(0, BLOCK_K)
    valid = (t < count)[:, None] & in_c[None, :]
    acc = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for i in tl.static_range(W):
        tap = tl.load(weight + c * W + i, mask=in_c, other=0.0).to(tl.float32)
        acc += tap[None, :] * rows_of(x, held, t + i, c, valid, x_row, C, W)
    if bias is not None:
        acc += tl.load(bias + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    if SILU:
        acc = acc * tl.sigmoid(acc)
    out = tl.where(valid, acc, 0.0).to(y.dtype.element_ty)
    rows = batch * K + t[:, None]
    tl.store(y + rows * C + c[None, :], out, mask=(t < K)[:, None] & in_c[None, :])

    r = tl.arange(0, BLOCK_R)
    inside = (r < W - 1)[:, None] & in_c[None, :]
    place = r[:, None] * C + c[None, :]
    if EACH:
        for step in range(K):
            kept = rows_of(x, held, tl.minimum(step + 1, count) + r, c, inside, x_row, C, W)
            slot = tl.load(write + batch * K + step).to(tl.int64)
            stored = inside & (step < count - 1) & (slot >= 0)
            tl.store(tail + slot * slot_stride + place, kept.to(tail.dtype.element_ty), mask=stored)
    last = rows_of(x, held, count + r, c, inside, x_row, C, W)
    # In place, rows move up: all of them are read before any is written.
    tl.debug_barrier()
    stored = inside & (target >= 0)
    to = tail + target.to(tl.int64) * slot_stride + place
    tl.store(to, last.to(tail.dtype.element_ty), mask=stored)


def conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, read: Tensor, write: Tensor, *,
    silu: bool = True, each: bool = False, new: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Convolve K new tokens of B sequences and advance their tails, from slot to slot.

    x: [B, K, C]; weight: [C, W], W >= 2; bias: [C] or None; tail: [slots, W-1, C] in float32 or
    bfloat16; read: int32 [B], write: int32 [B, K], each: the slots of tails, as `recurrent.step`
    says; new: int32 [B] valid tokens of right-padded rows (None: K).
    Returns y [B, K, C] in x's dtype, 0 at padded tokens.
    Raises ValueError naming the argument, its value and the rule it breaks.
    """
    require_dims("x", x, 3)
    require_dims("weight", weight, 2)
    batch, tokens, channels = x.shape
    width = weight.shape[1]
    if width < 2:
        raise ValueError(f"weight has {width} taps; a convolution with a tail needs at least 2")
    require_shape("weight", weight, (channels, width))
    inputs = {"x": x, "weight": weight}
    if bias is not None:
        require_shape("bias", bias, (channels,))
        inputs["bias"] = bias
    sizes = (batch, tokens, width - 1, channels)
    require_state(conv_step_fwd_kernel, tail, read, write, new, sizes, name="tail")
    require_like(tail, **inputs)
    if not weight.is_contiguous():
        raise ValueError(f"weight has strides {weight.stride()}; it must be contiguous")
    y = torch.empty(batch, tokens, channels, dtype=x.dtype, device=x.device)
    block_c, warps = CONFIGS[tail.dtype]
    conv_step_fwd_kernel[(triton.cdiv(channels, block_c), batch)](
        x, weight, bias, tail, read, write, new, y, row_stride("x", x), tail.stride(0),
        SILU=silu, K=tokens, EACH=each and tokens > 1, C=channels, W=width,
        BLOCK_K=triton.next_power_of_2(tokens), BLOCK_R=triton.next_power_of_2(width - 1),
        BLOCK_C=block_c, num_warps=warps,
        **overlapped(x.device),
    )  # fmt: skip
    return y


def conv_step_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, *, silu: bool = True
) -> tuple[Tensor, Tensor]:
    """The oracle: float64; tail [B, W-1, C] already taken from its slots.

    Returns y [B, K, C] and the tail after every token [B, K, W-1, C].
    """
    width = weight.shape[1]
    windows = torch.cat((tail.double(), x.double()), 1).unfold(1, width, 1)
    y = (windows * weight.double()).sum(-1)
    y = y if bias is None else y + bias.double()
    return F.silu(y) if silu else y, windows[..., 1:].transpose(2, 3)


def variants() -> list[Variant]:
    """Every shape and option that is compiled ahead of time, all with tails of 3 rows."""
    wide, narrow = torch.float32, torch.bfloat16

    def call(dtype: torch.dtype, channels: int, tokens: int, options: str = "") -> NamedCall:
        of = partial(meta, dtype=dtype)
        inputs = [of(1, tokens, channels), of(channels, 4), of(channels)]
        return step_call(conv_step, inputs, (3, channels), dtype, tokens, options)

    calls = (
        call(narrow, 6144, 1), call(narrow, 6144, 8, "ragged each"),
        call(narrow, 1008, 4, "ragged"),
        call(wide, 6144, 1), call(wide, 6144, 8, "ragged each"),
    )  # fmt: skip
    # Taps and tail: four rows of a tile.
    loads = tile_loads("tail", "BLOCK_R", "BLOCK_C")
    expected = Expected(wide_loads=loads, narrow_in_loops=frozenset({4}))
    return variants_of(calls, {conv_step_fwd_kernel: expected})
