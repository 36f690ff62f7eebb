"""What the convolution's forward and backward kernels share: rows, taps, checks."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.checks import form, require
from kernels.device import require_gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_WIDTH = 8


@triton.jit
def load_rows(x, tail, at, c, count, x_row, W: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows `at` of the W - 1 rows of the tail (zeros if None) and then `count` rows of x, fp32.

    Rows outside are zeros and are not read; at: int64 [rows], counted from the tail's first.
    """
    fresh = at - (W - 1)
    inside = ((fresh >= 0) & (fresh < count))[:, None] & (c < C)[None, :]
    rows = tl.load(x + fresh[:, None] * x_row + c[None, :], mask=inside, other=0.0).to(tl.float32)
    if tail is not None:
        inside = ((at >= 0) & (fresh < 0))[:, None] & (c < C)[None, :]
        old = tl.load(tail + at[:, None] * C + c[None, :], mask=inside, other=0.0)
        rows = tl.where((fresh < 0)[:, None], old.to(tl.float32), rows)
    return rows


@triton.jit
def load_taps(weight, c, W: tl.constexpr, C: tl.constexpr, TAPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """[BLOCK_C, TAPS] in float32, zeros past W: one wide load, where a tap alone is strided."""
    i = tl.arange(0, TAPS)
    inside = (c < C)[:, None] & (i < W)[None, :]
    return tl.load(weight + c[:, None] * W + i[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def tap_of(taps, i):  # type: ignore[no-untyped-def]
    """Tap i of every channel, [1, BLOCK_C]."""
    which = tl.arange(0, taps.shape[1])
    return tl.sum(tl.where((which == i)[None, :], taps, 0.0), 1)[None, :]


@triton.jit
def convolve(x, taps, bias, tail, at, c, count, x_row, W: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """Σ_i w_i · row at + i (+ bias), before the activation: the output of token `at`."""
    acc = tl.zeros((at.shape[0], c.shape[0]), tl.float32)
    for i in tl.static_range(W):
        acc += tap_of(taps, i) * load_rows(x, tail, at + i, c, count, x_row, W, C)
    if bias is not None:
        acc += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    return acc


def check_conv(
    kernel: Any, x: Tensor, tail: Tensor | None, slots: Tensor | None, new: Tensor | None,
    weight: Tensor | None = None,
) -> int:  # fmt: skip
    """Every rule but weight's and bias's forms; returns W, the tail's where weight is None."""
    require_gpu("x", x, kernel)
    require(x.dim() == 3 and x.numel() > 0, "x", form(x), "must be [B, T, C], not empty")
    require(x.dtype in DTYPES, "x", form(x), "must be one of {}", DTYPES)
    dense = x.stride(2) == 1 or x.shape[2] == 1
    require(dense, "x", form(x), "must have a last stride of 1")
    batch, tokens, channels = x.shape
    require(batch < 2**16, "B", batch, "must be below 65536")
    require(tokens <= 2**20, "T", tokens, "must be at most 2^20")
    if weight is not None:
        require(weight.dim() == 2, "weight", form(weight), "must be [{}, W]", channels)
        width = weight.shape[1]
        require(2 <= width <= MAX_WIDTH, "weight", form(weight), "needs W of 2 to {}", MAX_WIDTH)
    if tail is not None:
        name, shown = "tail" if weight is not None else "tail_pool", form(tail)
        require(tail.dim() == 3 and tail.numel() > 0, name, shown, "must be [slots, W-1, C]")
        if weight is None:
            width = tail.shape[1] + 1
            require(width <= MAX_WIDTH, name, shown, "needs W of 2 to {}", MAX_WIDTH)
        rows = batch if slots is None else tail.shape[0]
        fits = tail.shape == (rows, width - 1, channels) and tail.dtype in DTYPES
        require(fits, name, shown, "must be floats [{}, {}, {}]", rows, width - 1, channels)
        dense = tail[0].is_contiguous() and tail.stride(0) >= tail[0].numel()
        require(dense, name, shown, "must have contiguous slots")
        require(tail.device == x.device, name, shown, "must be on {}", x.device)
    for name, vector in (("read" if weight is None else "tail_slots", slots), ("new", new)):
        if vector is not None:
            fits = vector.shape == (batch,) and vector.dtype == torch.int32
            fits = fits and vector.is_contiguous() and vector.device == x.device
            require(
                fits, name, form(vector), "must be contiguous int32 [{}] on {}", batch, x.device
            )
    return width
