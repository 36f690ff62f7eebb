"""Latent attention on a device whose latent heads share one rotary key, in a pool of its own."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from eval.proof.gpu.case import Case, Check, Run
from eval.proof.gpu.ops.operands import PAGE, binary, on_cpu, paged, random
from kernels.latent.decode import mla_decode, mla_decode_ref

BF16_LIMIT = 8e-3
Pairs = Sequence[tuple[Tensor, Tensor]]


def check_grouped(
    heads: int, latents: int, rank: int, rope: int, new: int
) -> Callable[[torch.device], Pairs]:
    """Three times, since splits that do not wait for each other may differ from run to run."""

    def run(device: torch.device) -> Pairs:
        table, held, pages = paged([500, 1, 65, 0], device)
        q, turned = (random(4, new, heads, n, device=device) for n in (rank, rope))
        pool = random(latents, pages * PAGE, rank, device=device)
        keys = random(pages * PAGE, rope, device=device)
        given, scale = (q, turned, pool, table, held), (rank + rope) ** -0.5
        expected = mla_decode_ref(*on_cpu(*given), keys=keys.cpu(), scale=scale, page_size=PAGE)
        return [
            (mla_decode(*given, keys=keys, scale=scale, page_size=PAGE), expected) for _ in range(3)
        ]

    return run


def grouped_case(
    order: int, batch: int, context: int, heads: int, latents: int, rank: int, rope: int, new: int
) -> Case:
    """Beside the `mla_decode` case of as many heads and of rank 512, which reads as many bytes."""
    row, both = latents * rank + rope, 2 * rank + rope

    def build(device: torch.device) -> Mapping[str, Run]:
        table, held, pages = paged([context] * batch, device)
        q, turned = (random(batch, new, heads, n, device=device) for n in (rank, rope))
        pool = random(latents, pages * PAGE, rank, device=device)
        keys = random(pages * PAGE, rope, device=device)

        def ours() -> Tensor:
            return mla_decode(
                q, turned, pool, table, held, keys=keys, scale=192**-0.5, page_size=PAGE
            )

        return {"triton": ours}

    shape = f"{heads} heads {latents}x{rank}+{rope} bf16"
    return Case(
        name=f"{shape} batch {batch} context {binary(context)} new {new}", order=order,
        moved_bytes=2 * batch * (context * row + new * heads * both),
        flops=2 * batch * new * heads * context * both, build=build,
    )  # fmt: skip


CHECKS = [
    Check(name=f"{h} heads {g}x{rank}+{rope} new {new}", limit=BF16_LIMIT,
          run=check_grouped(h, g, rank, rope, new))
    for h, g, rank, rope, new in (
        (128, 2, 256, 64, 1), (128, 2, 256, 64, 2), (32, 8, 128, 64, 4), (8, 4, 32, 16, 3),
    )
]  # fmt: skip
CASES = [grouped_case(2, 128, 8192, 128, 2, 256, 64, new) for new in (1, 2)]
