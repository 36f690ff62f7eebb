"""The gated delta rule: S_t = (I - β_t k_t k_tᵀ) e^{g_t} S_{t-1} + β_t k_t v_tᵀ, y_t = S_tᵀ q_t.

With one decay g_t a head it is Gated DeltaNet's (arXiv 2412.06464), with one for each key channel,
a diagonal matrix, Kimi Delta Attention's (arXiv 2510.26692, eq. 1). With β_t by key channel, too,
S_t = (I - k_t (β_t ∘ k_t)ᵀ) e^{g_t} S_{t-1} + k_t v_tᵀ: Gated DeltaNet-2's, whose values come
gated. Chunked by the WY form (arXiv
2406.06484): one triangular solve per chunk turns the token-by-token corrections into products.
Decays, solves and states are float32. H heads of v share the heads of q and k; q and k come
normalised, q scaled.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from kernels.decay.running_sums import chunk_decays
from kernels.gated_delta.channels import decayed_scores, decayed_scores_matrix_flops

CHUNK = 32


class _Decays(NamedTuple):
    """Of a chunk of C tokens: scores of the queries and overlaps of the keys [..., H, C, C]; what
    is left of the state before it, [..., H, C, 1 or N] after each token and [..., H, 1 or N, 1]
    after the last, and of each token's key after the last, [..., H, C, 1 or N].
    """

    scores: Tensor
    overlap: Tensor
    grown: Tensor
    kept: Tensor
    left: Tensor


def _decays(q: Tensor, k: Tensor, g: Tensor, beta: Tensor, share: int) -> _Decays:
    """q, k: [..., G, C, N]; g, beta: [..., H, C] or [..., H, C, N]."""
    if g.dim() == q.dim():
        q, k = _spread(q, share), _spread(k, share)
        scores, overlap, since, until = decayed_scores(q, k, g, _erasing(k, beta))
        grown = since.exp()
        return _Decays(scores, overlap, grown, grown[..., -1, :, None], until.exp())
    between, past, rest = chunk_decays(g)
    scores, overlap = (_spread(t @ k.mT, share) * between for t in (q, k))
    grown = past[..., None]
    return _Decays(scores, overlap, grown, grown[..., -1:, :], rest[..., None])


def _erasing(k: Tensor, beta: Tensor) -> Tensor:
    """The keys by which tokens erase: gated by channel, or k, where heads have one strength."""
    return k * beta if beta.dim() == k.dim() else k


def _spread(t: Tensor, share: int) -> Tensor:
    """[..., G, C, ·] -> [..., G·share, C, ·]."""
    return t if share == 1 else t.repeat_interleave(share, -3)


def _corrected(k: Tensor, v: Tensor, beta: Tensor, decays: _Decays) -> tuple[Tensor, Tensor]:
    """u, w of (I + strictly lower overlap) [u, w] = β [v, e^c k]: a chunk writes u - w S."""
    right, overlap = torch.cat((v, _erasing(k, beta) * decays.grown), -1), decays.overlap
    if beta.dim() < k.dim():
        right, overlap = right * beta[..., None], overlap * beta[..., None]
    # The solver reads below the diagonal only.
    solved = torch.linalg.solve_triangular(overlap, right, upper=False, unitriangular=True)
    u, w = solved.split((v.shape[-1], k.shape[-1]), -1)
    return u, w


def gdn_chunk(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None = None,
    *, chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The chunked form; differentiable.

    q, k: [B, T, G, N]; v: [B, T, H, P]; log_decay (<= 0): [B, T, H], or [B, T, H, N] by channel;
    beta: [B, T, H], or by channel as decays are; state: [B, H, N, P] before the first token (None:
    zeros); chunk: tokens, a power of two where decays are by channel.
    Returns y [B, T, H, P] in v's dtype and the state after the last token.
    Raises ValueError where heads do not divide, a chunk cannot be halved, or beta alone is by
    channel.
    """
    batch, tokens, groups, n = q.shape
    heads, p = v.shape[2:]
    if heads % groups:
        raise ValueError(f"v has {heads} heads, not divisible by the {groups} heads of k")
    if beta.dim() > log_decay.dim():
        raise ValueError("beta is by channel and log_decay by head; give decays by channel, too")
    share = heads // groups
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    size = _chunk_size(tokens, chunk, log_decay.dim() == 4)
    count = -(-tokens // size)
    short = count * size - tokens
    if short:
        q, k, v, log_decay, beta = (
            F.pad(t, (0, 0) * (t.dim() - 2) + (0, short)) for t in (q, k, v, log_decay, beta)
        )
    qc, kc, vc, gc, bc = (
        rearrange(t.to(wide), "b (i c) h ... -> b i h c ...", i=count)
        for t in (q, k, v, log_decay, beta)
    )
    decays = _decays(qc, kc, gc, bc, share)
    qh, kh = _spread(qc, share), _spread(kc, share)
    u, w = _corrected(kh, vc, bc, decays)
    reach = qh * decays.grown
    left = (kh * decays.left).mT
    current = u.new_zeros(batch, heads, n, p) if state is None else state.to(wide)
    outputs = []
    for i in range(count):
        value = u[:, i] - w[:, i] @ current
        outputs.append(reach[:, i] @ current + decays.scores[:, i] @ value)
        current = torch.addcmul(left[:, i] @ value, decays.kept[:, i], current)
    y = rearrange(outputs, "i b h c p -> b (i c) h p")
    return (y[:, :tokens] if short else y).to(v.dtype), current


def _chunk_size(tokens: int, chunk: int, by_channel: bool) -> int:
    """Tokens of a chunk: no more than there are, but a power of two where it is halved."""
    return min(chunk, 1 << (tokens - 1).bit_length() if by_channel else tokens)


Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def product_steps(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Inputs:
    """Each product of a token as a token of its own: the first one decays, the last one asks.

    q: [B, T, G, N]; log_decay: [B, T, H]; k, v, beta: [B, T, n, ...] with n products a token
    (arXiv 2502.10297). Returns arguments of B sequences of n T tokens, of which every n-th answers;
    without products, k [B, T, G, N], they are as they come.
    """
    if k.dim() == 4:
        return q, k, v, log_decay, beta
    more = k.shape[2] - 1
    q = F.pad(q[:, :, None], (0, 0, 0, 0, more, 0))
    log_decay = F.pad(log_decay[:, :, None], (0, 0, 0, more))
    q, k, v, log_decay, beta = (t.flatten(1, 2) for t in (q, k, v, log_decay, beta))
    return q, k, v, log_decay, beta


def last_product(k: Tensor) -> slice:
    """The last product of each token among those of all; k: as `product_steps` takes it."""
    return slice(None) if k.dim() == 4 else slice(k.shape[2] - 1, None, k.shape[2])


def gdn_answers(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
) -> Tensor:  # fmt: skip
    """What the last K of T tokens read of them all, one chunk of `gdn_chunk`; the state after them
    is not computed.

    q: [B, K, G, N]; others as `gdn_chunk`'s. Returns y [B, K, H, P] in v's dtype.
    """
    asked, tokens, dtype, share = q.shape[1], v.shape[1], v.dtype, v.shape[2] // q.shape[2]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    # Tokens of zeros before the first one change nothing.
    early = _chunk_size(tokens, tokens * 2, log_decay.dim() == 4) - tokens
    q, k, v, log_decay, beta = (
        F.pad(t, (0, 0) * (t.dim() - 2) + (early + tokens - t.shape[1], 0)).to(wide).transpose(1, 2)
        for t in (q, k, v, log_decay, beta)
    )
    decays = _decays(q, k, log_decay, beta, share)
    current = state.to(wide)
    u, w = _corrected(_spread(k, share), v, beta, decays)
    value = u - w @ current
    reach = (_spread(q, share) * decays.grown)[..., -asked:, :]
    y = reach @ current + decays.scores[..., -asked:, :] @ value
    return y.transpose(1, 2).to(dtype)


def gdn_chunk_matrix_flops(
    batch: int, tokens: int, heads: int, groups: int, n: int, p: int, chunk: int = CHUNK,
    by_channel: bool = False,
) -> int:  # fmt: skip
    """What torch counts for `gdn_chunk`, exactly; it does not count the triangular solve."""
    size = _chunk_size(tokens, chunk, by_channel)
    count = -(-tokens // size)
    overlaps = 2 * groups * size * size * n
    if by_channel:
        overlaps = heads * decayed_scores_matrix_flops(size, n) // 2
    states = 3 * heads * size * n * p
    values = heads * size * size * p
    return 2 * batch * count * (overlaps + states + values)


def gdn_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor, *,
    each: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The recurrent form for a few tokens; `state` [B, H, N, P] is updated in place.

    Shapes as `gdn_chunk`. Returns y [B, K, H, P] and, when `each`, the states after every token.
    """
    tokens, groups = q.shape[1:3]
    heads = v.shape[2]
    if groups != heads:
        q, k = (t.repeat_interleave(heads // groups, 2) for t in (q, k))
    dtype = state.dtype
    decay = _of_states(log_decay.to(dtype)).exp()
    beta, by_head = beta.to(dtype), beta.dim() == 3
    q, k, wide_v = q.to(dtype).unsqueeze(-2), k.to(dtype), v.to(dtype).unsqueeze(-2)
    erasing = _erasing(k, beta)
    outputs, states = [], []
    for t in range(tokens):
        state.mul_(decay[:, t])
        delta = wide_v[:, t] - erasing[:, t].unsqueeze(-2) @ state
        if by_head:
            delta.mul_(beta[:, t, :, None, None])
        state.addcmul_(k[:, t, :, :, None], delta)
        outputs.append(q[:, t] @ state)
        if each:
            states.append(state.clone())
    y = outputs[0].movedim(-2, 1) if tokens == 1 else torch.cat(outputs, -2).transpose(1, 2)
    return y.to(v.dtype), torch.stack(states, 1) if each else None


def _of_states(g: Tensor) -> Tensor:
    """Log decays [B, T, H] or [B, T, H, N] as they meet states: [B, T, H, 1 or N, 1]."""
    return g.reshape(*g.shape[:3], -1, 1)


def gdn_step_matrix_flops(batch: int, tokens: int, heads: int, n: int, p: int) -> int:
    """What torch counts for `gdn_step`, exactly: two read-outs; the update is elementwise."""
    return 4 * batch * tokens * heads * n * p


def gdn_ref(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The oracle: float64, one token at a time."""
    share = v.shape[2] // q.shape[2]
    q, k = (t.double().repeat_interleave(share, 2) for t in (q, k))
    v, g, beta = v.double(), log_decay.double(), beta.double()
    g, s, rows = _of_states(g), state.double(), []
    beta = beta if (by_channel := beta.dim() == 4) else beta[..., None]
    for t in range(v.shape[1]):
        s = g[:, t].exp() * s
        erased = ((beta[:, t] * k[:, t])[..., None] * s).sum(-2)
        written = v[:, t] if by_channel else beta[:, t] * v[:, t]
        s = s + k[:, t, :, :, None] * (written - erased)[:, :, None]
        rows.append((q[:, t, :, :, None] * s).sum(-2))
    return torch.stack(rows, 1), s
