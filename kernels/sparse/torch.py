"""Attention of each token over the few rows that an indexer picks (arXiv 2512.02556).

Queries and keys of an indexer (`turn_first`), its scores of all rows (`index_scores`), the best k
of them (`best_rows`), and attention over latents of those rows alone (`picked_attention`). The
choice is made to be the same in every split of a sequence: dot products are float64, so their order
hardly matters, scores are rounded to float32 once, and among equal scores the earlier row wins.
"""

import torch
from torch import Tensor

from kernels.attention.torch import latent_attention
from kernels.rope.torch import rotate

#: Bytes of the float64 copy of keys that `index_scores` makes at once: what stays in a cache.
COPY_BYTES = 1 << 22
#: Rows of it at least, so that a large batch does not become many small calls.
LEAST_ROWS = 1024
#: A score of what is not seen, from which a softmax of nothing but such can be taken.
LEAST = torch.finfo(torch.float32).min


def turn_first(x: Tensor, angles: Tensor, dim: int) -> Tensor:
    """Rotate the first `dim` channels of x [B, K, H, d] by `angles` of `kernels.rope.torch`: in
    place where no gradient needs it, else into a new tensor.
    """
    turned = rotate(x[..., :dim], angles)
    return torch.cat((turned, x[..., dim:]), -1) if x.requires_grad else x


def index_scores(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """The indexer's scores Σ_h w_h · relu(q_h · k) (arXiv 2512.02556, equation 1), differentiable.

    q: [B, K, H, d]; weights: [B, K, H], scales included; keys: [B, S, d]. Returns float32
    [B, K, S]. Products of two float32 are exact in float64 and sums err by 2^-53, so the rounded
    score depends on neither K nor S but for about one score in 2^28.
    """
    queries, heads = q.double().flatten(1, 2), weights.double()[:, :, None]

    def scores(keys: Tensor) -> Tensor:
        dots = (queries @ keys.double().mT).unflatten(1, q.shape[1:3]).relu()
        return (heads @ dots).squeeze(2).float()

    size = max(LEAST_ROWS, COPY_BYTES // (8 * len(keys) * keys.shape[-1]))
    if keys.shape[1] <= size:
        return scores(keys)
    return torch.cat([scores(piece) for piece in keys.split(size, 1)], -1)


def best_rows(scores: Tensor, mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` visible rows of the highest scores; among equal scores the earlier row wins.

    scores: float32 [B, K, S]; mask: bool [1 or B, K, S], True where a token may look. Returns rows
    in ascending order, int64 [B, K, min(count, S)], and which of them a token may see, bool: a
    token that sees fewer rows than `count` picks them all. Raises ValueError for other scores than
    float32.
    """
    if scores.dtype != torch.float32:
        raise ValueError(f"scores are {scores.dtype}; rows are ranked by float32 scores")
    # Adding zero makes -0.0 the same number as 0.0 in bits, too.
    bits = (scores.masked_fill(~mask, -torch.inf) + 0.0).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    # One whole number for score and place: no two are equal, so every sort gives the same rows.
    last_first = torch.arange(scores.shape[-1] - 1, -1, -1, device=scores.device)
    ranks = (ordered << 32) | last_first
    at = ranks.topk(min(count, scores.shape[-1]), -1, sorted=False).indices.sort(-1).values
    return at, mask.expand(scores.shape).gather(-1, at)


def picked_mask(at: Tensor, valid: Tensor, rows: int) -> Tensor:
    """What `best_rows` returns as a mask over all `rows`: bool [B, K, S]."""
    return valid.new_zeros(*at.shape[:2], rows).scatter(-1, at, valid)


def picked_attention(q: Tensor, rows: Tensor, valid: Tensor, *, v_dim: int, scale: float) -> Tensor:
    """`latent_attention` of every token over rows of its own.

    q: [B, K, H, d]; rows: [B, K, k, d], of which `valid`, bool [B, K, k], a token may see; values
    are their first `v_dim` columns. Returns [B, K, H, v_dim]; 2·B·K·H·k·2d FLOPs are counted.
    """
    alone, own = q.flatten(0, 1)[:, None], rows.flatten(0, 1)[:, None]
    seen = valid.flatten(0, 1)[:, None, None]
    out = latent_attention(alone, own, v_dim=v_dim, scale=scale, mask=seen)
    return out.unflatten(0, q.shape[:2]).squeeze(2)


def mean_attention(q: Tensor, k: Tensor, *, scale: float, seen: Tensor | None = None) -> Tensor:
    """What an indexer learns: attention weights, their mean over heads (equation 3's p).

    q: [B, T, H, d]; k: [B, H or 1, S, d]; seen: bool [1, T, S], the rows that a token sees (None:
    S = T, causal). Returns float32 [B, T, S], whose rows sum to 1, or are zeros where a token sees
    nothing, without gradients.
    """
    with torch.no_grad():
        logits = (scale * q.transpose(1, 2) @ k.mT).float()
        hidden = _hidden(logits, seen)
        weights = logits.masked_fill_(hidden, LEAST).softmax(-1)
        return weights.masked_fill_(hidden, 0.0).mean(1)


def index_loss(scores: Tensor, attention: Tensor, seen: Tensor | None = None) -> Tensor:
    """Mean over tokens of KL(attention || softmax(scores)), in nats (equation 3).

    scores, attention: [B, T, S]; seen: as `mean_attention`'s; gradients go to the scores alone. A
    token that sees nothing counts as 0.
    """
    hidden = _hidden(scores, seen)
    guess = scores.masked_fill(hidden, LEAST).log_softmax(-1).masked_fill(hidden, 0.0)
    wanted = attention.detach()
    return (torch.xlogy(wanted, wanted) - wanted * guess).sum(-1).mean()


def _hidden(scores: Tensor, seen: Tensor | None) -> Tensor:
    """The rows that a token does not see; they broadcast with scores [..., T, S]."""
    if seen is not None:
        return ~seen
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)


def index_flops(tokens: int, heads: int, dim: int, rows: int) -> int:
    """Matrix FLOPs of `index_scores`: 2·d for each head's dot product, 2 for its weight."""
    return 2 * tokens * heads * rows * (dim + 1)


def index_scores_ref(q: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
    """The oracle: float64, one head at a time. Shapes as `index_scores`; returns float64."""
    total = q.new_zeros(*q.shape[:2], keys.shape[1], dtype=torch.float64)
    for head in range(q.shape[2]):
        dots = (q[:, :, head, None].double() * keys[:, None].double()).sum(-1)
        total += weights[:, :, head, None].double() * dots.clamp(min=0)
    return total


def best_rows_ref(scores: Tensor, mask: Tensor, count: int) -> list[list[list[int]]]:
    """The oracle of `best_rows`: sorted pairs in Python; row numbers of each token, ascending."""
    found: list[list[list[int]]] = []
    for of_tokens, of_masks in zip(scores, mask.expand(scores.shape), strict=True):
        ranked = [
            sorted((-row[s], s) for s in seen.nonzero()[:, 0].tolist())
            for row, seen in zip(of_tokens.tolist(), of_masks, strict=True)
        ]
        found.append([sorted(s for _, s in pairs[:count]) for pairs in ranked])
    return found


def picked_attention_ref(
    q: Tensor, rows: Tensor, valid: Tensor, *, v_dim: int, scale: float
) -> Tensor:
    """The oracle: float64, one token at a time. Shapes as `picked_attention`."""
    out = q.new_zeros(*q.shape[:3], v_dim, dtype=torch.float64)
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            own = rows[b, t][valid[b, t]].double()
            weights = (scale * q[b, t].double() @ own.T).softmax(-1)
            out[b, t] = weights @ own[:, :v_dim]
    return out
