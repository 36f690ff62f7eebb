"""Native sparse attention on a device: block means, attention over them, picked blocks as pages."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from eval.proof.gpu.case import Case, Check, Op, Run, lazily
from eval.proof.gpu.ops.operands import PAGE, binary, dense, on_cpu, paged, random
from kernels.attention.decode import attention_decode
from kernels.attention.torch import attention_ref
from kernels.blocks.append import block_append, block_append_ref
from kernels.blocks.pages import block_pages, block_pages_ref, unit_of
from kernels.blocks.scan import block_scan, block_scan_ref, scores_of
from kernels.blocks.torch import attend_means

BF16_LIMIT = 8e-3
#: Weights are made of sums in float32 of products of bfloat16.
WEIGHT_LIMIT = 1e-5
Pairs = Sequence[tuple[Tensor, Tensor]]


def check_append(heads: int, dim: int, block: int, new: int) -> Callable[[torch.device], Pairs]:
    """Means of the blocks that new tokens complete; others stay what they were."""

    def run(device: torch.device) -> Pairs:
        table, lengths, pages = paged([2 * block + new - 1, new, 132], device)
        pool = random(2, heads, pages * PAGE, dim, device=device)
        means = torch.zeros_like(pool)
        given = pool, table, lengths - new, means, table
        expected = block_append_ref(*on_cpu(*given), tokens=new, block=block, page_size=PAGE)
        block_append(*given, tokens=new, block=block, page_size=PAGE)
        return [(means, expected)]

    return run


def check_scan(
    heads: tuple[int, int], dim: int, block: int, new: int, *, ranks: bool
) -> Callable[[torch.device], Pairs]:
    """The attention; or what is ranked, as numbers, and its weights, but for the first block's."""

    def run(device: torch.device) -> Pairs:
        h, g = heads
        table, held, pages = paged([200, 1, 65], device)
        q = random(3, new, h, dim, device=device)
        k, v = random(2, g, pages * PAGE, dim, device=device)
        lengths, means = held * block + block // 2 - new, table.shape[1] * PAGE
        options: dict[str, Any] = {"means": means, "block": block, "page_size": PAGE}
        out, scores = block_scan_ref(*on_cpu(q, k, v, table, lengths), **options)
        got, found = block_scan(q, k, v, table, lengths, **options)
        if not ranks:
            return [(got, out)]
        both = [t[..., 1:].cpu().double() for t in (scores_of(found), scores)]
        seen = [(t > -torch.inf).double() for t in both]
        weights = [t.clamp(min=0.0) for t in both]
        return [(weights[0], weights[1]), (seen[0], seen[1])]

    return run


def check_pages(heads: tuple[int, int], dim: int, block: int) -> Callable[[torch.device], Pairs]:
    """Attention over the pages of picked blocks, whatever parts of pages they are."""

    def run(device: torch.device) -> Pairs:
        h, g = heads
        table, lengths, pages = paged([20 * block + 5, 1, 9 * block], device)
        picks = torch.stack([torch.randperm(7, device=device)[:5] for _ in range(3 * g)])
        picks = picks.view(3, 1, g, 5)
        q = random(3, 1, h, dim, device=device)
        k, v = random(2, g, pages * PAGE, dim, device=device)
        given = picks, table, lengths - 1
        rows = block_pages_ref(*on_cpu(*given), block=block, page_size=PAGE)
        asked = q.unflatten(2, (g, -1)).flatten(0, 2)[:, None]
        expected = torch.cat(
            [
                attention_ref(
                    *on_cpu(asked[i : i + 1], k[i % g, at][None, None], v[i % g, at][None, None]),
                    scale=dim**-0.5, mask=torch.ones(1, 1, 1, len(at), dtype=torch.bool),
                )
                for i, at in enumerate(r.to(device) for r in rows)
            ]
        )  # fmt: skip
        found, counts = block_pages(*given, block=block, page_size=PAGE, pool_rows=pages * PAGE)
        got = attention_decode(
            asked, k.view(1, -1, dim), v.view(1, -1, dim), found, counts,
            page_size=unit_of(block, PAGE),
        )  # fmt: skip
        return [(got, expected)]

    return run


def scan_case(order: int, batch: int, context: int, heads: tuple[int, int], dim: int) -> Case:
    """One new token's attention over the means of blocks of 64, beside which blocks are ranked."""
    (h, g), block = heads, 64
    count = context // block

    def build(device: torch.device) -> Mapping[str, Run]:
        table, held, pages = paged([count] * batch, device)
        q = random(batch, 1, h, dim, device=device)
        k, v = random(2, g, pages * PAGE, dim, device=device)
        lengths = held * block

        @cache
        def keys_values() -> tuple[Tensor, Tensor, Tensor]:
            mask = torch.ones(1, 1, count, dtype=torch.bool, device=device)
            return dense(k, table, count), dense(v, table, count), mask

        return {
            "triton": lambda: block_scan(
                q, k, v, table, lengths, means=count, block=block, page_size=PAGE
            )[0],
            "torch": lazily(
                lambda: lambda: attend_means(q, *keys_values(), scale=dim**-0.5)[0]
            ),
        }  # fmt: skip

    return Case(
        name=f"{h}/{g} heads d {dim} bf16 batch {batch} context {binary(context)}", order=order,
        moved_bytes=batch * (4 * count * g * dim + 8 * count * g + 4 * h * dim),
        flops=4 * batch * count * h * dim, build=build,
    )  # fmt: skip


OPS = (
    Op(name="block_append",
       checks=[Check(name=f"{heads} heads d {dim} block {block} new {new}", limit=BF16_LIMIT,
                     run=check_append(heads, dim, block, new))
               for heads, dim, block, new in ((2, 32, 8, 3), (4, 128, 64, 1), (2, 64, 96, 9))]),
    Op(name="block_scan",
       checks=[Check(name=f"{h}/{g} d {dim} block {block} new {new}" + " ranks" * ranks,
                     limit=WEIGHT_LIMIT if ranks else BF16_LIMIT,
                     run=check_scan((h, g), dim, block, new, ranks=ranks))
               for h, g, dim, block, new in ((4, 2, 32, 8, 3), (64, 4, 128, 64, 1))
               for ranks in (False, True)],
       cases=[scan_case(1, 64, 16384, (64, 4), 128), scan_case(1, 1, 65536, (64, 4), 128)]),
    Op(name="block_pages",
       checks=[Check(name=f"{h}/{g} d {dim} block {block}", limit=BF16_LIMIT,
                     run=check_pages((h, g), dim, block))
               for h, g, dim, block in ((4, 2, 32, 8), (4, 2, 64, 32), (64, 4, 128, 64))]),
)  # fmt: skip
