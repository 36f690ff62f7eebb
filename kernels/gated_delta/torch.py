"""The gated delta rule: S_t = e^{g_t} (I - β_t k_t k_tᵀ) S_{t-1} + β_t k_t v_tᵀ, y_t = S_tᵀ q_t.

Gated DeltaNet (arXiv 2412.06464), chunked by the WY form (arXiv 2406.06484): one triangular
solve per chunk turns the token-by-token corrections into products. Decays, solves and states are
float32. H heads of v share the heads of q and k; q and k come normalised, q scaled.
"""

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from kernels.decay.running_sums import chunk_decays

CHUNK = 32


def gdn_chunk(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None = None,
    *, chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The chunked form; differentiable.

    q, k: [B, T, G, N]; v: [B, T, H, P]; log_decay (<= 0), beta: [B, T, H];
    state: [B, H, N, P] before the first token (None: zeros).
    Returns y [B, T, H, P] in v's dtype and the state after the last token.
    """
    batch, tokens, groups, n = q.shape
    heads, p = v.shape[2:]
    if heads % groups:
        raise ValueError(f"v has {heads} heads, not divisible by the {groups} heads of k")
    share = heads // groups
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    size = min(chunk, tokens)
    count = -(-tokens // size)
    short = count * size - tokens
    if short:
        q, k, v = (F.pad(t, (0, 0, 0, 0, 0, short)) for t in (q, k, v))
        log_decay, beta = (F.pad(t, (0, 0, 0, short)) for t in (log_decay, beta))
    qc, kc, vc = (rearrange(t.to(wide), "b (i c) h n -> b i h c n", i=count) for t in (q, k, v))
    gc, bc = (rearrange(t.to(wide), "b (i c) h -> b i h c", i=count) for t in (log_decay, beta))
    between, since, until = chunk_decays(gc)
    grown = since[..., None]

    def spread(t: Tensor) -> Tensor:
        return t if share == 1 else t.repeat_interleave(share, 2)

    overlap = spread(kc @ kc.mT) * between * bc[..., None]
    kh, qh = spread(kc), spread(qc)
    # (I + strictly lower overlap) [u, w] = β [v, e^g k]; the solver reads below the diagonal only.
    right = torch.cat((vc, kh * grown), -1) * bc[..., None]
    solved = torch.linalg.solve_triangular(overlap, right, upper=False, unitriangular=True)
    u, w = solved.split((p, n), -1)
    scores = spread(qc @ kc.mT) * between
    reach = qh * grown
    left = (kh * until[..., None]).mT
    kept = grown[..., -1:, :]
    current = u.new_zeros(batch, heads, n, p) if state is None else state.to(wide)
    outputs = []
    for i in range(count):
        value = u[:, i] - w[:, i] @ current
        outputs.append(reach[:, i] @ current + scores[:, i] @ value)
        current = torch.addcmul(left[:, i] @ value, kept[:, i], current)
    y = rearrange(outputs, "i b h c p -> b (i c) h p")
    return (y[:, :tokens] if short else y).to(v.dtype), current


def gdn_answers(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor
) -> Tensor:  # fmt: skip
    """What the last K of T tokens read of them all, one chunk of `gdn_chunk`; the state after them
    is not computed.

    q: [B, K, G, N]; others as `gdn_chunk`'s. Returns y [B, K, H, P] in v's dtype.
    """
    asked, p = q.shape[1], v.shape[-1]
    share, n = v.shape[2] // q.shape[2], q.shape[3]
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    qh, kh = (t.to(wide).repeat_interleave(share, 2).transpose(1, 2) for t in (q, k))
    vh, strength = v.to(wide).transpose(1, 2), beta.to(wide).transpose(1, 2)[..., None]
    between, since, _ = chunk_decays(log_decay.to(wide).transpose(1, 2))
    grown, current = since[..., None], state.to(wide)
    overlap = (kh @ kh.mT) * between * strength
    right = torch.cat((vh, kh * grown), -1) * strength
    solved = torch.linalg.solve_triangular(overlap, right, upper=False, unitriangular=True)
    u, w = solved.split((p, n), -1)
    value = u - w @ current
    scores = (qh @ kh.mT) * between[..., -asked:, :]
    y = (qh * grown[..., -asked:, :]) @ current + scores @ value
    return y.transpose(1, 2).to(v.dtype)


def gdn_chunk_matrix_flops(
    batch: int, tokens: int, heads: int, groups: int, n: int, p: int, chunk: int = CHUNK
) -> int:
    """What torch counts for `gdn_chunk`, exactly; it does not count the triangular solve."""
    size = min(chunk, tokens)
    count = -(-tokens // size)
    overlaps = 2 * groups * size * size * n
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
    decay = log_decay.to(dtype).exp()[..., None, None]
    strength = beta.to(dtype)[..., None, None]
    q, k, wide_v = q.to(dtype).unsqueeze(-2), k.to(dtype), v.to(dtype).unsqueeze(-2)
    outputs, states = [], []
    for t in range(tokens):
        state.mul_(decay[:, t])
        delta = (wide_v[:, t] - k[:, t].unsqueeze(-2) @ state).mul_(strength[:, t])
        state.addcmul_(k[:, t, :, :, None], delta)
        outputs.append(q[:, t] @ state)
        if each:
            states.append(state.clone())
    y = outputs[0].movedim(-2, 1) if tokens == 1 else torch.cat(outputs, -2).transpose(1, 2)
    return y.to(v.dtype), torch.stack(states, 1) if each else None


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
    s, rows = state.double(), []
    for t in range(v.shape[1]):
        s = g[:, t, :, None, None].exp() * s
        error = v[:, t] - (k[:, t, :, :, None] * s).sum(-2)
        s = s + k[:, t, :, :, None] * (beta[:, t, :, None] * error)[:, :, None]
        rows.append((q[:, t, :, :, None] * s).sum(-2))
    return torch.stack(rows, 1), s
