"""Scores of a chunk whose keys decay by channel: q_t · (e^{c_t - c_s} ∘ k_s), s <= t, where c is
the running sum of log decays g <= 0 (Kimi Delta Attention, arXiv 2510.26692, section 3).

Such scores are no product of a row's and a column's factor: e^{c_t} may be 0 and e^{-c_s} infinite
where their product is near 1. They are one for tokens t and s on either side of a third, c_t - c_s
being (c_t - c_m) + (c_m - c_s), neither of them positive. So a chunk is halved, and its halves, and
so on: each pair of tokens is parted once, by one product of half a block with the other half.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Decayed(NamedTuple):
    """Of a chunk of C tokens: scores of the queries [..., C, C], their diagonal included, and of
    the keys, strictly below it; sums of log decays [..., C, N] since the chunk's first token, its
    own included, and until its last one, its own left out.
    """

    scores: Tensor
    overlap: Tensor
    since: Tensor
    until: Tensor


def decayed_scores(q: Tensor, k: Tensor, g: Tensor, erasing: Tensor | None = None) -> Decayed:
    """Exact however strong decays are: sums are of terms of one sign, and nothing positive is ever
    exponentiated; differentiable.

    q, k, g: [..., C, N], g <= 0, of one dtype; C a power of two. erasing: keys that ask for the
    overlap with earlier ones, where they are others than k.
    Raises ValueError where C is none.
    """
    chunk = k.shape[-2]
    if chunk & (chunk - 1):
        raise ValueError(f"a chunk of {chunk} tokens is not halved to the end; pad it")
    # Blocks of one token: sums [..., blocks, 1, N], scores [..., blocks, 1, 1].
    since, until = g.unsqueeze(-2), torch.zeros_like(g).unsqueeze(-2)
    scores = (q * k).sum(-1)[..., None, None]
    overlap = torch.zeros_like(scores)
    asked = torch.stack((q, k if erasing is None else erasing), -2)
    for size in (1 << i for i in range(chunk.bit_length() - 1)):
        first, later = since.unflatten(-3, (-1, 2)).unbind(-3)
        before, rest = until.unflatten(-3, (-1, 2)).unbind(-3)
        keys = k.unflatten(-2, (-1, 2, size))[..., 0, :, :] * before.exp()
        rows = asked.unflatten(-3, (-1, 2, size))[..., 1, :, :, :] * later.exp().unsqueeze(-2)
        below = (rows.flatten(-3, -2) @ keys.mT).unflatten(-2, (size, 2))
        scores = _joined(scores, below.select(-2, 0))
        overlap = _joined(overlap, below.select(-2, 1))
        since = torch.cat((first, later + first[..., -1:, :]), -2)
        until = torch.cat((before + later[..., -1:, :], rest), -2)
    return Decayed(scores.squeeze(-3), overlap.squeeze(-3), since.squeeze(-3), until.squeeze(-3))


def _joined(blocks: Tensor, below: Tensor) -> Tensor:
    """Neighbours of blocks [..., 2n, C, C] on a diagonal, `below` [..., n, C, C] under it:
    [..., n, 2C, 2C].
    """
    first, later = blocks.unflatten(-3, (-1, 2)).unbind(-3)
    upper = torch.cat((first, torch.zeros_like(below)), -1)
    return torch.cat((upper, torch.cat((below, later), -1)), -2)


def decayed_scores_matrix_flops(chunk: int, n: int) -> int:
    """What torch counts for `decayed_scores` of one chunk, exactly."""
    return 2 * chunk * (chunk - 1) * n
