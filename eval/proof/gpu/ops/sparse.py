"""Sparse attention on a device: index keys, the scan of them, attention over picked rows."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor

from eval.proof.gpu.case import Case, Check, Op, Run, lazily
from eval.proof.gpu.ops.operands import PAGE, angles, binary, dense, on_cpu, paged, random
from kernels.latent.decode import mla_decode, mla_decode_ref
from kernels.sparse.append import index_append, index_append_ref
from kernels.sparse.scan import index_scan, index_scan_ref, scores_of
from kernels.sparse.topk import rank_topk, rank_topk_ref

BF16_LIMIT = 8e-3
#: Scores are sums in float32 of products of bfloat16.
SCORE_LIMIT = 1e-5
EPS = 1e-6
Pairs = Sequence[tuple[Tensor, Tensor]]


def check_append(heads: int, dim: int, rope: int) -> Callable[[torch.device], Pairs]:
    """Keys normed, keys and queries turned, rows in their pages."""

    def run(device: torch.device) -> Pairs:
        table, lengths, pages = paged([3, 73, 132], device)
        cos_sin = angles(256, rope, device)
        q, key = random(3, 3, heads, dim, device=device), random(3, 3, dim, device=device)
        weight, bias = random(dim, device=device), random(dim, device=device)
        pool = torch.zeros(pages * PAGE, dim, dtype=torch.bfloat16, device=device)
        given = q, key, weight, bias, cos_sin, pool, table, lengths - 3
        expected = index_append_ref(*on_cpu(*given), eps=EPS, page_size=PAGE)
        index_append(*given, eps=EPS, page_size=PAGE)
        return list(zip((q, pool), expected, strict=True))

    return run


def check_scan(
    heads: int, dim: int, new: int, *, every: int = 1
) -> Callable[[torch.device], Pairs]:
    """Scores of what is seen, and what is seen, as numbers; every: tokens of a row."""

    def run(device: torch.device) -> Pairs:
        table, lengths, pages = paged([500, new, 65], device)
        q, pool = (
            random(3, new, heads, dim, device=device),
            random(pages * PAGE, dim, device=device),
        )
        weights = random(3, new, heads, device=device, dtype=torch.float32)
        rows = table.shape[1] * PAGE
        past = lengths - new
        ends = (past.long()[:, None] + torch.arange(1, new + 1, device=device)) // every

        def scan(form: Callable[..., Tensor], *given: Tensor) -> Tensor:
            *operands, held, seen = given
            told = {"lengths": None, "ends": seen} if every > 1 else {"lengths": held}
            return form(*operands, **told, rows=rows, page_size=PAGE)

        given = q, weights, pool, table, past, ends
        expected = scan(index_scan_ref, *on_cpu(*given))
        got = scores_of(scan(index_scan, *given))
        scores = [t.masked_fill(t == -torch.inf, 0.0) for t in (got, expected)]
        seen = [(t > -torch.inf).double() for t in (got, expected)]
        return [(scores[0], scores[1]), (seen[0], seen[1])]

    return run


def check_picked(heads: int, rank: int, rope: int) -> Callable[[torch.device], Pairs]:
    """Attention over rows one by one, wherever they lie."""

    def run(device: torch.device) -> Pairs:
        counts = torch.tensor([700, 1, 64, 0], dtype=torch.int32, device=device)
        pool = random(4096, rank + rope, device=device)
        rows = torch.randperm(4096, device=device)[: 4 * 700].view(4, 700).int()
        q, turned = (random(4, 1, heads, n, device=device) for n in (rank, rope))
        scale = (rank + rope) ** -0.5
        expected = mla_decode_ref(*on_cpu(q, turned, pool, rows, counts), scale=scale, page_size=1)
        got = mla_decode(q, turned, pool, rows, counts, scale=scale, page_size=1)
        return [(got, expected)]

    return run


def scan_case(order: int, batch: int, context: int, heads: int, dim: int) -> Case:
    """One new token's ranks of all rows."""

    def build(device: torch.device) -> Mapping[str, Run]:
        table, lengths, pages = paged([context] * batch, device)
        q, pool = (
            random(batch, 1, heads, dim, device=device),
            random(pages * PAGE, dim, device=device),
        )
        # Of one sign: a score near 0 has another rank on its other side.
        weights = random(batch, 1, heads, device=device, dtype=torch.float32).abs()

        @cache
        def keys() -> Tensor:
            return dense(pool[None], table, context)[:, 0]

        return {
            "triton": lambda: index_scan(
                q, weights, pool, table, lengths - 1, rows=context, page_size=PAGE
            ),
            "torch": lazily(lambda: _ranks(q, weights, keys())),
        }

    return Case(
        name=f"{heads} heads d {dim} bf16 batch {batch} context {binary(context)}", order=order,
        moved_bytes=batch * (context * (2 * dim + 8) + 2 * heads * dim),
        flops=2 * batch * context * heads * (dim + 1), build=build,
    )  # fmt: skip


def _ranks(q: Tensor, weights: Tensor, keys: Tensor) -> Run:
    """Two batched products, and their bits in order."""
    query, transposed = q[:, 0], keys.mT
    later = torch.arange(keys.shape[1] - 1, -1, -1, device=q.device)

    def run() -> Tensor:
        dots = torch.bmm(query, transposed).relu_()
        bits = torch.bmm(weights, dots.float()).view(torch.int32)
        return (torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() << 32) | later

    return run


def random_ranks(lists: int, rows: int, device: torch.device) -> Tensor:
    """Of few scores, so that many are equal, as the scan writes them."""
    scores = torch.randint(-9, 9, (lists, rows), device=device)
    return (scores << 32) | torch.arange(rows - 1, -1, -1, device=device)


def check_topk(count: int, rows: int) -> Callable[[torch.device], Pairs]:
    """Places, which are exact."""

    def run(device: torch.device) -> Pairs:
        ranks = random_ranks(5, rows, device)
        return [(rank_topk(ranks, count), rank_topk_ref(ranks.cpu(), count))]

    return run


def topk_case(order: int, batch: int, context: int, count: int) -> Case:
    """One new token's choice of `count` rows; torch's takes another launch to order places."""

    def build(device: torch.device) -> Mapping[str, Run]:
        ranks = random_ranks(batch, context, device)
        return {
            "triton": lambda: rank_topk(ranks, count),
            "torch": lambda: ranks.topk(count, -1, sorted=False).indices.sort(-1).values,
        }

    return Case(
        name=f"{binary(count)} picks batch {batch} context {binary(context)}", order=order,
        moved_bytes=8 * batch * (context + count), flops=0, build=build,
    )  # fmt: skip


PICKED = [
    Check(name=f"{h} heads {rank}+{rope} picked rows", limit=BF16_LIMIT,
          run=check_picked(h, rank, rope))
    for h, rank, rope in ((8, 128, 16), (16, 512, 64), (64, 512, 64))
]  # fmt: skip

OPS = (
    Op(name="index_append",
       checks=[Check(name=f"{heads} heads {dim} rotary {rope}", limit=BF16_LIMIT,
                     run=check_append(heads, dim, rope))
               for heads, dim, rope in ((4, 32, 16), (64, 128, 64))]),
    Op(name="index_scan",
       checks=[Check(name=f"{heads} heads {dim} new {new}", limit=SCORE_LIMIT,
                     run=check_scan(heads, dim, new))
               for heads, dim, new in ((2, 32, 3), (16, 64, 1), (64, 128, 1), (64, 128, 20))]
       + [Check(name=f"64 heads 64 every 4 new {new}", limit=SCORE_LIMIT,
                run=check_scan(64, 64, new, every=4)) for new in (1, 3)],
       cases=[scan_case(1, 64, 16384, 64, 128), scan_case(1, 1, 32768, 64, 128),
              scan_case(2, 1, 131072, 16, 64)]),
    Op(name="rank_topk",
       checks=[Check(name=f"{count} of {rows}", limit=0.0, run=check_topk(count, rows))
               for count, rows in ((3, 65), (65, 65), (2048, 40000))],
       cases=[topk_case(1, 64, 16384, 2048), topk_case(1, 1, 32768, 2048),
              topk_case(2, 1, 131072, 2048)]),
)  # fmt: skip
