"""How numbers are stored, as data: rows, fixed tensors and weights each name a format.

All byte counts come from here, scales and zero points included.
"""

from dataclasses import dataclass
from math import ceil
from typing import Literal, Self

import torch

from archs.errors import UserError

Rounding = Literal["nearest", "stochastic"]

#: The dtypes that hold one number each, and what kind of number.
PLAIN: dict[torch.dtype, Literal["float", "int"]] = {
    torch.float64: "float", torch.float32: "float", torch.bfloat16: "float",
    torch.float16: "float", torch.float8_e4m3fn: "float", torch.float8_e5m2: "float",
    torch.int64: "int", torch.int32: "int", torch.int16: "int",
    torch.int8: "int", torch.uint8: "int",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """The storage of a run of numbers.

    dtype: of the tensor that holds them; several narrow numbers may share one element.
    bits: of one number. kind: what the bits mean.
    group: numbers that share one scale; None: no scales. scale, zero: formats of a group's scale
    and zero point; zero None: symmetric.
    rounding: to the nearest number, or to either neighbour, each as likely as it is near.
    residual_bits: of what a number's rounding left, kept beside it for the next rounding.
    Raises UserError on parts that contradict each other.
    """

    dtype: torch.dtype
    bits: int
    kind: Literal["float", "int"] = "float"
    group: int | None = None
    scale: "Format | None" = None
    zero: "Format | None" = None
    rounding: Rounding = "nearest"
    residual_bits: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8 * self.dtype.itemsize:
            raise UserError(
                f"bits={self.bits} do not fit in an element of {self.dtype}; choose 1 to "
                f"{8 * self.dtype.itemsize}, or a wider dtype"
            )
        if (self.group is None) != (self.scale is None):
            raise UserError(
                f"group={self.group} with scale={self.scale}: numbers that share a scale need "
                "both; give both or neither"
            )
        if self.group is not None and self.group < 1:
            raise UserError(f"group={self.group} must be at least 1 number")
        if self.zero is not None and self.scale is None:
            raise UserError("a zero point belongs to a scale; give group and scale, or no zero")
        if self.residual_bits and (self.scale is None or self.zero is not None):
            raise UserError(
                f"residual_bits={self.residual_bits}: what rounding leaves is told in steps of a "
                "symmetric scale; give one, without a zero point"
            )

    @classmethod
    def of(cls, dtype: torch.dtype) -> Self:
        """One element of `dtype` for each number. Raises UserError for a dtype of another kind."""
        if dtype not in PLAIN:
            known = ", ".join(str(d).removeprefix("torch.") for d in PLAIN)
            raise UserError(f"no format of plain numbers has dtype {dtype}; choose one of {known}")
        return cls(dtype=dtype, bits=8 * dtype.itemsize, kind=PLAIN[dtype])

    @property
    def is_plain(self) -> bool:
        """Whether one element of `dtype` is one number, without scales."""
        return self.scale is None and self.bits == 8 * self.dtype.itemsize

    @property
    def is_exact(self) -> bool:
        """Whether numbers of `dtype` are stored as they come."""
        return self.is_plain and self.rounding == "nearest"

    def has_one_scale(self, numbers: int) -> bool:
        """Whether `numbers` numbers are codes of 8 bits to nearest, and all share one scale."""
        alike = self.bits == 8 and self.zero is None and not self.residual_bits
        whole = self.group is not None and self.group >= numbers
        return alike and whole and self.rounding == "nearest"

    def nbytes(self, numbers: int) -> int:
        """Bytes of `numbers` numbers that are stored together, their scales included."""
        held = ceil(ceil(numbers * self.bits / 8) / self.dtype.itemsize) * self.dtype.itemsize
        held += ceil(numbers * self.residual_bits / 8)
        if self.group is None:
            return held
        groups = ceil(numbers / self.group)
        return held + sum(f.nbytes(groups) for f in (self.scale, self.zero) if f is not None)

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        rounded = "" if self.rounding == "nearest" else f", {self.rounding} rounding"
        if self.is_plain:
            return name + rounded
        scaled = "" if self.group is None else f" in groups of {self.group}"
        left = f" and {self.residual_bits} bits of residual" if self.residual_bits else ""
        return f"{self.kind}{self.bits}{scaled}{left}{rounded}"
