"""Means of the blocks that new tokens complete, from pages of rows to pages of means: one launch.

Native sparse attention (arXiv 2502.11089) attends to one key and value for each block of S tokens;
here they are means. A mean is made of the rows that the cache holds, always by the same program and
in the same order, so it does not depend on how a sequence came.

Legend: B sequences, K new tokens, G KV heads, d channels. One program makes the mean key, or value,
of one head of a block; programs of blocks that are not complete have nothing to do.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot.ahead import Variant
from kernels.aot.recorded import Expected, NamedCall, meta, variants_of
from kernels.checks import form, require
from kernels.device import require_gpu
from kernels.overlap import overlapped, start_next, wait_for_previous
from kernels.pages.write import FLOATS

#: Rows that are summed at a time, and warps of a program.
TILE, WARPS = 64, 4
MAX_DIM = 512


@triton.jit(do_not_specialize=["tokens", "max_pages", "max_mean_pages"])
def block_append_fwd_kernel(  # type: ignore[no-untyped-def]
    pool, page_table, lengths, new, means, mean_table, tokens, max_pages, max_mean_pages,
    pool_rows, mean_rows,
    S: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
    BLOCK_D: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (blocks, 2 * G, B). new may be None."""
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    plane, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    past = tl.load(lengths + b)
    count = tokens
    if new is not None:
        count = tl.load(new + b)
    block = past // S + tl.program_id(0)
    if (block + 1) * S > past + count or block // PAGE >= max_mean_pages:
        return
    c = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, S, TILE):
        place = start + tl.arange(0, TILE)
        row = block * S + tl.minimum(place, S - 1)
        page = tl.load(page_table + b * max_pages + row // PAGE).to(tl.int64)
        at = (plane * pool_rows + page * PAGE + row % PAGE)[:, None] * D + c[None, :]
        inside = (place < S)[:, None] & (c < D)[None, :]
        total += tl.sum(tl.load(pool + at, mask=inside, other=0.0).to(tl.float32), 0)
    page = tl.load(mean_table + b * max_mean_pages + block // PAGE).to(tl.int64)
    at = (plane * mean_rows + page * PAGE + block % PAGE) * D + c
    tl.store(means + at, (total / S).to(means.dtype.element_ty), mask=c < D)


def block_append(
    pool: Tensor, page_table: Tensor, lengths: Tensor, means: Tensor, mean_table: Tensor, *,
    tokens: int, block: int, page_size: int, new: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the means of the blocks that the new tokens complete.

    pool: contiguous [2, G, pages * page_size, d], rows of the new tokens included; d at most 512;
      bfloat16, float16 or float32.
    means: contiguous [2, G, mean_pages * page_size, d] in the same dtype; sums are float32.
    page_table, mean_table: int32 [B, max_pages] each; entry j is the pool page of rows, or means,
      j * page_size and up.
    lengths: int32 [B], rows in the cache BEFORE this step of `tokens` tokens.
    new: int32 [B], valid tokens of right-padded rows (None: all).
    block: rows of a block.
    Raises ValueError naming the argument, its value and the rule, before any launch; the contents
    of the int32 tensors are not checked.
    """
    require_gpu("pool", pool, block_append_fwd_kernel)
    require(tokens >= 1, "tokens", tokens, "must be at least 1")
    require(block >= 1, "block", block, "must be at least 1")
    require(page_size >= 1, "page_size", page_size, "must be at least 1")
    for name, given in (("pool", pool), ("means", means)):
        fits = given.dim() == 4 and given.shape[0] == 2 and given.is_contiguous()
        fits = fits and given.shape[2] % page_size == 0 and 1 <= given.shape[3] <= MAX_DIM
        require(fits and given.dtype in FLOATS, name, form(given),
                "must be contiguous float [2, G, pages * {}, d <= {}]", page_size,
                MAX_DIM)  # fmt: skip
    same = means.shape[1::2] == pool.shape[1::2] and means.dtype == pool.dtype
    require(same, "means", form(means), "must have the heads, channels and dtype of pool")
    batch = lengths.numel()
    for name, table in (("page_table", page_table), ("mean_table", mean_table)):
        fits = table.dim() == 2 and table.shape[0] == batch and table.shape[1] > 0
        require(fits and table.dtype == torch.int32 and table.is_contiguous(), name, form(table),
                "must be contiguous int32 [{}, max_pages]", batch)  # fmt: skip
    for name, vector in (("lengths", lengths), ("new", new)):
        fits = vector is None or (vector.shape == (batch,) and vector.dtype == torch.int32)
        require(fits and (vector is None or vector.is_contiguous()), name,
                vector if vector is None else form(vector), "must be contiguous int32 [{}]",
                batch)  # fmt: skip
    others = {
        "means": means, "page_table": page_table, "mean_table": mean_table, "lengths": lengths,
        "new": new,
    }  # fmt: skip
    for name, tensor in others.items():
        here = tensor is None or tensor.device == pool.device
        require(here, name, None if tensor is None else tensor.device,
                "must be on the device of pool, {}", pool.device)  # fmt: skip
    if batch == 0:
        return
    heads, rows, dim = pool.shape[1:]
    block_append_fwd_kernel[(triton.cdiv(tokens, block), 2 * heads, batch)](
        pool, page_table, lengths, new, means, mean_table, tokens, page_table.shape[1],
        mean_table.shape[1], rows, means.shape[2], S=block, D=dim, PAGE=page_size,
        TILE=min(TILE, triton.next_power_of_2(block)), BLOCK_D=triton.next_power_of_2(dim),
        num_warps=WARPS, **overlapped(pool.device),
    )  # fmt: skip


def block_append_ref(
    pool: Tensor, page_table: Tensor, lengths: Tensor, means: Tensor, mean_table: Tensor, *,
    tokens: int, block: int, page_size: int, new: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The oracle: float64, block by block; returns the new means."""
    means, counts = means.double().clone(), [tokens] * len(lengths) if new is None else new.tolist()
    for b, (past, count) in enumerate(zip(lengths.tolist(), counts, strict=True)):
        for whole in range(past // block, (past + count) // block):
            rows = torch.arange(whole * block, (whole + 1) * block)
            at = page_table[b, rows // page_size].long() * page_size + rows % page_size
            to = int(mean_table[b, whole // page_size]) * page_size + whole % page_size
            means[:, :, to] = pool[:, :, at].double().mean(2)
    return means


def variants() -> list[Variant]:
    """Heads of every scale, blocks below and above a tile, and every dtype; first the paper's."""
    ints = partial(meta, dtype=torch.int32)

    def call(
        dtype: torch.dtype, dim: int, block: int, page: int, *, ragged: bool = False
    ) -> NamedCall:
        pool = meta(2, 1, page, dim, dtype=dtype)
        name = f"block_append {str(dtype)[6:]} d {dim} block {block} page {page}"
        return name + " ragged" * ragged, partial(
            block_append, pool, ints(1, 1), ints(1), pool, ints(1, 1), tokens=1, block=block,
            page_size=page, new=ints(1) if ragged else None,
        )  # fmt: skip

    bf16 = torch.bfloat16
    calls = (
        call(bf16, 128, 64, 64),
        call(bf16, 128, 64, 64, ragged=True),
        *(call(bf16, 32, block, 16) for block in (8, 16)),
        *(call(bf16, 64, block, 64) for block in (32, 64, 96)),
        *(call(dtype, 128, 64, 16) for dtype in (bf16, torch.float16, torch.float32)),
    )
    # Narrow in loops are the page numbers of blocks of more rows than a tile.
    expected = Expected(wide_loads=loads, narrow_in_loops=frozenset({4}))
    return variants_of(calls, {block_append_fwd_kernel: expected})


def loads(v: Variant) -> int:
    """Of 16 bytes a thread, of which a small tile has none."""
    item = 4 if v.signature["pool"] == "*fp32" else 2
    return int(v.constexprs["TILE"] * v.constexprs["BLOCK_D"] * item // (16 * 64 * v.num_warps))
