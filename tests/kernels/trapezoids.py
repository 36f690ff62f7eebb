"""Operands of the trapezoidal recurrence: sizes, inputs and weights, and a state's tensors."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.trapezoid.torch import TrapezoidSizes, TrapezoidWeights


def sizes_of(
    heads: int = 4, groups: int = 1, n: int = 8, p: int = 6, rank: int = 1, angles: int = 2
) -> TrapezoidSizes:
    return TrapezoidSizes(heads=heads, groups=groups, n=n, p=p, rank=rank, angles=angles)


def weights_of(s: TrapezoidSizes, dtype: torch.dtype = torch.float32) -> TrapezoidWeights:
    """Vectors of norms in `dtype`, the others in float32; a floor that many a rate is under."""
    mimo = [torch.rand(s.rank, s.inner) for _ in range(3 * (s.rank > 1))]
    norms = [(1 + 0.2 * torch.randn(s.n)).to(dtype) for _ in range(2)]
    biases = [torch.randn(s.rank, s.heads, s.n) for _ in range(2)]
    vectors = torch.linspace(-6, 0.5, s.heads), torch.linspace(-1, 1, s.heads)
    return TrapezoidWeights(*vectors, *norms, *biases, 1e-5, 0.5, *mimo)


def inputs_of(
    s: TrapezoidSizes, batch: int, tokens: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    return torch.randn(batch, tokens, sum(s.parts)).to(dtype)


class Held(NamedTuple):
    """Pools of what is held, in their slots."""

    last: Tensor
    angle: Tensor | None
    state: Tensor

    def at(self, slots: list[int]) -> "Held":
        """Copies of what lies in these slots."""
        return Held(*(None if t is None else t[slots].clone() for t in self))  # type: ignore[arg-type]


def held_of(
    s: TrapezoidSizes, slots: int, inputs: torch.dtype = torch.float32,
    state: torch.dtype = torch.float32,
) -> Held:  # fmt: skip
    return Held(
        torch.randn(slots, 1, s.last).to(inputs),
        torch.rand(slots, s.heads, s.angles) if s.angles else None,
        torch.randn(slots, s.heads, s.n, s.p).to(state),
    )
