"""Names of the formats that states are kept in.

`kv:int8,memory:int8-ef,conv:bfloat16`: what is kept, and how. `kv` are rows that attention reads
(keys and values, MLA's latents), `index` small keys by which such rows are picked, `memory`
recurrent states, `conv` the tails of convolutions. What is left out, and what a model does not
have, is kept as the mixer gives it.

int8, fp8: a scale for each row of a tensor's last dimension: a token's of one head, or a key
channel's of one head of a recurrent state. int2 to int4: a scale and a zero point for it. -g32 and
others: for so many numbers of it. -kivi: keys by channel and values by token, in blocks of 32
tokens (arXiv 2402.02750). -sr: stochastic rounding. -ef: error feedback, what rounding left is kept
in four bits more and added before the next rounding. Of `kv` there may be a policy instead, by
which rows are dropped (`archs/eviction.py`).
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import torch

from archs.errors import MisfitError, UserError, unknown_name
from archs.eviction import FADES, Eviction, EvictionError
from archs.formats import PLAIN, Format
from archs.spec import FixedSpec, RowSpec, StateSpec, TensorSpec
from kernels.quant.runs import WIDE_SCALE
from kernels.quant.torch import NARROW, SCALE_DTYPE

Declared = TypeVar("Declared", bound=TensorSpec)

#: Kinds of state tensors that formats are given for (`TensorSpec.kind`).
KINDS = ("kv", "index", "memory", "conv")
#: Plain numbers that a state can be kept in.
WIDE = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
}  # fmt: skip
#: Numbers of 8 bits, and of fewer, that share a scale.
BYTES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
FEW = tuple(f"int{bits}" for bits in reversed(NARROW))
#: Numbers that share a scale, where they are not a whole row.
GROUPS = (32, 64, 128)
#: Tokens, and values of a token, that share a scale in -kivi.
BLOCK = 32
#: Bits of what rounding left.
RESIDUAL_BITS = 4


class StateFormatError(MisfitError):
    """A format does not fit what an architecture remembers."""


@dataclass(frozen=True, slots=True)
class Kept:
    """How the numbers of one kind of state tensor are kept.

    group: numbers of a scale (None: a whole row). rounding: as `Format`'s. feedback: whether what
    rounding left is kept. blocks: whether keys are kept by channel, in blocks of tokens.
    """

    name: str
    group: int | None = None
    stochastic: bool = False
    feedback: bool = False
    blocks: bool = False

    @classmethod
    def named(cls, name: str) -> Self:
        """From its name. Raises UserError on an unknown number and on what it cannot go with."""
        base, *ways = name.split("-")
        if base not in (*WIDE, *BYTES, *FEW):
            policies = (f"{way}64" for way in (*FADES, "window"))
            raise unknown_name("state format", base, (*WIDE, *BYTES, *FEW, *policies))
        found: dict[str, Any] = {}
        for way in ways:
            told = _way(base, way)
            if told is None or told.keys() & found.keys():
                raise UserError(
                    f"state format '{name}': -{way} does not go with what stands before it; "
                    f"{_ways(base)}"
                )
            found |= told
        if found.get("blocks") and len(found) > 1:
            raise UserError(f"state format '{name}': blocks have groups of their own; leave -g out")
        if found.get("stochastic") and found.get("feedback"):
            raise UserError(f"state format '{name}': take -sr or -ef, not both")
        return cls(base, **found)

    def __str__(self) -> str:
        ways = [
            f"g{self.group}" if self.group else "", "kivi" if self.blocks else "",
            "sr" if self.stochastic else "", "ef" if self.feedback else "",
        ]  # fmt: skip
        return "-".join((self.name, *filter(None, ways)))

    @property
    def bits(self) -> int:
        """Of one number, scales apart."""
        if self.name in FEW:
            return int(self.name.removeprefix("int"))
        return 8 * (WIDE | BYTES)[self.name].itemsize

    def format(self, numbers: int) -> Format:
        """Of a row of so many numbers."""
        rounding: Any = "stochastic" if self.stochastic else "nearest"
        if self.name in WIDE:
            return replace(Format.of(WIDE[self.name]), rounding=rounding)
        group = min(self.group or numbers, numbers)
        if self.name in FEW:
            scale = Format.of(SCALE_DTYPE)
            return Format(
                dtype=torch.uint8, bits=self.bits, kind="int", group=group, scale=scale, zero=scale
            )
        dtype = BYTES[self.name]
        return Format(
            dtype=dtype, bits=8, kind=PLAIN[dtype], group=group, scale=Format.of(WIDE_SCALE),
            rounding=rounding, residual_bits=RESIDUAL_BITS if self.feedback else 0,
        )  # fmt: skip

    def applied(self, tensor: Declared) -> Declared:
        """A tensor as it is kept, its shape that of what the mixer gives."""
        return replace(tensor, format=self.format(tensor.shape[-1]), given=tensor.given_dtype)

    def in_blocks(self, rows: RowSpec) -> tuple[RowSpec, FixedSpec]:
        """Keys and values [2, G, d] in blocks of tokens, and those that wait for a block to be
        full. Raises StateFormatError for rows that are no such pairs.
        """
        pairs = len(rows.shape) == 3 and rows.shape[0] == 2 and rows.shape[2] % BLOCK == 0
        if not pairs or rows.window is not None or rows.every > 1 or rows.picks is not None:
            raise StateFormatError(
                f"{self} keeps keys by channel in blocks of {BLOCK} tokens and values in groups of "
                f"{BLOCK}: '{rows.name}' of shape {list(rows.shape)} is no such pair of whole "
                "heads of all tokens; take int8 or int4"
            )
        open_ = f"{rows.name} block"
        _, heads, dim = rows.shape
        few = Kept(self.name, group=BLOCK).format(BLOCK * dim)
        waiting = FixedSpec(
            name=open_, shape=(BLOCK, *rows.shape), format=rows.format, shards=rows.shards,
            kind=rows.kind, given=rows.given,
        )  # fmt: skip
        block = replace(
            rows, shape=(2, heads, BLOCK * dim), format=few, given=rows.given_dtype, every=BLOCK,
            block=open_,
        )  # fmt: skip
        return block, waiting


def _way(base: str, way: str) -> dict[str, Any] | None:
    """What a way to keep numbers sets; None: `base` does not know it."""
    if re.fullmatch(r"g\d+", way) and int(way[1:]) in GROUPS and base not in WIDE:
        return {"group": int(way[1:])}
    known = {
        "kivi": ("blocks", base in FEW), "ef": ("feedback", base == "int8"),
        "sr": ("stochastic", base in ("bfloat16", "float16", "int8")),
    }  # fmt: skip
    field, fits = known.get(way, ("", False))
    return {field: True} if fits else None


def _ways(base: str) -> str:
    groups = ", ".join(f"-g{group}" for group in GROUPS)
    ways = [groups] if base not in WIDE else []
    ways += ["-kivi"] if base in FEW else []
    ways += ["-ef"] if base == "int8" else []
    ways += ["-sr"] if base in ("bfloat16", "float16", "int8") else []
    return f"{base} takes {', '.join(ways) or 'nothing more'}"


@dataclass(frozen=True, slots=True)
class StateFormat:
    """How the tensors of a model's state are kept, by their kind; others as the mixer gives them.

    Raises UserError on an unknown kind.
    """

    kept: tuple[tuple[str, Kept | Eviction], ...] = ()

    @classmethod
    def named(cls, name: str) -> Self:
        """From its name, "" for a state as mixers give it. Raises UserError on unknown parts."""
        kept: dict[str, Kept | Eviction] = {}
        for part in filter(None, (p.strip() for p in name.split(","))):
            kind, colon, stored = part.partition(":")
            if not colon:
                raise UserError(
                    f"'{part}' in state format '{name}' is no kind with its format; write "
                    f"{' or '.join(f'{k}:int8' for k in KINDS)}"
                )
            if kind not in KINDS:
                raise unknown_name("kind of state", kind, KINDS)
            if kind in kept:
                raise UserError(f"state format '{name}' names {kind} twice; name it once")
            policy = Eviction.named(stored)
            if policy is not None and kind != "kv":
                raise UserError(
                    f"'{part}' in state format '{name}': a store drops rows of attention alone; "
                    f"write kv:{stored}"
                )
            kept[kind] = policy or Kept.named(stored)
        return cls(tuple((kind, kept[kind]) for kind in KINDS if kind in kept))

    def __str__(self) -> str:
        return ",".join(f"{kind}:{kept}" for kind, kept in self.kept)

    def of_kinds(self, kinds: set[str]) -> "StateFormat":
        """What it says of these kinds."""
        return StateFormat(tuple(pair for pair in self.kept if pair[0] in kinds))

    def stored(self, spec: StateSpec, evictable: Collection[str] = ()) -> StateSpec:
        """A layer's state as it is kept; integers stay what they are.

        evictable: row tensors that the mixer reads by attention alone, whose rows may be dropped.
        Raises StateFormatError where a format does not fit a tensor, and EvictionError where a
        policy does not.
        """
        if not self.kept:
            return spec
        formats = dict(self.kept)
        numbers = {t.name for t in (*spec.rows, *spec.fixed) if t.given_dtype.is_floating_point}
        rows: list[RowSpec] = []
        fixed: list[FixedSpec] = []
        for tensor in spec.rows:
            kept = formats.get(tensor.kind) if tensor.name in numbers else None
            if kept is None:
                rows.append(tensor)
            elif isinstance(kept, Eviction):
                if tensor.name not in evictable:
                    raise EvictionError(
                        f"{tensor.kind}:{kept}: the mixer reads '{tensor.name}' otherwise than by "
                        "plain attention; leave it out for this architecture"
                    )
                held, values = kept.applied(tensor)
                rows += held
                fixed += values
            elif kept.blocks:
                block, waiting = kept.in_blocks(tensor)
                rows.append(block)
                # Whoever reads another layer's rows finds what waits there, too.
                fixed += [waiting] if tensor.owner is None else []
            elif kept.feedback:
                raise StateFormatError(
                    f"{tensor.kind}:{kept}: rows are rounded once, so nothing is left to feed "
                    "back; take int8"
                )
            else:
                rows.append(kept.applied(tensor))
        for value in spec.fixed:
            kept = formats.get(value.kind) if value.name in numbers else None
            if isinstance(kept, Eviction):
                raise EvictionError(f"{value.kind}:{kept}: '{value.name}' has no rows to drop")
            if kept is not None and kept.blocks:
                raise StateFormatError(
                    f"{value.kind}:{kept}: blocks are of tokens, and '{value.name}' has none; "
                    "take int8 or int4"
                )
            fixed.append(value if kept is None else kept.applied(value))
        return StateSpec(rows=tuple(rows), fixed=tuple(fixed))
