"""Softmax attention of the new tokens over what they may see, by backend.

Kernels know rows of one token each; those of several are gathered and go to torch's attention.

Training is torch's fused attention under every backend: it picks FlashAttention or cuDNN, whose
published forward and backward rates on Hopper are above those of Triton kernels.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from archs.backends import Forms
from archs.ops import libraries
from archs.state import Kept, Pages, Rows, mask_of, pages_of
from kernels.attention.torch import attention, attention_with_sinks, latent_attention
from kernels.latent.torch import tied_attention
from kernels.rope.torch import rotated

#: Longest step that the split decode kernels take; longer ones are prefill.
DECODE_LIMIT = 9
MLA_DECODE_LIMIT = 4


def attend(q: Tensor, seen: Rows, sinks: Tensor | None = None, *, backend: str) -> Tensor:
    """softmax(d^-0.5 · q kᵀ) v over the rows [2, G, ·, d] that hold K and V.

    q: [B, K, H, d] -> [B, K, H, d]. sinks: [H], a logit more in each head's softmax, of no value.
    Raises UserError where the backend has no such attention.
    """
    if sinks is not None:
        return _ATTEND_SINKS[backend](q, seen, sinks)
    return seen.attend(q) if isinstance(seen, Kept) else _ATTEND[backend](q, seen)


def attend_turned(
    q: Tensor, seen: Rows, weight: Tensor | None, angles: Tensor, sinks: Tensor | None = None, *,
    backend: str,
) -> Tensor:  # fmt: skip
    """`attend` over rows [G, ·, d] that are values as they lie, and keys once rotated.

    weight: [d], what a key's channels are multiplied by first (None: 1). angles: of positions from
    0 on, as `kernels.rope.torch.rotate` takes them, [>= S, d/2]; real ones for rows in pages.
    Raises UserError as `attend` does.
    """
    return _ATTEND_TURNED[backend](q, seen, weight, angles, sinks)


def attend_latent(q: Tensor, q_rotary: Tensor, seen: Rows, *, scale: float, backend: str) -> Tensor:
    """Absorbed latent attention: keys are rows of R + r columns, values their first R.

    q: [B, K, H, R], q_rotary: [B, K, H, r] -> [B, K, H, R].
    """
    return _ATTEND_LATENT[backend](q, q_rotary, seen, scale)


def attend_tied(
    q: Tensor, q_rotary: Tensor, seen: Rows, key: Rows, *, scale: float, backend: str
) -> Tensor:
    """Attention over rows [G, d] that are values and, in their first columns, keys, beside the one
    rotary key [r] that all KV heads share.

    q: [B, K, H, n], n <= d; q_rotary: [B, K, H, r] -> [B, K, H, d].
    """
    return _ATTEND_TIED[backend](q, q_rotary, seen, key, scale)


def attend_expanded(q: Tensor, k: Tensor, v: Tensor, seen: Rows, *, backend: str) -> Tensor:
    """Attention over keys and values that were made from the rows of `seen`, in their order.

    q: [B, K, H, d]; k: [B, G, S, d], G dividing H; v: [B, G, S, dv]; returns [B, K, H, dv].
    """
    return _ATTEND_EXPANDED[backend](q, k, v, seen)


def _torch(q: Tensor, seen: Rows, sinks: Tensor | None = None) -> Tensor:
    k, v = seen.rows.unbind(1)
    return _expanded_torch(q, k, v, seen, sinks)


def _keys_of(rows: Tensor, weight: Tensor | None, angles: Tensor) -> Tensor:
    """Rows [B, G, S, d], weighed and rotated: a copy."""
    held, known = rows.shape[-2], angles[: rows.shape[-2]]
    if len(known) < held:
        # A last page reaches beyond the longest context, where nobody looks.
        known = F.pad(known, (0, 0, 0, 0, 0, held - len(known)))
    return rotated(rows if weight is None else rows * weight, known)


def _turned_torch(
    q: Tensor, seen: Rows, weight: Tensor | None, angles: Tensor, sinks: Tensor | None
) -> Tensor:
    return _expanded_torch(q, _keys_of(seen.rows, weight, angles), seen.rows, seen, sinks)


def _turned_triton(
    q: Tensor, seen: Rows, weight: Tensor | None, angles: Tensor, sinks: Tensor | None
) -> Tensor:
    p = pages_of(seen)
    if p is None:
        return _turned_torch(q, seen, weight, angles, sinks)
    if q.shape[1] > DECODE_LIMIT:
        # A long step computes so much for each row that a copy of it is little.
        return _expanded_triton(q, _keys_of(seen.rows, weight, angles), seen.rows, seen, sinks)
    from kernels.attention.decode import attention_decode

    return attention_decode(
        q, p.pool, None, p.table, p.total, page_size=p.page_size, k_scale=p.scales,
        sink_logits=sinks, cos_sin=angles, key_weight=weight,
    )  # fmt: skip


def _triton(q: Tensor, seen: Rows, sinks: Tensor | None = None) -> Tensor:
    p = pages_of(seen)
    if p is None:
        return _torch(q, seen, sinks)
    k, v = p.pool.unbind(0)
    at: dict[str, Any] = {"page_size": p.page_size, "window": p.window, "sinks": p.sinks}
    at["sink_logits"] = sinks
    if q.shape[1] <= DECODE_LIMIT:
        from kernels.attention.decode import attention_decode

        if p.scales is not None:
            at["k_scale"], at["v_scale"] = p.scales.unbind(0)
        return attention_decode(q, k, v, p.table, p.total, **at)
    if p.scales is not None:
        # A long step computes so much for each row that a copy of the rows as numbers is little.
        k, v = seen.rows.unbind(1)
        expanded = _expanded_torch if p.window else _expanded_triton
        return expanded(q, k, v, seen, sinks)
    from kernels.attention.prefill import attention_prefill

    return attention_prefill(q, k, v, p.table, p.total, new=p.new, **at)


def _flash_attn(q: Tensor, seen: Rows) -> Tensor:
    p = pages_of(seen)
    return _torch(q, seen) if p is None else libraries.flash_attention(q, p)


def _latent_torch(q: Tensor, q_rotary: Tensor, seen: Rows, scale: float) -> Tensor:
    rows, width = seen.rows[:, None], q.shape[-1]
    q = torch.cat((q, q_rotary), -1)
    return latent_attention(q, rows, v_dim=width, scale=scale, mask=seen.mask, causal=seen.causal)


def _latent_triton(q: Tensor, q_rotary: Tensor, seen: Rows, scale: float) -> Tensor:
    p = pages_of(seen)
    if p is None:
        return _latent_torch(q, q_rotary, seen, scale)
    return _latent_pages(q, q_rotary, p, None, scale)


def _latent_pages(
    q: Tensor, q_rotary: Tensor, p: Pages, keys: Tensor | None, scale: float
) -> Tensor:
    """A few tokens at a time; keys: the pool of a rotary key that all latents share."""
    from kernels.latent.decode import mla_decode

    new, pieces = q.shape[1], []
    for start in range(0, new, MLA_DECODE_LIMIT):
        at = slice(start, start + MLA_DECODE_LIMIT)
        later = max(0, new - start - MLA_DECODE_LIMIT)
        total = p.total - later if later else p.total
        pieces.append(
            mla_decode(
                q[:, at], q_rotary[:, at], p.pool, p.table, total, scale=scale,
                page_size=p.page_size, keys=keys,
            )
        )  # fmt: skip
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


def _tied_torch(q: Tensor, q_rotary: Tensor, seen: Rows, key: Rows, scale: float) -> Tensor:
    everything = seen.mask is None and not seen.causal
    mask = None if everything else mask_of(seen, q.shape[1])
    return tied_attention(q, q_rotary, seen.rows, key.rows, scale=scale, mask=mask)


def _tied_triton(q: Tensor, q_rotary: Tensor, seen: Rows, key: Rows, scale: float) -> Tensor:
    p, keys = pages_of(seen), pages_of(key)
    if p is None or keys is None:
        return _tied_torch(q, q_rotary, seen, key, scale)
    return _latent_pages(q, q_rotary, p, keys.pool, scale)


def _expanded_torch(
    q: Tensor, k: Tensor, v: Tensor, seen: Rows, sinks: Tensor | None = None
) -> Tensor:
    if sinks is None:
        return attention(q, k, v, mask=seen.mask, causal=seen.causal)
    return attention_with_sinks(q, k, v, sinks, mask=seen.mask, causal=seen.causal)


def _expanded_triton(
    q: Tensor, k: Tensor, v: Tensor, seen: Rows, sinks: Tensor | None = None
) -> Tensor:
    p = pages_of(seen)
    if p is None:
        return _expanded_torch(q, k, v, seen, sinks)
    from kernels.attention.prefill import attention_prefill

    batch, heads, rows = k.shape[:3]
    # Each sequence's rows of a head are a run of pages of its own.
    pages = rows // p.page_size
    table = torch.arange(pages, dtype=torch.int32, device=k.device)
    firsts = torch.arange(batch, dtype=torch.int32, device=k.device) * (heads * pages)
    return attention_prefill(
        q, _as_pool(k), _as_pool(v), firsts[:, None] + table, p.total, page_size=p.page_size,
        new=p.new, sink_logits=sinks,
    )  # fmt: skip


def _as_pool(t: Tensor) -> Tensor:
    """Dense [B, G, S, d] as the pool [G, ·, d] whose pages run through all sequences."""
    batch, heads, rows, dim = t.shape
    t = t.contiguous()
    size = (heads, ((batch - 1) * heads + 1) * rows, dim)
    return t.as_strided(size, (rows * dim, dim, 1))


_ATTEND = Forms(
    "attention",
    {"torch": _torch, "triton": _triton, "sdpa": _torch, "flash-attn": _flash_attn},
)
_ATTEND_SINKS = Forms("attention with learned sinks", {"torch": _torch, "triton": _triton})
_ATTEND_TURNED = Forms(
    "attention over rows that are keys and values",
    {"torch": _turned_torch, "triton": _turned_triton},
)
_ATTEND_LATENT = Forms(
    "latent attention", {"torch": _latent_torch, "triton": _latent_triton, "sdpa": _latent_torch}
)
_ATTEND_TIED = Forms(
    "tied attention", {"torch": _tied_torch, "triton": _tied_triton, "sdpa": _tied_torch}
)
_ATTEND_EXPANDED = Forms(
    "attention", {"torch": _expanded_torch, "triton": _expanded_triton, "sdpa": _expanded_torch}
)
