"""Latents and tied rows on a device that share one rotary key, in a pool of its own."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from eval.proof.gpu.case import Case, Check, Run
from eval.proof.gpu.ops.operands import PAGE, angles, binary, on_cpu, paged, random
from kernels.latent.append import latent_append, latent_append_ref
from kernels.latent.decode import mla_decode, mla_decode_ref

BF16_LIMIT = 8e-3
EPS = 1e-5
Pairs = Sequence[tuple[Tensor, Tensor]]


def check_append(
    heads: int, groups: int, width: int, rope: int, *, normed: bool
) -> Callable[[torch.device], Pairs]:
    """Rows normed, or tied ones as they are, keys and queries turned, both pools written."""

    def run(device: torch.device) -> Pairs:
        table, lengths, pages = paged([3, 73, 132], device)
        before, cos_sin = lengths - 3, angles(256, rope, device)
        q = random(3, 3, heads, rope, device=device)
        key, rows = random(3, 3, rope + groups * width, device=device).tensor_split((rope,), -1)
        rows = rows.unflatten(-1, (groups, width))
        weight = random(groups, width, device=device) if normed else None
        pool = torch.zeros(groups, pages * PAGE, width, dtype=torch.bfloat16, device=device)
        keys = torch.zeros(pages * PAGE, rope, dtype=torch.bfloat16, device=device)
        written = cos_sin, pool, table, before
        expected = latent_append_ref(
            q.cpu(), key.cpu(), rows.cpu(), None if weight is None else weight.cpu(),
            *on_cpu(*written), keys=keys.cpu(), eps=EPS, page_size=PAGE,
        )  # fmt: skip
        latent_append(q, key, rows, weight, *written, keys=keys, eps=EPS, page_size=PAGE)
        return list(zip((q, pool, keys), expected, strict=True))

    return run


def check_grouped(
    heads: int, latents: int, rank: int, rope: int, new: int, *, tied: bool = False
) -> Callable[[torch.device], Pairs]:
    """Three times, since splits that do not wait for each other may differ from run to run.

    tied: queries meet the first half of the columns.
    """

    def run(device: torch.device) -> Pairs:
        table, held, pages = paged([500, 1, 65, 0], device)
        asked = rank // 2 if tied else rank, rope
        q, turned = (random(4, new, heads, n, device=device) for n in asked)
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
] + [
    Check(name=f"{h} heads {g}x{rank}+{rope} new {new} tied", limit=BF16_LIMIT,
          run=check_grouped(h, g, rank, rope, new, tied=True))
    for h, g, rank, rope, new in ((32, 8, 128, 64, 1), (8, 2, 64, 32, 2), (6, 3, 32, 16, 4))
]  # fmt: skip
APPENDED = [
    Check(name=f"{heads} heads {groups}x{width}+{rope}{' tied' * (not normed)}", limit=BF16_LIMIT,
          run=check_append(heads, groups, width, rope, normed=normed))
    for heads, groups, width, rope, normed in (
        (32, 2, 256, 64, True), (6, 2, 48, 16, True), (32, 8, 128, 64, False),
        (6, 3, 32, 16, False),
    )
]  # fmt: skip
CASES = [grouped_case(2, 128, 8192, 128, 2, 256, 64, new) for new in (1, 2)]
