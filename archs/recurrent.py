"""What mixers with a recurrent state share: when to step, padding, and their initial values."""

import math

import torch
from torch import Tensor

from archs.cost import Step
from archs.formats import Format


def chunk_vector_flops(
    step: Step, chunk: int, heads: int, n: int, p: int, *, per_score: int, per_token: int
) -> int:
    """Arithmetic of a chunked scan beside its products, to first order.

    per_score: FLOPs of one of a chunk's [C, C] scores and decays; per_token: of one token of one
    head. The states [N, P] between chunks take one multiply-add each.
    """
    size = min(chunk, step.new_tokens)
    chunks = step.batch * -(-step.new_tokens // size)
    return chunks * heads * (per_score * size * size + per_token * size + 2 * n * p)


def masked(values: Tensor, valid: Tensor | None) -> Tensor:
    """Zero the padded tokens of values [B, K, ...] by `valid` [B, K]; None: nothing to do."""
    if valid is None:
        return values
    return values.masked_fill(~valid.reshape(*valid.shape, *[1] * (values.dim() - 2)), 0)


def memory_format(weight: Tensor) -> Format:
    """The format of a recurrent state: float32, or float64 in a model of float64."""
    return Format.of(torch.promote_types(weight.dtype, torch.float32))


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
