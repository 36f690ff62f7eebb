"""Which drafts the target keeps, and what it takes after them: greedy, and rejection sampling."""

from collections.abc import Sequence

import torch
from torch import Tensor

from infer.sampling import Sampler
from kernels.sampling.nucleus import draw


def agreed(
    sampler: Sampler, logits: Tensor, drafts: Tensor, counts: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Drafts that the target would have taken, and the token that it takes after them.

    logits: [B, K + 1, V]; drafts: [B, K].
    """
    own = sampler(logits.flatten(0, 1)).view(logits.shape[:2])
    rows = torch.cat((own, drafts), 1).tolist()
    kept, last = [], []
    for row, count in zip(rows, counts, strict=True):
        chosen, drafted = row[: own.shape[1]], row[own.shape[1] :]
        right = 0
        while right < count and chosen[right] == drafted[right]:
            right += 1
        kept.append(right)
        last.append(chosen[right])
    return kept, last


def accepted(
    sampler: Sampler, logits: Tensor, drafts: Tensor, counts: Sequence[int],
    drafted_from: Tensor | None, chances: Tensor, uniform: Tensor,
) -> tuple[list[int], list[int]]:  # fmt: skip
    """Rejection sampling: draft d is kept with probability min(1, p(d) / q(d)); the token after the
    kept ones is drawn from max(p - q, 0), or from p where all were kept.

    chances: [B, >= K], whether each is kept; uniform: [B], the last token's.
    """
    batch, width = drafts.shape
    p = sampler.probabilities(logits)
    q = torch.zeros_like(p)
    if drafted_from is not None:
        q[:, : drafted_from.shape[1]] = drafted_from
    else:
        q[:, :width].scatter_(2, drafts[..., None], 1.0)
    # Nothing was drafted past a sequence's count: there the whole of p is left.
    counted = torch.tensor(counts, device=p.device)
    q *= (torch.arange(width + 1, device=p.device) < counted[:, None])[..., None]
    at = drafts[..., None]
    wanted = p[:, :width].gather(2, at).squeeze(2)
    offered = q[:, :width].gather(2, at).squeeze(2)
    right = (chances[:, :width] * offered < wanted) & (offered > 0)
    kept = right.long().cumprod(1).sum(1)
    rows = torch.arange(batch, device=p.device)
    rest = (p - q)[rows, kept].clamp(min=0)
    # Of equal distributions nothing is left, and nothing is rejected but by rounding.
    rest = torch.where(rest.sum(1, keepdim=True) > 0, rest, p[rows, kept])
    last = draw(rest, uniform)
    found = torch.stack((kept, last)).tolist()
    return found[0], found[1]
