"""Causal softmax attention of K new tokens per sequence over a paged cache that holds their rows.

Legend: B batch, K new tokens, H query heads, G kv heads, d and dv head dims of keys and values,
M rows of one matrix product. The H/G query heads of a kv head times the tokens are packed into
rows, M of them a program, so that queries of a group share each read of keys and values. As in
FlashAttention-2 (arXiv 2307.08691, algorithm 1) a program keeps running maxima, sums and outputs
and divides once at the end; tiles that all its tokens see come first and carry no mask, then those
on the diagonal, the window's edge and the sinks. Logits and sums are fp32, exponents base 2.

Forward only, for inference. Training uses torch's fused attention, which has a backward; others'
published figures, not ours, have Triton behind its FlashAttention and cuDNN kernels on Hopper.
"""

import itertools
import math
from dataclasses import replace
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot.ahead import Variant
from kernels.aot.recorded import Expected, NamedCall, meta, variants_of
from kernels.attention.prefill_checks import DIMS, check
from kernels.attention.prefill_configs import BLOCKS_M, config_of, family_of
from kernels.attention.tiles import LOG2E

INT_MAX = 2**31 - 1
#: Most bytes spilled with logits of sinks: 64 and 80 by 128 rows of 128 channels on sm_80 and 8 by
#: one cell of 32 channels on sm_100. What they cost is not measured.
SINK_SPILLS = 80


@triton.jit
def _rows_of(  # type: ignore[no-untyped-def]
    i, sink_tiles, first, full, skipped, sunk, oldest, last,
    TILE: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """The i-th tile to visit, its positions, and which to load: hidden ones repeat another."""
    tile, low, high = i, 0, last
    if MASKED and WINDOWED:
        sink = i < sink_tiles
        tile = tl.where(sink, i, i - sink_tiles + first)
        tile = tl.where(tile < full, tile, tile + skipped)
        low, high = tl.where(sink, 0, oldest), tl.where(sink, sunk - 1, last)
    elif MASKED:
        tile = i + skipped
    row = tile * TILE + tl.arange(0, TILE)
    held = row
    if MASKED:
        held = tl.minimum(tl.maximum(row, low), high)
    return tile, row, held


@triton.jit
def _page_of(table, tile, held, PAGE: tl.constexpr, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The pool pages of a tile: a single one where a page holds whole tiles."""
    if PAGE % TILE == 0:
        return tl.load(table + tile * TILE // PAGE)
    else:
        return tl.load(table + held // PAGE)


@triton.jit
def _load_rows(pool, at, D: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    dims = tl.arange(0, BLOCK_D)
    pointers = pool + at.to(tl.int64)[:, None] * D + dims[None, :]
    if D == BLOCK_D:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(dims < D)[None, :], other=0.0)


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    top, total, sums, query, position, k, v, table, scale_log2, window, sinks, start, end,
    sink_tiles, first, full, skipped, sunk, oldest, last,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """Running softmax over the tiles from `start` to `end`, which is more than `start`."""
    tile, _, held = _rows_of(
        start, sink_tiles, first, full, skipped, sunk, oldest, last, TILE, MASKED, WINDOWED
    )
    page = _page_of(table, tile, held, PAGE, TILE)
    for i in tl.range(start, end):
        _, row, held = _rows_of(
            i, sink_tiles, first, full, skipped, sunk, oldest, last, TILE, MASKED, WINDOWED
        )
        at = page * PAGE + held % PAGE
        # The next page is looked up here: a load that feeds loads would cost pipeline stages.
        after, _, held_after = _rows_of(
            tl.minimum(i + 1, end - 1), sink_tiles, first, full, skipped, sunk, oldest, last,
            TILE, MASKED, WINDOWED,
        )  # fmt: skip
        page = _page_of(table, after, held_after, PAGE, TILE)
        keys = _load_rows(k, at, D, BLOCK_D)
        logits = tl.dot(query, tl.trans(keys), input_precision="ieee")
        if MASKED:
            age = position[:, None] - row[None, :]
            if WINDOWED:
                # One comparison for all: as an unsigned number an age below 0 is huge.
                limit = tl.where(row == held, tl.where(row < sinks, 0x7FFFFFFF, window), 0)
                visible = age.to(tl.uint32, bitcast=True) < limit.to(tl.uint32)[None, :]
            else:
                visible = age >= 0
            logits = tl.where(visible, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1) * scale_log2)
        safe = new_top
        if MASKED:
            # A row that has seen nothing yet has top -inf; with 0 its weights are 0, not NaN.
            safe = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(logits * scale_log2 - safe[:, None])
        shrink = tl.exp2(top - safe)
        total = total * shrink + tl.sum(weights, 1)
        values = _load_rows(v, at, DV, BLOCK_DV)
        sums = tl.dot(
            weights.to(query.dtype), values, sums * shrink[:, None], input_precision="ieee"
        )
        top = new_top
    return top, total, sums


@triton.jit(do_not_specialize=["max_pages", "group", "tokens", "window", "sinks"])
def attention_prefill_fwd_kernel(  # type: ignore[no-untyped-def]
    q, k, v, page_table, lengths, new, sink_logits, out,
    scale_log2, q_stride_b, q_stride_t, q_stride_h, k_stride_g, v_stride_g,
    max_pages, group, tokens, window, sinks,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr,
    WINDOWED: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of M, G, B). sink_logits may be None."""
    g, b = tl.program_id(1), tl.program_id(2)
    # The last tokens see the most rows: their blocks start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    length = tl.load(lengths + b)
    valid = tokens
    if RAGGED:
        valid = tl.minimum(tl.load(new + b), tokens)

    # Row r of the product is head r % group of token r // group.
    r = block * BLOCK_M + tl.arange(0, BLOCK_M)
    token = r // group
    head = g * group + r % group
    past = length - tokens
    position = past + token
    out_rows = (b.to(tl.int64) * tokens + token) * group * tl.num_programs(1) + head
    dims_v = tl.arange(0, BLOCK_DV)
    out_at = out + out_rows[:, None] * DV + dims_v[None, :]
    stored = (token < tokens)[:, None]
    if DV != BLOCK_DV:
        stored = stored & (dims_v < DV)[None, :]
    newest_token = tl.minimum((block * BLOCK_M + BLOCK_M - 1) // group, valid - 1)
    oldest_token = block * BLOCK_M // group
    last = past + newest_token
    if (oldest_token >= valid) | (last < 0):
        tl.store(out_at, tl.zeros([BLOCK_M, BLOCK_DV], out.dtype.element_ty), mask=stored)
        return

    # Whole tiles from `full` on are seen by all tokens, until `skipped` of them; `first` is the
    # tile of the oldest windowed row, and sinks older than that row have tiles of their own.
    oldest = 0
    sunk = 0
    full = 0
    full_end = tl.maximum((past + oldest_token + 1) // TILE, 0)
    if WINDOWED:
        oldest = tl.maximum(past + oldest_token + 1 - window, 0)
        sunk = tl.minimum(sinks, oldest)
        full_end = tl.maximum(full_end, oldest // TILE)
        full = tl.minimum(tl.cdiv(tl.maximum(last + 1 - window, 0), TILE), full_end)
    first = oldest // TILE
    sink_tiles = tl.cdiv(sunk, TILE)
    skipped = full_end - full
    masked_tiles = sink_tiles + tl.cdiv(last + 1, TILE) - first - skipped

    dims = tl.arange(0, BLOCK_D)
    q_rows = b.to(tl.int64) * q_stride_b + token.to(tl.int64) * q_stride_t + head * q_stride_h
    asked = (token < valid)[:, None]
    if D != BLOCK_D:
        asked = asked & (dims < D)[None, :]
    query = tl.load(q + q_rows[:, None] + dims[None, :], mask=asked, other=0.0)
    k += g.to(tl.int64) * k_stride_g
    v += g.to(tl.int64) * v_stride_g
    page_table += b.to(tl.int64) * max_pages

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if sink_logits is not None:
        # One logit more in the softmax, of no value.
        top = tl.load(sink_logits + head, mask=token < tokens, other=0.0).to(tl.float32) * LOG2E
        total += 1.0
    if skipped > 0:
        top, total, sums = _attend(
            top, total, sums, query, position, k, v, page_table, scale_log2, window, sinks,
            full, full_end, sink_tiles, first, full, skipped, sunk, oldest, last,
            D, DV, BLOCK_D, BLOCK_DV, PAGE, TILE, False, WINDOWED,
        )  # fmt: skip
    if masked_tiles > 0:
        top, total, sums = _attend(
            top, total, sums, query, position, k, v, page_table, scale_log2, window, sinks,
            0, masked_tiles, sink_tiles, first, full, skipped, sunk, oldest, last,
            D, DV, BLOCK_D, BLOCK_DV, PAGE, TILE, True, WINDOWED,
        )  # fmt: skip
    result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    if RAGGED:
        result = tl.where((token < valid)[:, None], result, 0.0)
    tl.store(out_at, result.to(out.dtype.element_ty), mask=stored)


def attention_prefill(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, page_table: Tensor, lengths: Tensor, *,
    page_size: int, scale: float | None = None, window: int | None = None, sinks: int = 0,
    new: Tensor | None = None, sink_logits: Tensor | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(scale · q kᵀ) v over the rows that each new token may see.

    q: [B, K, H, d], any K >= 1, bf16 or fp16; strides multiples of 16, so views of a packed
      projection will do. d and dv are a pair of `DIMS`: each was compiled for every target.
    k_pool, v_pool: [G, pages * page_size, d] and [.., dv], q's dtype; strides [16i, d, 1] and
      [16i, dv, 1], and heads may overlap: a dense [B, G, S, d] is the pool [G, rows, d] with
      strides (S * d, d, 1) whose table says b * G * S / page_size + j.
    page_table: int32 [B, max_pages]; entry j is the pool page of positions j * page_size and up.
      Entries of pages that no token sees may be anything.
    lengths: int32 [B]; rows in the cache, the K new ones included, padding among them. Token i
      sits at position length - K + i and sees rows up to itself; a token at a negative position
      returns zeros.
    scale: positive; default d^-0.5.
    window, sinks: of the rows before it a token sees the newest `window` (itself counted) and the
      first `sinks`. Tiles of rows outside both are not visited.
    new: int32 [B]; how many of the K tokens are real (default: all). The others, at the end,
      return zeros, and neither their queries nor their rows are read.
    sink_logits: [H], q's dtype; one logit more in each head's softmax, of no value.
    out: contiguous [B, K, H, dv], written and returned.
    Raises ValueError for anything else, before any launch. The contents of `page_table`, `lengths`
    and `new` are not checked: they are read on the device only.
    """
    batch, tokens, heads, dim, v_dim, kv_heads = check(
        q, k_pool, v_pool, page_table, lengths, page_size, scale, window, sinks, new,
        sink_logits, out, kernel=attention_prefill_fwd_kernel,
    )  # fmt: skip
    if out is None:
        out = torch.empty((batch, tokens, heads, v_dim), dtype=q.dtype, device=q.device)
    if batch == 0:
        return out
    group = heads // kv_heads
    family = family_of(q.device)
    block_m, config = config_of(dim, v_dim, group * tokens, page_size, family=family)
    # The stride of a single element is arbitrary, and never used.
    stride_b, stride_t, stride_h = (q.stride(i) if q.shape[i] > 1 else 0 for i in range(3))
    stride_k, stride_v = (t.stride(0) if kv_heads > 1 else 0 for t in (k_pool, v_pool))
    attention_prefill_fwd_kernel[(triton.cdiv(group * tokens, block_m), kv_heads, batch)](
        q, k_pool, v_pool, page_table, lengths, lengths if new is None else new, sink_logits,
        out,
        (dim**-0.5 if scale is None else scale) * math.log2(math.e),
        stride_b, stride_t, stride_h, stride_k, stride_v,
        page_table.shape[1], group, tokens, min(window or 0, INT_MAX), min(sinks, INT_MAX),
        D=dim, DV=v_dim, BLOCK_D=triton.next_power_of_2(dim),
        BLOCK_DV=triton.next_power_of_2(v_dim), PAGE=page_size, BLOCK_M=block_m, TILE=config.tile,
        WINDOWED=window is not None, RAGGED=new is not None,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out


def attention_prefill_ref(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, page_table: Tensor, lengths: Tensor, *,
    page_size: int, scale: float | None = None, window: int | None = None, sinks: int = 0,
    new: Tensor | None = None, sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The oracle: float64, one token of one head at a time. Arguments as `attention_prefill`."""
    batch, tokens, heads, dim = q.shape
    sink = torch.full((heads,), -math.inf) if sink_logits is None else sink_logits
    out = torch.zeros(batch, tokens, heads, v_pool.shape[2], dtype=torch.float64)
    for b in range(batch):
        for i in range(tokens if new is None else int(new[b])):
            position = int(lengths[b]) - tokens + i
            rows = torch.arange(max(position + 1, 0))
            if window is not None:
                rows = rows[(rows > position - window) | (rows < sinks)]
            if len(rows) == 0:
                continue
            at = page_table[b, rows // page_size].long() * page_size + rows % page_size
            for h in range(heads):
                g = h // (heads // k_pool.shape[0])
                logits = k_pool[g, at].double() @ q[b, i, h].double()
                logits = logits * (dim**-0.5 if scale is None else scale)
                logits = torch.cat((logits, sink[h, None].double()))
                out[b, i, h] = logits.softmax(0)[:-1] @ v_pool[g, at].double()
    return out


def variants() -> list[Variant]:
    """Every configuration that the wrapper can pick; first long prompts on Hopper, heads of 128.
    Pages: one size for each way of reading tiles, as whole pages or as parts of several; those
    below a tile, windows and ragged batches of fp16 are left out: code of bf16 but for the type.
    Logits of sinks: of bf16 and pages of whole tiles."""
    bf16, ints = torch.bfloat16, partial(meta, dtype=torch.int32)

    def call(
        dtype: torch.dtype, dims: tuple[int, int], rows: int, page: int, windowed: bool,
        ragged: bool, sinks: bool = False,
    ) -> NamedCall:  # fmt: skip
        k, v = (meta(1, page, dim, dtype=dtype) for dim in dims)
        name = f"attention_prefill {str(dtype)[6:]} d {dims[0]} {dims[1]} m {rows} page {page}"
        return name + " window" * windowed + " ragged" * ragged + " sinks" * sinks, partial(
            attention_prefill, meta(1, 1, rows, dims[0], dtype=dtype), k, v, ints(1, 1), ints(1),
            page_size=page, window=1 if windowed else None, new=ints(1) if ragged else None,
            sink_logits=meta(rows, dtype=dtype) if sinks else None,
        )  # fmt: skip

    def way(v: Variant) -> str:
        """All of a variant but its page size, and whether pages hold whole tiles."""
        whole = v.constexprs["PAGE"] % v.constexprs["TILE"] == 0
        return repr(replace(v, name="", constexprs={**v.constexprs, "PAGE": whole}))

    calls = (
        call(dtype, dims, rows, page, windowed, ragged)
        for dtype in (bf16, torch.float16)
        for dims in DIMS
        for rows in BLOCKS_M
        for page in (64, 16, 32)
        for windowed, ragged in itertools.product((False, True), repeat=2)
        if dtype == bf16 or (page, windowed, ragged) == (64, False, False)
    )
    sinks = (
        call(bf16, (d, dv), rows, 64, windowed, False, True)
        for d, dv in DIMS if d == dv
        for rows in BLOCKS_M for windowed in (False, True)
    )  # fmt: skip
    # Keys and values, in each of the two loops; what is narrow are page numbers.
    expected = Expected(
        wide_loads=4, narrow_in_loops=frozenset({4}), matrix=True,
        spills=lambda v: SINK_SPILLS if "sink_logits" in v.signature else 0,
    )  # fmt: skip
    default = call(bf16, (128, 128), BLOCKS_M[-1], 64, False, False)
    ways: dict[str, Variant] = {}
    for v in variants_of((default, *calls, *sinks), {attention_prefill_fwd_kernel: expected}):
        ways.setdefault(way(v), v)
    return list(ways.values())
