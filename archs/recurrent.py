"""What mixers with a recurrent state share: when to step, padding, and their initial values."""

import math

import torch
from torch import Tensor

#: Up to this many new tokens the recurrent form is used, above it the chunked one.
RECURRENT_LIMIT = 8


def masked(values: Tensor, valid: Tensor | None) -> Tensor:
    """Zero the padded tokens of values [B, K, ...] by `valid` [B, K]; None: nothing to do."""
    if valid is None:
        return values
    return values.masked_fill(~valid.reshape(*valid.shape, *[1] * (values.dim() - 2)), 0)


def memory_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of a recurrent state: float32, or float64 in a model of float64."""
    return torch.promote_types(weight.dtype, torch.float32)


def fill_dt_bias(
    tensor: Tensor,
    generator: torch.Generator,
    low: float = 1e-3,
    high: float = 0.1,
    floor: float = 1e-4,
) -> None:
    """Inverse softplus of a step size drawn log-uniformly from [low, high]."""
    u = torch.rand(tensor.shape, generator=generator, device=tensor.device)
    dt = torch.exp(u * (math.log(high) - math.log(low)) + math.log(low)).clamp(min=floor)
    tensor.copy_(dt + torch.log(-torch.expm1(-dt)))


def fill_log_uniform(tensor: Tensor, generator: torch.Generator, low: float, high: float) -> None:
    """log(A) with A uniform in [low, high]."""
    u = torch.rand(tensor.shape, generator=generator, device=tensor.device)
    tensor.copy_((low + u * (high - low)).log())


def fill_ones(tensor: Tensor, generator: torch.Generator) -> None:
    """Ones; the generator is not drawn from."""
    tensor.fill_(1.0)
