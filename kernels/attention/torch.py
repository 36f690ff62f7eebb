"""Softmax attention of K new tokens over the rows they may see, grouped queries included.

Layout: queries [B, K, H, d]; keys and values [B, G, S, d], G dividing H, each head's rows
together (the store keeps them so: a decode step then streams memory instead of striding).
Torch's fused CPU attention does the work where its operands allow it. Short steps are packed:
the H/G query heads that share a key head become rows of one product, so keys are read once.
"""

import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

#: Longest step that is packed; beyond it the copies of the mask cost more than keys read again.
PACK_LIMIT = 8


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:  # fmt: skip
    """softmax(scale · q kᵀ + mask) v.

    q: [B, K, H, d]; k: [B, G, S, d]; v: [B, G, S, dv]; returns [B, K, H, dv].
    mask: bool, broadcastable to [B, 1, K, S], True where a token may look.
    causal: token i sees rows 0..i (then S = K and mask must be None).
    scale: default d^-0.5.
    Raises ValueError on head counts that do not divide or on a mask beside `causal`.
    """
    _require_fit(q, k, mask, causal)
    batch, new, heads, dim = q.shape
    groups, v_dim = k.shape[1], v.shape[-1]
    scale = dim**-0.5 if scale is None else scale
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    per_group = heads // groups
    if new == 1:
        packed = q.view(batch, groups, per_group, dim)
        seen = None if causal else mask
        if v_dim != dim:
            out = _unfused(packed, k, v, scale, seen)
        else:
            out = F.scaled_dot_product_attention(packed, k, v, attn_mask=seen, scale=scale)
        return out.reshape(batch, 1, heads, v_dim)
    # The fused kernel wants equal widths; zero columns change nothing.
    width = max(dim, v_dim)
    if dim < width:
        q, k = F.pad(q, (0, width - dim)), F.pad(k, (0, width - dim))
    elif v_dim < width:
        v = F.pad(v, (0, width - v_dim))
    if new <= PACK_LIMIT and per_group > 1 and not causal:
        packed = rearrange(q, "b t (g h) d -> b g (t h) d", g=groups)
        # One row for every query head of a token; a row that all tokens share stays one.
        seen = mask
        if mask is not None and mask.shape[2] > 1:
            seen = mask.repeat_interleave(per_group, 2)
        out = F.scaled_dot_product_attention(packed, k, v, attn_mask=seen, scale=scale)
        out = rearrange(out, "b g (t h) d -> b t (g h) d", t=new)
    else:
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, attn_mask=mask, is_causal=causal, scale=scale,
            enable_gqa=per_group > 1,
        ).transpose(1, 2)  # fmt: skip
    return out if v_dim == width else out[..., :v_dim]


def _require_fit(q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> None:
    new, heads = q.shape[1:3]
    groups, rows = k.shape[1:3]
    if heads % groups:
        raise ValueError(f"q has {heads} heads, not divisible by the {groups} heads of k")
    if causal and (mask is not None or rows != new):
        raise ValueError(
            f"causal=True needs as many rows as new tokens ({rows} != {new}) and no mask"
        )


def attention_with_sinks(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, *, mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:  # fmt: skip
    """`attention` whose softmax has one more logit a head, that no value belongs to: a head may
    look nowhere (gpt-oss, arXiv 2508.10925).

    sinks: [H]; the rest as there. Weights are exp(s_j - log(Σ exp s_j + exp sink)), in float32;
    all scores [B, H, K, S] are held at once. Raises ValueError as `attention` does.
    """
    _require_fit(q, k, mask, causal)
    new, groups = q.shape[1], k.shape[1]
    packed = rearrange(q, "b t (g h) d -> b g (h t) d", g=groups)
    scores = (packed * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    scores = scores.unflatten(2, (-1, new))
    if causal:
        mask = torch.ones(new, new, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        allowed = mask[(None,) * (4 - mask.dim())].unsqueeze(2)
        scores = scores.masked_fill(~allowed, -math.inf)
    wide = scores if scores.dtype == torch.float64 else scores.float()
    sink = sinks.to(wide.dtype).view(groups, -1, 1, 1)
    total = torch.logaddexp(wide.logsumexp(-1, keepdim=True), sink)
    weights = (wide - total).exp().to(v.dtype)
    return rearrange(weights.flatten(2, 3) @ v, "b g (h t) d -> b t (g h) d", t=new)


def latent_attention(
    q: Tensor, rows: Tensor, *, v_dim: int, scale: float, mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:  # fmt: skip
    """`attention` whose values are the first `v_dim` columns of the keys (arXiv 2405.04434).

    q: [B, K, H, d]; rows: [B, G, S, d]; returns [B, K, H, v_dim]. Computes all d columns of the
    output: the fused kernel then needs no narrower copy, and 2·B·H·K·S·2d FLOPs are counted.
    """
    out = attention(q, rows, rows, scale=scale, mask=mask, causal=causal)
    return out[..., :v_dim]


def _unfused(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    scores = (q * scale) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def window_mask(tokens: int, window: int, sinks: int, device: torch.device) -> Tensor:
    """Which rows each of `tokens` positions sees: causal, the newest `window` rows, and sinks.

    Returns bool [tokens, tokens]; row j is kept for token i if i - window < j <= i or j < sinks.
    """
    i = torch.arange(tokens, device=device)[:, None]
    j = torch.arange(tokens, device=device)
    return (j <= i) & ((j > i - window) | (j < sinks))


def attention_ref(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, mask: Tensor, sinks: Tensor | None = None
) -> Tensor:
    """The oracle: float64, one query head at a time. Shapes as `attention`; sinks: [H]."""
    per_group = q.shape[2] // k.shape[1]
    heads = []
    for h in range(q.shape[2]):
        g = h // per_group
        scores = scale * q[:, :, h].double() @ k[:, g].double().transpose(-1, -2)
        allowed = mask.expand(q.shape[0], 1, *scores.shape[1:])[:, 0]
        scores = scores.masked_fill(~allowed, -math.inf)
        if sinks is not None:
            scores = torch.cat((scores, sinks[h].double().expand(*scores.shape[:2], 1)), -1)
        weights = scores.softmax(-1)[..., : k.shape[2]]
        heads.append(weights @ v[:, g].double())
    return torch.stack(heads, 2)


def fused_attention_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """FLOP formula of torch's fused CPU attention, which its own counter does not know.

    q: [B, H, K, d]; k: [B, G, S, d]; v: [B, G, S, dv]: 2·B·H·K·S·(d + dv).
    """
    batch, heads, new, dim = q
    return 2 * batch * heads * new * k[2] * (dim + v[3])


FLOP_FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: fused_attention_flops,
}
