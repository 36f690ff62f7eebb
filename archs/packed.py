"""Matrices of a few bits in memory: codes, scales, and what they are multiplied with.

A `Packed` matrix stands where a plain weight stood (`archs.storage`), so a model's memory shrinks
and its products read the codes. Its buffers are a checkpoint's tensors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from archs.errors import MisfitError
from archs.ops.dense import product
from archs.ops.matrix import Matrix, Weight
from archs.ops.packed import (
    cpu_product,
    cpu_takes,
    for_cpu,
    from_cpu,
    int8_product,
    packed_product,
)
from archs.weights import Number
from kernels.quant.torch import (
    SCALE_DTYPE,
    Rounded,
    dense,
    on_grid,
    pack,
    round_fp8,
    round_int8,
    round_narrow,
)


def nearest(weight: Tensor, number: Number) -> Rounded:
    """A matrix [N, K] rounded to nearest. Raises MisfitError where a group is wider than a row."""
    if number.group is not None:
        require_group(number, weight.shape)
        return round_narrow(weight, number.bits, number.group)
    return round_int8(weight) if number.dtype == torch.int8 else round_fp8(weight, number.dtype)


def require_group(number: Number, shape: Sequence[int]) -> None:
    """Raise MisfitError where a group of columns is wider than the rows of a matrix."""
    if number.group is not None and number.group > shape[1]:
        raise MisfitError(
            f"weight format '{number.name}' has groups of {number.group} columns, wider than the "
            f"rows of a matrix {list(shape)}; take smaller groups, or a wider model"
        )


def as_rounded(weight: Tensor, number: Number) -> Tensor:
    """The numbers that `nearest` stores for a matrix [N, K], in its dtype."""
    if number.group is not None:
        return on_grid(weight, number.bits, number.group)
    return dense(nearest(weight, number), number.bits, weight.shape[1], weight.dtype)


class Packed(Matrix):
    """A matrix [N, K] as codes and scales.

    number: the format of the codes. dtype: of its rows and products. inverse: [K], what columns of
    x are multiplied by first, where the codes are those of a matrix whose columns were divided by
    it; None: nothing.
    """

    def __init__(
        self, rounded: Rounded, number: Number, columns: int, dtype: torch.dtype,
        inverse: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.number = number
        self.dtype = dtype
        self._shape = torch.Size((rounded.codes.shape[0], columns))
        #: Whether codes and scales are in the order of a CPU's product.
        self._ordered = False
        self.register_buffer("codes", rounded.codes)
        self.register_buffer("scale", rounded.scale)
        self.register_buffer("zero", rounded.zero)
        self.register_buffer("inverse", None if inverse is None else inverse.to(SCALE_DTYPE))

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    inverse: Tensor | None

    @property
    def rounded(self) -> Rounded:
        """The codes as they are stored in files."""
        if not self._ordered:
            return Rounded(self.codes, self.scale, self.zero)
        codes, scale, zero = from_cpu(self.codes, self.scale)
        return Rounded(pack(codes, self.number.bits), scale.contiguous(), zero.contiguous())

    def product(self, x: Tensor, *, backend: str) -> Tensor:
        """As `Matrix.product`."""
        if self.inverse is not None:
            x = x * self.inverse.to(x.dtype)
        if self.number.int8_inputs:
            return int8_product(x, self.rounded, backend=backend)
        if self._ordered and x.dtype == SCALE_DTYPE:
            return cpu_product(x, self.codes, self.scale)
        return packed_product(x, self.rounded, self.number.bits, self._shape[1], backend=backend)

    def rows(self, index: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """As `Matrix.rows`. Raises ValueError where several numbers share a byte."""
        if self.number.narrow or self.inverse is not None:
            raise ValueError(f"rows of {self.number.name} cannot be read by number")
        # float8 has no lookup of its own; its bytes do.
        codes = self.codes.view(torch.uint8)[index].view(self.codes.dtype)
        wanted = dtype or self.dtype
        return codes.to(wanted) * self.scale[index].to(wanted)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """As `Matrix.dense`."""
        found = dense(self.rounded, self.number.bits, self._shape[1], dtype)
        return found if self.inverse is None else found * self.inverse.to(dtype)

    def give(self, dtype: torch.dtype) -> None:
        """As `Matrix.give`."""
        self.dtype = dtype

    def lay_out(self) -> None:
        """As `Matrix.lay_out`: 4 bits on a CPU, with bfloat16 rows and a multiple of 16 rows of its
        own. Other matrices are read as they are stored in files.
        """
        rounded = Rounded(self.codes, self.scale, self.zero)
        if not self._ordered and cpu_takes(rounded, self.number.bits, self.dtype):
            self.codes, self.scale = for_cpu(rounded)
            self.zero, self._ordered = None, True

    def _save_to_state_dict(
        self, destination: dict[str, Tensor], prefix: str, keep_vars: bool
    ) -> None:
        """Files hold the codes as they are stored everywhere, whatever this machine reads."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._ordered:
            codes, scale, zero = self.rounded
            assert zero is not None
            destination |= {f"{prefix}codes": codes, f"{prefix}scale": scale, f"{prefix}zero": zero}

    @property
    def shape(self) -> torch.Size:
        """[N, K]."""
        return self._shape

    @property
    def declared_bytes(self) -> int:
        """As `Matrix.declared_bytes`, with the factors of columns."""
        factors = 0 if self.inverse is None else self._shape[1] * SCALE_DTYPE.itemsize
        return self.number.nbytes(*self._shape) + factors

    @property
    def storage(self) -> str:
        """As `Matrix.storage`."""
        return self.number.name


class Stacked(Matrix):
    """A matrix whose rows are stored in several formats, one block of rows after the other."""

    def __init__(self, parts: Sequence[Weight]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(p if isinstance(p, Matrix) else Plain(p) for p in parts)

    @property
    def blocks(self) -> list[Matrix]:
        """The parts, typed."""
        return [part for part in self.parts if isinstance(part, Matrix)]

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """That of its parts."""
        return self.blocks[0].dtype

    def product(self, x: Tensor, *, backend: str) -> Tensor:
        """As `Matrix.product`."""
        return torch.cat([part.product(x, backend=backend) for part in self.blocks], -1)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """As `Matrix.dense`."""
        return torch.cat([part.dense(dtype) for part in self.blocks])

    def lay_out(self) -> None:
        """As `Matrix.lay_out`."""
        for part in self.blocks:
            part.lay_out()

    @property
    def shape(self) -> torch.Size:
        """[N, K]."""
        shapes = [part.shape for part in self.blocks]
        return torch.Size((sum(s[0] for s in shapes), shapes[0][1]))

    @property
    def declared_bytes(self) -> int:
        """As `Matrix.declared_bytes`."""
        return sum(part.declared_bytes for part in self.blocks)

    @property
    def storage(self) -> str:
        """As `Matrix.storage`."""
        return max(self.blocks, key=Matrix.numel).storage


class Plain(Matrix):
    """Plain numbers as a `Matrix`: one part of another, say."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """Of the numbers."""
        return self.weight.dtype

    def product(self, x: Tensor, *, backend: str) -> Tensor:
        """As `Matrix.product`."""
        return product(x, self.weight.to(x.dtype), backend=backend)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """As `Matrix.dense`."""
        return self.weight.to(dtype)

    @property
    def shape(self) -> torch.Size:
        """[N, K]."""
        return self.weight.shape

    @property
    def declared_bytes(self) -> int:
        """As `Matrix.declared_bytes`."""
        return self.weight.nbytes

    @property
    def storage(self) -> str:
        """As `Matrix.storage`: none of its own."""
        return ""
