"""Mamba-3's step on a device: its state, angles and last token in slots, beside torch's form."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from eval.proof.gpu.case import Case, Check, Op, Run
from eval.proof.gpu.ops.operands import bytes_of, random, slots
from eval.proof.gpu.ops.recurrent import BF16_LIMIT, in_slots, scattered
from kernels.trapezoid.step import trapezoid_step, trapezoid_step_ref
from kernels.trapezoid.torch import (
    TrapezoidSizes,
    TrapezoidWeights,
    before_of,
    finished,
    rows_of,
    tokens_of,
)
from kernels.trapezoid.torch import trapezoid_step as torch_step

Pairs = Sequence[tuple[Tensor, Tensor]]
SISO = TrapezoidSizes(heads=64, groups=1, n=128, p=64, rank=1, angles=32)
MIMO = TrapezoidSizes(heads=64, groups=1, n=128, p=64, rank=4, angles=32)


def made(
    s: TrapezoidSizes, batch: int, tokens: int, held: int, device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, TrapezoidWeights, Tensor, Tensor, Tensor]:  # fmt: skip
    """Inputs, weights, and pools of last tokens, angles and states in `dtype`."""

    def wide(*shape: int) -> Tensor:
        return random(*shape, device=device, dtype=torch.float32)

    mimo = [wide(s.rank, s.inner) for _ in range(3 * (s.rank > 1))]
    weights = TrapezoidWeights(
        wide(s.heads) - 3, wide(s.heads), random(s.n, device=device), random(s.n, device=device),
        wide(s.rank, s.heads, s.n), wide(s.rank, s.heads, s.n), 1e-5, 1e-4, *mimo,
    )  # fmt: skip
    return (
        random(batch, tokens, sum(s.parts), device=device), weights,
        random(held, 1, s.last, device=device), wide(held, s.heads, s.angles),
        random(held, s.heads, s.n, s.p, device=device, dtype=dtype),
    )  # fmt: skip


def check(s: TrapezoidSizes, tokens: int, dtype: torch.dtype) -> Callable[[torch.device], Pairs]:
    """Outputs, and the states after all tokens in scattered slots."""

    def run(device: torch.device) -> Pairs:
        inputs, weights, *pools = made(s, 3, tokens, 6 + 3 * tokens, device, dtype)
        at, before = scattered(tokens, device), pools[2].clone()
        there = at["read"].long()
        expected, states = trapezoid_step_ref(
            inputs.cpu(), s,
            TrapezoidWeights(*(w.cpu() if isinstance(w, Tensor) else w for w in weights)),  # type: ignore[arg-type]
            *(pool[there].cpu() for pool in pools),
        )  # fmt: skip
        y = trapezoid_step(inputs, s, weights, *pools, **at, each=True)
        return [(y, expected), *in_slots(pools[2], before, tokens, states)]

    return run


def case(order: int, s: TrapezoidSizes, batch: int) -> Case:
    """One token for each of `batch` sequences."""

    def build(device: torch.device) -> Mapping[str, Run]:
        inputs, weights, last, angle, state = made(s, batch, 1, batch, device)
        at = slots(batch, device)

        def by_torch() -> Tensor:
            tokens = tokens_of(inputs, s, weights, angle)
            y, _ = torch_step(tokens, before_of(state, last, s, weights))
            angle.copy_(tokens.angles[:, 0])
            last.copy_(rows_of(tokens.k, inputs[..., s.inner : 2 * s.inner], s))
            return finished(y, tokens.v, inputs[..., : s.inner], s, weights)

        def ours() -> Tensor:
            return trapezoid_step(inputs, s, weights, last, angle, state, at, at[:, None])

        return {"triton": ours, "torch": by_torch}

    inputs, weights, last, angle, state = made(s, batch, 1, batch, torch.device("meta"))
    read = [w for w in weights if isinstance(w, Tensor)]
    return Case(
        name=f"{s.heads}x{s.n}x{s.p} rank {s.rank} float32 state batch {batch}", order=order,
        moved_bytes=bytes_of(inputs, *read) + 2 * bytes_of(last, angle, state)
        + 2 * batch * s.inner,
        flops=batch * s.inner * s.n * (3 + 4 * s.rank), build=build,
    )  # fmt: skip


def _small(rank: int) -> TrapezoidSizes:
    return TrapezoidSizes(heads=4, groups=2, n=64, p=32, rank=rank, angles=16)


OPS = (
    Op(
        name="trapezoid_step",
        checks=[
            Check(name=f"4x64x32 rank {rank} new {k} {str(dtype)[6:]}", limit=BF16_LIMIT,
                  run=check(_small(rank), k, dtype))
            for rank in (1, 4)
            for k in (1, 4, 8)
            for dtype in (torch.float32, torch.bfloat16)
        ],
        cases=[
            *(case(1 if batch == 64 else 2, SISO, batch) for batch in (64, 1, 512)),
            case(2, MIMO, 64),
        ],
    ),
)  # fmt: skip
