"""Norms and gates in as few torch calls as they can be: decode at small sizes is call-bound.

Statistics are float32 (float64 stays), results keep the input's dtype. Where gradients are
wanted, hand-written backward passes keep only what they must.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension (arXiv 1910.07467).

    x: [..., D]; weight: [D]; returns [..., D] in x's dtype.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, weight, eps)
    return _normalise(x, eps)[0].mul_(weight)


def _normalise(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x̂ = x / rms in a fresh tensor of x's dtype, and sqrt(D) · rms [..., 1]."""
    dim = x.shape[-1]
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    # hypot(‖x‖, sqrt(D·eps)) is sqrt(D) · sqrt(mean(x²) + eps) without squaring twice.
    if torch.compiler.is_compiling():
        unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    else:
        length = torch.hypot(length, _constant((dim * eps) ** 0.5, wide.dtype, wide.device))
        unit = (wide / length).mul_(_constant(dim**0.5, wide.dtype, wide.device))
    return unit if unit.dtype == x.dtype else unit.to(x.dtype), length


@lru_cache(maxsize=256)
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A 0-dim tensor: cheaper to combine with than a Python number, which torch wraps each time."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device=device)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        unit, length = _normalise(x, eps)
        ctx.save_for_backward(unit, length, weight)
        return unit * weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, length, weight = ctx.saved_tensors
        dim = unit.shape[-1]
        weight_grad = (grad * unit).flatten(0, -2).sum(0)
        scaled = (grad * weight).to(length.dtype)
        along = (scaled * unit).sum(-1, keepdim=True).div_(dim)
        grad_x = torch.addcmul(scaled, unit.to(length.dtype), along, value=-1).div_(length)
        return grad_x.mul_(dim**0.5).to(grad.dtype), weight_grad.to(weight.dtype), None


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, *, gate_first: bool,
    group: int | None = None, opened: str = "silu",
) -> Tensor:  # fmt: skip
    """RMSNorm and a gate, in either order, over the last dimension or groups of it.

    gate_first: norm(x · silu(gate)) (Mamba-2); else norm(x) · silu(gate) (gated delta, RetNet).
    x, gate: [..., D]; weight: [D]; group: channels that share one statistic (None: D); opened: the
    gate's function, silu or sigmoid (Kimi Delta Attention).
    Raises ValueError where a group does not divide D, KeyError on another function.
    """
    dim, opens = x.shape[-1], OPENED[opened]
    if group is not None and dim % group:
        raise ValueError(f"D={dim} is not divisible by group={group}")
    if gate_first:
        x = x * opens(gate)
    if group is None or group == dim:
        y = rms_norm(x, weight, eps)
    else:
        ones = weight.new_ones(group)
        y = rms_norm(x.unflatten(-1, (-1, group)), ones, eps).flatten(-2) * weight
    return y if gate_first else y * opens(gate)


#: What a gate's value may be of what it was projected to.
OPENED: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputNorm:
    """`gated_rms_norm` of a recurrent mixer's output, to be applied by it or within its kernel.

    gate: [B, K, H, P], where every head is a row, or [B, K, H·P]; the rest as there.
    """

    gate: Tensor
    weight: Tensor
    eps: float
    gate_first: bool
    group: int | None = None
    opened: str = "silu"


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(Σ x² + eps) over the last dimension."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    unit = wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)
    return unit.to(x.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(first half) · second half. [..., 2F] -> [..., F]."""
    if torch.is_grad_enabled() and gate_up.requires_grad:
        return _SwiGLU.apply(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


class _SwiGLU(torch.autograd.Function):
    """Keeps its input alone; the activation is computed again in backward."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        out = torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, -1)
        torch.mul(F.silu(gate), grad, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return out
