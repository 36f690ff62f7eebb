"""How numbers are stored, as data: rows, fixed tensors and weights each name a format.

All byte counts come from here, scales and zero points included.
"""

from dataclasses import dataclass
from math import ceil
from typing import Literal, Self

import torch

from archs.errors import UserError

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
    Raises UserError on parts that contradict each other.
    """

    dtype: torch.dtype
    bits: int
    kind: Literal["float", "int"] = "float"
    group: int | None = None
    scale: "Format | None" = None
    zero: "Format | None" = None

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

    def nbytes(self, numbers: int) -> int:
        """Bytes of `numbers` numbers that are stored together, their scales included."""
        held = ceil(ceil(numbers * self.bits / 8) / self.dtype.itemsize) * self.dtype.itemsize
        if self.group is None:
            return held
        groups = ceil(numbers / self.group)
        return held + sum(f.nbytes(groups) for f in (self.scale, self.zero) if f is not None)

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        if self.is_plain:
            return name
        scaled = "" if self.group is None else f" in groups of {self.group}"
        return f"{self.kind}{self.bits}{scaled}"
