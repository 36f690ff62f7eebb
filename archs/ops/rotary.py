"""Rotary positions of the new tokens and the write of their rows, by backend.

With kernels one launch rotates queries and keys and writes keys and values into their pages.
"""

from typing import cast

from torch import Tensor

from archs.backends import choose, everywhere
from archs.spec import KernelState, LayerState, Rows
from kernels.rope import rotate


def append_rotated(
    qkv: Tensor, state: LayerState, name: str, *, kv_heads: int, theta: float, backend: str
) -> tuple[Tensor, Rows]:
    """Rotate queries and keys (in place), store keys and values, and say what is seen.

    qkv: [B, K, H + 2·G, d], queries first, G = kv_heads; the rows of `name` are [2, G, d].
    Returns queries [B, K, H, d] and all rows that the new tokens may see.
    """
    return choose("rotary positions", backend, _APPEND)(qkv, state, name, kv_heads, theta)


def rotate_new(x: Tensor, state: LayerState, *, theta: float, backend: str) -> Tensor:
    """Rotate x [B, K, H, d] by the new tokens' positions, in place."""
    return choose("rotary positions", backend, _ROTATE)(x, state, theta)


def _append_torch(
    qkv: Tensor, state: LayerState, name: str, kv_heads: int, theta: float
) -> tuple[Tensor, Rows]:
    heads, dim = qkv.shape[2] - 2 * kv_heads, qkv.shape[3]
    rotate(qkv[..., : heads + kv_heads, :], state.rope(dim, theta))
    seen = state.append(name, qkv[..., heads:, :].unflatten(2, (2, kv_heads)))
    return qkv[..., :heads, :], seen


def _append_triton(
    qkv: Tensor, state: LayerState, name: str, kv_heads: int, theta: float
) -> tuple[Tensor, Rows]:
    state = cast(KernelState, state)
    pages = state.pages(name, qkv.dtype)
    if pages is None:
        return _append_torch(qkv, state, name, kv_heads, theta)
    from kernels.rope_append import rope_append

    heads, dim = qkv.shape[2] - 2 * kv_heads, qkv.shape[3]
    k_pool, v_pool = pages.pool.unbind(0)
    rope_append(
        qkv, state.rotary(dim, theta), k_pool, v_pool, pages.table, pages.past, heads=heads,
        kv_heads=kv_heads, page_size=pages.page_size, new=pages.new,
    )  # fmt: skip
    return qkv[..., :heads, :], state.written(name)


def _rotate_torch(x: Tensor, state: LayerState, theta: float) -> Tensor:
    return rotate(x, state.rope(x.shape[-1], theta))


def _rotate_triton(x: Tensor, state: LayerState, theta: float) -> Tensor:
    from kernels.rope_rotate import rope_rotate

    state = cast(KernelState, state)
    return rope_rotate(x, state.rotary(x.shape[-1], theta), state.past)


_APPEND = everywhere(_append_torch, _append_triton)
_ROTATE = everywhere(_rotate_torch, _rotate_triton)
