"""The gated delta rule from raw gates to normed outputs, by backend: decays by head (arXiv
2412.06464, eq. 10) or by key channel (arXiv 2510.26692, eq. 1).

With several products a token a step's kernel takes them all, and the scans take each as a token.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from archs.backends import Forms
from archs.ops import libraries
from archs.ops.dense import output_norm
from archs.ops.replay import caught_up, replay, run_ring
from archs.recurrent import masked
from archs.spec import RECURRENT_LIMIT
from archs.state import LayerState
from kernels.gated_delta.torch import (
    Inputs,
    gdn_answers,
    gdn_chunk,
    gdn_step,
    last_product,
    product_steps,
)
from kernels.norm.torch import OutputNorm, l2_norm


def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    a_log: Tensor,
    dt_bias: Tensor,
    norm: OutputNorm,
    *,
    beta_max: float = 1.0,
    state: LayerState | None = None,
    name: str = "memory",
    backend: str,
) -> Tensor:
    """q, k are normalised and q scaled by N^-0.5; g = -e^{a_log} softplus(a + dt_bias),
    β = beta_max · sigmoid(b).

    q, k: [B, K, G, N]; v: [B, K, H, P]; a: [B, K, H] with dt_bias [H], or by channel [B, K, H, N]
    with dt_bias [H, N]; b: [B, K, H]; a_log: [H]. With n products a token (arXiv 2502.10297) k, v
    and b are [B, K, n, ...]: a state decays, takes them one by one, and then is read. With b by
    channel, [B, K, H, N] as a is, S_t = (I - k (β ∘ k)ᵀ) e^g S_{t-1} + k vᵀ (arXiv 2605.22791).
    Returns [B, K, H·P], normed and gated by `norm`, and advances the state [H, N, P] called
    `name`; without one it starts at zero and is not kept (training).
    Raises NoFormError for a backend that has no form of it.
    """
    forms = _PRODUCTS if k.dim() == 5 else _BY_CHANNEL if a.dim() == 4 else _FORMS
    return forms[backend](q, k, v, a, b, Gates(a_log, dt_bias, beta_max), norm, state, name)


class Gates(NamedTuple):
    """How raw a and b become decays and strengths."""

    a_log: Tensor
    dt_bias: Tensor
    beta_max: float

    def log_decay(self, a: Tensor) -> Tensor:
        """float32, as a: [B, T, H] or [B, T, H, N]."""
        rate = -self.a_log.float().exp()
        return F.softplus(a.float() + self.dt_bias) * (rate[:, None] if a.dim() == 4 else rate)

    def strength(self, b: Tensor) -> Tensor:
        """As b."""
        return b.sigmoid() if self.beta_max == 1 else self.beta_max * b.sigmoid()


def _exact(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, gates: Gates) -> Inputs:
    """As `_prepared`, but nothing is rounded to 16 bits: near 2 a strength's error is a state's,
    which no later token takes away.
    """
    wide = torch.promote_types(v.dtype, torch.float32)
    return _prepared(q.to(wide), k.to(wide), v, a, b.to(wide), gates)


def _prepared(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, gates: Gates) -> Inputs:
    """Normalised q and k, v, log decay (float32) and strength."""
    scaled = l2_norm(q) * q.shape[-1] ** -0.5
    return scaled, l2_norm(k), v, gates.log_decay(a), gates.strength(b)


def _torch(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, gates: Gates, norm: OutputNorm,
    state: LayerState | None, name: str,
) -> Tensor:  # fmt: skip
    if state is None:
        y, _ = gdn_chunk(*product_steps(*_exact(q, k, v, a, b, gates)))
        return output_norm(y[:, last_product(k)], norm, backend="torch")
    at = state.replayed(name)
    rule = _DeltaRule(k.shape[2:], v.shape[2:], b.shape[2:], gates)
    if at is not None and not at.whole:
        new = torch.cat([t.flatten(2) for t in (k, v, a, b)], -1)
        return output_norm(replay(at, state, name, new, q, rule), norm, backend="torch")
    memory, each, last = caught_up(at, state, name, rule), None, last_product(k)
    few = v.shape[1] <= RECURRENT_LIMIT
    q, k, v, decay, beta = _exact(q, k, v, a, b, gates)
    v, decay, beta = (masked(t, state.valid) for t in (v, decay, beta))
    inputs = product_steps(q, k, v, decay, beta)
    if few:
        y, each = gdn_step(*inputs, memory, each=state.each and at is None)
    else:
        y, memory = gdn_chunk(*inputs, memory)
    state.put(name, memory, None if each is None else each[:, last])
    return output_norm(y[:, last], norm, backend="torch")


class _DeltaRule(NamedTuple):
    """As `archs.ops.replay.Recurrence`, on rows of k, v, a and b. keys, values, strengths: shapes
    of a token's k, v and b.
    """

    keys: torch.Size
    values: torch.Size
    strengths: torch.Size
    gates: Gates

    def answers(self, q: Tensor, rows: Tensor, valid: Tensor | None, value: Tensor) -> Tensor:
        k, inputs = self._inputs(q, rows, valid)
        return gdn_answers(*inputs, value)[:, last_product(k)]

    def after(self, rows: Tensor, valid: Tensor | None, value: Tensor) -> Tensor:
        q = rows.new_zeros(*rows.shape[:2], *self.keys[-2:])
        return gdn_chunk(*self._inputs(q, rows, valid)[1], value)[1]

    def _inputs(self, q: Tensor, rows: Tensor, valid: Tensor | None) -> tuple[Tensor, Inputs]:
        shapes = self.keys, self.values, self.gates.dt_bias.shape, self.strengths
        parts = rows.split([shape.numel() for shape in shapes], -1)
        k, v, a, b = (t.unflatten(-1, shape) for t, shape in zip(parts, shapes, strict=True))
        q, k, v, decay, beta = _exact(q, k, v, a, b, self.gates)
        v, decay, beta = (masked(t, valid) for t in (v, decay, beta))
        return k, product_steps(q, k, v, decay, beta)


def _triton(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, gates: Gates, norm: OutputNorm,
    state: LayerState | None, name: str,
) -> Tensor:  # fmt: skip
    from kernels.gated_delta import channel_chunk, chunk, step

    scan, last = channel_chunk.kda_chunk if a.dim() == 4 else chunk.gdn_chunk, last_product(k)
    if state is None:
        y, _ = scan(*product_steps(*_prepared(q, k, v, a, b, gates)))
        return output_norm(y[:, last], norm, backend="triton")
    at, replayed = state.slots(name), state.replayed(name)
    if replayed is not None:
        found = run_ring(
            replayed, norm, partial(step.gdn_step, **gates._asdict()), q=q, k=k, v=v, a=a, b=b
        )  # fmt: skip
        if found is not None:
            return found
    if v.shape[1] <= RECURRENT_LIMIT:
        y = step.gdn_step(
            q, k, v, a, b, **gates._asdict(), state=at.pool, read=at.read, write=at.write,
            each=at.each, new=at.new, norm=norm, arrivals=at.arrivals,
        )  # fmt: skip
        return y.flatten(2)
    inputs = product_steps(*_prepared(q, k, v, a, b, gates))
    new = at.new if at.new is None or k.dim() == 4 else at.new * k.shape[2]
    y, memory = scan(*inputs, state.get(name), new=new)
    state.put(name, memory)
    return output_norm(y[:, last], norm, backend="triton")


def _fla(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, gates: Gates, norm: OutputNorm,
    state: LayerState | None, name: str,
) -> Tensor:  # fmt: skip
    at = libraries.single(v, state, name, "fla")
    if at is None:
        return _triton(q, k, v, a, b, gates, norm, state, name)
    q, k = (libraries.repeat_heads(t, v.shape[2]) for t in (q, k))
    y = libraries.gated_delta_update(q, k, v, gates.log_decay(a), gates.strength(b), at)
    return output_norm(y, norm, backend="fla")


_FORMS = Forms("gated delta rule", {"torch": _torch, "triton": _triton, "fla": _fla})
_BY_CHANNEL = Forms("gated delta rule by channel", {"torch": _torch, "triton": _triton})
_PRODUCTS = Forms(
    "gated delta rule with several products a token", {"torch": _torch, "triton": _triton}
)
