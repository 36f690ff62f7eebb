"""Names of the formats that a model's weights are stored in.

`int4-g64-awq,head:int8,gates:bfloat16`: the format of all matrices with the way their codes were
chosen, then that of the embedding and the head, then that of the rows of matrices that give decays,
gates of states and step sizes. Left out, the embedding and the head of a model in few bits are
int8, and gates stay plain numbers. Norms, convolutions, and matrices that are not read by a plain
product stay plain numbers always.
"""

import re
from dataclasses import dataclass
from typing import Self

import torch

from archs.errors import UserError, unknown_name
from archs.formats import PLAIN, Format
from kernels.quant.torch import NARROW, SCALE_DTYPE

#: Plain numbers that a model can be stored in.
PLAIN_WEIGHTS = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip
#: Columns that share a scale, of integers of fewer than 8 bits.
GROUPS = (32, 64, 128)
#: One element a number, with a scale a row; w8a8: rows of inputs, too, as they come.
BY_ROW = {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "w8a8": torch.int8}
INT8_INPUTS = "w8a8"
NARROW_NAMES = tuple(f"int{bits}-g{group}" for bits in reversed(NARROW) for group in GROUPS)
#: How codes are chosen, and whether inputs are multiplied by factors for it. "": each number's
#: nearest; qat: the same, of weights that were trained to be rounded.
METHODS = {"": False, "awq": True, "gptq": False, "qat": False}
#: Parts of a model whose format may differ, beside its matrices.
PARTS = ("head", "gates")
#: What numbers that are not packed are stored in, beside some that are.
BESIDE = "bfloat16"


@dataclass(frozen=True, slots=True)
class Number:
    """How the numbers of one matrix are stored.

    bits: of a number. group: columns that share a scale; None: a row does, or there is none.
    """

    name: str
    dtype: torch.dtype
    bits: int
    group: int | None = None

    @classmethod
    def named(cls, name: str) -> Self:
        """One of `PLAIN_WEIGHTS`, `BY_ROW` and `NARROW_NAMES`. Raises UserError on another."""
        if name in PLAIN_WEIGHTS:
            dtype = PLAIN_WEIGHTS[name]
            return cls(name, dtype, 8 * dtype.itemsize)
        if name in BY_ROW:
            return cls(name, BY_ROW[name], 8)
        if name not in NARROW_NAMES:
            raise unknown_name("weight format", name, (*PLAIN_WEIGHTS, *BY_ROW, *NARROW_NAMES))
        bits, _, group = name.removeprefix("int").partition("-g")
        return cls(name, torch.uint8, int(bits), int(group))

    @property
    def plain(self) -> bool:
        """Whether a matrix of these numbers is a plain tensor."""
        return self.name in PLAIN_WEIGHTS

    @property
    def int8_inputs(self) -> bool:
        """Whether rows of inputs are rounded to int8, too."""
        return self.name == INT8_INPUTS

    @property
    def narrow(self) -> bool:
        """Whether several numbers share a byte."""
        return self.group is not None

    def row(self, columns: int) -> Format:
        """The format of one row of so many columns, those that fill up its last group included."""
        if self.plain:
            return Format.of(self.dtype)
        scale = Format.of(SCALE_DTYPE)
        return Format(
            dtype=self.dtype, bits=self.bits, kind=PLAIN[self.dtype], group=self.group or columns,
            scale=scale, zero=scale if self.narrow else None,
        )  # fmt: skip

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix, scales and zero points included."""
        stored = columns + (-columns % self.group if self.group else 0)
        return rows * self.row(columns).nbytes(stored)


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How a model's weights are stored. method: how the matrices' codes were chosen.

    Raises UserError on a method that has no codes to choose, an embedding that cannot be read row
    by row, and parts that differ from plain matrices.
    """

    matrices: Number
    head: Number
    gates: Number
    method: str = ""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown_name("way to choose codes", self.method, [*filter(None, METHODS)])
        if self.method == "qat" and self.matrices.plain:
            raise UserError(
                f"'{self.matrices.name}-qat': plain numbers are not rounded; take "
                f"{', '.join((*BY_ROW, *NARROW_NAMES))}"
            )
        if self.method not in ("", "qat") and not self.matrices.narrow:
            raise UserError(
                f"'{self.matrices.name}-{self.method}': {self.method} chooses codes of integers of "
                f"2 to 4 bits; take one of {', '.join(NARROW_NAMES)}"
            )
        if self.head.narrow:
            raise UserError(
                f"head:{self.head.name}: rows of an embedding are read by number, and several "
                f"numbers share a byte; take {', '.join((*PLAIN_WEIGHTS, *BY_ROW))}"
            )
        if self.matrices.plain and (self.head, self.gates) != (self.matrices,) * 2:
            raise UserError(
                f"'{self.matrices.name}' with head:{self.head.name}, gates:{self.gates.name}: "
                "plain numbers are the same in all of a model; leave the parts out"
            )

    @classmethod
    def named(cls, name: str) -> Self:
        """From its name. Raises UserError on an unknown format, method or part."""
        first, *others = name.split(",")
        base, _, method = first.strip().rpartition("-")
        if not base or re.fullmatch(r"g\d+", method):
            base, method = first.strip(), ""
        matrices = Number.named(base)
        beside = matrices.name if matrices.plain else BESIDE
        parts = {"head": matrices.name if matrices.plain else "int8", "gates": beside}
        for other in others:
            part, colon, stored = other.strip().partition(":")
            if part not in PARTS or not colon:
                raise UserError(
                    f"'{other.strip()}' in weight format '{name}' is no part with its format; "
                    f"write {' or '.join(f'{p}:int8' for p in PARTS)}"
                )
            parts[part] = stored
        head, gates = (Number.named(parts[part]) for part in PARTS)
        return cls(matrices, head, gates, method)

    @property
    def plain(self) -> bool:
        """Whether nothing is packed."""
        return self.matrices.plain

    @property
    def factors(self) -> bool:
        """Whether inputs of the matrices are multiplied by factors of their own."""
        return METHODS[self.method]

    @property
    def dtype(self) -> torch.dtype:
        """Of all that is not packed, and what products are computed in."""
        return PLAIN_WEIGHTS[self.matrices.name if self.plain else BESIDE]

    @property
    def storages(self) -> tuple[str, ...]:
        """Names of the formats that products read, plain numbers by ""."""
        numbers = (self.matrices, self.head, self.gates)
        return tuple(dict.fromkeys(["", *("" if n.plain else n.name for n in numbers)]))

    def __str__(self) -> str:
        """The name, without parts that are as they would be if left out."""
        usual = WeightFormat.named(self.matrices.name)
        name = "-".join(filter(None, (self.matrices.name, self.method)))
        for part in PARTS:
            stored = getattr(self, part)
            name += "" if stored == getattr(usual, part) else f",{part}:{stored.name}"
        return name
