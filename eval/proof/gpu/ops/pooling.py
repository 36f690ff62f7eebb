"""Attention over a window and pooled rows, all of them or picked ones, on a device."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from archs.ops.pooling import attend_all_pooled
from archs.state import Seen
from eval.proof.gpu.case import Case, Check, Op, Run, lazily
from eval.proof.gpu.ops.operands import PAGE, angles, binary, dense, paged, random
from kernels.pooling.decode import pooled_decode, pooled_decode_ref

BF16_LIMIT = 8e-3
#: Rows of a window, and those that a sequence holds at most.
WINDOW, HELD = 128, 200
Pairs = Sequence[tuple[Tensor, Tensor]]


def operands(
    lengths: Sequence[int], heads: int, dim: int, every: int, picks: int, new: int,
    device: torch.device,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Tensors of the kernel and its other arguments; picks: 0 where all pooled rows are read."""
    held = torch.tensor(lengths, dtype=torch.int32, device=device)
    # Of its own rows a sequence keeps few, as a store does.
    near_table, kept, near_pages = paged([min(n, HELD) for n in lengths], device)
    far_table, _, far_pages = paged([max(1, n // every) for n in lengths], device)
    tensors: dict[str, Any] = {
        "q": random(len(lengths), new, heads, dim, device=device, scale=dim**-0.5),
        "near": random(near_pages * PAGE, dim, device=device), "near_table": near_table,
        "lengths": kept, "far": random(far_pages * PAGE, dim, device=device),
        "far_table": far_table, "past": held - new,
        "sinks": random(heads, device=device, dtype=torch.float32),
        "cos_sin": angles(max(lengths), dim // 8, device),
    }  # fmt: skip
    if picks:
        rows = min(max(1, n // every) for n in lengths)
        drawn = [torch.randperm(rows, device=device)[:picks] for _ in range(len(lengths) * new)]
        tensors["picks"] = torch.stack(drawn).view(len(lengths), new, -1).sort().values
    return tensors, {"scale": 1.0, "page_size": PAGE, "window": WINDOW, "every": every}


def check_pooled(
    heads: int, dim: int, every: int, picks: int, new: int
) -> Callable[[torch.device], Pairs]:
    """Three times, since splits that do not wait for each other may differ from run to run."""

    def run(device: torch.device) -> Pairs:
        # Every token sees as many pooled rows as it picks.
        lengths = [900, 700, 640] if picks else [900, new, 131]
        tensors, options = operands(lengths, heads, dim, every, picks, new, device)
        expected = pooled_decode_ref(**{n: t.cpu() for n, t in tensors.items()}, **options)
        return [(pooled_decode(**tensors, **options), expected) for _ in range(3)]

    return run


def pooled_case(
    order: int, batch: int, context: int, heads: int, dim: int, every: int, picks: int = 0
) -> Case:
    """One new token; torch's form reads rows that were gathered before."""
    near = min(WINDOW, context)
    far = min(picks, context // every) if picks else context // every

    def build(device: torch.device) -> Mapping[str, Run]:
        tensors, options = operands([context] * batch, heads, dim, every, picks, 1, device)

        @cache
        def rows() -> tuple[Seen, Seen]:
            own = dense(tensors["near"][None], tensors["near_table"], min(context, HELD))[:, 0]
            pooled = dense(tensors["far"][None], tensors["far_table"], context // every)[:, 0]
            if picks:
                of = torch.arange(batch, device=device)[:, None]
                pooled = pooled[of, tensors["picks"][:, 0]]
            return Seen(own[:, -near:], None, False), Seen(pooled, None, False)

        return {
            "triton": lambda: pooled_decode(**tensors, **options),
            "torch": lazily(lambda: _torch(tensors, *rows())),
        }

    named = f"{heads} heads d {dim} bf16 batch {batch} context {binary(context)} every {every}"
    return Case(
        name=named + f" picks {picks}" * bool(picks), order=order,
        moved_bytes=batch * (2 * dim * (near + far + 2 * heads) + 8 * bool(picks) * far),
        flops=4 * batch * heads * (near + far) * dim, build=build,
    )  # fmt: skip


def _torch(tensors: Mapping[str, Tensor], near: Seen, far: Seen) -> Run:
    at = torch.view_as_complex(tensors["cos_sin"])[tensors["past"].long()][:, None, None]
    return lambda: attend_all_pooled(tensors["q"], near, far, tensors["sinks"], at, scale=1.0)


OPS = (
    Op(name="pooled_decode",
       checks=[Check(name=f"{h} heads d {dim} every {every} picks {picks} new {new}",
                     limit=BF16_LIMIT, run=check_pooled(h, dim, every, picks, new))
               for h, dim, every, picks, new in (
                   (8, 64, 8, 0, 3), (8, 64, 4, 40, 2), (16, 96, 4, 0, 1), (64, 256, 128, 0, 4),
                   (64, 256, 4, 150, 4), (64, 512, 4, 0, 1), (64, 512, 4, 150, 1))],
       cases=[pooled_case(1, 64, 16384, 64, 256, 128), pooled_case(1, 1, 131072, 64, 256, 128),
              pooled_case(1, 64, 16384, 64, 256, 4, 512),
              pooled_case(2, 1, 131072, 64, 256, 4, 512),
              pooled_case(2, 64, 16384, 64, 512, 128),
              pooled_case(2, 64, 16384, 64, 512, 4, 512)]),
)  # fmt: skip
