"""Norms and gates, by backend."""

from typing import Any

from torch import Tensor

from archs.backends import choose, everywhere
from kernels import norm
from kernels.norm import OutputNorm


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, backend: str) -> Tensor:
    """As `kernels.norm.rms_norm`."""
    return choose("RMSNorm", backend, _RMS_NORM)(x, weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, backend: str
) -> tuple[Tensor, Tensor]:
    """RMSNorm of x + residual, and the sum. [..., D] -> [..., D] twice."""
    return choose("RMSNorm", backend, _ADD_RMS_NORM)(x, residual, weight, eps)


def output_norm(y: Tensor, how: OutputNorm, *, backend: str) -> Tensor:
    """Norm and gate a mixer's output y [B, K, H, P] in a launch of its own. -> [B, K, H·P]."""
    form = choose("gated RMSNorm", backend, _GATED_RMS_NORM)
    return form(
        y.reshape(how.gate.shape), how.gate, how.weight, how.eps, gate_first=how.gate_first,
        group=how.group,
    ).flatten(2)  # fmt: skip


def swiglu(gate_up: Tensor, *, backend: str) -> Tensor:
    """silu(first half) · second half. [..., 2F] -> [..., F]."""
    return choose("SwiGLU", backend, _SWIGLU)(gate_up)


def _add_torch(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return norm.rms_norm(total, weight, eps), total


def _norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    from kernels import norm_triton

    return norm_triton.rms_norm(x, weight, eps)


def _add_triton(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from kernels import norm_triton

    # Under autocast the stream stays as wide as torch's promotion would leave it.
    return norm_triton.add_rms_norm(x.to(residual.dtype), residual, weight, eps)


def _gated_triton(x: Tensor, gate: Tensor, weight: Tensor, eps: float, **options: Any) -> Tensor:
    from kernels import norm_triton

    return norm_triton.gated_rms_norm(x, gate, weight, eps, **options)


def _swiglu_triton(gate_up: Tensor) -> Tensor:
    from kernels import norm_triton

    return norm_triton.swiglu(gate_up)


_RMS_NORM = everywhere(norm.rms_norm, _norm_triton)
_ADD_RMS_NORM = everywhere(_add_torch, _add_triton)
_GATED_RMS_NORM = everywhere(norm.gated_rms_norm, _gated_triton)
_SWIGLU = everywhere(norm.swiglu, _swiglu_triton)
