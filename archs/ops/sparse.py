"""The choice of rows by an indexer, and attention over the chosen ones, by backend.

Forms are torch's alone so far, over keys that are gathered from pages; our kernels have none.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from archs.backends import Forms
from archs.state import LayerState, PagedSeen, Rows, mask_of
from kernels.sparse.torch import (
    best_rows,
    index_scores,
    picked_attention,
    picked_mask,
    turn_first,
)


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
    scores = index_scores(q, weights, keys.rows)
    return Picked(*best_rows(scores, mask_of(keys, q.shape[1]), count), scores.shape[-1])


def _attend_torch(q: Tensor, q_rotary: Tensor, seen: Rows, picked: Picked, scale: float) -> Tensor:
    rows, whole = _rows_at(seen, picked.at), torch.cat((q, q_rotary), -1)
    return picked_attention(whole, rows, picked.valid, v_dim=q.shape[-1], scale=scale)


def _rows_at(seen: Rows, at: Tensor) -> Tensor:
    """Rows by their places among all that are seen: [B, K, k] -> [B, K, k, row]."""
    if not isinstance(seen, PagedSeen) or seen.pages.window is not None:
        batch = torch.arange(len(at), device=at.device)[:, None, None]
        return seen.rows[batch, at]
    # Without a window the place of a row is its position; the pages of no other row are touched.
    pages, size = seen.pages, seen.pages.page_size
    page = pages.table.long().gather(1, (at // size).flatten(1)).view_as(at)
    return pages.pool[page * size + at % size]


_APPEND = Forms("index keys", {"torch": _append_torch, "sdpa": _append_torch})
_PICK = Forms("choice of rows", {"torch": _pick_torch, "sdpa": _pick_torch})
_ATTEND = Forms("attention over picked rows", {"torch": _attend_torch, "sdpa": _attend_torch})
