"""Pairs of 8-bit values in 16-bit words, the form in which kernels copy 8-bit caches.

Copies into shared memory are laid out for the product that follows, eight elements at a time:
of bytes, half of the 16 that a thread can move; of words, all. A word holds an even channel and
the odd one after it, so a product over channels is the sum of one over each half.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def as_words(pool: Tensor) -> Tensor:
    """An 8-bit tensor [..., d] as int16 [..., d/2], the even channel in the low byte; a view."""
    return pool.view(torch.int16)


@triton.jit
def halves(words, FP8: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """The even and the odd channels of int16 words, each of their shape: int8 or float8_e4m3fn."""
    if FP8:
        low = words.to(tl.uint8)
        high = (words >> 8).to(tl.uint8)
        low, high = low.to(tl.float8e4nv, bitcast=True), high.to(tl.float8e4nv, bitcast=True)
    else:
        low, high = (words << 8) >> 8, words >> 8
    return low.to(dtype), high.to(dtype)


@triton.jit
def split_channels(x):  # type: ignore[no-untyped-def]
    """The even and the odd channels of [M, D], each [M, D/2]."""
    return tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))


@triton.jit
def join_channels(even, odd):  # type: ignore[no-untyped-def]
    """The inverse of `split_channels`."""
    return tl.reshape(tl.join(even, odd), [even.shape[0], 2 * even.shape[1]])
