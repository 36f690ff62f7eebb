"""Rows that are stored in blocks of tokens: keys by channel, values by token (arXiv 2402.02750).

A channel of keys keeps its size over many tokens, so its numbers share a scale along them; they can
be stored once a block of tokens is full. Tokens of the block that is not full wait as they came, in
a fixed tensor. A token sees full blocks as they are stored and the others as they came, itself
among them, so what it sees does not depend on how a sequence is split into steps.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from archs.state import Seen
from infer.coding import Coding
from infer.rows import Held, RowForm


class Appended(NamedTuple):
    """What the new tokens see, and the tokens that wait after the step [B, m, 2, G, d]; each:
    after every token of it [B, K, m, 2, G, d].
    """

    seen: Seen
    waiting: Tensor
    each: Tensor | None


def append_blocks(
    held: Held, form: RowForm, coding: Coding, rows: Tensor, waiting: Tensor, past: Tensor,
    new: Tensor | None, *, each: bool,
) -> Appended:  # fmt: skip
    """Store the blocks that new rows [B, K, 2, G, d] fill.

    waiting: [B, m, 2, G, d], of which the first past % m tokens are a sequence's. past: int64 [B];
    new: int64 [B] valid tokens (None: all K).
    """
    batch, count, size = rows.shape[0], rows.shape[1], waiting.shape[1]
    blocks = -(-(size - 1 + count) // size)
    # Those that wait, the new ones right behind them, and room for a next block.
    line = rows.new_zeros(batch, (blocks + 1) * size, *rows.shape[2:])
    line[:, :size] = waiting
    at = past[:, None] % size + torch.arange(count, device=rows.device)
    line[torch.arange(batch, device=rows.device)[:, None], at] = rows
    full = line[:, : -(-count // size) * size].unflatten(1, (-1, size))
    seen = form.append(held, coding.encode(_by_channel(full)))
    stored = _by_token(coding.decode(seen.rows), size)
    ends = past[:, None] + torch.arange(1, count + 1, device=rows.device)
    masks = _stored_mask(seen.mask, stored, batch, count, size), _mask(line, past, ends, size)
    both = torch.cat((stored, line.movedim(1, -2)), -2)
    found = Seen(both, torch.cat(masks, -1), False)
    last = ends[:, -1] if new is None else past + new
    after = _begun(line, past, last[:, None], size)[:, 0]
    return Appended(found, after, _begun(line, past, ends, size) if each else None)


def _by_channel(full: Tensor) -> Tensor:
    """[B, R, m, 2, G, d] -> [B, R, 2, G, m·d]: keys with a channel's tokens together."""
    keys, values = full.unbind(3)
    keys = keys.movedim(2, -1).flatten(-2)
    return torch.stack((keys, values.movedim(2, -2).flatten(-2)), 2)


def _by_token(stored: Tensor, size: int) -> Tensor:
    """[B, 2, G, S, m·d] -> [B, 2, G, S·m, d]."""
    keys, values = stored.unbind(1)
    keys = keys.unflatten(-1, (-1, size)).transpose(-1, -2)
    return torch.stack((keys, values.unflatten(-1, (size, -1))), 1).flatten(-3, -2)


def _stored_mask(mask: Tensor | None, stored: Tensor, batch: int, count: int, size: int) -> Tensor:
    if mask is None:
        return stored.new_ones(batch, 1, count, stored.shape[-2], dtype=torch.bool)
    return mask.repeat_interleave(size, -1).expand(batch, -1, -1, -1)


def _mask(line: Tensor, past: Tensor, ends: Tensor, size: int) -> Tensor:
    """bool [B, 1, K, T]: which of the line's tokens each new one sees as they came."""
    at = (past - past % size)[:, None] + torch.arange(line.shape[1], device=line.device)
    at, end = at[:, None], ends[..., None]
    return ((at >= end - end % size) & (at < end))[:, None]


def _begun(line: Tensor, past: Tensor, ends: Tensor, size: int) -> Tensor:
    """The block that is begun at each of these ends [B, E] -> [B, E, m, 2, G, d]."""
    first = ends - ends % size - (past - past % size)[:, None]
    at = first[..., None] + torch.arange(size, device=line.device)
    rows = torch.arange(line.shape[0], device=line.device)[:, None, None]
    return line[rows, at]
