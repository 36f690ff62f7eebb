"""Causal convolution of long steps and of training: y_t = Σ_i w_i · x_{t-W+1+i} (+ bias), SiLU;
depthwise, as before every recurrent mixer (arXiv 2312.00752, § 3.4). Forward, backward, tails.

B sequences, T tokens, C channels, W taps; the tail is the last W - 1 inputs of a sequence, in a
tensor of its own or in slots of a pool. A tile is BLOCK_T tokens by BLOCK_C channels in float32;
its W shifted reads meet in the cache. Backward computes the activation's slope again from x.
`step` is the form for up to 8 tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kernels.aot.ahead import Variant
from kernels.aot.recorded import Expected, NamedCall, both_ways, meta, tile_loads, variants_of
from kernels.checks import form, require
from kernels.conv.chunk_bwd import conv_bwd, conv_chunk_bwd_rows_kernel, conv_chunk_bwd_sums_kernel
from kernels.conv.chunk_rows import DTYPES, check_conv, convolve, load_rows, load_taps
from kernels.recurrent.step import require_slots

#: Tokens up to which a tile serves -> (BLOCK_T, BLOCK_C, num_warps); 0: any number of tokens.
CONFIGS: dict[int, tuple[int, int, int]] = {16: (16, 128, 4), 0: (64, 64, 4)}
#: BLOCK_C and num_warps of the tail's copy.
TAIL_CONFIG = (256, 1)


@triton.jit
def tail_of(tail, slots, batch, stride):  # type: ignore[no-untyped-def]
    """Where the tail of a sequence starts: its own row, or its slot of a pool."""
    if slots is not None:
        batch = tl.load(slots + batch).to(tl.int64)
    return tail + batch * stride


@triton.jit
def conv_chunk_fwd_kernel(  # type: ignore[no-untyped-def]
    x, weight, bias, tail, slots, new, y, tokens, x_batch, x_row, tail_stride,
    SILU: tl.constexpr, C: tl.constexpr, W: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of C, tiles of T, B). bias, tail, slots and new may be None; y is dense."""
    batch = tl.program_id(2).to(tl.int64)
    count = tokens
    if new is not None:
        count = tl.minimum(tl.load(new + batch), tokens)
    held = None
    if tail is not None:
        held = tail_of(tail, slots, batch, tail_stride)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    t = tl.program_id(1).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    taps = load_taps(weight, c, W, C, TAPS)
    acc = convolve(x + batch * x_batch, taps, bias, held, t, c, count, x_row, W, C)
    if SILU:
        acc *= tl.sigmoid(acc)
    out = tl.where((t < count)[:, None], acc, 0.0).to(y.dtype.element_ty)
    to = y + (batch * tokens + t)[:, None] * C + c[None, :]
    tl.store(to, out, mask=(t < tokens)[:, None] & (c < C)[None, :])


@triton.jit
def conv_tail_fwd_kernel(  # type: ignore[no-untyped-def]
    x, tail, slots, write, new, tokens, x_batch, x_row, tail_stride,
    C: tl.constexpr, W: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of C, B): the last W - 1 rows of a slot's tail and of x, into another slot."""
    batch = tl.program_id(1).to(tl.int64)
    count = tokens
    if new is not None:
        count = tl.maximum(tl.minimum(tl.load(new + batch), tokens), 0)
    held = tail_of(tail, slots, batch, tail_stride)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    r = tl.arange(0, BLOCK_R).to(tl.int64)
    last = load_rows(x + batch * x_batch, held, count + r, c, count, x_row, W, C)
    # Rows move up in place: all of them are read before any is written.
    tl.debug_barrier()
    to = tail_of(tail, write, batch, tail_stride) + r[:, None] * C + c[None, :]
    inside = (r < W - 1)[:, None] & (c < C)[None, :] & (count > 0)
    tl.store(to, last.to(tail.dtype.element_ty), mask=inside)


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, tail: Tensor | None = None, *,
    silu: bool = True, new: Tensor | None = None, tail_slots: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Convolve T tokens of B sequences after their tails, which stay as they are.

    x: [B, T, C], tokens and sequences strided at will, channels dense; weight: [C, W], W from 2 to
    8; bias: [C] or None; tail: [B, W-1, C], or with tail_slots, int32 [B] in range (not checked: it
    would wait for the device), a pool [slots, W-1, C]; None: zeros. All float32, bfloat16 or
    float16. new: int32 [B] valid tokens of right-padded rows (None: T).
    Returns y [B, T, C] in x's dtype, 0 at padded tokens, whose inputs do not matter.
    Differentiable once, in x, weight, bias and a tail without slots.
    Raises ValueError naming the argument, its value and the rule it breaks.
    """
    width = check_conv(conv_chunk_fwd_kernel, x, tail, tail_slots, new, weight)
    for name, given, shape in (
        ("weight", weight, (x.shape[2], width)),
        ("bias", bias, x.shape[2:]),
    ):
        if given is not None:
            fits = given.shape == shape and given.dtype in DTYPES and given.is_contiguous()
            require(fits, name, form(given), "must be contiguous floats {}", list(shape))
            require(given.device == x.device, name, form(given), "must be on {}", x.device)
    slots = None if tail_slots is None else form(tail_slots)
    require(slots is None or tail is not None, "tail_slots", slots, "needs a tail, the pool")
    wanted = (t is not None and t.requires_grad for t in (x, weight, bias, tail))
    if not (torch.is_grad_enabled() and any(wanted)):
        return _forward(x, weight, bias, tail, tail_slots, new, silu)
    rule = "cannot be given where gradients are wanted: pools are overwritten"
    require(tail_slots is None, "tail_slots", slots, rule)
    y: Tensor = _Conv.apply(x, weight, bias, tail, new, silu)
    return y


def conv_tail_(
    x: Tensor, tail_pool: Tensor, read: Tensor, write: Tensor, *, new: Tensor | None = None
) -> None:
    """Advance tails: the last W - 1 of the old tail and the new tokens, of which `new`.

    x: [B, T, C], strided as in `causal_conv`; tail_pool: [slots, W-1, C], rounded to where x is
    wider; read, write: int32 [B], the slots of the old tails and of the new ones, in range (not
    checked: it would wait for the device); a sequence may write to the slot that it reads, and to
    none that another reads; new: int32 [B] valid tokens of right-padded rows (None: T), where it is
    0 nothing is written. Not differentiable.
    Raises ValueError naming the argument, its value and the rule it breaks.
    """
    width = check_conv(conv_tail_fwd_kernel, x, tail_pool, read, new)
    require_slots(tail_pool, (x.shape[0],), write=write)
    batch, tokens, channels = x.shape
    block_c, warps = TAIL_CONFIG
    conv_tail_fwd_kernel[(triton.cdiv(channels, block_c), batch)](
        x, tail_pool, read, write, new, tokens, x.stride(0), x.stride(1), tail_pool.stride(0),
        C=channels, W=width, BLOCK_R=triton.next_power_of_2(width - 1), BLOCK_C=block_c,
        num_warps=warps,
    )  # fmt: skip


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None,
        new: Tensor | None, silu: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, weight, bias, tail, new)
        ctx.silu = silu
        return _forward(x, weight, bias, tail, None, new, silu)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, tail, new = ctx.saved_tensors
        with_tail = tail is not None and ctx.needs_input_grad[3]
        grads = conv_bwd(x, weight, bias, tail, new, dy, silu=ctx.silu, with_tail=with_tail)
        return *grads, None, None


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, slots: Tensor | None,
    new: Tensor | None, silu: bool,
) -> Tensor:  # fmt: skip
    batch, tokens, channels = x.shape
    block_t, block_c, warps = CONFIGS[16 if tokens <= 16 else 0]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(channels, block_c), triton.cdiv(tokens, block_t), batch)
    conv_chunk_fwd_kernel[grid](
        x, weight, bias, tail, slots, new, y, tokens, x.stride(0), x.stride(1),
        0 if tail is None else tail.stride(0), SILU=silu, C=channels, W=weight.shape[1],
        TAPS=triton.next_power_of_2(weight.shape[1]), BLOCK_T=block_t, BLOCK_C=block_c,
        num_warps=warps,
    )  # fmt: skip
    return y


def causal_conv_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor | None, *, silu: bool = True
) -> Tensor:
    """The oracle: float64, one token at a time; tail [B, W-1, C] already taken from its slots."""
    width = weight.shape[1]
    past = x.new_zeros(x.shape[0], width - 1, x.shape[2]) if tail is None else tail
    rows = torch.cat((past.double(), x.double()), 1)
    outputs = []
    for t in range(x.shape[1]):
        y = (rows[:, t : t + width] * weight.double().t()).sum(1)
        y = y if bias is None else y + bias.double()
        outputs.append(F.silu(y) if silu else y)
    return torch.stack(outputs, 1)


def variants() -> list[Variant]:
    """Every kernel, tile and option; the first is a long step on a pool of bfloat16 tails."""

    def call(
        dtype: torch.dtype, options: str = "", *, tokens: int = 200, channels: int = 6144,
        width: int = 4,
    ) -> NamedCall:  # fmt: skip
        """options: what is given, "pool" (of tails), "linear" (no SiLU), "trained"."""
        chosen, of = options.split(), partial(meta, dtype=dtype)
        bias = of(channels) if "bias" in chosen else None
        tail = of(1, width - 1, channels) if {"tail", "pool"}.intersection(chosen) else None
        x = of(1, tokens, -(-channels // 16) * 16)[..., :channels]
        inputs = x, of(channels, width), bias, tail
        new = slots if "new" in chosen else None
        op = partial(causal_conv, silu="linear" not in chosen, new=new)
        name = " ".join((str(dtype)[6:], f"{tokens}x{channels} w {width}", *chosen))
        if "trained" in chosen:
            return both_ways(name, op, *inputs)
        return name, partial(op, *inputs, tail_slots=slots if "pool" in chosen else None)

    slots = meta(1, dtype=torch.int32)
    forward, trained = [call(torch.bfloat16, "bias pool")], [call(torch.bfloat16, "linear trained")]
    for dtype in DTYPES:
        x, pool = (meta(1, rows, 6144, dtype=dtype) for rows in (200, 3))
        forward += [
            call(dtype, "bias pool new", tokens=9), call(dtype, "bias pool new"),
            call(dtype, "linear", channels=1000), call(dtype, "bias tail", width=8),
            (f"{str(dtype)[6:]} tail", partial(conv_tail_, x, pool, slots, slots, new=slots)),
        ]  # fmt: skip
        trained += [
            call(dtype, "trained"), call(dtype, "bias tail new trained"),
            call(dtype, "bias trained", width=8),
        ]  # fmt: skip

    def expected(pointer: str, reads: Callable[[Any], int], rows: str = "T") -> Expected:
        """So many reads of a tile of rows, by constants of the launch."""
        tile = tile_loads(pointer, f"BLOCK_{rows}", "BLOCK_C")
        return Expected(wide_loads=lambda v: reads(v.constexprs) * tile(v))

    forms = {
        conv_chunk_fwd_kernel: expected("x", lambda c: c["W"]),
        conv_tail_fwd_kernel: expected("x", lambda _: 1, "R"),
    }
    gradients = {
        conv_chunk_bwd_sums_kernel: expected("x", lambda c: 2 + c["SILU"] * c["W"]),
        conv_chunk_bwd_rows_kernel: expected("dz", lambda c: c["W"]),
    }
    return variants_of(forward, forms) + variants_of(trained, gradients)
