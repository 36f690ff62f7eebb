"""Calls of the step kernels on operands without memory, for compiling them ahead of time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels.aot.ahead import TOKEN_LOADS, Variant
from kernels.aot.recorded import Expected, NamedCall, lane_loads, meta
from kernels.norm.torch import OutputNorm


def step_call(
    step: Callable[..., object], inputs: list[Any], state: tuple[int, ...], dtype: torch.dtype,
    tokens: int, options: str = "", norm: OutputNorm | None = None, **more: Any,
) -> NamedCall:  # fmt: skip
    """One sequence's step on a pool of `state`, and its name.

    inputs: what comes before the state. options: "ragged", "each", and words for the name alone.
    """
    chosen = options.split()
    slots = partial(meta, dtype=torch.int32)
    given = dict(more, each="each" in chosen, new=slots(1) if "ragged" in chosen else None)
    if norm is not None:
        given["norm"] = norm
    shape = "x".join(map(str, state[-2:]))
    name = f"{step.__name__}_{str(dtype)[6:]}_{shape}_k{tokens}"
    pool = meta(1, *state, dtype=dtype)
    call = partial(step, *inputs, pool, slots(1), slots(1, tokens), **given)
    return "_".join((name, *chosen)), call


def output_norm(gate: Tensor, group: int | None = None) -> OutputNorm:
    """A norm of rows as wide as the gate's, or of groups of so many channels, gated first."""
    return OutputNorm(
        gate=gate, weight=meta(gate.shape[-1]), eps=1e-5, gate_first=group is not None, group=group
    )


def floats(*shape: int) -> Tensor:
    """A parameter that stays in float32."""
    return meta(*shape, dtype=torch.float32)


def _loads(v: Variant) -> int:
    """Of the state's tile, and of y and the gate, once or twice, where they are normed."""
    c = v.constexprs
    dtype = torch.float32 if v.signature["state"] == "*fp32" else torch.bfloat16
    found = lane_loads(c["BLOCK_N"] * c["BLOCK_P"], dtype, v.num_warps)
    d, block = c["NORM_D"], c["BLOCK_D"]
    if d is None or d % 8:
        return found
    rows = lane_loads(c["BLOCK_K"] * block, torch.bfloat16, v.num_warps)
    # A compiler may keep a row of one block instead of reading it again.
    return found + (2 if block >= d else 2 + c["GATE_FIRST"]) * rows


#: Of a step on a matrix for each head.
MATRIX_STEP = Expected(wide_loads=_loads, narrow_in_loops=TOKEN_LOADS)
