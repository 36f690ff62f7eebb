"""Linear attention with one decay per head: S_t = e^{g_t} S_{t-1} + k_t v_tᵀ, y_t = S_tᵀ q_t.

Serves Mamba-2's state-space duality (arXiv 2405.21060: q = C, k = B, v = Δ·x, g = Δ·A) and
retention (arXiv 2307.08621: g fixed per head). Prefill and training run chunked: within a chunk
a masked product, between chunks a short recurrence. Decays and states are float32.
Groups: H heads of v share the G heads of q and k.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from kernels.decay.running_sums import chunk_decays

CHUNK = 64


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def decay_chunk(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None = None, *,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The chunked form; differentiable.

    q, k: [B, T, G, N]; v: [B, T, H, P]; log_decay: [1 or B, 1 or T, H], <= 0;
    state: [B, H, N, P] before the first token (None: zeros).
    Returns y [B, T, H, P] in v's dtype and the state after the last token.
    """
    batch, tokens, groups, n = q.shape
    heads, p = v.shape[2:]
    if heads % groups:
        raise ValueError(f"v has {heads} heads, not divisible by the {groups} groups of q and k")
    share = heads // groups
    wide = _wide(v.dtype)
    size = min(chunk, tokens)
    count = -(-tokens // size)
    log_decay = log_decay.to(wide).expand(-1, tokens, -1)
    short = count * size - tokens
    if short:
        q, k, v = (F.pad(t, (0, 0, 0, 0, 0, short)) for t in (q, k, v))
        log_decay = F.pad(log_decay, (0, 0, 0, short))
    # i counts chunks and s the heads of a group: one product serves them all.
    qc, kc = (rearrange(t.to(wide), "b (i c) g n -> b i g c n", i=count) for t in (q, k))
    vc = rearrange(v.to(wide), "b (i c) (g s) p -> b i g s c p", i=count, s=share)
    gc = rearrange(log_decay, "b (i c) (g s) -> b i g s c", i=count, s=share)
    between, since, until = chunk_decays(gc)
    scores = (qc @ kc.mT).unsqueeze(3) * between
    y = scores @ vc

    fresh = kc.mT @ rearrange(vc * until[..., None], "b i g s c p -> b i g c (s p)")
    fresh = rearrange(fresh, "b i g n (s p) -> b i (g s) n p", s=share)
    kept = rearrange(since[..., -1], "b i g s -> b i (g s) 1 1")
    current = fresh.new_zeros(batch, heads, n, p) if state is None else state.to(wide)
    before = []
    for i in range(count):
        before.append(current)
        current = torch.addcmul(fresh[:, i], kept[:, i], current)
    if state is not None or count > 1:
        past = rearrange(before, "i b (g s) n p -> b i g n (s p)", s=share)
        carried = rearrange(qc @ past, "b i g c (s p) -> b i g s c p", s=share)
        y = torch.addcmul(y, carried, since[..., None])
    y = rearrange(y, "b i g s c p -> b (i c) (g s) p")
    return (y[:, :tokens] if short else y).to(v.dtype), current


def decay_answers(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor
) -> Tensor:  # fmt: skip
    """What the last K of T tokens read of them all, one chunk of `decay_chunk`; the state after
    them is not computed.

    q: [B, K, G, N]; others as `decay_chunk`'s. Returns y [B, K, H, P] in v's dtype.
    """
    asked, groups = q.shape[1:3]
    tokens, heads = v.shape[1:3]
    share, wide = heads // groups, _wide(v.dtype)
    qc, kc = (rearrange(t.to(wide), "b c g n -> b g c n") for t in (q, k))
    vc = rearrange(v.to(wide), "b c (g s) p -> b g s c p", s=share)
    decay = log_decay.to(wide).expand(len(v), tokens, -1)
    between, since, _ = chunk_decays(rearrange(decay, "b c (g s) -> b g s c", s=share))
    scores = (qc @ kc.mT).unsqueeze(2) * between[..., -asked:, :]
    carried = qc.unsqueeze(2) @ rearrange(state.to(wide), "b (g s) n p -> b g s n p", s=share)
    y = torch.addcmul(scores @ vc, carried, since[..., -asked:, None])
    return rearrange(y, "b g s c p -> b c (g s) p").to(v.dtype)


def decay_chunk_matrix_flops(
    batch: int, tokens: int, heads: int, groups: int, n: int, p: int, chunk: int = CHUNK
) -> int:
    """What torch counts for `decay_chunk` with a state, exactly."""
    size = min(chunk, tokens)
    count = -(-tokens // size)
    scores = groups * size * size * n
    values = heads * size * size * p
    states = 2 * heads * size * n * p
    return 2 * batch * count * (scores + values + states)


def decay_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, *, each: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The recurrent form for a few tokens; `state` [B, H, N, P] is updated in place.

    Shapes as `decay_chunk`. Returns y [B, K, H, P] and, when `each`, the states after every
    token [B, K, H, N, P].
    """
    tokens, groups = q.shape[1:3]
    heads = v.shape[2]
    if groups != heads:
        q, k = (t.repeat_interleave(heads // groups, 2) for t in (q, k))
    decay = log_decay.to(state.dtype).exp().expand(-1, tokens, -1)[..., None, None]
    q, k, v = q.to(state.dtype).unsqueeze(-2), k.to(state.dtype)[..., None], v.unsqueeze(-2)
    outputs, states = [], []
    for t in range(tokens):
        state.mul_(decay[:, t]).addcmul_(k[:, t], v[:, t].to(state.dtype))
        outputs.append(q[:, t] @ state)
        if each:
            states.append(state.clone())
    y = outputs[0].movedim(-2, 1) if tokens == 1 else torch.cat(outputs, -2).transpose(1, 2)
    return y.to(v.dtype), torch.stack(states, 1) if each else None


def decay_step_matrix_flops(batch: int, tokens: int, heads: int, n: int, p: int) -> int:
    """What torch counts for `decay_step`, exactly: the read-out; the update is elementwise."""
    return 2 * batch * tokens * heads * n * p


def decay_ref(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The oracle: float64, one token at a time."""
    share = v.shape[2] // q.shape[2]
    q, k = (t.double().repeat_interleave(share, 2) for t in (q, k))
    g = log_decay.double().expand(v.shape[0], v.shape[1], -1)
    s, rows = state.double(), []
    for t in range(v.shape[1]):
        s = g[:, t, :, None, None].exp() * s + k[:, t, :, :, None] * v[:, t, :, None].double()
        rows.append((q[:, t, :, :, None] * s).sum(-2))
    return torch.stack(rows, 1), s
