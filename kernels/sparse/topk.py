"""The places of the largest ranks of many lists, as `kernels.sparse.scan` and `kernels.blocks.scan`
write them.

A rank is an int64 whose upper half orders scores, and whose lower half the places of equal ones,
the earlier above the later. So the k largest are those whose upper half is above an edge, and the
first few of those at it. One program takes a list. Each of four passes finds eight bits of the
edge: it counts, among the ranks that share the bits found so far, those with each value of the next
eight. A fifth writes places in ascending order. Counts are whole numbers, so the choice is exact.

Legend: L lists, S ranks of a list, k of them taken.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot.ahead import Variant
from kernels.aot.recorded import Expected, NamedCall, meta, variants_of
from kernels.checks import form, require
from kernels.device import require_gpu
from kernels.overlap import overlapped, start_next, wait_for_previous

#: Ranks that a program takes at a time, and its warps.
TILE, WARPS = 2048, 8


@triton.jit
def _keys(ranks, place, rows):  # type: ignore[no-untyped-def]
    """The upper halves of ranks, as unsigned numbers in the same order."""
    upper = (tl.load(ranks + place, mask=place < rows, other=0) >> 32).to(tl.int32)
    return (upper ^ -0x80000000).to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=["count"])
def rank_topk_fwd_kernel(  # type: ignore[no-untyped-def]
    ranks, out, rows, count, TILE: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """Grid (L,)."""
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    each = tl.program_id(0).to(tl.int64)
    ranks += each * rows
    out += each * count
    inner = tl.arange(0, TILE)
    values = tl.arange(0, 256)
    edge = tl.zeros([], tl.uint32)
    found = tl.zeros([], tl.uint32)
    # How many of the ranks at the edge, as far as it is found, are taken.
    ties = count
    for step in range(4):
        shift = 24 - 8 * step
        counts = tl.zeros([256], tl.int32)
        for start in range(0, rows, TILE):
            place = start + inner
            keys = _keys(ranks, place, rows)
            same = (place < rows) & ((keys & found) == edge)
            counts += tl.histogram(((keys >> shift) & 255).to(tl.int32), 256, mask=same)
        reached = tl.cumsum(counts, 0, reverse=True) >= ties
        value = tl.max(tl.where(reached, values, 0), 0)
        ties -= tl.sum(tl.where(values > value, counts, 0), 0)
        edge |= value.to(tl.uint32) << shift
        found |= tl.full([], 255, tl.uint32) << shift
    written = tl.zeros([], tl.int32)
    for start in range(0, rows, TILE):
        place = start + inner
        keys = _keys(ranks, place, rows)
        tied = ((place < rows) & (keys == edge)).to(tl.int32)
        above = (place < rows) & (keys > edge)
        taken = above | ((tied > 0) & (tl.cumsum(tied, 0) <= ties))
        ties -= tl.sum(tied, 0)
        at = written + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(out + at, place.to(tl.int64), mask=taken)
        written += tl.sum(taken.to(tl.int32), 0)


def rank_topk(ranks: Tensor, count: int) -> Tensor:
    """The places of the `count` largest of each list, ascending, int64 [..., count].

    ranks: contiguous int64 [..., S]; of two with equal upper halves the earlier is the larger.
    count: 1 to S.
    Raises ValueError naming the argument, its value and the rule, before any launch; the order of
    equal upper halves is not checked.
    """
    require_gpu("ranks", ranks, rank_topk_fwd_kernel)
    fits = ranks.dim() >= 1 and ranks.dtype == torch.int64 and ranks.is_contiguous()
    require(fits, "ranks", form(ranks), "must be contiguous int64 [..., S]")
    *lists, rows = ranks.shape
    require(1 <= count <= rows, "count", count, "must be 1 to the {} ranks of a list", rows)
    out = ranks.new_empty(*lists, count)
    if out.numel() == 0:
        return out
    rank_topk_fwd_kernel[(out.numel() // count,)](
        ranks, out, rows, count, TILE=TILE, num_warps=WARPS, **overlapped(ranks.device)
    )
    return out


def rank_topk_ref(ranks: Tensor, count: int) -> Tensor:
    """The oracle: Python's sort of each list."""
    found = []
    for row in ranks.flatten(0, -2).tolist():
        largest = sorted(range(len(row)), key=row.__getitem__, reverse=True)[:count]
        found.append(sorted(largest))
    return torch.tensor(found, dtype=torch.int64).view(*ranks.shape[:-1], count)


def variants() -> list[Variant]:
    """Lists of rows of pages: their lengths are multiples of 16."""

    def call(rows: int) -> NamedCall:
        name = f"rank_topk of {rows}"
        return name, functools.partial(rank_topk, meta(1, 1, rows, dtype=torch.int64), 16)

    expected = Expected(wide_loads=TILE * 8 // (16 * 64 * WARPS))
    return variants_of([call(64)], {rank_topk_fwd_kernel: expected})
