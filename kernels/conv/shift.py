"""Blends of tokens with the ones before them, for 1 to 9 new tokens on tails in slots: RWKV's token
shift (arXiv 2503.14456, section 4), y_i = x_t + (x_{t-1} - x_t) w_i.

B sequences, K new tokens, D channels, W blends. A tail is the last token's x, [1, D].
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot.ahead import TOKEN_LOADS, Variant
from kernels.aot.recorded import Expected, meta, variants_of
from kernels.checks import form, require
from kernels.overlap import overlapped, start_next, wait_for_previous
from kernels.recurrent.ring import store_as
from kernels.recurrent.step import (
    require_dims,
    require_like,
    require_shape,
    require_state,
    row_stride,
)

#: Channels of a program: each thread has 16 bytes of its own, which nobody else reads or writes.
BLOCK, WARPS = 256, 1


@triton.jit
def token_shift_fwd_kernel(  # type: ignore[no-untyped-def]
    x, tail, blend, read, write, new, y, x_row, slot_stride, blend_stride,
    K: tl.constexpr, EACH: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of D, B). Rows of x are tokens; new may be None."""
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    batch = tl.program_id(1).to(tl.int64)
    count = K
    if new is not None:
        count = tl.load(new + batch)
    source = tl.load(read + batch).to(tl.int64)
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = c < D
    before = tl.load(tail + source * slot_stride + c, mask=inside, other=0.0).to(tl.float32)
    for t in range(K):
        valid = t < count
        row = batch * K + t
        now = tl.load(x + row * x_row + c, mask=inside & valid, other=0.0)
        wide = now.to(tl.float32)
        for i in tl.static_range(W):
            share = tl.load(blend + i * D + c, mask=inside, other=0.0).to(tl.float32)
            mixed = tl.where(valid, wide + (before - wide) * share, 0.0)
            store_as(y + i * blend_stride + row * D + c, mixed, inside)
        before = wide
        slot = tl.load(write + row).to(tl.int64)
        kept = valid & (slot >= 0)
        if not EACH:
            kept &= t == count - 1
        store_as(tail + slot * slot_stride + c, now, inside & kept)


def token_shift(
    x: Tensor, blend: Tensor, tail: Tensor, read: Tensor, write: Tensor, *, each: bool = False,
    new: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Blend K tokens of B sequences with the ones before them, and keep the last one.

    x: [B, K, D]; blend: [W, D], shares of the token before; tail: [slots, 1, D] in float32 or
    bfloat16; read: int32 [B], write: int32 [B, K], each: the slots of tails, as `recurrent.step`
    says; new: int32 [B] valid tokens of right-padded rows (None: K).
    Returns y [W, B, K, D] in x's dtype, 0 at padded tokens.
    Raises ValueError naming the argument, its value and the rule it breaks.
    """
    require_dims("x", x, 3)
    require_dims("blend", blend, 2)
    batch, tokens, width = x.shape
    require_shape("blend", blend, (len(blend), width))
    require_state(token_shift_fwd_kernel, tail, read, write, new, (batch, tokens, 1, width), "tail")
    require_like(tail, x=x, blend=blend)
    require(blend.is_contiguous(), "blend", form(blend), "must be contiguous")
    y = torch.empty(len(blend), batch, tokens, width, dtype=x.dtype, device=x.device)
    token_shift_fwd_kernel[(triton.cdiv(width, BLOCK), batch)](
        x, tail, blend, read, write, new, y, row_stride("x", x), tail.stride(0), y.stride(0),
        K=tokens, EACH=each and tokens > 1, D=width, W=len(blend), BLOCK=BLOCK, num_warps=WARPS,
        **overlapped(x.device),
    )  # fmt: skip
    return y


def token_shift_ref(x: Tensor, blend: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """The oracle: float64; tail [B, 1, D] already taken from its slots.

    Returns y [W, B, K, D] and the tail after every token [B, K, 1, D].
    """
    x, blend = x.double(), blend.double()
    before = torch.cat((tail.double(), x[:, :-1]), 1)
    return x + (before - x) * blend[:, None, None], x.unsqueeze(2)


def variants() -> list[Variant]:
    """Every shape and option that is compiled ahead of time; the first is the 1b shape."""
    slots = partial(meta, dtype=torch.int32)

    def call(width: int, tokens: int, options: str = "") -> tuple[str, partial[Tensor]]:
        ragged, wide = "ragged" in options, "wide" in options
        kind = torch.float32 if wide else torch.bfloat16
        name = "_".join((f"token_shift_{width}_k{tokens}", *options.split()))
        return name, partial(
            token_shift, meta(1, tokens, width, dtype=kind), meta(6, width, dtype=torch.float32),
            meta(1, 1, width, dtype=kind), slots(1), slots(1, tokens), each="each" in options,
            new=slots(1) if ragged else None,
        )  # fmt: skip

    calls = (
        call(2048, 1), call(2048, 8, "ragged each"), call(512, 1), call(2048, 1, "wide"),
        call(1000, 3, "ragged"),
    )  # fmt: skip
    expected = Expected(
        # Of the tail and the first token, where rows begin at 16 bytes.
        wide_loads=lambda v: 2 * (v.constexprs["D"] % 16 == 0), narrow_in_loops=TOKEN_LOADS
    )  # fmt: skip
    return variants_of(calls, {token_shift_fwd_kernel: expected})
