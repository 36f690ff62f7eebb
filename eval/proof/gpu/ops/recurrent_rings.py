"""Recurrent updates with a ring on a device: held inputs are replayed, the state is seldom stored.

A step reads the state and eight held inputs, appends one; every eighth sequence stores its state,
as in an engine that stores each once in eight steps.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from archs.ops.wkv import WkvWeights
from eval.proof.gpu.case import Case, Run, installed
from eval.proof.gpu.ops.operands import bytes_of, random, slots
from eval.proof.gpu.ops.recurrent_baselines import Baselines
from kernels.recurrent.ring import Ring

ROWS, HELD = 16, 8
#: Inputs without a row for each token.
WHOLE = {
    "a_log", "d", "dt_bias", "log_decay", "cos_sin", "past", "weight", "arrivals",
    *WkvWeights._fields,
}  # fmt: skip


def _int32(values: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def answers(inputs: Mapping[str, Tensor]) -> Tensor:
    """One of a step's inputs that is as large as its outputs."""
    values = inputs["x" if "x" in inputs else "v"]
    return values[:, :, 0] if values.dim() == 5 else values


def check_ring(
    step: Callable[..., Tensor], reference: Callable[..., tuple[Tensor, Tensor]],
    make: Callable[..., dict[str, Tensor]], sizes: tuple[int, ...], row: int, tokens: int,
) -> Callable[[torch.device], Sequence[tuple[Tensor, Tensor]]]:  # fmt: skip
    """Two steps: the first one's inputs are all held by the second, and wrap around the ring.

    Outputs, and states that take in all, some or none of the held inputs.
    """

    def run(device: torch.device) -> Sequence[tuple[Tensor, Tensor]]:
        inputs = make(3, HELD + tokens, sizes, device)
        past, read = _int32((0, 3, 12), device), _int32((4, 1, 2), device)
        held, none = torch.full_like(read, HELD), torch.zeros_like(read)
        pool = random(6, *sizes, device=device, dtype=torch.float32)
        before, ring = pool.clone(), random(6, ROWS, row, device=device)
        whole = {name: t.cpu() for name, t in inputs.items() if name != "arrivals"}
        expected, states = reference(**whole, state=pool[read.long()].cpu())

        def part(at: slice, more: int) -> dict[str, Any]:
            rows = {n: t[:, at].contiguous() for n, t in inputs.items() if n not in WHOLE}
            turn = {"past": inputs["past"] + more} if "past" in inputs else {}
            return {**inputs, **rows, **turn, "state": pool, "read": read, "write": None}

        first = step(**part(slice(HELD), 0), ring=Ring(ring, past, none, none))
        fold = _int32((HELD, 3, 0), device)
        then = step(**part(slice(HELD, None), HELD), ring=Ring(ring, past + HELD, held, fold))
        rest = torch.tensor([0, 2, 3, 5], device=device)
        return [
            (torch.cat((first, then), 1), expected), (pool[4], states[0, HELD - 1]),
            (pool[1], states[1, 2]), (pool[rest], before[rest]),
        ]  # fmt: skip

    return run


def ring_case(
    order: int, step: Callable[..., Tensor], make: Callable[..., dict[str, Tensor]],
    sizes: tuple[int, ...], row: int, batch: int, flops: int, others: Baselines, more: str = "",
) -> Case:  # fmt: skip
    """One token for each of `batch` sequences, states in float32.

    row: elements of a ring's row. flops: of each element of the state, two of which read it out.
    Others take the token on states that are up to date, and store each.
    """
    folding = -(-batch // HELD)

    def build(device: torch.device) -> Mapping[str, Run]:
        inputs = make(batch, 1, sizes, device)
        pool = random(batch, *sizes, device=device, dtype=torch.float32)
        at, settled = slots(batch, device), pool.clone()
        held, none = torch.full_like(at, HELD), torch.zeros_like(at)
        ring = Ring(random(batch, ROWS, row, device=device), at + HELD, held, held)
        step(**inputs, state=settled, read=at, write=None, new=none, ring=ring)
        ring = ring._replace(fold=torch.where(at % HELD == 0, held, none))
        return {
            "triton": lambda: step(**inputs, state=pool, read=at, write=None, ring=ring),
            **others(inputs, settled),
        }

    shapes = make(batch, 1, sizes, torch.device("meta"))
    one = math.prod(sizes)
    return Case(
        name=f"{'x'.join(map(str, sizes))} float32 state batch {batch}{more} ring held {HELD}",
        order=order,
        moved_bytes=4 * one * (batch + folding) + 2 * row * batch * (HELD + 1)
        + bytes_of(answers(shapes), *shapes.values()),
        flops=one * batch * (flops + HELD * (flops - 2)), build=build,
        late=tuple(name for name in ("mamba-ssm", "fla") if installed(name)),
    )  # fmt: skip
