"""Linear recurrences with one decay per head, by backend: Mamba-2's SSD and retention."""

from typing import cast

import torch
from torch import Tensor
from torch.nn import functional as F

from archs.backends import choose
from archs.ops import libraries
from archs.recurrent import RECURRENT_LIMIT, masked
from archs.spec import KernelState, LayerState
from kernels.decay_scan import decay_chunk, decay_step


def ssd(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    a_log: Tensor,
    d: Tensor,
    dt_bias: Tensor,
    *,
    state: LayerState | None = None,
    name: str = "ssm",
    backend: str,
) -> Tensor:
    """State-space duality (arXiv 2405.21060): S_t = e^{ΔA} S_{t-1} + B (Δ x)ᵀ, y = Sᵀ C + D x.

    x: [B, K, H, P]; dt: [B, K, H], raw (Δ = softplus(dt + dt_bias)); b, c: [B, K, G, N];
    a_log, d, dt_bias: [H] (A = -e^{a_log}). Returns [B, K, H, P] and advances the state
    [H, N, P] called `name`; without one it starts at zero and is not kept (training).
    """
    return choose("state-space duality", backend, _SSD)(x, dt, b, c, a_log, d, dt_bias, state, name)


def retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float,
    state: LayerState | None = None,
    name: str = "memory",
    backend: str,
) -> Tensor:
    """Retention (arXiv 2307.08621): S_t = γ S_{t-1} + k_t v_tᵀ, y_t = scale · S_tᵀ q_t.

    q, k: [B, K, H, N]; v: [B, K, H, P]; log_decay: float32 [1, 1, H]. Returns [B, K, H, P] and
    advances the state [H, N, P] called `name`; without one it starts at zero (training).
    """
    return choose("retention", backend, _RETENTION)(q, k, v, log_decay, scale, state, name)


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
    state: LayerState | None, name: str,
) -> Tensor:  # fmt: skip
    if state is None:
        return _skip(decay_chunk(c, b, *_scan_inputs(x, dt, a_log, dt_bias, None))[0], x, d)
    scan = (c, b, *_scan_inputs(x, dt, a_log, dt_bias, state.valid))
    ssm, each = state.get(name), None
    if x.shape[1] <= RECURRENT_LIMIT:
        y, each = decay_step(*scan, ssm, each=state.each)
    else:
        y, ssm = decay_chunk(*scan, ssm)
    state.put(name, ssm, each)
    return _skip(y, x, d)


def _ssd_triton(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a_log: Tensor, d: Tensor, dt_bias: Tensor,
    state: LayerState | None, name: str,
) -> Tensor:  # fmt: skip
    from kernels import decay_chunk as chunk
    from kernels import ssm_step as step

    if state is None:
        scan = _scan_inputs(x, dt, a_log, dt_bias, None)
        return _skip(chunk.decay_chunk(c, b, *scan)[0], x, d)
    state = cast(KernelState, state)
    at = state.slots(name)
    if x.shape[1] <= RECURRENT_LIMIT:
        y = step.ssm_step(
            x, dt, b, c, a_log, d, dt_bias, at.pool, at.slots, new=at.new, each=at.each
        )
        state.settle(name, at)
        return y
    scan = _scan_inputs(x, dt, a_log, dt_bias, None)
    y, ssm = chunk.decay_chunk(c, b, *scan, state.get(name), new=at.new)
    state.put(name, ssm)
    return _skip(y, x, d)


def _ssd_mamba_ssm(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a_log: Tensor, d: Tensor, dt_bias: Tensor,
    state: LayerState | None, name: str,
) -> Tensor:  # fmt: skip
    at = libraries.single(x, state, name, "mamba-ssm")
    if at is None:
        return _ssd_triton(x, dt, b, c, a_log, d, dt_bias, state, name)
    return libraries.mamba2_update(x, dt, b, c, a_log, d, dt_bias, at)


def _retention_torch(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float,
    state: LayerState | None, name: str,
) -> Tensor:  # fmt: skip
    q = q * scale
    if state is None:
        return decay_chunk(q, k, v, log_decay)[0]
    if state.valid is not None:
        k = masked(k, state.valid)
        log_decay = masked(log_decay.expand(*k.shape[:2], -1), state.valid)
    memory, each = state.get(name), None
    if v.shape[1] <= RECURRENT_LIMIT:
        y, each = decay_step(q, k, v, log_decay, memory, each=state.each)
    else:
        y, memory = decay_chunk(q, k, v, log_decay, memory)
    state.put(name, memory, each)
    return y


def _retention_triton(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float,
    state: LayerState | None, name: str,
) -> Tensor:  # fmt: skip
    from kernels import decay_chunk as chunk
    from kernels import linear_step as step

    if state is None:
        return chunk.decay_chunk(q * scale, k, v, log_decay)[0]
    state = cast(KernelState, state)
    at = state.slots(name)
    if v.shape[1] <= RECURRENT_LIMIT:
        y = step.linear_step(
            q, k, v, log_decay.flatten(), at.pool, at.slots, scale=scale, new=at.new, each=at.each
        )
        state.settle(name, at)
        return y
    y, memory = chunk.decay_chunk(q * scale, k, v, log_decay, state.get(name), new=at.new)
    state.put(name, memory)
    return y


def _retention_fla(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, scale: float,
    state: LayerState | None, name: str,
) -> Tensor:  # fmt: skip
    at = libraries.single(v, state, name, "fla")
    if at is None:
        return _retention_triton(q, k, v, log_decay, scale, state, name)
    return libraries.decay_update(q, k, v, log_decay, scale, at)


_SSD = {"torch": _ssd_torch, "triton": _ssd_triton, "mamba-ssm": _ssd_mamba_ssm}
_RETENTION = {"torch": _retention_torch, "triton": _retention_triton, "fla": _retention_fla}
