"""A state whose transition is diagonal plus a product of two vectors (RWKV-7, arXiv 2503.14456,
section 4): S_t = diag(e^{g_t}) S_{t-1} + b_t a_tᵀ S_{t-1} + k_t v_tᵀ, y_t = S_tᵀ q_t.

What a_t reads of the state before the token, u_t = S_{t-1}ᵀ a_t, is written back along b_t, which
is free of the key k_t along which v_t is written; in the delta rule (`kernels.gated_delta`) one key
does all three. Within a chunk every u_t depends on those before it: one triangular solve gives them
all, as in the WY form (arXiv 2406.06484). Decays g are by key channel, at most 0. Decays, solves
and states are float32.
"""

import math
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

CHUNK = 32
#: The strongest log decay of a token of RWKV-7.
LEAST_DECAY = -math.exp(-0.5)


class _Scores(NamedTuple):
    """Of chunks of C tokens: scores [..., 2, 2, C, C] of two rows with two columns; sums of log
    decays [..., C, N] since a chunk's first token, its own included, and until its last one, its
    own left out.
    """

    scores: Tensor
    since: Tensor
    until: Tensor


def _scores(rows: Tensor, columns: Tensor, g: Tensor) -> _Scores:
    """rows_t · (e^{c_t - c_s} ∘ columns_s) for s <= t, 0 above, where c is the running sum of g.

    rows, columns: [..., C, 2, N]; g: [..., C, N]; C a power of two. A chunk is halved to the end,
    so that each pair of tokens is parted once by a third, from which both their exponents are sums
    of decays: nothing positive is exponentiated (`kernels.gated_delta.channels`).
    """
    since, until = g.unsqueeze(-2), torch.zeros_like(g).unsqueeze(-2)
    # Blocks of one token, [..., blocks, 2, 2, 1, 1].
    scores = (rows @ columns.mT)[..., None, None]
    for size in (1 << i for i in range(g.shape[-2].bit_length() - 1)):
        first, later = since.unflatten(-3, (-1, 2)).unbind(-3)
        before, rest = until.unflatten(-3, (-1, 2)).unbind(-3)
        asked = rows.unflatten(-3, (-1, 2, size))[..., 1, :, :, :] * later.exp().unsqueeze(-2)
        held = columns.unflatten(-3, (-1, 2, size))[..., 0, :, :, :] * before.exp().unsqueeze(-2)
        below = asked.flatten(-3, -2) @ held.flatten(-3, -2).mT
        below = rearrange(below, "... (t r) (s c) -> ... r c t s", r=2, c=2)
        scores = _joined(scores, below)
        since = torch.cat((first, later + first[..., -1:, :]), -2)
        until = torch.cat((before + later[..., -1:, :], rest), -2)
    return _Scores(scores.squeeze(-5), since.squeeze(-3), until.squeeze(-3))


def _joined(blocks: Tensor, below: Tensor) -> Tensor:
    """Neighbours of blocks [..., 2n, 2, 2, C, C] on a diagonal, `below` [..., n, 2, 2, C, C] under
    it: [..., n, 2, 2, 2C, 2C].
    """
    first, later = blocks.unflatten(-5, (-1, 2)).unbind(-5)
    upper = torch.cat((first, torch.zeros_like(below)), -1)
    return torch.cat((upper, torch.cat((below, later), -1)), -2)


def _next(t: Tensor) -> Tensor:
    """Each token's successor along dimension -2, zeros for the last."""
    return F.pad(t[..., 1:, :], (0, 0, 0, 1))


def _last(t: Tensor) -> Tensor:
    """Each token's predecessor along dimension -2, zeros for the first."""
    return F.pad(t[..., :-1, :], (0, 0, 1, 0))


def dplr_chunk(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, a: Tensor, b: Tensor,
    state: Tensor | None = None, *, chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The chunked form; differentiable.

    q, k, a, b: [B, T, H, N]; log_decay (<= 0): the same; v: [B, T, H, P]; state: [B, H, N, P]
    before the first token (None: zeros); chunk: tokens, a power of two.
    Returns y [B, T, H, P] in v's dtype and the state after the last token.
    Raises ValueError on a chunk that cannot be halved to the end.
    """
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"a chunk of {chunk} tokens is not halved to the end; take a power of two")
    batch, tokens, heads, n = q.shape
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    size = _chunk_size(tokens, chunk)
    count = -(-tokens // size)
    # Tokens of zeros after the last one change nothing.
    q, k, v_wide, g, a, b = (
        rearrange(
            F.pad(t.to(wide), (0, 0, 0, 0, 0, count * size - tokens)),
            "b (i c) h ... -> b i h c ...", i=count,
        )
        for t in (q, k, v, log_decay, a, b)
    )  # fmt: skip
    within = _within(q, k, v_wide, g, a, b)
    current = v_wide.new_zeros(batch, heads, n, v.shape[-1]) if state is None else state.to(wide)
    outputs = []
    for i in range(count):
        read = within.known[:, i] + within.of_state[:, i] @ current
        reached = within.reach[:, i] @ current
        outputs.append(within.own[:, i] + reached + within.from_reads[:, i] @ read)
        taken = within.written[:, i] + within.back[:, i] @ read
        current = torch.addcmul(taken, within.kept[:, i], current)
    y = rearrange(outputs, "i b h c p -> b (i c) h p")
    return y[:, :tokens].to(v.dtype), current


class _Within(NamedTuple):
    """Of chunks of C tokens [..., C, ·]: answers from their own keys alone, what the queries reach
    of the state before and of what the tokens read; what those read of values alone and of the
    state; and what the state after is made of.
    """

    own: Tensor
    reach: Tensor
    from_reads: Tensor
    known: Tensor
    of_state: Tensor
    written: Tensor
    back: Tensor
    kept: Tensor


def _within(q: Tensor, k: Tensor, v: Tensor, g: Tensor, a: Tensor, b: Tensor) -> _Within:
    """q, k, g, a, b: [..., C, N]; v: [..., C, P]; C a power of two."""
    # Token t's `a` reads the state after token t - 1: as a query of that token.
    scores, since, until = _scores(torch.stack((q, _next(a)), -2), torch.stack((k, b), -2), g)
    from_keys, from_reads = scores[..., 0, 0, :, :], scores[..., 0, 1, :, :]
    read_keys, read_reads = _last(scores[..., 1, 0, :, :]), _last(scores[..., 1, 1, :, :])
    right = torch.cat((read_keys @ v, a * _last(since).exp()), -1)
    # The solver reads below the diagonal only.
    solved = torch.linalg.solve_triangular(-read_reads, right, upper=False, unitriangular=True)
    known, of_state = solved.split((v.shape[-1], k.shape[-1]), -1)
    left = until.exp()
    return _Within(
        own=from_keys @ v, reach=q * since.exp(), from_reads=from_reads, known=known,
        of_state=of_state, written=(k * left).mT @ v, back=(b * left).mT,
        kept=since[..., -1, :, None].exp(),
    )  # fmt: skip


def dplr_answers(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> Tensor:  # fmt: skip
    """What the last K of T tokens read of them all, one chunk of `dplr_chunk`; the state after them
    is not computed.

    q: [B, K, H, N]; others as `dplr_chunk`'s. Returns y [B, K, H, P] in v's dtype.
    """
    asked, tokens, dtype = q.shape[1], v.shape[1], v.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    size = _chunk_size(tokens, 2 * tokens)
    # Tokens of zeros before the first one change nothing.
    within = _within(*(
        F.pad(t, (0, 0, 0, 0, size - t.shape[1], 0)).to(wide).transpose(1, 2)
        for t in (q, k, v, log_decay, a, b)
    ))  # fmt: skip
    current = state.to(wide)
    read, last = within.known + within.of_state @ current, slice(size - asked, None)
    y = within.own[:, :, last] + within.reach[:, :, last] @ current
    return (y + within.from_reads[:, :, last] @ read).transpose(1, 2).to(dtype)


def _chunk_size(tokens: int, chunk: int) -> int:
    """Tokens of a chunk: a power of two, no larger than is needed."""
    return min(chunk, 1 << (tokens - 1).bit_length())


def dplr_chunk_matrix_flops(
    batch: int, tokens: int, heads: int, n: int, p: int, chunk: int = CHUNK
) -> int:
    """What torch counts for `dplr_chunk`, exactly; it does not count the triangular solve."""
    size = _chunk_size(tokens, chunk)
    # Of each token with itself, and of each halving.
    scores = 4 * size * n + 2 * size * (size - 1) * n
    values = 3 * size * size * p
    states = 4 * size * n * p
    return 2 * batch * -(-tokens // size) * heads * (scores + values + states)


def dplr_step(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, a: Tensor, b: Tensor, state: Tensor, *,
    each: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The recurrent form for a few tokens; `state` [B, H, N, P] is updated in place.

    Shapes as `dplr_chunk`. Returns y [B, K, H, P] and, when `each`, the states after every token.
    """
    dtype = state.dtype
    decay, k, b = (t.to(dtype).unsqueeze(-1) for t in (log_decay.to(dtype).exp(), k, b))
    q, a, wide_v = (t.to(dtype).unsqueeze(-2) for t in (q, a, v))
    outputs, states = [], []
    for t in range(v.shape[1]):
        read = a[:, t] @ state
        state.mul_(decay[:, t]).addcmul_(b[:, t], read).addcmul_(k[:, t], wide_v[:, t])
        outputs.append(q[:, t] @ state)
        if each:
            states.append(state.clone())
    y = torch.cat(outputs, -2).transpose(1, 2)
    return y.to(v.dtype), torch.stack(states, 1) if each else None


def dplr_step_matrix_flops(batch: int, tokens: int, heads: int, n: int, p: int) -> int:
    """What torch counts for `dplr_step`, exactly: two read-outs; the update is elementwise."""
    return 4 * batch * tokens * heads * n * p


def dplr_ref(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, a: Tensor, b: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The oracle: float64, one token at a time."""
    q, k, v, g, a, b, s = (t.double() for t in (q, k, v, log_decay, a, b, state))
    rows = []
    for t in range(v.shape[1]):
        read = (a[:, t, :, :, None] * s).sum(-2)
        s = g[:, t].exp()[..., None] * s + b[:, t, :, :, None] * read[:, :, None]
        s = s + k[:, t, :, :, None] * v[:, t, :, None]
        rows.append((q[:, t, :, :, None] * s).sum(-2))
    return torch.stack(rows, 1), s
