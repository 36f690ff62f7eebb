"""Recurrent updates on a device, by their bytes: the state is read and written once."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eval.gpu.case import Case, Check, Op, Run
from eval.gpu.ops import recurrent_baselines as baselines
from eval.gpu.ops.operands import bytes_of, on_cpu, random, slots
from eval.gpu.ops.recurrent_baselines import Baselines
from kernels import conv_step, gdn_step, linear_step, selective_step, ssm_step

BF16_LIMIT = 8e-3
Pairs = Sequence[tuple[Tensor, Tensor]]
Make = Callable[..., dict[str, Tensor]]


def ssm_inputs(b: int, k: int, sizes: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
    """Mamba-2's: sizes are H, N, P; one group."""
    heads, n, p = sizes
    return {
        "x": random(b, k, heads, p, device=device), "dt": random(b, k, heads, device=device),
        "b": random(b, k, 1, n, device=device), "c": random(b, k, 1, n, device=device),
        **_per_head(heads, device), "d": random(heads, device=device, dtype=torch.float32),
    }  # fmt: skip


def gdn_inputs(b: int, k: int, sizes: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
    """The gated delta rule's: sizes are H, N, P; a key head per value head."""
    heads, n, p = sizes
    return {
        "q": random(b, k, heads, n, device=device), "k": random(b, k, heads, n, device=device),
        "v": random(b, k, heads, p, device=device), "a": random(b, k, heads, device=device),
        "b": random(b, k, heads, device=device), **_per_head(heads, device),
    }  # fmt: skip


def linear_inputs(
    b: int, k: int, sizes: tuple[int, ...], device: torch.device
) -> dict[str, Tensor]:
    """Retention's: sizes are H, N, P."""
    heads, n, p = sizes
    decay = -torch.rand(heads, device=device) / 8
    return {
        "q": random(b, k, heads, n, device=device), "k": random(b, k, heads, n, device=device),
        "v": random(b, k, heads, p, device=device), "log_decay": decay,
    }  # fmt: skip


def selective_inputs(
    b: int, k: int, sizes: tuple[int, ...], device: torch.device
) -> dict[str, Tensor]:
    """Mamba's: sizes are E, N."""
    width, n = sizes
    a_log = torch.arange(1, n + 1, device=device).log().expand(width, n).contiguous()
    ones = torch.ones(width, device=device)
    return {
        "x": random(b, k, width, device=device), "dt": random(b, k, width, device=device),
        "b": random(b, k, n, device=device), "c": random(b, k, n, device=device),
        "a_log": a_log, "d": ones, "dt_bias": ones / 8, "z": random(b, k, width, device=device),
    }  # fmt: skip


def _per_head(heads: int, device: torch.device) -> dict[str, Tensor]:
    return {
        "a_log": torch.rand(heads, device=device),
        "dt_bias": random(heads, device=device, dtype=torch.float32),
    }


def check_step(
    step: Callable[..., Tensor], reference: Callable[..., tuple[Tensor, Tensor]], make: Make,
    sizes: tuple[int, ...], tokens: int, dtype: torch.dtype,
) -> Callable[[torch.device], Pairs]:  # fmt: skip
    """Outputs, snapshots and states of scattered slots."""

    def run(device: torch.device) -> Pairs:
        inputs = make(3, tokens, sizes, device)
        pool = random(6, *sizes, device=device, dtype=dtype)
        at = torch.tensor([4, 1, 3], dtype=torch.int32, device=device)
        held = {name: t.cpu() for name, t in inputs.items()}
        expected, states = reference(**held, state=pool[at.long()].cpu())
        each = torch.empty(3, tokens, *sizes, dtype=dtype, device=device)
        y = step(**inputs, state=pool, slots=at, each=each)
        return [(y, expected), (each, states), (pool[at.long()], states[:, -1])]

    return run


def step_case(
    order: int, step: Callable[..., Tensor], make: Make, sizes: tuple[int, ...], batch: int,
    dtype: torch.dtype, flops: int, others: Baselines,
) -> Case:  # fmt: skip
    """One token for each of `batch` sequences; flops: of each element of the state."""

    def build(device: torch.device) -> Mapping[str, Run]:
        inputs = make(batch, 1, sizes, device)
        pool, at = random(batch, *sizes, device=device, dtype=dtype), slots(batch, device)
        return {"triton": lambda: step(**inputs, state=pool, slots=at), **others(inputs, pool)}

    shapes = make(batch, 1, sizes, torch.device("meta"))
    values = shapes.get("x", shapes.get("v"))
    assert values is not None
    size = batch * math.prod(sizes)
    kind = str(dtype).removeprefix("torch.")
    return Case(
        name=f"{'x'.join(map(str, sizes))} {kind} state batch {batch}", order=order,
        moved_bytes=2 * size * dtype.itemsize + bytes_of(values, *shapes.values()),
        flops=flops * size, build=build,
    )  # fmt: skip


def _op(
    name: str, step: Callable[..., Tensor], reference: Callable[..., tuple[Tensor, Tensor]],
    make: Make, checked: tuple[int, ...], timed: Sequence[tuple[int, ...]], flops: int,
    others: Baselines,
) -> Op:  # fmt: skip
    kinds = (torch.float32, torch.bfloat16)
    checks = [
        Check(
            name=f"{'x'.join(map(str, checked))} new {k} {str(dtype)[6:]}", limit=BF16_LIMIT,
            run=check_step(step, reference, make, checked, k, dtype),
        )
        for k in (1, 4, 8)
        for dtype in kinds
    ]  # fmt: skip
    cases = [
        step_case(0 if batch == 64 and dtype == kinds[0] else 2, step, make, sizes, batch, dtype,
                  flops, others)
        for sizes in timed
        for batch in (64, 1, 512)
        for dtype in kinds
    ]  # fmt: skip
    return Op(name=name, checks=checks, cases=cases)


def check_conv(device: torch.device) -> Pairs:
    """Outputs and tails of scattered slots, four tokens."""
    x, pool = random(3, 4, 512, device=device), random(6, 3, 512, device=device)
    weight, bias = random(512, 4, device=device), random(512, device=device)
    at = torch.tensor([4, 1, 3], dtype=torch.int32, device=device)
    held: list[Any] = on_cpu(x, weight, bias, pool[at.long()])
    expected, tails = conv_step.conv_step_ref(*held)
    got = conv_step.conv_step(x, weight, bias, pool, at)
    return [(got, expected), (pool[at.long()], tails[:, -1])]


def conv_case(batch: int, channels: int) -> Case:
    """One token through a convolution of width 4."""

    def build(device: torch.device) -> Mapping[str, Run]:
        x = random(batch, 1, channels, device=device)
        pool = random(batch, 3, channels, device=device)
        weight, bias = random(channels, 4, device=device), random(channels, device=device)
        at = slots(batch, device)

        def by_torch() -> Tensor:
            seen = torch.cat((pool, x), 1)
            pool.copy_(seen[:, 1:])
            summed = torch.einsum("bwc,cw->bc", seen, weight)
            return F.silu(summed + bias)[:, None]

        return {
            "triton": lambda: conv_step.conv_step(x, weight, bias, pool, at), "torch": by_torch
        }  # fmt: skip

    moved = 2 * channels * (8 * batch + 5)
    return Case(name=f"{channels} channels bf16 batch {batch}", order=3, moved_bytes=moved,
                flops=9 * batch * channels, build=build)  # fmt: skip


OPS = (
    _op("ssm_step", ssm_step.ssm_step, ssm_step.ssm_step_ref, ssm_inputs, (8, 128, 64),
        [(64, 128, 64), (64, 128, 128)], 5, baselines.ssm),
    _op("gdn_step", gdn_step.gdn_step, gdn_step.gdn_step_ref, gdn_inputs, (4, 128, 128),
        [(32, 128, 128)], 7, baselines.gdn),
    _op("linear_step", linear_step.linear_step, linear_step.linear_step_ref, linear_inputs,
        (4, 128, 128), [(32, 128, 128)], 5, baselines.linear),
    _op("selective_step", selective_step.selective_step, selective_step.selective_step_ref,
        selective_inputs, (512, 16), [(4096, 16)], 7, baselines.selective),
    Op(name="conv_step", checks=[Check(name="512 new 4", run=check_conv, limit=BF16_LIMIT)],
       cases=[conv_case(64, 6144), conv_case(1, 6144)]),
)  # fmt: skip
