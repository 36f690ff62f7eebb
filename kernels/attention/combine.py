"""The results of attention's splits put together, in a launch of its own.

Flash-decoding (arXiv 2307.08691, 2402.05099) divides a sequence's rows among splits; each leaves a
result that is normalised over its own rows, and the log2 of its sum. A program here makes some
columns of one row of the result: it has the log-sum-exps of all splits at hand and loads many
pieces at once. The last split to arrive would read them one after the other, and alone.

B batch, S splits of the grid, M rows of one matrix product, D columns of a result.
"""

import math
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot.ahead import Variant
from kernels.aot.recorded import Expected, NamedCall, meta, tile_loads, variants_of
from kernels.overlap import overlapped, start_next, wait_for_previous

#: Most splits of one sequence.
MAX_SPLITS = 128
#: Columns that a program makes, at most; pieces that it loads at once; its warps.
COLUMNS, PIECES, WARPS = 128, 32, 4


@triton.jit(do_not_specialize=["splits", "group", "tokens", "row_blocks", "heads"])
def split_combine_fwd_kernel(  # type: ignore[no-untyped-def]
    partials, partial_lse, used_splits, out, splits, group, tokens, row_blocks, heads,
    D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_M: tl.constexpr, SPLITS: tl.constexpr,
    PIECES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (rows of a product × blocks of columns, parts, B); splits up to SPLITS."""
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    blocks: tl.constexpr = D // COLUMNS
    column = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    m = tl.program_id(0) // blocks
    part, b = tl.program_id(1), tl.program_id(2)
    counter = b.to(tl.int64) * tl.num_programs(1) + part
    used = tl.load(used_splits + counter)
    row = (part % row_blocks) * BLOCK_M + m
    # A split that is alone has written its result itself.
    if (used > 1) & (row < group * tokens):
        lses = partial_lse + counter * splits * BLOCK_M + m
        s = tl.arange(0, SPLITS)
        lse = tl.load(lses + s * BLOCK_M, mask=s < used, other=float("-inf"))
        top = tl.max(lse, 0)
        # A row that no split has seen anything for has top -inf; its weights are 0, not NaN.
        safe = tl.where(top == float("-inf"), 0.0, top)
        total = tl.sum(tl.exp2(lse - safe), 0)
        sums = tl.zeros([COLUMNS], tl.float32)
        for start in tl.range(0, SPLITS, PIECES):
            p = start + tl.arange(0, PIECES)
            weight = tl.load(lses + p * BLOCK_M, mask=p < used, other=float("-inf"))
            piece = partials + ((counter * splits + p) * BLOCK_M + m)[:, None] * D
            piece = tl.load(piece + column[None, :], mask=(p < used)[:, None], other=0.0)
            sums += tl.sum(tl.exp2(weight - safe)[:, None] * piece, 0)
        head = part // row_blocks * group + row % group
        at = (b.to(tl.int64) * tokens + row // group) * heads + head
        result = sums / tl.where(total == 0.0, 1.0, total)
        tl.store(out + at * D + column, result.to(out.dtype.element_ty))


def split_combine(
    partials: Tensor, partial_lse: Tensor, used_splits: Tensor, out: Tensor, *, row_blocks: int
) -> None:
    """Write the rows of `out` that several splits share.

    partials: float32 [B, parts, S, M, D], a part being a kv head's block of rows; partial_lse:
    float32 [B, parts, S, M], log2; used_splits: int32 [B * parts], how many of the S are written
    (1: `out` is, too); out: contiguous [B, K, H, D]; row_blocks: parts of a kv head.
    """
    batch, parts, splits, block_m, d = partials.shape
    tokens, heads = out.shape[1:3]
    group = heads * row_blocks // parts
    rows = min(block_m, group * tokens)
    columns, most = math.gcd(d, COLUMNS), triton.next_power_of_2(splits)
    split_combine_fwd_kernel[(rows * (d // columns), parts, batch)](
        partials, partial_lse, used_splits, out, splits, group, tokens, row_blocks, heads,
        D=d, COLUMNS=columns, BLOCK_M=block_m, SPLITS=most, PIECES=min(most, PIECES),
        num_warps=WARPS, **overlapped(out.device),
    )  # fmt: skip


def variants() -> list[Variant]:
    """Widths of attention heads and of latents, few splits and many; first heads of 128."""

    def call(dtype: torch.dtype, d: int, block_m: int, splits: int) -> NamedCall:
        floats = partial(meta, 1, 1, splits, block_m, dtype=torch.float32)
        used, out = meta(1, dtype=torch.int32), meta(1, 1, block_m, d, dtype=dtype)
        name = f"split_combine {str(dtype)[6:]} d {d} m {block_m} splits {splits}"
        return name, partial(split_combine, floats(d), floats(), used, out, row_blocks=1)

    calls = (
        call(dtype, d, block_m, splits)
        for dtype in (torch.bfloat16, torch.float16)
        for d, block_m in ((128, 16), (32, 16), (64, 16), (96, 16), (128, 64), (256, 32), (512, 64))
        for splits in (33, 2, MAX_SPLITS)
    )
    loads = tile_loads("partials", "PIECES", "COLUMNS")
    # Log-sum-exps of the splits, a row of the product apart, are narrow.
    expected = Expected(wide_loads=lambda v: min(loads(v), 1), narrow_in_loops=frozenset({4}))
    return variants_of(calls, {split_combine_fwd_kernel: expected})
