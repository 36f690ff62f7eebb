"""Gated pooling: one row for every group of tokens (DeepSeek-V4's report, equations 9 to 23).

A token has a value and a gate in every channel, and a row is Σ softmax(gate) · value over the
tokens that it pools. Of any set of tokens it is enough to know two numbers a channel: the logarithm
of Σ exp(gate), and the weighted mean. Such *parts* of disjoint tokens merge, so what is remembered
of a group that is not yet whole does not depend on how long groups are.

Tokens have S series of values and gates. The row of group g pools series 0 of its own tokens and,
where there are two, series 1 of those of group g - 1: rows then overlap. A part holds both numbers
for the row that its group completes and, where there are two series, for the next one.

Legend: B sequences, K new tokens, M tokens a group, S series, C channels, R rows.
A part is [..., 2, S, C]: logarithm and mean.
"""

import math

import torch
from torch import Tensor

#: In place of the logarithm of nothing, from which -inf can be subtracted.
LEAST = torch.finfo(torch.float32).min


def series_of(
    values: Tensor, gates: Tensor, bias: Tensor, at: Tensor, series: int
) -> tuple[Tensor, Tensor]:
    """Values and gates as they are pooled, [B, K, S, C] each, in float32 (float64 stays).

    values, gates: [B, K, S·C] as projected; bias: [M, S·C], added to the gates of a group's tokens;
    at: positions [1 or B, K].
    """
    wide = torch.promote_types(values.dtype, torch.float32)
    gates = gates.to(wide) + bias[at % len(bias)]
    return values.to(wide).unflatten(-1, (series, -1)), gates.unflatten(-1, (series, -1))


def pooled(values: Tensor, gates: Tensor) -> Tensor:
    """The part of n tokens: [..., n, S, C] twice -> [..., 2, S, C]. A gate of -inf is no token."""
    total = gates.logsumexp(-3)
    weights = (gates - total.clamp(min=LEAST).unsqueeze(-3)).exp()
    return torch.stack((total, (weights * values).sum(-3)), -3)


def merged(one: Tensor, other: Tensor) -> Tensor:
    """The part of two parts' tokens; [..., 2, S, C] each."""
    (total, mean), (other_total, other_mean) = one.unbind(-3), other.unbind(-3)
    both = torch.logaddexp(total, other_total)
    share = (other_total - both.clamp(min=LEAST)).exp()
    return torch.stack((both, mean + share * (other_mean - mean)), -3)


def whole_rows(values: Tensor, gates: Tensor, size: int) -> Tensor:
    """The rows of a sequence from its first token on, differentiable.

    values, gates: [B, T, S, C]; returns [B, T // M, C].
    """
    tokens = values.shape[1] // size * size
    parts = pooled(*(t[:, :tokens].unflatten(1, (-1, size)) for t in (values, gates)))
    return _joined(parts)[:, :, 1, 0]


def step_parts(
    part: Tensor, values: Tensor, gates: Tensor, at: Tensor, valid: Tensor | None, size: int
) -> Tensor:
    """The part after each of a few new tokens, [B, K, 2, S, C].

    part: [B, 2, S, C], after the token before them; values, gates: [B, K, S, C]; at: int64 [B, K],
    their positions; valid: bool [B, K], False for padding, after which the part is what it was.
    """
    each = []
    for t in range(values.shape[1]):
        token = torch.stack((gates[:, t], values[:, t]), 1)
        after = merged(_begun(part, at[:, t], size), token)
        part = after if valid is None else torch.where(_of(valid[:, t], part), after, part)
        each.append(part)
    return torch.stack(each, 1)


def group_parts(
    part: Tensor, values: Tensor, gates: Tensor, past: Tensor, new: Tensor | None, size: int
) -> tuple[Tensor, Tensor]:
    """As `step_parts` after many tokens, of which `new` [B] are valid (None: all).

    past: int64 [B], tokens before them. Returns the parts of the groups in which they lie, whole
    or not, [B, ⌈K / M⌉ + 1, 2, S, C], and the part after the last one, [B, 2, S, C].
    """
    count, offset = values.shape[1], past % size
    groups = -(-count // size) + 1
    at = torch.arange(groups * size, device=past.device) - offset[:, None]
    ends = torch.full_like(past, count) if new is None else new
    there = (at >= 0) & (at < ends[:, None])
    index = at.clamp(0, count - 1)[..., None, None].expand(-1, -1, *values.shape[2:])
    gates = gates.gather(1, index).masked_fill(~there[..., None, None], -math.inf)
    own = pooled(*(t.unflatten(1, (-1, size)) for t in (values.gather(1, index), gates)))
    first = merged(_begun(part, past, size), own[:, 0])
    parts = _joined(torch.cat((first[:, None], own[:, 1:]), 1))
    last = (offset + ends - 1).clamp(min=0) // size
    after = parts[torch.arange(len(parts), device=past.device), last]
    return parts, after if new is None else torch.where(_of(new > 0, part), after, part)


def _begun(part: Tensor, at: Tensor, size: int) -> Tensor:
    """The part [B, 2, S, C] as a token at position `at` [B] finds it: at a group's first one, what
    the group before has begun of its row; at a sequence's first one, nothing.
    """
    nothing = _nothing(part)
    shifted = torch.cat((part[:, :, 1:], nothing[:, :, :1]), 2)
    found = torch.where(_of(at % size == 0, part), shifted, part)
    return torch.where(_of(at == 0, part), nothing, found)


def _joined(parts: Tensor) -> Tensor:
    """Parts of groups' own tokens [B, R, 2, S, C], each with what the group before has begun."""
    if parts.shape[-2] == 1:
        return parts
    before = parts[:, :-1]
    begun = torch.cat((before[..., 1:, :], _nothing(before)[..., :1, :]), -2)
    return torch.cat((parts[:, :1], merged(begun, parts[:, 1:])), 1)


def _nothing(like: Tensor) -> Tensor:
    """The part of no tokens."""
    nothing = torch.zeros_like(like)
    nothing[..., 0, :, :] = -math.inf
    return nothing


def _of(mask: Tensor, part: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1]."""
    return mask[(..., *[None] * (part.dim() - 1))]


def whole_rows_ref(values: Tensor, gates: Tensor, size: int) -> Tensor:
    """The oracle of `whole_rows`: float64, one row and one channel at a time."""
    batch, tokens, series, channels = values.shape
    rows = values.new_zeros(batch, tokens // size, channels, dtype=torch.float64)
    for b in range(batch):
        for row in range(tokens // size):
            own = [(t, 0) for t in range(row * size, (row + 1) * size)]
            if series > 1 and row:
                own += [(t, 1) for t in range((row - 1) * size, row * size)]
            for c in range(channels):
                gate = torch.stack([gates[b, t, s, c].double() for t, s in own])
                value = torch.stack([values[b, t, s, c].double() for t, s in own])
                rows[b, row, c] = gate.softmax(0) @ value
    return rows
