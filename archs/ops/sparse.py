"""The choice of rows by an indexer, and attention over the chosen ones, by backend.

Kernels write index keys, rank all rows, find the largest ranks and attend over the picked rows
where they lie.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from archs.backends import Forms
from archs.state import LayerState, PagedSeen, Pages, Rows, mask_of, pages_of
from kernels.sparse.torch import (
    best_rows,
    index_scores,
    picked_attention,
    picked_mask,
    turn_first,
)

#: Numbers of the scores that torch's form holds at once.
PIECE = 1 << 23


class Picked(NamedTuple):
    """The rows that each new token reads of `rows` rows.

    at: int64 [B, K, k], ascending; valid: bool [B, K, k], False where a token sees fewer.
    """

    at: Tensor
    valid: Tensor
    rows: int

    def mask(self) -> Tensor:
        """bool [B, 1, K, S] over all rows."""
        return picked_mask(self.at, self.valid, self.rows)[:, None]


class IndexNorm(NamedTuple):
    """LayerNorm of index keys; weight, bias: [d]."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, key: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        return F.layer_norm(key, self.weight.shape, self.weight, self.bias, self.eps)


def append_index(
    queries: Tensor, key: Tensor, norm: IndexNorm, state: LayerState, name: str, *, rope_dim: int,
    theta: float, backend: str,
) -> tuple[Tensor, Rows]:  # fmt: skip
    """Norm index keys, turn the first `rope_dim` channels of queries and keys, store the keys.

    queries: [B, K, H, d], whose memory may be written; key: [B, K, d]; the rows of `name` are [d].
    Returns the queries and all keys that the new tokens may see. Raises NoFormError where the
    backend has no form, as all operations here do.
    """
    return _APPEND[backend](queries, key, norm, state, name, rope_dim, theta)


def pick_rows(q: Tensor, weights: Tensor, keys: Rows, count: int, *, backend: str) -> Picked:
    """The `count` visible rows with the highest index scores, of equal ones the earlier.

    q: [B, K, H, d]; weights: [B, K, H], scales included; the rows of `keys` are [d].
    """
    return _PICK[backend](q, weights, keys, count)


def attend_picked(
    q: Tensor, q_rotary: Tensor, seen: Rows, picked: Picked, *, scale: float, backend: str
) -> Tensor:
    """As `archs.ops.attention.attend_latent`, of every token over its picked rows alone, which are
    all that is read.
    """
    return _ATTEND[backend](q, q_rotary, seen, picked, scale)


def _append_torch(
    queries: Tensor, key: Tensor, norm: IndexNorm, state: LayerState, name: str, rope_dim: int,
    theta: float,
) -> tuple[Tensor, Rows]:  # fmt: skip
    angles = state.rope(rope_dim, theta)
    turned = turn_first(norm(key)[:, :, None], angles, rope_dim)[:, :, 0]
    return turn_first(queries, angles, rope_dim), state.append(name, turned)


def _pick_torch(q: Tensor, weights: Tensor, keys: Rows, count: int) -> Picked:
    rows, mask = keys.rows, mask_of(keys, q.shape[1])
    # A token's choice is its own, so a long step is taken in pieces.
    size = max(1, PIECE // max(1, len(q) * q.shape[2] * rows.shape[1]))
    parts_of = zip(q.split(size, 1), weights.split(size, 1), mask.split(size, 1), strict=True)
    pieces = [best_rows(index_scores(a, b, rows), seen, count) for a, b, seen in parts_of]
    at, valid = (torch.cat(parts, 1) for parts in zip(*pieces, strict=True))
    return Picked(at, valid, rows.shape[1])


def _attend_torch(q: Tensor, q_rotary: Tensor, seen: Rows, picked: Picked, scale: float) -> Tensor:
    rows, whole = rows_at(seen, picked.at), torch.cat((q, q_rotary), -1)
    return picked_attention(whole, rows, picked.valid, v_dim=q.shape[-1], scale=scale)


def rows_at(seen: Rows, at: Tensor) -> Tensor:
    """Rows by their places among all that are seen: [B, K, k] -> [B, K, k, row]."""
    if not isinstance(seen, PagedSeen) or seen.pages.window is not None:
        batch = torch.arange(len(at), device=at.device)[:, None, None]
        return seen.rows[batch, at]
    # Without a window the place of a row is its position; the pages of no other row are touched.
    return seen.pages.pool[_pool_rows(seen.pages, at)]


def _append_triton(
    queries: Tensor, key: Tensor, norm: IndexNorm, state: LayerState, name: str, rope_dim: int,
    theta: float,
) -> tuple[Tensor, Rows]:  # fmt: skip
    pages = state.pages(name, key.dtype)
    if pages is None:
        return _append_torch(queries, key, norm, state, name, rope_dim, theta)
    from kernels.sparse.append import index_append

    index_append(
        queries, key, norm.weight, norm.bias, state.rotary(rope_dim, theta), pages.pool,
        pages.table, pages.past, eps=norm.eps, page_size=pages.page_size, new=pages.new,
    )  # fmt: skip
    return queries, state.written(name)


def _pick_triton(q: Tensor, weights: Tensor, keys: Rows, count: int) -> Picked:
    if not isinstance(keys, PagedSeen) or not keys.length:
        return _pick_torch(q, weights, keys, count)
    pages, ends = keys.pages, keys.pages.ends
    from kernels.sparse.scan import index_scan
    from kernels.sparse.topk import rank_topk

    # As many rows as all pages have that are gathered where a mask is asked for.
    size = pages.page_size
    rows = min(-(-keys.length // size), pages.table.shape[1]) * size
    if q.data_ptr() % 16 or any(stride % 16 for stride in q.stride()[:3]):
        # A view beside a few head weights: the kernel reads 16 bytes at a time. One token's queries
        # are contiguous wherever they start.
        q = q.clone(memory_format=torch.contiguous_format)
    ranks = index_scan(
        q, weights.contiguous(), pages.pool, pages.table, pages.past if ends is None else None,
        rows=rows, page_size=size, ends=ends,
    )  # fmt: skip
    at = rank_topk(ranks, min(count, rows))
    # Where a token sees fewer rows it picks them all, and they come before all others.
    seen = ends
    if seen is None:
        seen = pages.past[:, None] + torch.arange(1, q.shape[1] + 1, device=q.device)
    return Picked(at, torch.arange(at.shape[-1], device=q.device) < seen[..., None], rows)


def _attend_triton(q: Tensor, q_rotary: Tensor, seen: Rows, picked: Picked, scale: float) -> Tensor:
    pages = pages_of(seen)
    if pages is None:
        return _attend_torch(q, q_rotary, seen, picked, scale)
    from kernels.latent.decode import mla_decode

    # Each token is a sequence of its own, whose pages are the rows that it picked.
    rows = _pool_rows(pages, picked.at).int().flatten(0, 1)
    counts = picked.valid.sum(-1, dtype=torch.int32).flatten()
    out = mla_decode(
        q.flatten(0, 1)[:, None], q_rotary.flatten(0, 1)[:, None], pages.pool, rows, counts,
        scale=scale, page_size=1,
    )  # fmt: skip
    return out.view_as(q)


def _pool_rows(pages: Pages, at: Tensor) -> Tensor:
    """Where rows [B, K, k] of the sequences lie in the pool, int64 of the same shape."""
    size = pages.page_size
    page = pages.table.gather(1, (at // size).flatten(1)).view_as(at)
    return page.long() * size + at % size


_APPEND = Forms(
    "index keys", {"torch": _append_torch, "triton": _append_triton, "sdpa": _append_torch}
)
_PICK = Forms("choice of rows", {"torch": _pick_torch, "triton": _pick_triton, "sdpa": _pick_torch})
_ATTEND = Forms(
    "attention over picked rows",
    {"torch": _attend_torch, "triton": _attend_triton, "sdpa": _attend_torch},
)
