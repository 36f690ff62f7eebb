"""Absorbed latent attention of 1 to 4 new tokens per sequence over a paged latent cache.

Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) keeps one row c = [latent | rotary key]
per position. With the up-projections absorbed into query and output, a head computes
softmax(scale · (q_latent · c_latent + q_rotary · c_rotary)) c_latent: keys are whole rows, values
their first R columns, so a row is loaded once. Several latent heads make it grouped-latent
attention (arXiv 2505.21487), where all of them may share one rotary key, in a pool of its own.
Queries that meet the first n columns alone make it grouped-tied attention (there, too).

Legend: B batch, K new tokens, H query heads, G latent heads, R latent width, r rotary width,
n query width, M rows of one matrix product: the H/G query heads of a latent head times K tokens.
Splits, the fixed grid and the combination are those of `attention.decode`.
"""

import functools
import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.aot.ahead import Variant
from kernels.aot.recorded import Expected, NamedCall, meta, variants_of
from kernels.attention.combine import MAX_SPLITS, split_combine
from kernels.attention.decode import SPILLS, multiprocessors
from kernels.attention.tiles import page_of, rows_of
from kernels.device import gpu
from kernels.latent.decode_checks import WIDTHS, WIDTHS_APART, check
from kernels.overlap import overlapped, start_next, wait_for_previous

#: Fewest rows worth a split of their own.
SPLIT_ROWS = 256


@dataclass(frozen=True, slots=True)
class Config:
    """Cache rows per tile, warps per program, stages of the load pipeline."""

    tile: int
    warps: int
    stages: int


#: By family of GPUs, then by latent width, up to a power of two, and M: the largest M takes what
#: is more. 64 rows of 512 columns fit the registers only where the matrix unit reads queries and
#: cache rows from shared memory (Hopper's wgmma). AMD programs have 64 KiB of shared memory, so one
#: tile of 512 columns at a time, and with 4 warps twice the registers of those with 8.
CONFIGS: dict[str, dict[tuple[int, int], Config]] = {
    "hopper": {
        (32, 16): Config(64, 4, 3), (32, 64): Config(64, 4, 3),
        (64, 16): Config(64, 4, 3), (64, 64): Config(64, 4, 3),
        (128, 16): Config(64, 4, 3), (128, 64): Config(64, 8, 3),
        (256, 16): Config(32, 4, 3), (256, 32): Config(64, 4, 3), (256, 64): Config(64, 4, 2),
        (512, 16): Config(32, 4, 3), (512, 32): Config(32, 4, 3), (512, 64): Config(64, 8, 2),
    },
    "nvidia": {
        (32, 16): Config(64, 4, 3), (32, 64): Config(32, 4, 3),
        (64, 16): Config(64, 4, 3), (64, 64): Config(32, 4, 3),
        (128, 16): Config(64, 4, 3), (128, 64): Config(64, 8, 3),
        (256, 16): Config(16, 4, 3), (256, 32): Config(32, 8, 3),
        (512, 16): Config(32, 8, 3), (512, 32): Config(32, 8, 3),
    },
    "amd": {
        (32, 16): Config(64, 2, 3), (32, 64): Config(64, 4, 3),
        (64, 16): Config(64, 2, 3), (64, 64): Config(64, 4, 3),
        (128, 16): Config(64, 2, 3), (128, 64): Config(32, 4, 3),
        (256, 16): Config(32, 4, 3), (256, 32): Config(32, 4, 2),
        (512, 16): Config(32, 4, 2), (512, 32): Config(16, 4, 2),
    },
}  # fmt: skip
#: Bytes that 32 and 64 rows of 256 and more columns may spill on Hopper. On an H100 these tiles are
#: 15 to 30 % faster than what does not spill: bf16, pages of 64, no window, where 0 to 32 bytes are
#: spilled. The other variants spill up to 176 and were not timed.
MEASURED_SPILLS = 176


@triton.jit(do_not_specialize=["max_pages", "group", "tokens", "row_blocks", "window", "sinks"])
def mla_decode_fwd_kernel(  # type: ignore[no-untyped-def]
    q, q_rotary, pool, keys, page_table, lengths, out, partials, partial_lse, used_splits,
    scale_log2, q_stride_b, q_stride_t, q_stride_h, r_stride_b, r_stride_t, r_stride_h,
    pool_stride_g,
    max_pages, group, tokens, row_blocks, window, sinks,
    LATENT: tl.constexpr, BLOCK_LATENT: tl.constexpr, QUERY: tl.constexpr, ROTARY: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr, SPLIT_TILES: tl.constexpr,
    WINDOWED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (splits, G * tiles of M, B). keys may be None."""
    ROW: tl.constexpr = LATENT + ROTARY if keys is None else LATENT
    wait_for_previous(OVERLAP)
    split, part, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    g = part // row_blocks
    splits = tl.num_programs(0)
    length = tl.load(lengths + b)

    # The tiles to visit: those of the sinks older than the windows, then `oldest` to the end.
    last = tl.maximum(length - 1, 0)
    oldest = 0
    sunk = 0
    if WINDOWED:
        oldest = tl.maximum(length - tokens + 1 - window, 0)
        sunk = tl.minimum(sinks, oldest)
    sink_tiles = tl.cdiv(sunk, TILE)
    tiles = tl.cdiv(length, TILE) - oldest // TILE + sink_tiles
    per_split = tl.maximum(tl.cdiv(tiles, splits), SPLIT_TILES)
    used = tl.maximum(tl.cdiv(tiles, per_split), 1)
    if split >= used:
        return
    if split == 0:
        tl.store(used_splits + b * tl.num_programs(1) + part, used)
    start = split * per_split
    end = tl.minimum(start + per_split, tiles)

    # Row m of the product is head m % group of token m // group.
    m = (part % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    latent = tl.arange(0, BLOCK_LATENT)
    rotary = tl.arange(0, ROTARY)
    token = m // group
    head = g * group + m % group
    real = (m < group * tokens)[:, None]
    position = length - tokens + token
    q_rows = (q + b.to(tl.int64) * q_stride_b + token * q_stride_t + head * q_stride_h)[:, None]
    asked = real
    if QUERY != BLOCK_LATENT:
        # Zeros meet the columns that are values alone.
        asked = asked & (latent < QUERY)[None, :]
    q_latent = tl.load(q_rows + latent[None, :], mask=asked, other=0.0)
    r_rows = (q_rotary + b.to(tl.int64) * r_stride_b + token * r_stride_t + head * r_stride_h)[
        :, None
    ]
    q_turned = tl.load(r_rows + rotary[None, :], mask=real, other=0.0)
    pool += g.to(tl.int64) * pool_stride_g
    page_table += b.to(tl.int64) * max_pages

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_LATENT], tl.float32)
    page = page_of(page_table, start, sink_tiles, sunk, oldest, last, PAGE, TILE, WINDOWED)
    for i in tl.range(start, end):
        row, held = rows_of(i, sink_tiles, sunk, oldest, last, TILE, WINDOWED)
        at = pool + page.to(tl.int64) * (PAGE * ROW)
        at = (at + held % PAGE * ROW)[:, None]
        if keys is None:
            key_at = at + LATENT
        else:
            key_at = keys + page.to(tl.int64) * (PAGE * ROTARY)
            key_at = (key_at + held % PAGE * ROTARY)[:, None]
        # The next page is looked up here: a load that feeds loads would cost pipeline stages.
        after = tl.minimum(i + 1, end - 1)
        page = page_of(page_table, after, sink_tiles, sunk, oldest, last, PAGE, TILE, WINDOWED)
        if LATENT == BLOCK_LATENT:
            c = tl.load(at + latent[None, :])
        else:
            c = tl.load(at + latent[None, :], mask=(latent < LATENT)[None, :], other=0.0)
        k_rotary = tl.load(key_at + rotary[None, :])
        logits = tl.dot(q_turned, tl.trans(k_rotary), input_precision="ieee")
        logits = tl.dot(q_latent, tl.trans(c), logits, input_precision="ieee")
        age = position[:, None] - row[None, :]
        if WINDOWED:
            # One comparison for all: as an unsigned number an age below 0 is huge.
            limit = tl.where(row == held, tl.where(row < sinks, 0x7FFFFFFF, window), 0)
            visible = age.to(tl.uint32, bitcast=True) < limit.to(tl.uint32)[None, :]
        else:
            visible = age >= 0
        logits = tl.where(visible, logits * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        # A row that has seen nothing yet has top -inf; 0 in its place gives weights of 0, not NaN.
        safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(logits - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(weights, 1)
        sums = tl.dot(weights.to(c.dtype), c, sums * shrink[:, None], input_precision="ieee")
        top = new_top

    # Not before: what the next kernel asks for ahead would stand in the way of the rows.
    start_next(OVERLAP)
    # Derived anew: kept through the loop, what tells the rows apart would cost it registers.
    token = position + tokens - tl.load(lengths + b, volatile=True)
    head = g * group + (part % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M) - token * group
    real = (token < tokens)[:, None]
    result = sums * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
    heads = group * (tl.num_programs(1) // row_blocks)
    out_rows = out + ((b.to(tl.int64) * tokens + token) * heads + head)[:, None] * LATENT
    stored = real
    if LATENT != BLOCK_LATENT:
        stored = stored & (latent < LATENT)[None, :]
    if used == 1:
        tl.store(out_rows + latent[None, :], result.to(out.dtype.element_ty), mask=stored)
        return

    counter = b.to(tl.int64) * tl.num_programs(1) + part
    first = counter * splits * BLOCK_M + tl.arange(0, BLOCK_M)
    at = (split * BLOCK_M + first)[:, None] * LATENT + latent[None, :]
    tl.store(partials + at, result, mask=stored)
    tl.store(partial_lse + split * BLOCK_M + first, top + tl.log2(total))


def mla_decode(
    q: Tensor, q_rotary: Tensor, pool: Tensor, page_table: Tensor, lengths: Tensor, *, scale: float,
    page_size: int, window: int | None = None, sinks: int = 0, keys: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(scale · [q, q_rotary] cᵀ) c[:, :R] over the rows c that a token sees: [B, K, H, R].

    q: [B, K, H, R], queries that meet latents; q_rotary: [B, K, H, r], those that meet the rotary
      key; R and r a pair of `WIDTHS`, or of `WIDTHS_APART` where `keys` are given; K <= 4, bf16 or
      fp16; strides multiples of 16, so products by heads and views of a packed projection will do.
      With `keys` q may be narrower, [B, K, H, n], n a multiple of 16: it meets the first n columns.
    pool: [pages * page_size, R + r], or [G, pages * page_size, R + r] with a latent head for each
      H / G query heads; q's dtype. With `keys` its rows are R wide: c is [latent | key].
    keys: contiguous [pages * page_size, r], the rotary key that all latent heads share; pages of
      more than one row and no window then. None: each latent head has its own, in its rows.
    page_table: int32 [B, max_pages]; entry j is the pool page of positions j * page_size and up.
      Pages of one row make it a list of rows, such as those that an indexer picks
      (`kernels.sparse`).
    lengths: int32 [B]; rows in the cache, the K new ones included. Token i sits at position
      length - K + i and sees rows up to itself; a token at a negative position returns zeros.
    window, sinks: of the rows before it a token sees the newest `window` (itself counted) and the
      first `sinks`; pages that no new token sees may be anything.
    out: contiguous [B, K, H, R], written and returned.
    Raises ValueError for anything else, before any launch. Neither the contents of `page_table`
    nor those of `lengths` are checked: they are read on the device only.
    """
    groups = check(
        q, q_rotary, pool, keys, page_table, lengths, page_size, window, sinks, out,
        kernel=mla_decode_fwd_kernel,
    )  # fmt: skip
    batch, tokens, heads, query = q.shape
    latent = query if keys is None else pool.shape[-1]
    if out is None:
        out = torch.empty((batch, tokens, heads, latent), dtype=q.dtype, device=q.device)
    if batch == 0:
        return out
    group = heads // groups
    configs = _configs_of(latent, gpu(q.device).family)
    block_m = min((m for m in configs if m >= group * tokens), default=max(configs))
    config = configs[block_m]
    row_blocks = triton.cdiv(group * tokens, block_m)
    parts = groups * row_blocks

    capacity = page_table.shape[1] * page_size
    if window is not None:
        capacity = min(capacity, window + tokens + sinks + 2 * config.tile)
    # One program fills a multiprocessor: its tiles take most of the shared memory.
    splits = triton.cdiv(multiprocessors(q.device), batch * parts)
    splits = max(1, min(splits, triton.cdiv(capacity, SPLIT_ROWS), MAX_SPLITS))
    early = triton.cdiv(capacity, splits) <= SPLIT_ROWS
    floats = functools.partial(torch.empty, dtype=torch.float32, device=q.device)
    partials = floats((batch, parts, splits, block_m, latent) if splits > 1 else (16,))
    partial_lse = floats((batch, parts, splits, block_m) if splits > 1 else (16,))
    used_splits = torch.empty(batch * parts, dtype=torch.int32, device=q.device)
    # The stride of a single element is arbitrary, and never used.
    strides = (t.stride(i) if t.shape[i] > 1 else 0 for t in (q, q_rotary) for i in range(3))
    mla_decode_fwd_kernel[(splits, parts, batch)](
        q, q_rotary, pool, keys, page_table, lengths, out, partials, partial_lse, used_splits,
        scale * math.log2(math.e), *strides, pool.stride(0) if groups > 1 else 0,
        page_table.shape[1], group, tokens, row_blocks, window or 0, sinks,
        LATENT=latent, BLOCK_LATENT=triton.next_power_of_2(latent), QUERY=query,
        ROTARY=q_rotary.shape[3], PAGE=page_size, BLOCK_M=block_m, TILE=config.tile,
        SPLIT_TILES=SPLIT_ROWS // config.tile, WINDOWED=window is not None,
        num_warps=config.warps, num_stages=config.stages,
        **overlapped(q.device, early=early),
    )  # fmt: skip
    if splits > 1:
        split_combine(partials, partial_lse, used_splits, out, row_blocks=row_blocks)
    return out


def _configs_of(latent: int, family: str) -> dict[int, Config]:
    """The configurations for this latent width, by M."""
    width = triton.next_power_of_2(latent)
    return {m: config for (w, m), config in CONFIGS[family].items() if w == width}


def mla_decode_ref(
    q: Tensor, q_rotary: Tensor, pool: Tensor, page_table: Tensor, lengths: Tensor, *,
    scale: float, page_size: int, window: int | None = None, sinks: int = 0,
    keys: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The oracle: float64, one new token of one head at a time. Arguments as `mla_decode`."""
    batch, tokens, heads, latent = q.shape
    pool = pool if pool.dim() == 3 else pool[None]
    if keys is not None:
        latent = pool.shape[-1]
        q = F.pad(q, (0, latent - q.shape[-1]))
        pool = torch.cat((pool, keys.expand(len(pool), -1, -1)), -1)
    q = torch.cat((q, q_rotary), -1)
    out = torch.zeros((batch, tokens, heads, latent), dtype=torch.float64)
    for b in range(batch):
        for i in range(tokens):
            position = int(lengths[b]) - tokens + i
            rows = torch.arange(max(position + 1, 0))
            if window is not None:
                rows = rows[(rows > position - window) | (rows < sinks)]
            if len(rows) == 0:
                continue
            at = page_table[b, rows // page_size].long() * page_size + rows % page_size
            for h in range(heads):
                c = pool[h // (heads // len(pool)), at].double()
                logits = c @ q[b, i, h].double() * scale
                out[b, i, h] = logits.softmax(0) @ c[:, :latent]
    return out


def variants() -> list[Variant]:
    """Every configuration that the wrapper can pick; first latents of 512 + 64 on Hopper. Pages: of
    whole tiles, below a tile, and of one row; those of fp16 are left out, as its code is that of
    bf16 but for the type. Then two latent heads that share their key, and tied rows, whose queries
    are half as wide."""
    bf16 = torch.bfloat16

    def call(
        dtype: torch.dtype, widths: tuple[int, int], rows: int, windowed: bool, page: int,
        apart: bool = False, tied: bool = False,
    ) -> NamedCall:  # fmt: skip
        heads = 2 if apart else 1
        asked = widths[0] // 2 if tied else widths[0], widths[1]
        q, q_rotary = (meta(1, 1, heads * rows, width, dtype=dtype) for width in asked)
        pool = meta(heads, page, widths[0] if apart else sum(widths), dtype=dtype)
        keys = meta(page, widths[1], dtype=dtype) if apart else None
        table, lengths = meta(1, 1, dtype=torch.int32), meta(1, dtype=torch.int32)
        name = f"mla_decode {str(dtype)[6:]} latent {widths[0]}+{widths[1]} rows {rows} page {page}"
        name += " window" * windowed + " keys apart" * apart + " tied" * tied
        return name, functools.partial(
            mla_decode, q, q_rotary, pool, table, lengths, scale=0.1, page_size=page,
            window=1 if windowed else None, keys=keys,
        )  # fmt: skip

    def narrow(v: Variant) -> frozenset[int]:
        """Page numbers; rotary channels of too few bytes."""
        threads = v.num_warps * (64 if "gfx942" in v.targets else 32)
        few = v.constexprs["ROTARY"] * v.constexprs["TILE"] * 2 < 16 * threads
        return frozenset({4, 8} if few else {4})

    def spills(v: Variant) -> int:
        wide = v.constexprs["LATENT"] >= 256 and v.constexprs["BLOCK_M"] > 16
        return MEASURED_SPILLS if wide and v.targets == ("sm_90",) else SPILLS

    calls = (
        call(dtype, widths, rows, windowed, page)
        for dtype in (bf16, torch.float16)
        for widths in WIDTHS
        for rows in (16, 32, 64)
        for windowed in (False, True)
        for page in (64, 16, 1)
        if page == 64 or (dtype == bf16 and not (windowed and page == 1))
    )
    apart = (
        call(dtype, widths, rows, False, page, apart=True, tied=tied)
        for tied in (False, True)
        for dtype in (bf16, torch.float16)
        for widths in WIDTHS_APART
        for rows in (16, 32, 64)
        for page in (64, 16)
        if (page == 64 or dtype == bf16) and (not tied or widths[0] == 2 * widths[1])
    )
    expected = Expected(wide_loads=2, narrow_in_loops=narrow, matrix=True, spills=spills)
    default = call(bf16, (512, 64), 16, False, 64)
    return variants_of((default, *calls, *apart), {mla_decode_fwd_kernel: expected})
