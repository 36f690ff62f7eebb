"""Pairs of values in words of twice their width, the form in which kernels copy 8-bit caches.

Copies into shared memory are laid out for the product that follows, eight elements at a time:
of bytes, half of the 16 that a thread can move; of words, all. A word holds an even channel and
the odd one after it, so a product over channels is the sum of one over each half. Rows that are
keys and values (`tied`) are words too, of 32 bits where they hold 16: rotations want pairs apart,
and a copy that two products read in different layouts would not be made ahead.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

#: By bytes of a value; those of 4 are the interpreter's alone.
_WORDS = {1: torch.int16, 2: torch.int32, 4: torch.int64}


def as_words(pool: Tensor) -> Tensor:
    """A tensor [..., d] as integers [..., d/2] of twice the width, the even channel low; a view."""
    return pool.view(_WORDS[pool.dtype.itemsize])


@triton.jit
def halves(words, FP8: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """The even and the odd channels of words, each of their shape, in `dtype`.

    Words of 16 bits hold int8 or float8_e4m3fn, wider ones `dtype` itself.
    """
    if words.dtype != tl.int16:
        BITS: tl.constexpr = dtype.primitive_bitwidth
        half: tl.constexpr = tl.int16 if BITS == 16 else tl.int32
        low = words.to(half).to(dtype, bitcast=True)
        high = (words >> BITS).to(half).to(dtype, bitcast=True)
    elif FP8:
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
