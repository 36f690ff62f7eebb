"""Calls of recurrent kernels on operands without memory, for compiling them ahead of time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.aot.ahead import TOKEN_LOADS, Variant
from kernels.aot.recorded import Expected, NamedCall, both_ways, meta, tile_loads
from kernels.norm.torch import OutputNorm
from kernels.recurrent.ring import Ring

#: Rows of a ring that is compiled ahead.
RING = 16


def step_call(
    step: Callable[..., object], inputs: list[Any], state: tuple[int, ...], dtype: torch.dtype,
    tokens: int, options: str = "", norm: OutputNorm | None = None, *, row: int = 0,
    **more: Any,
) -> NamedCall:  # fmt: skip
    """One sequence's step on a pool of `state`, and its name.

    inputs: what comes before the state. options: "ragged", "each", "ring", with rows of so many
    elements, and words for the name alone.
    """
    chosen = options.split()
    slots = partial(meta, dtype=torch.int32)
    given = dict(more, each="each" in chosen, new=slots(1) if "ragged" in chosen else None)
    if norm is not None:
        given["norm"] = norm
    shape = "x".join(map(str, state[-2:]))
    name = f"{step.__name__}_{str(dtype)[6:]}_{shape}_k{tokens}"
    pool = meta(1, *state, dtype=dtype)
    write: Tensor | None = slots(1, tokens)
    if "ring" in chosen:
        write, given["ring"] = None, Ring(meta(1, RING, row), slots(1), slots(1), slots(1))
    call = partial(step, *inputs, pool, slots(1), write, **given)
    return "_".join((name, *chosen)), call


def output_norm(gate: Tensor, group: int | None = None, opened: str = "silu") -> OutputNorm:
    """A norm of rows as wide as the gate's, or of groups of so many channels, gated first."""
    return OutputNorm(
        gate=gate, weight=meta(gate.shape[-1]), eps=1e-5, gate_first=group is not None, group=group,
        opened=opened,
    )  # fmt: skip


def floats(*shape: int) -> Tensor:
    """A parameter that stays in float32."""
    return meta(*shape, dtype=torch.float32)


def _loads(v: Variant) -> int:
    """Of the state's tile, and of y and the gate, once or twice, where they are normed."""
    found = tile_loads("state", "BLOCK_N", "BLOCK_P")(v)
    d, block = v.constexprs["NORM_D"], v.constexprs["BLOCK_D"]
    if d is None or d % 8:
        return found
    # A compiler may keep a row of one block instead of reading it again.
    times = 2 if block >= d else 2 + v.constexprs["GATE_FIRST"]
    return found + times * tile_loads("gate", "BLOCK_K", "BLOCK_D")(v)


#: Of a step on a matrix for each head.
MATRIX_STEP = Expected(wide_loads=_loads, narrow_in_loops=TOKEN_LOADS)

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
