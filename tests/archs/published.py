"""Attention by its definition, in float64: one head at a time, every key and value in full.

A model whose mixers are replaced by such a `Published` says what ours must give. Rotary pairs are
half-split, as in the published code, so weights are permuted where they are copied
(`tests.archs.hf.interleaved`).
"""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

from archs.backbone import Model
from archs.mixer import Mixer, Shared


def half_split(x: Tensor, theta: float = 10_000.0) -> Tensor:
    """Rotate x [B, T, r], channel i with channel i + r/2, by its position in T."""
    half = x.shape[-1] // 2
    speed = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * speed
    first, second = x[..., :half], x[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One causal head: q, k [B, T, d], v [B, T, dv]; scale d^-0.5."""
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1) @ v


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm over the last dimension."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


class Published(nn.Module):
    """A mixer that is a function of its input [B, T, D] alone."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, shared: Shared | None = None) -> Tensor:
        return self.function(x)


def in_place_of(model: Model, made: Callable[[Mixer], Callable[[Tensor], Tensor]]) -> nn.Module:
    """A copy of a model with what `made` makes of its mixers in their place; it may change them."""
    theirs = deepcopy(model)
    for ours, block in zip(model.layers, theirs.layers, strict=True):
        block.mixer = Published(made(ours.mixer))  # type: ignore[assignment]
    return theirs


def random_matrix(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Float64 [rows, columns], normal with columns^-0.5."""
    found = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return found * columns**-0.5
