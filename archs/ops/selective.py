"""Mamba's selective scan with its gate, by backend (S6, arXiv 2312.00752, eq. 2)."""

from torch import Tensor
from torch.nn import functional as F

from archs.backends import Forms
from archs.ops import libraries
from archs.recurrent import masked
from archs.spec import RECURRENT_LIMIT
from archs.state import LayerState
from kernels.selective.torch import selective_scan, selective_step


def selective(
    x: Tensor,
    z: Tensor,
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
    """h_t = e^{ΔA} h_{t-1} + Δ B x, y = (C · h + D x) · silu(z).

    x, z: [B, K, E]; dt: [B, K, E], raw (Δ = softplus(dt + dt_bias)); b, c: [B, K, N];
    a_log: [E, N] (A = -e^{a_log}); d, dt_bias: [E]. Returns [B, K, E] and advances the state
    [E, N] called `name`; without one it starts at zero and is not kept (training).
    """
    return _FORMS[backend](x, z, dt, b, c, a_log, d, dt_bias, state, name)


def _scan_inputs(
    x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a_log: Tensor, d: Tensor, dt_bias: Tensor,
    valid: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    step = masked(F.softplus(dt.float() + dt_bias), valid)
    return x, step, -a_log.float().exp(), b, c, d


def _torch(
    x: Tensor, z: Tensor, dt: Tensor, b: Tensor, c: Tensor, a_log: Tensor, d: Tensor,
    dt_bias: Tensor, state: LayerState | None, name: str,
) -> Tensor:  # fmt: skip
    if state is None:
        y, _ = selective_scan(*_scan_inputs(x, dt, b, c, a_log, d, dt_bias, None))
        return y * F.silu(z)
    scan = _scan_inputs(x, dt, b, c, a_log, d, dt_bias, state.valid)
    ssm, each = state.get(name), None
    if x.shape[1] <= RECURRENT_LIMIT:
        y, each = selective_step(*scan, ssm, each=state.each)
    else:
        y, ssm = selective_scan(*scan, ssm)
    state.put(name, ssm, each)
    return y.mul_(F.silu(z))


def _triton(
    x: Tensor, z: Tensor, dt: Tensor, b: Tensor, c: Tensor, a_log: Tensor, d: Tensor,
    dt_bias: Tensor, state: LayerState | None, name: str,
) -> Tensor:  # fmt: skip
    from kernels.selective import chunk, step

    if state is None:
        y, _ = chunk.selective_scan(*_scan_inputs(x, dt, b, c, a_log, d, dt_bias, None))
        return y * F.silu(z)
    at = state.slots(name)
    if x.shape[1] <= RECURRENT_LIMIT:
        y = step.selective_step(
            x, dt, b, c, a_log, d, dt_bias, at.pool, at.read, at.write, z=z, each=at.each,
            new=at.new,
        )  # fmt: skip
        return y
    scan = _scan_inputs(x, dt, b, c, a_log, d, dt_bias, None)
    y, ssm = chunk.selective_scan(*scan, state.get(name), new=at.new)
    state.put(name, ssm)
    return y * F.silu(z)


def _mamba_ssm(
    x: Tensor, z: Tensor, dt: Tensor, b: Tensor, c: Tensor, a_log: Tensor, d: Tensor,
    dt_bias: Tensor, state: LayerState | None, name: str,
) -> Tensor:  # fmt: skip
    at = libraries.single(x, state, name, "mamba-ssm")
    if at is None:
        return _triton(x, z, dt, b, c, a_log, d, dt_bias, state, name)
    return libraries.mamba1_update(x, z, dt, b, c, a_log, d, dt_bias, at)


_FORMS = Forms("selective scan", {"torch": _torch, "triton": _triton, "mamba-ssm": _mamba_ssm})
