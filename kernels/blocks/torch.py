"""Attention over block means, and the choice of blocks by it (NSA, arXiv 2502.11089).

Rows lie in blocks of S tokens. A token attends to the mean keys and values of whole blocks
(`attend_means`), and the weights that it gives them say which blocks it reads row by row
(`best_blocks`): the first, the best, its own and the one before. A block is whole once its last
token is there, so a token that ends a block sees its mean.

The choice is to be the same in every split of a sequence. Means, dot products and weights are
float64, so their order hardly matters, and are rounded once; among equal weights the earlier block
wins.

Legend: B sequences, K new tokens, H query heads, G KV heads, d channels, C block means.
"""

import torch
from torch import Tensor

from kernels.sparse.torch import best_rows, picked_mask

#: The newest blocks, which every token reads: its own and the one before.
NEWEST = 2
#: In place of the first block's weight: above all others.
ALWAYS = 2.0


def block_means(rows: Tensor, size: int) -> Tensor:
    """Means of whole blocks of `size` rows: [..., R·S, d] -> [..., R, d].

    Sums of float32 err by 2^-53, so a mean does not depend on how its rows lie.
    """
    return rows.unflatten(-2, (-1, size)).mean(-2, dtype=torch.float64).to(rows.dtype)


def attend_means(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v over block means (equation 8), and the weights by KV head.

    q: [B, K, H, d]; k, v: [B, G, C, d]; mask: bool [1 or B, K, C], which means a token sees.
    Returns [B, K, H, d], zeros for a token that sees none, and the mean weights of the H/G query
    heads of a KV head (equation 10), float32 [B, K, G, C] without gradients. 2·B·K·H·C·2d FLOPs.
    """
    groups, tokens = k.shape[1], q.shape[1]
    # The heads of a KV head and all tokens are the rows of one product.
    asked = q.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4)
    logits = asked.flatten(2, 3).double() @ (scale * k.double()).mT
    hidden = ~mask[:, None, None]
    logits = logits.unflatten(2, (-1, tokens)).masked_fill(hidden, torch.finfo(torch.float64).min)
    # A token that sees nothing would weigh all alike.
    weights = logits.softmax(-1).masked_fill(hidden, 0.0)
    out = weights.flatten(2, 3).to(v.dtype) @ v
    out = out.unflatten(2, (-1, tokens)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return out, weights.detach().mean(2).transpose(1, 2).float()


def best_blocks(weights: Tensor, own: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The blocks that a token reads beside its own and the one before it (equation 11): the
    first, and of the others those of the highest weights; among equal ones the earlier wins.

    weights: float32 [B, K, G, C]; own: int64 [1 or B, K], the block of each token; count: of all
    blocks that it reads, at least 3. Returns blocks in ascending order, int64
    [B, K, G, min(count - 2, C)], and which of them there are, bool: the others come last.
    """
    blocks = torch.arange(weights.shape[-1], device=weights.device)
    older = (blocks <= own[..., None] - NEWEST)[:, :, None]
    ranked = weights.masked_fill(blocks == 0, ALWAYS)
    return best_rows(ranked, older, count - NEWEST)


def blocks_mask(at: Tensor, valid: Tensor, own: Tensor, size: int, rows: int) -> Tensor:
    """What `best_blocks` returns, and the newest blocks, as a mask over all rows, bool
    [B, K, G, S]; rows after the token are among them.
    """
    count = -(-rows // size)
    blocks = torch.arange(count, device=at.device)
    newest = (blocks > own[..., None] - NEWEST)[:, :, None]
    picked = picked_mask(at.flatten(1, 2), valid.flatten(1, 2), count).unflatten(1, at.shape[1:3])
    return (picked | newest).repeat_interleave(size, -1)[..., :rows]


def means_flops(tokens: int, heads: int, dim: int, means: int) -> int:
    """Matrix FLOPs of `attend_means`."""
    return 4 * tokens * heads * dim * means


def attend_means_ref(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, scale: float
) -> tuple[Tensor, Tensor]:
    """The oracle: float64, one token of one head at a time. Shapes as `attend_means`."""
    batch, tokens, heads, _ = q.shape
    groups, per_group = k.shape[1], heads // k.shape[1]
    out = q.new_zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64)
    weights = q.new_zeros(batch, tokens, groups, k.shape[2], dtype=torch.float64)
    for b in range(batch):
        for t in range(tokens):
            seen = mask.expand(batch, -1, -1)[b, t]
            if not seen.any():
                continue
            for h in range(heads):
                g = h // per_group
                own = (k[b, g, seen].double() @ q[b, t, h].double() * scale).softmax(-1)
                out[b, t, h] = own @ v[b, g, seen].double()
                weights[b, t, g, seen] += own / per_group
    return out, weights


def best_blocks_ref(weights: Tensor, own: Tensor, count: int) -> list[list[list[list[int]]]]:
    """The oracle of `best_blocks`: sorted pairs in Python; blocks of each sequence, token and KV
    head, ascending.
    """
    batch, tokens, groups, _ = weights.shape

    def of(b: int, t: int, g: int) -> list[int]:
        older = range(max(0, int(own.expand(batch, -1)[b, t]) - 1))
        ranked = sorted((block != 0, -float(weights[b, t, g, block]), block) for block in older)
        return sorted(block for *_, block in ranked[: count - NEWEST])

    return [[[of(b, t, g) for g in range(groups)] for t in range(tokens)] for b in range(batch)]
