"""Attention over rows that are keys and values at once, beside one rotary key for all KV heads.

Grouped-tied and grouped-latent attention (arXiv 2505.21487): a KV head's row is its value, and its
first columns are the part of its key without positions. The other part is one rotary key that all
KV heads share, in rows of its own. Rows are read where they lie: side by side they would be a copy.
"""

import torch
from torch import Tensor


def tied_attention(
    q: Tensor, q_rotary: Tensor, tied: Tensor, key: Tensor, *, scale: float,
    mask: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(scale · (q tied[..., :n]ᵀ + q_rotary keyᵀ) + mask) tied.

    q: [B, K, H, n], n <= d; q_rotary: [B, K, H, r]; tied: [B, G, S, d], G dividing H; key:
    [B, S, r]; returns [B, K, H, d].
    mask: bool [1 or B, K, S], True where a token may look; None: everywhere.
    Takes 2·B·H·K·S·(n + r + d) FLOPs. Raises ValueError on head counts that do not divide.
    """
    new, heads = q.shape[1:3]
    groups = tied.shape[1]
    if heads % groups:
        raise ValueError(f"q has {heads} heads, not divisible by the {groups} heads of tied")
    hidden = None if mask is None else ~mask
    if hidden is not None and hidden.shape[1] > 1:
        hidden = hidden.repeat_interleave(heads // groups, 1)
    # One KV head at a time: a batched product over both dimensions would copy rows of a store.
    parts = zip(
        (q * scale).chunk(groups, 2), (q_rotary * scale).chunk(groups, 2), tied.unbind(1),
        strict=True,
    )  # fmt: skip
    found = [_of_one_head(a.flatten(1, 2), b.flatten(1, 2), rows, key, hidden)
             for a, b, rows in parts]  # fmt: skip
    return torch.cat([out.unflatten(1, (new, -1)) for out in found], 2)


def _of_one_head(
    q: Tensor, q_rotary: Tensor, rows: Tensor, key: Tensor, hidden: Tensor | None
) -> Tensor:
    """q: [B, M, n], scaled; q_rotary: [B, M, r]; rows: [B, S, d]; hidden: [1 or B, 1 or M, S]."""
    scores = torch.baddbmm(q_rotary @ key.mT, q, rows[..., : q.shape[-1]].mT)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    wide = torch.promote_types(scores.dtype, torch.float32)
    return scores.softmax(-1, dtype=wide).to(rows.dtype) @ rows


def tied_attention_ref(
    q: Tensor, q_rotary: Tensor, tied: Tensor, key: Tensor, *, scale: float, mask: Tensor
) -> Tensor:
    """The oracle: float64, one query head at a time. Shapes as `tied_attention`."""
    per_group, width = q.shape[2] // tied.shape[1], q.shape[3]
    heads = []
    for h in range(q.shape[2]):
        rows = tied[:, h // per_group].double()
        keys = torch.cat((rows[..., :width], key.double()), -1)
        query = torch.cat((q[:, :, h], q_rotary[:, :, h]), -1).double()
        scores = scale * query @ keys.transpose(-1, -2)
        heads.append(scores.masked_fill(~mask, -torch.inf).softmax(-1) @ rows)
    return torch.stack(heads, 2)
