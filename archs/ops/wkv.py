"""RWKV-7's recurrence from raw gates to normed outputs, by backend (arXiv 2503.14456)."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from archs.backends import Forms
from archs.ops.replay import caught_up, replay, run_ring
from archs.recurrent import masked
from archs.spec import RECURRENT_LIMIT
from archs.state import LayerState
from kernels.dplr.torch import LEAST_DECAY, dplr_answers, dplr_chunk, dplr_step


class WkvWeights(NamedTuple):
    """decay_bias, rate_bias, removal_scale (ξ), rate_scale (α), bonus (ρ): [H, N]; norm_weight,
    norm_bias: [H, P].
    """

    decay_bias: Tensor
    rate_bias: Tensor
    removal_scale: Tensor
    rate_scale: Tensor
    bonus: Tensor
    norm_weight: Tensor
    norm_bias: Tensor


def wkv(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    rate: Tensor,
    weights: WkvWeights,
    *,
    eps: float,
    state: LayerState | None = None,
    name: str = "memory",
    backend: str,
) -> Tensor:
    """S_t = (diag(e^{g_t}) - (κ̂_t ∘ a_t) κ̂_tᵀ) S_{t-1} + k̃_t v_tᵀ, and normed answers Sᵀ r with
    the bonus of each token's own, (r · (ρ ∘ k̃)) v.

    a = σ(rate + bias), g = -e^{-1/2} σ(decay + bias), κ̂ = normalised k ∘ ξ,
    k̃ = k ∘ (1 + (a - 1) ∘ α). r, k, decay, rate: [B, K, H, N], as projected; v: [B, K, H, P]; eps:
    of the norm over each head's P.
    Returns [B, K, H·P] and advances the state [H, N, P] called `name`; without one it starts at
    zero and is not kept: training, which is torch's under every backend. Raises NoFormError for a
    backend that has no form of it.
    """
    if state is None:
        tokens = rule(k, v, decay, rate, weights)
        return finished(dplr_chunk(r, *tokens)[0], r, tokens, weights, eps)
    return _FORMS[backend](r, k, v, decay, rate, weights, eps, state, name)


class Rule(NamedTuple):
    """What the recurrence takes of each token (`kernels.dplr.torch`): k̃, v, g, -κ̂ and κ̂ ∘ a."""

    k: Tensor
    v: Tensor
    log_decay: Tensor
    a: Tensor
    b: Tensor

    def masked(self, valid: Tensor | None) -> "Rule":
        """Tokens that are not valid change nothing."""
        return self._replace(
            k=masked(self.k, valid), log_decay=masked(self.log_decay, valid),
            b=masked(self.b, valid),
        )  # fmt: skip


def rule(k: Tensor, v: Tensor, decay: Tensor, rate: Tensor, weights: WkvWeights) -> Rule:
    """From what was projected: k, decay, rate [B, T, H, N]; v [B, T, H, P]."""
    rate = (rate + weights.rate_bias).sigmoid()
    removed = F.normalize(k * weights.removal_scale, dim=-1)
    return Rule(
        k=torch.addcmul(k, k * (rate - 1), weights.rate_scale), v=v,
        log_decay=(decay + weights.decay_bias).sigmoid() * LEAST_DECAY,
        a=-removed, b=removed * rate,
    )  # fmt: skip


def finished(y: Tensor, r: Tensor, tokens: Rule, weights: WkvWeights, eps: float) -> Tensor:
    """[B, K, H, P] -> [B, K, H·P], normed, with the bonus."""
    normed = F.group_norm(
        y.flatten(0, 1).flatten(1), y.shape[2], weights.norm_weight.flatten(),
        weights.norm_bias.flatten(), eps,
    ).view_as(tokens.v)  # fmt: skip
    bonus = (r * tokens.k * weights.bonus).sum(-1, keepdim=True)
    return torch.addcmul(normed, bonus, tokens.v).flatten(2)


def _torch(
    r: Tensor, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor, weights: WkvWeights, eps: float,
    state: LayerState, name: str,
) -> Tensor:  # fmt: skip
    at, again = state.replayed(name), _Again(k.shape[2:], v.shape[2:], weights)
    if at is not None and not at.whole:
        rows = torch.cat([t.flatten(2) for t in (k, v, decay, rate)], -1)
        y = replay(at, state, name, rows, r, again)
        return finished(y, r, rule(k, v, decay, rate, weights), weights, eps)
    memory = caught_up(at, state, name, again)
    return _advanced(r, k, v, decay, rate, weights, eps, state, name, memory, at is None)


def _advanced(
    r: Tensor, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor, weights: WkvWeights, eps: float,
    state: LayerState, name: str, memory: Tensor, copies: bool,
) -> Tensor:  # fmt: skip
    """From the value before the tokens to that after them; copies: whether some may be kept."""
    tokens, each = rule(k, v, decay, rate, weights), None
    if v.shape[1] <= RECURRENT_LIMIT:
        y, each = dplr_step(r, *tokens.masked(state.valid), memory, each=copies and state.each)
    else:
        y, memory = dplr_chunk(r, *tokens.masked(state.valid), memory)
    state.put(name, memory, each)
    return finished(y, r, tokens, weights, eps)


class _Again(NamedTuple):
    """As `archs.ops.replay.Recurrence`, on rows of k, v, decay and rate. keys, values: shapes of a
    token's k and v.
    """

    keys: torch.Size
    values: torch.Size
    weights: WkvWeights

    def answers(self, q: Tensor, rows: Tensor, valid: Tensor | None, value: Tensor) -> Tensor:
        return dplr_answers(q, *self._tokens(rows, valid), value)

    def after(self, rows: Tensor, valid: Tensor | None, value: Tensor) -> Tensor:
        tokens = self._tokens(rows, valid)
        return dplr_chunk(torch.zeros_like(tokens.k), *tokens, value)[1]

    def _tokens(self, rows: Tensor, valid: Tensor | None) -> Rule:
        shapes = self.keys, self.values, self.keys, self.keys
        parts = rows.split([shape.numel() for shape in shapes], -1)
        k, v, decay, rate = (t.unflatten(-1, shape) for t, shape in zip(parts, shapes, strict=True))
        return rule(k, v, decay, rate, self.weights).masked(valid)


def _triton(
    r: Tensor, k: Tensor, v: Tensor, decay: Tensor, rate: Tensor, weights: WkvWeights, eps: float,
    state: LayerState, name: str,
) -> Tensor:  # fmt: skip
    """Steps of more tokens are torch's."""
    from kernels.dplr import step

    tokens = {"r": r, "k": k, "v": v, "decay": decay, "rate": rate}
    run: Callable[..., Tensor] = partial(step.wkv_step, **weights._asdict(), eps=eps)
    at, replayed = state.slots(name), state.replayed(name)
    if replayed is not None:
        found = run_ring(replayed, None, run, **tokens)
        if found is not None:
            return found
    if v.shape[1] > RECURRENT_LIMIT:
        memory = state.get(name)
        return _advanced(r, k, v, decay, rate, weights, eps, state, name, memory, False)
    y = run(**tokens, state=at.pool, read=at.read, write=at.write, each=at.each, new=at.new)
    return y.flatten(2)


_FORMS = Forms("RWKV-7's recurrence", {"torch": _torch, "triton": _triton})
