"""The next token in torch: greedy, and top-p (nucleus sampling, arXiv 1904.09751, eq. 3).

A token is drawn by inverting the distribution function of those that are kept, in the order of
their indices, at a number in [0, 1): who draws with the same number gets the same token, here and
from the kernels of `sample`. B sequences, V tokens of the vocabulary.
"""

import torch
from torch import Tensor

#: Instead of a token where the logits decide none: NaN, or for a draw no largest finite one.
NO_TOKEN = -1
#: By how much the mass before a token may fall short of top_p through rounding of float32 logits:
#: of .5 .3 .1 .1 top-p 0.8 keeps two, whatever the last bit of their logarithms.
SLACK = 1e-6


def greedy(logits: Tensor) -> Tensor:
    """The first token of the largest logit: [B, V] -> int64 [B]; NO_TOKEN where one is NaN."""
    best = logits.max(-1)
    return best.indices.masked_fill(best.values.isnan(), NO_TOKEN)


def nucleus(logits: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """The distribution that is drawn from: float64 [B, V], NaN where the logits define none.

    Kept is the smallest set of likeliest tokens with mass top_p: a token is, while the mass of
    those before it, by falling logit and rising index, is less by more than `SLACK`.
    """
    wide = logits.double()
    # Less the largest first: no temperature then makes a product of 0 and infinity.
    probabilities = ((wide - wide.amax(-1, keepdim=True)) / temperature).softmax(-1)
    if top_p == 1:
        return probabilities
    ordered, index = probabilities.sort(stable=True, dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    gone = before >= top_p - SLACK
    gone[..., 0] = False
    kept = torch.zeros_like(probabilities).scatter_(-1, index, ordered.masked_fill_(gone, 0.0))
    return kept / kept.sum(-1, keepdim=True)


def top_k(logits: Tensor, k: int) -> Tensor:
    """The logits of the k likeliest tokens [..., V], -inf for all others; of equal logits at the
    edge the first ones stay, as in a stable sort. NaN stays, too.
    """
    if k >= logits.shape[-1]:
        return logits
    edge = logits.topk(k, -1).values[..., -1:]
    above, tied = logits > edge, logits == edge
    room = k - above.sum(-1, keepdim=True)
    kept = above | (tied & (tied.cumsum(-1) <= room)) | logits.isnan()
    return logits.masked_fill(~kept, -torch.inf)


def draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """One token per row: [B, V] and numbers in [0, 1) [B] -> int64 [B]; NO_TOKEN for NaN."""
    bounds = probabilities.cumsum(-1)
    whole = bounds[..., -1]
    tokens = (bounds <= (uniform.to(bounds.dtype) * whole)[..., None]).sum(-1)
    return tokens.masked_fill(whole.isnan(), NO_TOKEN)
