"""Calls of the chunked scans on operands without memory, for compiling them ahead of time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.aot.ahead import Variant
from kernels.aot.recorded import NamedCall, both_ways, meta, tile_loads

#: Tokens of a call: several chunks of every scan, the last one short.
TOKENS = 100


def scan_call(
    scan: Callable[..., tuple[Tensor, Tensor]], inputs: list[Tensor], state: tuple[int, ...],
    options: str = "",
) -> NamedCall:  # fmt: skip
    """One sequence's scan, forward and backward, and its name.

    inputs: what comes before the state; state: without the batch. options: "ragged" rows, "given"
    (the first state and the last one's gradient), and words for the name alone.
    """
    chosen = options.split()
    first = meta(1, *state, dtype=torch.float32) if "given" in chosen else None
    new = meta(1, dtype=torch.int32) if "ragged" in chosen else None

    def op(*given: Any) -> Tensor | tuple[Tensor, Tensor]:
        y, last = scan(*given, new=new)
        return y if first is None else (y, last)

    sizes = "x".join(map(str, state[-2:]))
    return both_ways(" ".join((str(inputs[0].dtype), sizes, *chosen)), op, *inputs, first)


def loads_of(*tiles: str) -> Callable[[Variant], int]:
    """Loads of tiles, each a pointer, which may be None, and the constants of its sides."""
    counts = {tile: tile_loads(*tile.split()) for tile in tiles}

    def loads(v: Variant) -> int:
        return sum(counts[tile](v) for tile in tiles if tile.split()[0] in v.signature)

    return loads


def narrow_products(v: Variant) -> bool:
    """Products of float32 are exact, without the matrix unit."""
    return not {"*bf16", "*fp16"}.isdisjoint(v.signature.values())
