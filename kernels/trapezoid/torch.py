"""Mamba-3's recurrence (arXiv 2603.15569): an exponential-trapezoidal rule on rotated B and C.

h_t = α_t h_{t-1} + β_t k_{t-1} v_{t-1}ᵀ + γ_t k_t v_tᵀ, y_t = h_tᵀ q_t, with α = e^{ΔA},
β = (1-λ) Δ α and γ = λ Δ. k and q are B and C, normed, biased and turned by angles that tokens add
up to. So a token feeds the state twice: γ_t k_t v_tᵀ at once, and (1-λ_{t+1}) Δ_{t+1} k_t v_tᵀ when
the next one comes.

B sequences, T tokens, H heads, G groups of B and C, N states, P channels per head, R columns of B
and C (the rank of MIMO; 1 is SISO), A angles.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.decay.torch import decay_chunk, decay_chunk_matrix_flops
from kernels.norm.torch import rms_norm

TURN = 2 * math.pi


@dataclass(frozen=True, kw_only=True, slots=True)
class TrapezoidSizes:
    """Sizes of one layer; `angles` turn the first 2·A states in pairs (0, 1), (2, 3), …"""

    heads: int
    groups: int
    n: int
    p: int
    rank: int
    angles: int

    @property
    def inner(self) -> int:
        """Channels of all heads."""
        return self.heads * self.p

    @property
    def parts(self) -> tuple[int, ...]:
        """Widths of z, x, B, C, Δ, A, λ and the angles in a token's inputs."""
        shared = self.rank * self.groups * self.n
        return (self.inner, self.inner, shared, shared, *[self.heads] * 3, self.angles)

    @property
    def last(self) -> int:
        """Numbers of a row of `rows_of`."""
        return self.heads * (self.rank * self.n + self.p)


class TrapezoidWeights(NamedTuple):
    """dt_bias, d: [H]; b_norm, c_norm: [N]; b_bias, c_bias: [R, H, N]; eps: of the norms; floor:
    the least -A; mimo_x, mimo_z, mimo_o: [R, H·P], None where R is 1.
    """

    dt_bias: Tensor
    d: Tensor
    b_norm: Tensor
    c_norm: Tensor
    b_bias: Tensor
    c_bias: Tensor
    eps: float
    floor: float
    mimo_x: Tensor | None = None
    mimo_z: Tensor | None = None
    mimo_o: Tensor | None = None


class Tokens(NamedTuple):
    """What a recurrence takes: q, k: [B, T, R, H, N]; v: [B, T, R, H, P]; log_decay: ΔA, now: λΔ,
    then: (1-λ)Δ, which is the previous token's, [B, T, H]; angles: [B, T, H, A], in turns.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor
    now: Tensor
    then: Tensor
    angles: Tensor


class Before(NamedTuple):
    """What is known before the first token: state [B, H, N, P], and the previous token's
    k [B, R, H, N] and v [B, R, H, P].
    """

    state: Tensor
    k: Tensor
    v: Tensor


def tokens_of(
    inputs: Tensor, sizes: TrapezoidSizes, weights: TrapezoidWeights, angle: Tensor | None = None,
    valid: Tensor | None = None,
) -> Tokens:  # fmt: skip
    """Tokens from their inputs [B, T, sum(sizes.parts)], as projected.

    angle: [B, H, A] before the first token, in turns (None: zeros); valid: bool [B, T], tokens that
    are no padding (None: all): Δ of others is 0, so that they change nothing.
    """
    wide = torch.promote_types(inputs.dtype, torch.float32)
    _, x, b, c, dt, a, share, theta = inputs.split(sizes.parts, -1)
    step = F.softplus(dt.to(wide) + weights.dt_bias)
    if valid is not None:
        step = step.masked_fill(~valid[..., None], 0)
    now = step * share.to(wide).sigmoid()
    angles = accumulated(theta.to(wide), step, angle)
    cos, sin = (turn(TURN * angles).unsqueeze(2) for turn in (torch.cos, torch.sin))

    def turned(columns: Tensor, norm: Tensor, bias: Tensor) -> Tensor:
        groups = columns.unflatten(-1, (sizes.rank, sizes.groups, sizes.n))
        normed = rms_norm(groups, norm, weights.eps).unsqueeze(4)
        biased = (normed + bias.unflatten(1, (sizes.groups, -1))).flatten(3, 4)
        return rotated(biased, cos, sin).to(inputs.dtype)

    return Tokens(
        q=turned(c, weights.c_norm, weights.c_bias),
        k=turned(b, weights.b_norm, weights.b_bias),
        v=values_of(x, sizes, weights),
        log_decay=-step * F.softplus(a.to(wide)).clamp(min=weights.floor),
        now=now,
        then=step - now,
        angles=angles,
    )


def values_of(x: Tensor, sizes: TrapezoidSizes, weights: TrapezoidWeights) -> Tensor:
    """x [..., H·P] as the columns' values [..., R, H, P], each scaled by a vector of its own."""
    v = x.unsqueeze(-2)
    if weights.mimo_x is not None:
        v = (v * weights.mimo_x).to(x.dtype)
    return v.unflatten(-1, (sizes.heads, sizes.p))


def before_of(
    state: Tensor, last: Tensor, sizes: TrapezoidSizes, weights: TrapezoidWeights
) -> Before:
    """What is known before the first token: the state, and a row of `rows_of`, [B, 1, ·]."""
    of_k = sizes.rank * sizes.n
    k, x = last.unflatten(-1, (sizes.heads, -1)).squeeze(1).split((of_k, sizes.p), -1)
    k = k.unflatten(-1, (sizes.rank, sizes.n)).transpose(1, 2)
    return Before(state, k, values_of(x.flatten(1), sizes, weights))


def rows_of(k: Tensor, x: Tensor, sizes: TrapezoidSizes) -> Tensor:
    """Tokens as the next ones need them, [B, T, sizes.last]: each head's k and x.

    k: [B, T, R, H, N]; x: [B, T, H·P].
    """
    by_head = k.transpose(2, 3).flatten(3), x.unflatten(-1, (sizes.heads, sizes.p))
    return torch.cat(by_head, -1).flatten(2)


def accumulated(theta: Tensor, step: Tensor, before: Tensor | None) -> Tensor:
    """The angle after each token, [B, T, H, A]: the sum of π tanh(θ) Δ, less whole turns.

    In turns, so that to take whole ones away rounds nothing. theta: [B, T, A]; step: [B, T, H];
    before: [B, H, A], the sum before the first (None: 0).
    """
    turns = (theta.tanh() / 2).unsqueeze(2) * step.unsqueeze(3)
    # In float32 a sum over 50,000 tokens would lose the third digit of an angle.
    total = turns.double().cumsum(1)
    if before is not None:
        total = total + before.unsqueeze(1)
    return (total - total.floor()).to(step.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., N] with the first pairs of its channels turned; cos, sin: [..., A], 2·A <= N."""
    count = cos.shape[-1]
    if not count:
        return x
    even, odd = x[..., : 2 * count].unflatten(-1, (count, 2)).unbind(-1)
    pairs = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
    return torch.cat((pairs.flatten(-2), x[..., 2 * count :]), -1)


def trapezoid_chunk(
    tokens: Tokens, before: Before | None = None, *,
    scan: Callable[..., tuple[Tensor, Tensor]] = decay_chunk,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The chunked form on a scan of one decay per head; differentiable with `decay_chunk`.

    A column of B and C is a token of the scan, fed with what it gives at once and to the next
    token; what a token must not see yet of its own is taken back. scan: `decay_chunk`, of torch or
    of Triton.
    Returns y [B, T, R, H, P] in v's dtype and the state after the last token, without what that
    token will give to the next one.
    """
    q, k, v, log_decay, now, then, _ = tokens
    rank = q.shape[2]
    later = F.pad(then[:, 1:], (0, 0, 0, 1))
    fed = (v * (now + later)[:, :, None, :, None].to(v.dtype)).flatten(1, 2)
    decay = F.pad(log_decay.unsqueeze(2), (0, 0, 0, rank - 1)).flatten(1, 2)
    state = None if before is None else _with_previous(before, then[:, 0])
    y, last = scan(q.flatten(1, 2), k.flatten(1, 2), fed, decay, state)
    # Of its own token's columns s, column r has seen those up to itself, fed for later, too.
    seen = torch.ones(rank, rank, dtype=now.dtype, device=now.device).tril()[..., None]
    owed = now[:, :, None, None] * (1 - seen) - later[:, :, None, None] * seen
    scores = (q.to(now.dtype).unsqueeze(3) * k.to(now.dtype).unsqueeze(2)).sum(-1)
    own = ((owed * scores).unsqueeze(-1) * v.to(now.dtype).unsqueeze(2)).sum(3)
    return y.unflatten(1, (-1, rank)) + own.to(v.dtype), last


def _with_previous(before: Before, then: Tensor) -> Tensor:
    """The state with what the previous token gives to this one, for `then` [B, H]; a copy."""
    state = before.state
    fed = (before.v.to(state.dtype) * then[:, None, :, None]).unsqueeze(3)
    for r, column in enumerate(before.k.to(state.dtype).unsqueeze(4).unbind(1)):
        state = torch.addcmul(state, column, fed[:, r])
    return state


def trapezoid_step(
    tokens: Tokens, before: Before, *, each: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The recurrent form for a few tokens; `before.state` is updated in place.

    Returns y [B, K, R, H, P] in v's dtype and, when `each`, the states after every token
    [B, K, H, N, P].
    """
    state, decay = before.state, tokens.log_decay.exp()
    k = torch.cat((before.k.unsqueeze(1), tokens.k), 1).to(state.dtype).unsqueeze(5)
    v = torch.cat((before.v.unsqueeze(1), tokens.v), 1).to(state.dtype).unsqueeze(4)
    then, now = (t[..., None, None] for t in (tokens.then * decay, tokens.now))
    queries, outputs, states = tokens.q.to(state.dtype).transpose(2, 3), [], []
    for t in range(len(decay[0])):
        state.mul_(decay[:, t, :, None, None])
        for r in range(k.shape[2]):
            state.addcmul_(k[:, t, r], v[:, t, r] * then[:, t])
            state.addcmul_(k[:, t + 1, r], v[:, t + 1, r] * now[:, t])
        outputs.append(queries[:, t] @ state)
        if each:
            states.append(state.clone())
    y = torch.stack(outputs, 1).transpose(2, 3).to(tokens.v.dtype)
    return y, torch.stack(states, 1) if each else None


def finished(
    y: Tensor, v: Tensor, z: Tensor, sizes: TrapezoidSizes, weights: TrapezoidWeights
) -> Tensor:
    """y + D v, gated by z and summed over the columns: [B, T, R, H, P] -> [B, T, H·P].

    z: [B, T, H·P], the gate's input, scaled for each column as x is.
    """
    y = torch.addcmul(y, v, weights.d[:, None].to(y.dtype)).flatten(3)
    gate = z.unsqueeze(2)
    if weights.mimo_z is None or weights.mimo_o is None:
        return (y * F.silu(gate)).squeeze(2)
    gated = y * F.silu(gate * weights.mimo_z)
    return (gated * weights.mimo_o).sum(2).to(z.dtype)


def trapezoid_chunk_matrix_flops(batch: int, tokens: int, sizes: TrapezoidSizes) -> int:
    """What torch counts for `trapezoid_chunk` with a state, exactly."""
    s = sizes
    return decay_chunk_matrix_flops(batch, tokens * s.rank, s.heads, s.heads, s.n, s.p)


def trapezoid_step_matrix_flops(batch: int, tokens: int, sizes: TrapezoidSizes) -> int:
    """What torch counts for `trapezoid_step`, exactly: the read-out; the update is elementwise."""
    return 2 * batch * tokens * sizes.rank * sizes.heads * sizes.n * sizes.p


def trapezoid_ref(tokens: Tokens, before: Before) -> tuple[Tensor, Tensor]:
    """The oracle: float64, one token at a time.

    Returns y [B, T, R, H, P] and the state after every token [B, T, H, N, P].
    """
    q, k, v, log_decay, now, then, _ = (t.double() for t in tokens)
    state, k_before, v_before = (t.double() for t in before)
    rows, states = [], []
    for t in range(q.shape[1]):
        alpha, gamma = log_decay[:, t].exp(), now[:, t]
        beta = then[:, t] * alpha
        state = alpha[..., None, None] * state
        state = state + torch.einsum("bh,brhn,brhp->bhnp", beta, k_before, v_before)
        state = state + torch.einsum("bh,brhn,brhp->bhnp", gamma, k[:, t], v[:, t])
        rows.append(torch.einsum("brhn,bhnp->brhp", q[:, t], state))
        states.append(state)
        k_before, v_before = k[:, t], v[:, t]
    return torch.stack(rows, 1), torch.stack(states, 1)
