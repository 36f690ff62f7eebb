"""Rotary positions of the new tokens and the write of their rows, by backend.

With kernels one launch rotates queries and keys and writes keys and values into their pages.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from archs.backends import everywhere
from archs.ops.dense import Input, Unnormed, norm_each, product
from archs.ops.dense import rms_norm as norm_rows
from archs.ops.matrix import Weight
from archs.state import LayerState, Pages, Rows
from kernels.norm.torch import rms_norm
from kernels.rope.torch import rotate


def project_append(
    x: Input, weight: Weight, state: LayerState, name: str, *, kv_heads: int, head_dim: int,
    theta: float, rope_dim: int | None = None, backend: str,
) -> tuple[Tensor, Rows]:  # fmt: skip
    """Project to queries, keys and values, rotate the former two, store the latter two, and say
    what is seen.

    x: [B, K, D]; weight: [(H + 2·G)·d, D], queries first, G = kv_heads, d = head_dim; the rows of
    `name` are [2, G, d]. rope_dim: channels of a head that rotate, the first (None: all; 0: none).
    Returns queries [B, K, H, d] and all rows that the new tokens may see.
    """
    return _APPEND[backend](x, weight, state, name, kv_heads, head_dim, theta, rope_dim)


def rotate_append(
    qkv: Tensor, state: LayerState, name: str, *, kv_heads: int, theta: float,
    rope_dim: int | None = None, backend: str,
) -> tuple[Tensor, Rows]:  # fmt: skip
    """`project_append` of heads qkv [B, K, H + 2·G, d] that are there already; what they were is
    lost.
    """
    return _ROTATE_APPEND[backend](qkv, state, name, kv_heads, theta, rope_dim)


def rotate_new(
    x: Tensor, state: LayerState, *, theta: float, rope_dim: int | None = None, backend: str
) -> Tensor:
    """Rotate x [B, K, H, d], or its first `rope_dim` channels, by the new tokens' positions, in
    place.
    """
    return x if rope_dim == 0 else _ROTATE[backend](x, state, theta, rope_dim)


def append_latent(
    to_turn: Sequence[Tensor], latent: Tensor, weight: Tensor, state: LayerState, name: str, *,
    eps: float, theta: float | None, backend: str,
) -> tuple[Tensor, Rows]:  # fmt: skip
    """Turn rotary queries and key, norm latents, store both as rows, and say what is seen.

    theta: None turns nothing: the key is stored as it is.

    to_turn: [B, K, ·, r], one or more; in order their heads are the H queries and the key. What
    it was is lost. latent: [B, K, R], before the norm of `weight` [R]. The rows of `name` are
    [R + r]. Returns the queries [B, K, H, r] and all rows that the new tokens may see.
    """
    return _APPEND_LATENT[backend](to_turn, latent, weight, state, name, eps, theta)


def append_tied(
    to_turn: Sequence[Tensor], rows: Tensor, weight: Tensor | None, state: LayerState, name: str,
    key: str, *, theta: float | None, eps: float = 0.0, backend: str,
) -> tuple[Tensor, Rows, Rows]:  # fmt: skip
    """`append_latent` of several rows a token, with the key in rows of its own.

    rows: [B, K, G, R], before the norms of `weight` [G, R] (None: there are none). Those of `name`
    are [G, R], those of `key` [r]. Returns the queries [B, K, H, r] and all rows of `name` and of
    `key` that the new tokens may see.
    """
    return _APPEND_TIED[backend](to_turn, rows, weight, state, name, key, eps, theta)


def _append_torch(
    x: Input, weight: Weight, state: LayerState, name: str, kv_heads: int, dim: int, theta: float,
    rope_dim: int | None,
) -> tuple[Tensor, Rows]:  # fmt: skip
    qkv = product(x, weight, backend="torch").view(*x.shape[:2], -1, dim)
    return _rotate_append_torch(qkv, state, name, kv_heads, theta, rope_dim)


def _append_triton(
    x: Input, weight: Weight, state: LayerState, name: str, kv_heads: int, dim: int, theta: float,
    rope_dim: int | None,
) -> tuple[Tensor, Rows]:  # fmt: skip
    pages = state.pages(name, weight.dtype)
    if pages is not None and isinstance(x, Unnormed) and isinstance(weight, Tensor):
        q = _in_one_launch(x, weight, pages, state.rotary(dim, theta, rope_dim))
        if q is not None:
            return q, state.written(name)
    qkv = product(x, weight, backend="triton").view(*x.shape[:2], -1, dim)
    return _rotate_append_triton(qkv, state, name, kv_heads, theta, rope_dim)


def _rotate_append_torch(
    qkv: Tensor, state: LayerState, name: str, kv_heads: int, theta: float, rope_dim: int | None,
    backend: str = "torch",
) -> tuple[Tensor, Rows]:  # fmt: skip
    heads = qkv.shape[2] - 2 * kv_heads
    turned = qkv[..., : heads + kv_heads, :]
    rotate_new(turned, state, theta=theta, rope_dim=rope_dim, backend=backend)
    seen = state.append(name, qkv[..., heads:, :].unflatten(2, (2, kv_heads)))
    return qkv[..., :heads, :], seen


def _rotate_append_triton(
    qkv: Tensor, state: LayerState, name: str, kv_heads: int, theta: float, rope_dim: int | None
) -> tuple[Tensor, Rows]:
    pages = state.pages(name, qkv.dtype)
    if pages is None:
        return _rotate_append_torch(qkv, state, name, kv_heads, theta, rope_dim, "triton")
    from kernels.rope.append import rope_append

    heads = qkv.shape[2] - 2 * kv_heads
    k_pool, v_pool = pages.pool.unbind(0)
    rope_append(
        qkv, state.rotary(qkv.shape[-1], theta, rope_dim), k_pool, v_pool, pages.table, pages.past,
        heads=heads, kv_heads=kv_heads, page_size=pages.page_size, new=pages.new,
    )  # fmt: skip
    return qkv[..., :heads, :], state.written(name)


def _in_one_launch(x: Unnormed, weight: Tensor, pages: Pages, cos_sin: Tensor) -> Tensor | None:
    """Norm, product, rotation and write of one token; None where that takes other operands."""
    if x.x.numel() != x.shape[-1] or pages.new is not None or torch.is_grad_enabled():
        return None
    from kernels.products.project_append import project_append, serves

    k_pool, v_pool = pages.pool.unbind(0)
    if not serves(x.x, x.residual, x.weight, weight, k_pool):
        return None
    q, x.total = project_append(
        x.x, x.residual, x.weight, weight, cos_sin, k_pool, v_pool, pages.table, pages.past,
        eps=x.eps, page_size=pages.page_size,
    )  # fmt: skip
    return q


def queries_and_key(turned: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """[B, K, H, r] and [B, K, r] of what `append_latent` takes."""
    queries, key = turned[0], turned[-1][..., -1, :]
    return queries if len(turned) > 1 else queries[..., :-1, :], key


def _append_latent_torch(
    to_turn: Sequence[Tensor], latent: Tensor, weight: Tensor, state: LayerState, name: str,
    eps: float, theta: float | None,
) -> tuple[Tensor, Rows]:  # fmt: skip
    if theta is not None:
        angles = state.rope(to_turn[0].shape[-1], theta)
        to_turn = [rotate(t, angles) for t in to_turn]
    queries, key = queries_and_key(to_turn)
    return queries, state.append(name, torch.cat((rms_norm(latent, weight, eps), key), -1))


def _append_latent_triton(
    to_turn: Sequence[Tensor], latent: Tensor, weight: Tensor, state: LayerState, name: str,
    eps: float, theta: float | None,
) -> tuple[Tensor, Rows]:  # fmt: skip
    if theta is None:
        queries, key = queries_and_key(to_turn)
        normed = norm_rows(latent, weight, eps, backend="triton")
        return queries, state.append(name, torch.cat((normed, key), -1))
    pages = state.pages(name, latent.dtype)
    if pages is None:
        return _append_latent_torch(to_turn, latent, weight, state, name, eps, theta)
    from kernels.latent.append import latent_append

    queries, key = queries_and_key(to_turn)
    latent_append(
        queries, key, latent, weight, state.rotary(key.shape[-1], theta), pages.pool, pages.table,
        pages.past, eps=eps, page_size=pages.page_size, new=pages.new,
    )  # fmt: skip
    return queries, state.written(name)


def _append_tied_torch(
    to_turn: Sequence[Tensor], rows: Tensor, weight: Tensor | None, state: LayerState, name: str,
    key: str, eps: float, theta: float | None, backend: str = "torch",
) -> tuple[Tensor, Rows, Rows]:  # fmt: skip
    if theta is not None:
        to_turn = [rotate_new(t, state, theta=theta, backend=backend) for t in to_turn]
    queries, turned = queries_and_key(to_turn)
    if weight is not None:
        rows = norm_each(rows, weight, eps, backend=backend)
    return queries, state.append(name, rows), state.append(key, turned)


def _append_tied_triton(
    to_turn: Sequence[Tensor], rows: Tensor, weight: Tensor | None, state: LayerState, name: str,
    key: str, eps: float, theta: float | None,
) -> tuple[Tensor, Rows, Rows]:  # fmt: skip
    given = to_turn, rows, weight, state, name, key, eps, theta
    if theta is None:
        return _append_tied_torch(*given, "triton")
    pages, keys = (state.pages(n, rows.dtype) for n in (name, key))
    if pages is None or keys is None:
        return _append_tied_torch(*given, "triton")
    from kernels.latent.append import latent_append

    queries, turning = queries_and_key(to_turn)
    latent_append(
        queries, turning, rows, weight, state.rotary(turning.shape[-1], theta), pages.pool,
        pages.table, pages.past, eps=eps, keys=keys.pool, page_size=pages.page_size, new=pages.new,
    )  # fmt: skip
    return queries, state.written(name), state.written(key)


def _rotate_torch(x: Tensor, state: LayerState, theta: float, rope_dim: int | None) -> Tensor:
    return rotate(x, state.rope(x.shape[-1], theta, rope_dim))


def _rotate_triton(x: Tensor, state: LayerState, theta: float, rope_dim: int | None) -> Tensor:
    from kernels.rope.rotate import rope_rotate

    return rope_rotate(x, state.rotary(x.shape[-1], theta, rope_dim), state.past)


_APPEND = everywhere("rotary positions", _append_torch, _append_triton)
_ROTATE_APPEND = everywhere("rotary positions", _rotate_append_torch, _rotate_append_triton)
_APPEND_LATENT = everywhere("rotary positions", _append_latent_torch, _append_latent_triton)
_APPEND_TIED = everywhere("rotary positions", _append_tied_torch, _append_tied_triton)
_ROTATE = everywhere("rotary positions", _rotate_torch, _rotate_triton)
