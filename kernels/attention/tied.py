"""Keys from rows that are values as they lie (`attention_k_eq_v` of Gemma 4), a tile at a time.

A row becomes a key when its channels have been weighed and rotated by its position. Rotations add
up: the row at place j of the tile that begins at position t turns by R(t + j) = R(t) R(j). So keys
turn by their place in the tile, whose angles are the same for every tile and are read once, and the
query turns back by t. Angles of every row would be twice as many bytes as the rows.
"""

import triton
import triton.language as tl

from kernels.attention.words import split_channels


@triton.jit
def angles_of(cos_sin, position, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Cosines and sines, each [N, D/2], of positions [N]."""
    at = cos_sin + position.to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :]
    return split_channels(tl.load(at))


@triton.jit
def turned(even, odd, cos, sin, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Pairs of channels, rotated in float32."""
    even, odd = even.to(tl.float32), odd.to(tl.float32)
    return (even * cos - odd * sin).to(dtype), (even * sin + odd * cos).to(dtype)
