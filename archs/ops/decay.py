"""Linear recurrences with one decay per head, by backend: Mamba-2's SSD and retention.

Both hand their outputs out normed: the step kernels norm within their own launch.
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
from archs.ops.rotary import rotate_new
from archs.recurrent import masked
from archs.spec import RECURRENT_LIMIT
from archs.state import LayerState
from kernels.decay.torch import decay_answers, decay_chunk, decay_step
from kernels.norm.torch import OutputNorm
from kernels.rope.torch import rope_table, rotate


def ssd(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    a_log: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    norm: OutputNorm,
    *,
    state: LayerState | None = None,
    name: str = "ssm",
    backend: str,
) -> Tensor:
    """State-space duality (arXiv 2405.21060): S_t = e^{ΔA} S_{t-1} + B (Δ x)ᵀ, y = Sᵀ C + D x.

    x: [B, K, H, P]; dt: [B, K, H], raw (Δ = softplus(dt + dt_bias)); b, c: [B, K, G, N];
    a_log, d, dt_bias: [H] (A = -e^{a_log}). Returns [B, K, H·P], normed and gated by `norm`, and
    advances the state [H, N, P] called `name`; without one it starts at zero and is not kept
    (training).
    """
    return _SSD[backend](x, dt, b, c, a_log, d, dt_bias, norm, state, name)


def retention(
    qk: Tensor,
    v: Tensor,
    log_decay: Tensor,
    norm: OutputNorm,
    *,
    scale: float,
    theta: float,
    state: LayerState | None = None,
    name: str = "memory",
    backend: str,
) -> Tensor:
    """Retention (arXiv 2307.08621): S_t = γ S_{t-1} + k_t v_tᵀ, y_t = scale · S_tᵀ q_t.

    qk: [B, K, 2·H, N], queries and keys, which are turned by their positions with the base theta,
    in place where no gradient needs them; v: [B, K, H, P]; log_decay: float32 [1, 1, H].
    Returns [B, K, H·P], normed and gated by `norm`, and advances the state [H, N, P] called
    `name`; without one it starts at zero (training).
    """
    return _RETENTION[backend](qk, v, log_decay, norm, scale, theta, state, name)


def _scan_inputs(
    x: Tensor, dt: Tensor, a_log: Tensor, dt_bias: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Δ x and Δ A; padded tokens have Δ = 0, so the state passes them unchanged."""
    dt = masked(F.softplus(dt.float() + dt_bias), valid)
    return x * dt[..., None].to(x.dtype), dt * -a_log.float().exp()


def _skip(y: Tensor, x: Tensor, d: Tensor) -> Tensor:
    return torch.addcmul(y, x, d[:, None].to(x.dtype))


def _ssd_torch(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a_log: Tensor, d: Tensor, dt_bias: Tensor,
    norm: OutputNorm, state: LayerState | None, name: str,
) -> Tensor:  # fmt: skip
    if state is None:
        y, _ = decay_chunk(c, b, *_scan_inputs(x, dt, a_log, dt_bias, None))
        return output_norm(_skip(y, x, d), norm, backend="torch")
    at = state.replayed(name)
    duality = _Duality(x.shape[2:], b.shape[2:], a_log, dt_bias)
    if at is not None and not at.whole:
        inputs = torch.cat((x.flatten(2), b.flatten(2), dt), -1)
        y = replay(at, state, name, inputs, c, duality)
        return output_norm(_skip(y, x, d), norm, backend="torch")
    ssm, each = caught_up(at, state, name, duality), None
    scan = (c, b, *_scan_inputs(x, dt, a_log, dt_bias, state.valid))
    if x.shape[1] <= RECURRENT_LIMIT:
        y, each = decay_step(*scan, ssm, each=state.each and at is None)
    else:
        y, ssm = decay_chunk(*scan, ssm)
    state.put(name, ssm, each)
    return output_norm(_skip(y, x, d), norm, backend="torch")


class _Duality(NamedTuple):
    """As `archs.ops.replay.Recurrence`, on rows of x, B and Δ. heads, shared: (H, P), (G, N)."""

    heads: torch.Size
    shared: torch.Size
    a_log: Tensor
    dt_bias: Tensor

    def answers(self, q: Tensor, rows: Tensor, valid: Tensor | None, value: Tensor) -> Tensor:
        return decay_answers(q, *self._inputs(rows, valid), value)

    def after(self, rows: Tensor, valid: Tensor | None, value: Tensor) -> Tensor:
        b, fed, decay = self._inputs(rows, valid)
        return decay_chunk(b, b, fed, decay, value)[1]

    def _inputs(self, rows: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        x, b, dt = rows.split((self.heads.numel(), self.shared.numel(), self.heads[0]), -1)
        x, b = x.unflatten(-1, self.heads), b.unflatten(-1, self.shared)
        return b, *_scan_inputs(x, dt, self.a_log, self.dt_bias, valid)


def _ssd_triton(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a_log: Tensor, d: Tensor, dt_bias: Tensor,
    norm: OutputNorm, state: LayerState | None, name: str,
) -> Tensor:  # fmt: skip
    from kernels.decay import chunk
    from kernels.decay import ssm_step as step

    if state is None:
        y, _ = chunk.decay_chunk(c, b, *_scan_inputs(x, dt, a_log, dt_bias, None))
        return output_norm(_skip(y, x, d), norm, backend="triton")
    at, replayed = state.slots(name), state.replayed(name)
    if replayed is not None:
        found = run_ring(
            replayed, norm, partial(step.ssm_step, a_log=a_log, d=d, dt_bias=dt_bias),
            x=x, dt=dt, b=b, c=c,
        )  # fmt: skip
        if found is not None:
            return found
    if x.shape[1] <= RECURRENT_LIMIT:
        y = step.ssm_step(
            x, dt, b, c, a_log, d, dt_bias, at.pool, at.read, at.write, each=at.each, new=at.new,
            norm=norm, arrivals=at.arrivals,
        )  # fmt: skip
        return y.flatten(2)
    scan = _scan_inputs(x, dt, a_log, dt_bias, None)
    y, ssm = chunk.decay_chunk(c, b, *scan, state.get(name), new=at.new)
    state.put(name, ssm)
    return output_norm(_skip(y, x, d), norm, backend="triton")


def _ssd_mamba_ssm(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a_log: Tensor, d: Tensor, dt_bias: Tensor,
    norm: OutputNorm, state: LayerState | None, name: str,
) -> Tensor:  # fmt: skip
    at = libraries.single(x, state, name, "mamba-ssm")
    if at is None:
        return _ssd_triton(x, dt, b, c, a_log, d, dt_bias, norm, state, name)
    y = libraries.mamba2_update(x, dt, b, c, a_log, d, dt_bias, at)
    return output_norm(y, norm, backend="mamba-ssm")


def _turned(
    qk: Tensor, theta: float, state: LayerState | None, backend: str
) -> tuple[Tensor, Tensor]:
    """q and k [B, K, H, N] turned by their positions; those of training start at 0."""
    if state is None:
        tokens, dim = qk.shape[1], qk.shape[3]
        qk = rotate(qk, rope_table(tokens, dim, theta, qk.device)[:tokens])
    else:
        qk = rotate_new(qk, state, theta=theta, backend=backend)
    q, k = qk.chunk(2, 2)
    return q, k


def _retention_torch(
    qk: Tensor, v: Tensor, log_decay: Tensor, norm: OutputNorm, scale: float, theta: float,
    state: LayerState | None, name: str,
) -> Tensor:  # fmt: skip
    q, k = _turned(qk, theta, state, "torch")
    q = q * scale
    if state is None:
        return output_norm(decay_chunk(q, k, v, log_decay)[0], norm, backend="torch")
    at = state.replayed(name)
    retained = _Retention(k.shape[2:], v.shape[2:], log_decay)
    if at is not None and not at.whole:
        inputs = torch.cat((k.flatten(2), v.flatten(2)), -1)
        return output_norm(replay(at, state, name, inputs, q, retained), norm, backend="torch")
    memory, each = caught_up(at, state, name, retained), None
    if state.valid is not None:
        k = masked(k, state.valid)
        log_decay = masked(log_decay.expand(*k.shape[:2], -1), state.valid)
    if v.shape[1] <= RECURRENT_LIMIT:
        y, each = decay_step(q, k, v, log_decay, memory, each=state.each and at is None)
    else:
        y, memory = decay_chunk(q, k, v, log_decay, memory)
    state.put(name, memory, each)
    return output_norm(y, norm, backend="torch")


class _Retention(NamedTuple):
    """As `archs.ops.replay.Recurrence`, on rows of turned k and v. keys, heads: (H, N), (H, P)."""

    keys: torch.Size
    heads: torch.Size
    log_decay: Tensor

    def answers(self, q: Tensor, rows: Tensor, valid: Tensor | None, value: Tensor) -> Tensor:
        return decay_answers(q, *self._inputs(rows, valid), value)

    def after(self, rows: Tensor, valid: Tensor | None, value: Tensor) -> Tensor:
        k, v, decay = self._inputs(rows, valid)
        return decay_chunk(k, k, v, decay, value)[1]

    def _inputs(self, rows: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        k, v = rows.split((self.keys.numel(), self.heads.numel()), -1)
        k, v = k.unflatten(-1, self.keys), v.unflatten(-1, self.heads)
        decay = self.log_decay.expand(*k.shape[:2], -1)
        return masked(k, valid), v, masked(decay, valid)


def _retention_triton(
    qk: Tensor, v: Tensor, log_decay: Tensor, norm: OutputNorm, scale: float, theta: float,
    state: LayerState | None, name: str,
) -> Tensor:  # fmt: skip
    from kernels.decay import chunk
    from kernels.decay import linear_step as step

    if state is None:
        q, k = _turned(qk, theta, state, "triton")
        y, _ = chunk.decay_chunk(q * scale, k, v, log_decay)
        return output_norm(y, norm, backend="triton")
    at, replayed = state.slots(name), state.replayed(name)
    q, k = qk.chunk(2, 2)
    cos_sin = state.rotary(qk.shape[-1], theta)
    if replayed is not None:
        run = partial(
            step.linear_step, log_decay=log_decay.flatten(), scale=scale, cos_sin=cos_sin,
            past=state.past,
        )  # fmt: skip
        found = run_ring(replayed, norm, run, q=q, k=k, v=v)
        if found is not None:
            return found
    if v.shape[1] <= RECURRENT_LIMIT:
        y = step.linear_step(
            q, k, v, log_decay.flatten(), at.pool, at.read, at.write, each=at.each,
            new=at.new, scale=scale, cos_sin=cos_sin, past=state.past, norm=norm,
            arrivals=at.arrivals,
        )  # fmt: skip
        return y.flatten(2)
    q, k = _turned(qk, theta, state, "triton")
    y, memory = chunk.decay_chunk(q * scale, k, v, log_decay, state.get(name), new=at.new)
    state.put(name, memory)
    return output_norm(y, norm, backend="triton")


def _retention_fla(
    qk: Tensor, v: Tensor, log_decay: Tensor, norm: OutputNorm, scale: float, theta: float,
    state: LayerState | None, name: str,
) -> Tensor:  # fmt: skip
    at = libraries.single(v, state, name, "fla")
    if at is None:
        return _retention_triton(qk, v, log_decay, norm, scale, theta, state, name)
    q, k = _turned(qk, theta, state, "fla")
    y = libraries.decay_update(q, k, v, log_decay, scale, at)
    return output_norm(y, norm, backend="fla")


_SSD = Forms(
    "state-space duality",
    {"torch": _ssd_torch, "triton": _ssd_triton, "mamba-ssm": _ssd_mamba_ssm},
)
_RETENTION = Forms(
    "retention", {"torch": _retention_torch, "triton": _retention_triton, "fla": _retention_fla}
)
