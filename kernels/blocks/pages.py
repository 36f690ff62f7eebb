"""The pages of the blocks that each token reads, in order, for attention over pages.

Attention over a few blocks of rows is attention over pages (`kernels.attention.decode`) of a
sequence whose pages are those blocks: one for every token and KV head, with a table of its own. All
blocks but a token's own are read whole, and its own comes last, so how many rows there are says all
that a mask would.

Legend: B sequences, K new tokens, G KV heads, S rows of a block, n blocks, u rows of a page.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot.ahead import Variant
from kernels.aot.recorded import Expected, NamedCall, meta, variants_of
from kernels.blocks.torch import NEWEST
from kernels.checks import form, require
from kernels.device import require_gpu
from kernels.overlap import overlapped, start_next, wait_for_previous

#: Entries that a program writes, and its warps.
ENTRIES, WARPS = 128, 1


@triton.jit(do_not_specialize=["tokens", "heads", "max_pages", "pool_rows", "picked", "entries"])
def block_pages_fwd_kernel(  # type: ignore[no-untyped-def]
    picks, page_table, lengths, table, counts, tokens, heads, max_pages, pool_rows, picked, entries,
    S: tl.constexpr, PAGE: tl.constexpr, UNIT: tl.constexpr, NEWEST: tl.constexpr,
    ENTRIES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (B * K * G, tiles of entries)."""
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    each = tl.program_id(0).to(tl.int64)
    g, token = each % heads, each // heads
    b = token // tokens
    position = tl.load(lengths + b) + (token % tokens).to(tl.int32)
    own = position // S
    older = tl.minimum(tl.maximum(own - NEWEST + 1, 0), picked)
    newest = tl.minimum(own + 1, NEWEST)
    entry = tl.program_id(1) * ENTRIES + tl.arange(0, ENTRIES)
    j = entry // (S // UNIT)
    block = tl.load(picks + each * picked + j, mask=j < older, other=0).to(tl.int32)
    block = tl.where(j < older, block, tl.minimum(own + 1 - newest + j - older, own))
    row = block * S + entry % (S // UNIT) * UNIT
    page = tl.minimum(row // PAGE, max_pages - 1)
    page = tl.load(page_table + b * max_pages + page)
    # Pages of a KV head lie behind those of the heads before it.
    at = (page.to(tl.int64) * PAGE + row % PAGE + g * pool_rows) // UNIT
    tl.store(table + each * entries + entry, at.to(tl.int32), mask=entry < entries)
    if tl.program_id(1) == 0:
        tl.store(counts + each, (older + newest - 1) * S + position % S + 1)


def unit_of(block: int, page_size: int) -> int:
    """Rows that lie together in blocks and in pages: a multiple of 16, or single ones."""
    for unit in range(min(block, page_size) // 16 * 16, 0, -16):
        if block % unit == 0 and page_size % unit == 0:
            return unit
    return 1


def block_pages(
    picks: Tensor, page_table: Tensor, lengths: Tensor, *, block: int, page_size: int,
    pool_rows: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Page tables of the n blocks of every token and KV head, int32 [B·K·G, n·S/u], and how many
    rows they have, int32 [B·K·G].

    picks: contiguous int64 [B, K, G, n - 2]: blocks older than a token's own and the one before,
      of which it has n - 2 or, if there are fewer, all; what stands behind them may be anything.
    page_table: int32 [B, max_pages]; entry j is the pool page of positions j * page_size and up.
    lengths: int32 [B], rows in the cache BEFORE this step: token i sits at position lengths[b] + i.
    pool_rows: rows of a pool [G, rows, d]; the tables are of its view as [1, G · rows, d] in pages
      of `unit_of(block, page_size)` rows.
    Raises ValueError naming the argument, its value and the rule, before any launch; the contents
    of the integer tensors are not checked.
    """
    require_gpu("picks", picks, block_pages_fwd_kernel)
    fits = picks.dim() == 4 and picks.dtype == torch.int64 and picks.is_contiguous()
    require(fits and min(picks.shape[1:]) > 0, "picks", form(picks),
            "must be contiguous int64 [B, K, G, n - 2]")  # fmt: skip
    batch, tokens, heads, picked = picks.shape
    require(block >= 1, "block", block, "must be at least 1")
    require(page_size >= 1, "page_size", page_size, "must be at least 1")
    require(pool_rows >= 1 and pool_rows % page_size == 0, "pool_rows", pool_rows,
            "must be a positive multiple of {}", page_size)  # fmt: skip
    fits = page_table.dim() == 2 and page_table.shape[0] == batch and page_table.shape[1] > 0
    require(fits and page_table.dtype == torch.int32 and page_table.is_contiguous(), "page_table",
            form(page_table), "must be contiguous int32 [{}, max_pages]", batch)  # fmt: skip
    fits = lengths.shape == (batch,) and lengths.dtype == torch.int32 and lengths.is_contiguous()
    require(fits, "lengths", form(lengths), "must be contiguous int32 [{}]", batch)
    for name, tensor in {"page_table": page_table, "lengths": lengths}.items():
        require(tensor.device == picks.device, name, tensor.device,
                "must be on the device of picks, {}", picks.device)  # fmt: skip
    unit = unit_of(block, page_size)
    entries = (picked + NEWEST) * (block // unit)
    all_of = batch * tokens * heads
    table = torch.empty((all_of, entries), dtype=torch.int32, device=picks.device)
    counts = torch.empty(all_of, dtype=torch.int32, device=picks.device)
    if batch == 0:
        return table, counts
    block_pages_fwd_kernel[(all_of, triton.cdiv(entries, ENTRIES))](
        picks, page_table, lengths, table, counts, tokens, heads, page_table.shape[1], pool_rows,
        picked, entries, S=block, PAGE=page_size, UNIT=unit, NEWEST=NEWEST,
        ENTRIES=ENTRIES, num_warps=WARPS, **overlapped(picks.device),
    )  # fmt: skip
    return table, counts


def block_pages_ref(
    picks: Tensor, page_table: Tensor, lengths: Tensor, *, block: int, page_size: int
) -> list[Tensor]:
    """The oracle: the pool rows that each token and KV head reads, in order, of its head's pool."""
    batch, tokens, heads, _ = picks.shape
    found = []
    for b in range(batch):
        for i in range(tokens):
            position = int(lengths[b]) + i
            own = position // block
            for g in range(heads):
                there = picks[b, i, g, : max(0, own - NEWEST + 1)].tolist()
                read = [*there, *range(max(0, own - NEWEST + 1), own + 1)]
                starts = torch.tensor(read)[:, None] * block
                rows = (starts + torch.arange(block)).flatten()
                # Of its own block, the last, those up to itself.
                rows = rows[: len(rows) - ((own + 1) * block - 1 - position)]
                at = page_table[b, rows // page_size].long() * page_size + rows % page_size
                found.append(at)
    return found


def variants() -> list[Variant]:
    """Blocks that are pages, parts of pages, and several; and single rows. First the paper's."""
    ints = functools.partial(meta, dtype=torch.int32)

    def call(picks: int, block: int, page: int) -> NamedCall:
        return f"block_pages {picks} of {block} page {page}", functools.partial(
            block_pages, meta(1, 1, 1, picks, dtype=torch.int64), ints(1, 1), ints(1), block=block,
            page_size=page, pool_rows=page,
        )  # fmt: skip

    calls = (call(14, 64, 64), call(14, 64, 16), call(2, 32, 64), call(2, 8, 16))
    return variants_of(calls, {block_pages_fwd_kernel: Expected(wide_loads=0)})
