"""Native sparse attention over rows in blocks, by backend (arXiv 2502.11089).

Three attentions of the same queries, each weighed by a gate of its own: over the means of whole
blocks, over the rows of a few blocks that those weights pick, and over a window. Short steps gather
what they read: first the newest rows of each token, which hold its own block and the one before,
then the blocks that were picked. Longer ones read all rows once, under masks.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from archs.backends import Forms
from archs.ops.attention import DECODE_LIMIT
from archs.state import LayerState, PagedSeen, Rows, Seen, mask_of, pages_of
from kernels.attention.torch import attention
from kernels.blocks.torch import NEWEST, attend_means, best_blocks, block_means, blocks_mask

#: Weights of means that a long step holds at once.
PIECE = 1 << 23


@dataclass(frozen=True, slots=True)
class Blocks:
    """What a token reads: `count` blocks of `size` rows, and the newest `window` rows."""

    size: int
    count: int
    window: int

    @property
    def newest(self) -> int:
        """Rows that hold the window, a token's own block and the one before."""
        return max(self.window, NEWEST * self.size)

    @property
    def rows(self) -> int:
        """Distinct rows that a token reads at most."""
        return self.newest + (self.count - NEWEST) * self.size

    def gathers(self, new_tokens: int, rows: int) -> bool:
        """Whether a step gathers the rows of every token apart: where these are no more than all
        rows, which a longer step reads once, under masks.
        """
        return new_tokens * self.rows <= rows

    def are_all(self, rows: int) -> bool:
        """Whether every token reads all blocks, so that there is nothing to pick."""
        return rows <= self.count * self.size


class Branches(NamedTuple):
    """What the three attentions of a step give, [B, K, H, d] each."""

    means: Tensor
    picked: Tensor
    window: Tensor

    def gated(self, gates: Tensor) -> Tensor:
        """Their sum, weighed by gates [B, K, 3, H] (equation 5)."""
        means, picked, window = gates[..., None].unbind(2)
        return means * self.means + picked * self.picked + window * self.window


def attend_blocks(
    q: Tensor, seen: Rows, state: LayerState, name: str, blocks: Blocks, *, backend: str
) -> Branches:
    """The three attentions of new tokens; means of blocks that these complete become rows `name`.

    q: [B, K, H, d]; the rows of `seen`, the new ones among them, and of `name` are [2, G, d].
    Raises NoFormError where the backend has no form.
    """
    return _ATTEND[backend](q, seen, state, name, blocks)


def attend_all_blocks(q: Tensor, kv: Tensor, blocks: Blocks) -> Branches:
    """The same of whole sequences, differentiable: q [B, T, H, d], rows kv [B, 2, G, T, d]."""
    tokens, size = q.shape[1], blocks.size
    at = torch.arange(tokens, device=q.device)[None]
    means = block_means(kv[..., : tokens // size * size, :], size)
    ends = torch.arange(1, means.shape[-2] + 1, device=q.device) * size
    seen = Seen(means, (ends <= at[..., None] + 1)[:, None], False)
    return _masked(q, Seen(kv, None, True), seen, at, blocks)


# -- in torch ------------------------------------------------------------------------------------


def _torch(q: Tensor, seen: Rows, state: LayerState, name: str, blocks: Blocks) -> Branches:
    if blocks.gathers(q.shape[1], seen.length):
        return _gathered(q, seen, state, name, blocks)
    # Blocks that the step completes: some of their rows may have come before it.
    size, new = blocks.size, -(-q.shape[1] // blocks.size)
    first = state.past.long() // size * size
    at = first[:, None] + torch.arange(new * size, device=q.device)
    at = at.clamp(max=seen.length - 1)[:, None, None, :, None]
    rows = seen.rows.gather(3, at.expand(-1, *seen.rows.shape[1:3], -1, seen.rows.shape[-1]))
    means = state.append(name, block_means(rows, size).movedim(3, 1))
    return _masked(q, seen, means, state.positions, blocks)


def _masked(q: Tensor, seen: Rows, means: Rows, at: Tensor, blocks: Blocks) -> Branches:
    """Over all rows, under masks. at: positions [1 or B, K]."""
    new, own = q.shape[1], at // blocks.size
    (k, v), scale = seen.rows.unbind(1), q.shape[-1] ** -0.5
    # Of whole pages there may be more than are seen.
    count = k.shape[2]
    out, weights = _over_means(q, means, scale)
    every = mask_of(seen, new)
    near = torch.arange(count, device=q.device) > at[..., None] - blocks.window
    window = attention(q, k, v, mask=(every & near)[:, None])
    if blocks.are_all(seen.length):
        picked = attention(q, k, v, mask=seen.mask, causal=seen.causal)
        return Branches(out, picked, window)
    best = best_blocks(weights, own, blocks.count)
    chosen = blocks_mask(*best, own, blocks.size, count) & every[:, :, None]
    # Every KV head has rows of its own choice: each is a sequence of its own.
    apart = q.unflatten(2, (k.shape[1], -1)).transpose(1, 2).flatten(0, 1)
    picked = attention(
        apart, k.flatten(0, 1)[:, None], v.flatten(0, 1)[:, None],
        mask=chosen.transpose(1, 2).flatten(0, 1)[:, None],
    )  # fmt: skip
    picked = picked.unflatten(0, (-1, k.shape[1])).transpose(1, 2).flatten(2, 3)
    return Branches(out, picked, window)


def _over_means(q: Tensor, means: Rows, scale: float) -> tuple[Tensor, Tensor]:
    """As `attend_means`; a token's weights are its own, so a long step is taken in pieces."""
    (k, v), mask = means.rows.unbind(1), mask_of(means, q.shape[1])
    size = max(1, PIECE // (len(q) * q.shape[2] * max(1, means.length)))
    if size >= q.shape[1]:
        return attend_means(q, k, v, mask, scale=scale)
    parts = zip(q.split(size, 1), mask.split(size, 1), strict=True)
    pieces = [attend_means(a, k, v, seen, scale=scale) for a, seen in parts]
    out, weights = zip(*pieces, strict=True)
    return torch.cat(out, 1), torch.cat(weights, 1)


def _gathered(q: Tensor, seen: Rows, state: LayerState, name: str, blocks: Blocks) -> Branches:
    """Over the rows of every token, gathered."""
    size, scale = blocks.size, q.shape[-1] ** -0.5
    at = state.positions.expand(len(q), -1)
    back = torch.arange(1 - blocks.newest, 1, device=q.device)
    near = at[..., None] + back
    k, v = _rows_at(seen, near.clamp(0, seen.length - 1)[:, :, None])
    means = state.append(name, _completed(k, v, state, blocks))
    out, weights = _over_means(q, means, scale)
    picks, valid = best_blocks(weights, at // size, blocks.count)
    far = (picks[..., None] * size + torch.arange(size, device=q.device)).flatten(-2)
    k_far, v_far = _rows_at(seen, far.clamp(max=seen.length - 1))
    kept = valid.repeat_interleave(size, -1)
    # Of the newest rows those of a token's own block and the one before, and those in its window.
    newest, first = near[..., -NEWEST * size :], (at // size - 1).clamp(min=0) * size
    kept = torch.cat((kept, _for_heads(newest >= first[..., None], k.shape[2])), -1)
    last = slice(-NEWEST * size, None)
    k_all, v_all = (torch.cat((a, b[..., last, :]), -2) for a, b in ((k_far, k), (v_far, v)))
    last = slice(-blocks.window, None)
    seen_near = _for_heads(near[..., last] >= 0, k.shape[2])
    return Branches(
        out,
        _each_alone(q, k_all, v_all, kept),
        _each_alone(q, k[..., last, :], v[..., last, :], seen_near),
    )


def _rows_at(seen: Rows, at: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values by their places: [B, K, G or 1, n] -> [B, K, G, n, d] each."""
    batch: tuple[Tensor, ...] = ()
    if isinstance(seen, PagedSeen):
        # Without a window the place of a row is its position; no other page is touched.
        p = seen.pages
        page = p.table.gather(1, (at // p.page_size).flatten(1)).view_as(at)
        at = page.long() * p.page_size + at % p.page_size
        k, v = p.pool.unbind(0)
    else:
        batch = (torch.arange(len(at), device=at.device)[:, None, None, None],)
        k, v = seen.rows.unbind(1)
    head = torch.arange(k.shape[-3], device=at.device)[:, None]
    return k[*batch, head, at], v[*batch, head, at]


def _completed(k: Tensor, v: Tensor, state: LayerState, blocks: Blocks) -> Tensor:
    """Means [B, R, 2, G, d] of the blocks that a step completes; k, v: the newest rows of its
    tokens [B, K, G, n, d], of which those of a block's last token end with the block.
    """
    size, (batch, new) = blocks.size, k.shape[:2]
    ends = torch.arange(1, -(-new // size) + 1, device=k.device) * size - 1
    last = (ends - state.past.long()[:, None] % size).clamp(max=new - 1)
    of = torch.arange(batch, device=k.device)[:, None]
    kv = torch.stack([t[..., -size:, :][of, last] for t in (k, v)], 2)
    return block_means(kv, size).squeeze(-2)


def _for_heads(mask: Tensor, heads: int) -> Tensor:
    """[B, K, n] -> [B, K, G, n]."""
    return mask[:, :, None].expand(-1, -1, heads, -1)


def _each_alone(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of every token and KV head over rows of its own.

    q: [B, K, H, d]; k, v: [B, K, G, n, d]; mask: bool [B, K, G, n]. Returns [B, K, H, d].
    """
    groups = k.shape[2]
    alone = q.unflatten(2, (groups, -1)).flatten(0, 2)[:, None]
    k, v = (t.flatten(0, 2)[:, None] for t in (k, v))
    return attention(alone, k, v, mask=mask.flatten(0, 2)[:, None, None]).reshape(q.shape)


# -- by kernels ----------------------------------------------------------------------------------


def _triton(q: Tensor, seen: Rows, state: LayerState, name: str, blocks: Blocks) -> Branches:
    """Decode; longer steps are torch's, under masks."""
    p = pages_of(seen)
    if p is None or q.shape[1] > DECODE_LIMIT:
        return _torch(q, seen, state, name, blocks)
    means = state.pages(name, q.dtype)
    if means is None:
        return _torch(q, seen, state, name, blocks)
    from kernels.attention.decode import attention_decode
    from kernels.blocks.append import block_append
    from kernels.blocks.pages import block_pages, unit_of
    from kernels.blocks.scan import block_scan
    from kernels.sparse.topk import rank_topk

    size, page = blocks.size, p.page_size
    block_append(
        p.pool, p.table, p.past, means.pool, means.table, tokens=q.shape[1], block=size,
        page_size=page, new=p.new,
    )  # fmt: skip
    # As many means as the longest sequence has, in whole pages.
    most = max(1, min(-(-state.written(name).length // page), means.table.shape[1])) * page
    k, v = means.pool.unbind(0)
    out, ranks = block_scan(q, k, v, means.table, p.past, means=most, block=size, page_size=page)
    # Where a token sees fewer blocks it picks them all, and they come before all others.
    picks = rank_topk(ranks, min(blocks.count - NEWEST, most))
    rows = p.pool.shape[2]
    table, counts = block_pages(picks, p.table, p.past, block=size, page_size=page, pool_rows=rows)
    # Each token and KV head is a sequence of its own, whose pages are what it reads.
    alone = q.unflatten(2, (p.pool.shape[1], -1)).flatten(0, 2)[:, None]
    k, v = p.pool.unbind(0)
    picked = attention_decode(
        alone, k.view(1, -1, k.shape[-1]), v.view(1, -1, v.shape[-1]), table, counts,
        page_size=unit_of(size, page),
    )  # fmt: skip
    window = attention_decode(q, k, v, p.table, p.total, page_size=page, window=blocks.window)
    return Branches(out, picked.view_as(out), window)


_ATTEND = Forms("native sparse attention", {"torch": _torch, "triton": _triton, "sdpa": _torch})
