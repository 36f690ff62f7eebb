"""How a store keeps a tensor otherwise than the mixer gives it: coded where it comes in, decoded
where it goes out.

What lies in the pools are bytes like any others: forks, rollbacks, prefixes and checkpoints copy
codes, so that what comes back is what was stored, bit for bit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from archs.formats import Format
from archs.spec import TensorSpec
from kernels.quant.runs import Runs, hashed_uniform, stochastic


@dataclass(frozen=True, slots=True)
class Coding:
    """One tensor's.

    given: the dtype of what comes and goes. numbers: of its last dimension, which are stored
    together. salt: tells its random numbers from other tensors'.
    """

    format: Format
    given: torch.dtype
    numbers: int
    salt: int = 0

    @classmethod
    def of(cls, tensor: TensorSpec, salt: int = 0) -> "Coding | None":
        """Of a tensor that is declared so; None where it is stored as it comes."""
        if not tensor.is_coded:
            return None
        return cls(tensor.format, tensor.given_dtype, tensor.shape[-1], salt)

    @property
    def feeds_back(self) -> bool:
        """Whether what is stored depends on what stood there before."""
        return self.format.residual_bits > 0

    @property
    def has_one_scale(self) -> bool:
        """Whether kernels can read its codes, where the scales lie apart."""
        return self.format.has_one_scale(self.numbers)

    def apart(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What is stored for x [..., N] where scales lie apart: bytes [..., N], scales [..., 1]."""
        codes, scales, _ = self.encode(x).split(self._runs.sizes, -1)
        return codes, scales.contiguous().view(self._runs.scale_dtype)

    @property
    def is_random(self) -> bool:
        """Whether numbers are rounded at random."""
        return self.format.rounding == "stochastic"

    def encode(
        self, x: Tensor, tokens: Tensor | None = None, before: Tensor | None = None
    ) -> Tensor:
        """What is stored for x [..., N].

        tokens: int64 [...], leading dimensions of x: how many tokens each value comes after, by
        which random numbers are drawn. before: what stands there now, for feedback.
        """
        noise = None
        if self.is_random:
            assert tokens is not None
            shape = tuple(x.shape[tokens.dim() :])
            noise = hashed_uniform(tokens.expand(x.shape[: tokens.dim()]), shape, self.salt)
        if self.format.is_plain:
            if noise is not None:
                return stochastic(x, self.format.dtype, noise)
            return x.to(self.format.dtype)
        runs, residual = self._runs, None
        if self.feeds_back and before is not None:
            residual = runs.residual(before, x.dtype)
            # Values between a step's tokens start from what stood there before all of them.
            residual = residual.unsqueeze(1) if residual.dim() < x.dim() else residual
        return runs.encode(x, residual, noise)

    def decode(self, held: Tensor) -> Tensor:
        """[..., N] of what is stored; a tensor of its own."""
        if self.format.is_plain:
            return held.to(self.given, copy=True)
        return self._runs.decode(held, self.given)

    @property
    def _runs(self) -> Runs:
        f = self.format
        assert f.group is not None
        return Runs(self.numbers, f.bits, f.group, f.dtype, f.residual_bits)


def held_shape(tensor: TensorSpec) -> tuple[int, ...]:
    """The shape of a row, or of the value, in a pool: bytes where it is not one number each."""
    if tensor.format.is_plain:
        return tensor.shape
    return (*tensor.shape[:-1], tensor.format.nbytes(tensor.shape[-1]))


def held_dtype(tensor: TensorSpec) -> torch.dtype:
    """The dtype of its pool."""
    return tensor.format.dtype if tensor.format.is_plain else torch.uint8
