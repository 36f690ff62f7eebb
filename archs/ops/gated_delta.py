"""The gated delta rule from raw gates to normed outputs, by backend: decays by head (arXiv
2412.06464, eq. 10) or by key channel (arXiv 2510.26692, eq. 1).
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
from kernels.gated_delta.torch import gdn_answers, gdn_chunk, gdn_step
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
    state: LayerState | None = None,
    name: str = "memory",
    backend: str,
) -> Tensor:
    """q, k are normalised and q scaled by N^-0.5; g = -e^{a_log} softplus(a + dt_bias),
    β = sigmoid(b).

    q, k: [B, K, G, N]; v: [B, K, H, P]; a: [B, K, H] with dt_bias [H], or by channel [B, K, H, N]
    with dt_bias [H, N]; b: [B, K, H]; a_log: [H].
    Returns [B, K, H·P], normed and gated by `norm`, and advances the state [H, N, P] called
    `name`; without one it starts at zero and is not kept (training).
    Raises NoFormError for a backend that has no form of it.
    """
    forms = _BY_CHANNEL if a.dim() == 4 else _FORMS
    return forms[backend](q, k, v, a, b, a_log, dt_bias, norm, state, name)


Inputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _prepared(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor
) -> Inputs:
    """Normalised q and k, v, log decay (float32) and strength."""
    rate = -a_log.float().exp()
    decay = F.softplus(a.float() + dt_bias) * (rate[:, None] if a.dim() == 4 else rate)
    return l2_norm(q) * q.shape[-1] ** -0.5, l2_norm(k), v, decay, b.sigmoid()


def _torch(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor,
    norm: OutputNorm, state: LayerState | None, name: str,
) -> Tensor:  # fmt: skip
    if state is None:
        y, _ = gdn_chunk(*_prepared(q, k, v, a, b, a_log, dt_bias))
        return output_norm(y, norm, backend="torch")
    at = state.replayed(name)
    rule = _DeltaRule(k.shape[2:], v.shape[2:], a_log, dt_bias)
    if at is not None and not at.whole:
        inputs = torch.cat((k.flatten(2), v.flatten(2), a.flatten(2), b), -1)
        return output_norm(replay(at, state, name, inputs, q, rule), norm, backend="torch")
    memory, each = caught_up(at, state, name, rule), None
    q, k, v, decay, beta = _prepared(q, k, v, a, b, a_log, dt_bias)
    decay, beta = masked(decay, state.valid), masked(beta, state.valid)
    if v.shape[1] <= RECURRENT_LIMIT:
        y, each = gdn_step(q, k, v, decay, beta, memory, each=state.each and at is None)
    else:
        y, memory = gdn_chunk(q, k, v, decay, beta, memory)
    state.put(name, memory, each)
    return output_norm(y, norm, backend="torch")


class _DeltaRule(NamedTuple):
    """As `archs.ops.replay.Recurrence`, on rows of k, v, a and b. keys, heads: (G, N), (H, P)."""

    keys: torch.Size
    heads: torch.Size
    a_log: Tensor
    dt_bias: Tensor

    def answers(self, q: Tensor, rows: Tensor, valid: Tensor | None, value: Tensor) -> Tensor:
        return gdn_answers(*self._inputs(q, rows, valid), value)

    def after(self, rows: Tensor, valid: Tensor | None, value: Tensor) -> Tensor:
        inputs = self._inputs(rows.new_zeros(*rows.shape[:2], *self.keys), rows, valid)
        return gdn_chunk(*inputs, value)[1]

    def _inputs(self, q: Tensor, rows: Tensor, valid: Tensor | None) -> Inputs:
        gates = self.dt_bias.shape
        sizes = (self.keys.numel(), self.heads.numel(), gates.numel(), self.heads[0])
        k, v, a, b = rows.split(sizes, -1)
        k, v, a = (
            t.unflatten(-1, shape) for t, shape in ((k, self.keys), (v, self.heads), (a, gates))
        )
        q, k, v, decay, beta = _prepared(q, k, v, a, b, self.a_log, self.dt_bias)
        return q, k, v, masked(decay, valid), masked(beta, valid)


def _triton(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor,
    norm: OutputNorm, state: LayerState | None, name: str,
) -> Tensor:  # fmt: skip
    from kernels.gated_delta import channel_chunk, chunk, step

    scan = channel_chunk.kda_chunk if a.dim() == 4 else chunk.gdn_chunk
    if state is None:
        y, _ = scan(*_prepared(q, k, v, a, b, a_log, dt_bias))
        return output_norm(y, norm, backend="triton")
    at, replayed = state.slots(name), state.replayed(name)
    if replayed is not None:
        found = run_ring(
            replayed, norm, partial(step.gdn_step, a_log=a_log, dt_bias=dt_bias),
            q=q, k=k, v=v, a=a, b=b,
        )  # fmt: skip
        if found is not None:
            return found
    if v.shape[1] <= RECURRENT_LIMIT:
        y = step.gdn_step(
            q, k, v, a, b, a_log, dt_bias, at.pool, at.read, at.write, each=at.each, new=at.new,
            norm=norm, arrivals=at.arrivals,
        )  # fmt: skip
        return y.flatten(2)
    inputs = _prepared(q, k, v, a, b, a_log, dt_bias)
    y, memory = scan(*inputs, state.get(name), new=at.new)
    state.put(name, memory)
    return output_norm(y, norm, backend="triton")


def _fla(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor,
    norm: OutputNorm, state: LayerState | None, name: str,
) -> Tensor:  # fmt: skip
    at = libraries.single(v, state, name, "fla")
    if at is None:
        return _triton(q, k, v, a, b, a_log, dt_bias, norm, state, name)
    decay = F.softplus(a.float() + dt_bias) * -a_log.float().exp()
    q, k = (libraries.repeat_heads(t, v.shape[2]) for t in (q, k))
    y = libraries.gated_delta_update(q, k, v, decay, b.sigmoid(), at)
    return output_norm(y, norm, backend="fla")


_FORMS = Forms("gated delta rule", {"torch": _torch, "triton": _triton, "fla": _fla})
_BY_CHANNEL = Forms("gated delta rule by channel", {"torch": _torch, "triton": _triton})
