"""Depthwise causal short convolution with its tail: y_t = Σ_i w_i · x_{t-W+1+i} (+ bias), SiLU.

The last W - 1 inputs of a sequence are its state. Shifted multiply-adds over a padded copy beat
a depthwise `Conv1d` on CPUs at these widths. Sums are float32, as our kernels' are: 16-bit outputs
are rounded once, not at every tap.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, tail: Tensor | None = None, *,
    silu: bool = True,
) -> Tensor:  # fmt: skip
    """x: [B, T, C]; weight: [C, W]; bias: [C]; tail: [B, W-1, C] earlier inputs (None: zeros).

    Returns [B, T, C]. Raises ValueError on widths or channels that do not fit.
    """
    width = weight.shape[1]
    if weight.shape[0] != x.shape[-1] or (tail is not None and tail.shape[1] != width - 1):
        raise ValueError(
            f"weight {tuple(weight.shape)} needs x of {weight.shape[0]} channels and a tail of "
            f"{width - 1} rows, not {tuple(x.shape)} and {None if tail is None else tail.shape}"
        )
    if x.dtype.itemsize == 2:
        bias, tail = (t if t is None else t.float() for t in (bias, tail))
        return causal_conv(x.float(), weight.float(), bias, tail, silu=silu).to(x.dtype)
    past = x.new_zeros(x.shape[0], width - 1, x.shape[2]) if tail is None else tail.to(x.dtype)
    padded = torch.cat((past, x), 1)
    if torch.is_grad_enabled() and (padded.requires_grad or weight.requires_grad):
        y = _Conv.apply(padded, weight, bias)
        return F.silu(y) if silu else y
    y = _shifted_sum(padded, weight, bias, x.shape[1])
    return F.silu(y, inplace=True) if silu else y


def _shifted_sum(padded: Tensor, weight: Tensor, bias: Tensor | None, tokens: int) -> Tensor:
    if tokens == 1:
        y = (padded * weight.t()).sum(1, keepdim=True)
        return y if bias is None else y.add_(bias)
    first = padded[:, :tokens]
    y = first * weight[:, 0] if bias is None else torch.addcmul(bias, first, weight[:, 0])
    for i in range(1, weight.shape[1]):
        y.addcmul_(padded[:, i : i + tokens], weight[:, i])
    return y


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(padded, weight)
        ctx.has_bias = bias is not None
        return _shifted_sum(padded, weight, bias, padded.shape[1] - weight.shape[1] + 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        padded, weight = ctx.saved_tensors
        tokens = grad.shape[1]
        grad_padded = torch.zeros_like(padded)
        grad_weight = torch.zeros_like(weight)
        for i in range(weight.shape[1]):
            grad_padded[:, i : i + tokens].addcmul_(grad, weight[:, i])
            grad_weight[:, i] = (grad * padded[:, i : i + tokens]).sum((0, 1))
        return grad_padded, grad_weight, grad.sum((0, 1)) if ctx.has_bias else None


def conv_tail(x: Tensor, tail: Tensor, width: int, *, new: Tensor | None = None) -> Tensor:
    """The tail [B, W-1, C] after the new tokens x [B, T, C], of which `new` [B] are valid."""
    if new is None and x.shape[1] >= width - 1:
        return x[:, x.shape[1] - width + 1 :]
    padded = torch.cat((tail.to(x.dtype), x), 1)
    if new is None:
        return padded[:, padded.shape[1] - width + 1 :]
    rows = new[:, None] + torch.arange(width - 1, device=x.device)
    return padded[torch.arange(x.shape[0], device=x.device)[:, None], rows]


def conv_tails(x: Tensor, tail: Tensor, width: int) -> Tensor:
    """The tail after every single token, [B, T, W-1, C]."""
    padded = torch.cat((tail.to(x.dtype), x), 1)
    return padded[:, 1:].unfold(1, width - 1, 1).transpose(2, 3)


def causal_conv_ref(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor) -> Tensor:
    """The oracle: float64, one output at a time, no activation."""
    padded = torch.cat((tail, x), 1).double()
    rows = []
    for t in range(x.shape[1]):
        row = (padded[:, t : t + weight.shape[1]] * weight.t().double()).sum(1)
        rows.append(row if bias is None else row + bias.double())
    return torch.stack(rows, 1)
