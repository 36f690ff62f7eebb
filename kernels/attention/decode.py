"""Softmax attention of 1 to 9 new tokens per sequence over a paged cache, split along its rows.

Legend: B batch, K new tokens, H query heads, G kv heads, d head dim, M rows of one matrix product.
The H/G query heads of a kv head times K tokens are packed into the M rows, so that keys and values
are read once. A sequence's tiles are divided among the splits of a fixed grid (its size depends on
capacities alone, so a captured graph stays valid; how many splits work is read from `lengths`).
Where there are several, `combine` puts their results together (flash-decoding, arXiv
2307.08691 and 2402.05099). Logits, softmax and sums are fp32; exponents are base 2.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot.ahead import Variant
from kernels.aot.recorded import Expected, NamedCall, meta, variants_of
from kernels.attention.combine import MAX_SPLITS, split_combine
from kernels.attention.decode_checks import EIGHT_BIT, MAX_TILE, check
from kernels.attention.decode_configs import CONFIGS, TIED_CONFIGS, config_of
from kernels.attention.tied import angles_of, turned
from kernels.attention.tiles import LOG2E, page_of, rows_of
from kernels.attention.words import as_words, halves, join_channels, split_channels
from kernels.device import gpu
from kernels.overlap import overlapped, start_next, wait_for_previous

#: Programs that a multiprocessor is given, where there are rows for so many.
PROGRAMS_PER_SM = 2
#: Fewest rows worth a split of their own.
SPLIT_ROWS = 128
#: Multiprocessors assumed where there is no GPU to ask (those of an H200).
INTERPRETER_SMS = 132
#: Most bytes spilled: in some cells Triton 3.7's ptxas stops at 96, 128 or 168 registers and keeps
#: a few bytes in memory. What was timed on an H100 is Triton 3.6's code, which spills none in the
#: cells of d 64 and 128 with 16 rows: what these bytes cost is not measured.
SPILLS = 24


@triton.jit(do_not_specialize=["max_pages", "group", "tokens", "row_blocks", "window", "sinks"])
def attention_decode_fwd_kernel(  # type: ignore[no-untyped-def]
    q, k, v, page_table, lengths, k_scale, v_scale, sink_logits, cos_sin, key_weight, out,
    partials, partial_lse, used_splits,
    scale_log2, q_stride_b, q_stride_t, q_stride_h, k_stride_g, v_stride_g, k_scale_g, v_scale_g,
    max_pages, group, tokens, row_blocks, window, sinks,
    D: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr, TILE: tl.constexpr,
    SPLIT_TILES: tl.constexpr, WINDOWED: tl.constexpr,
    EIGHT_BIT: tl.constexpr, FP8: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """sink_logits may be None; cos_sin, too, or values are the rows of k, and key_weight may be."""
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

    # Row r of the product is head r % group of token r // group.
    r = (part % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, D)
    token = r // group
    head = g * group + r % group
    real = (r < group * tokens)[:, None]
    position = length - tokens + token
    q_rows = b.to(tl.int64) * q_stride_b + token * q_stride_t + head * q_stride_h
    query = tl.load(q + q_rows[:, None] + dims[None, :], mask=real, other=0.0)
    TIED: tl.constexpr = cos_sin is not None
    WORDS: tl.constexpr = EIGHT_BIT or TIED
    WIDTH: tl.constexpr = D // 2 if WORDS else D
    columns = tl.arange(0, WIDTH)
    if EIGHT_BIT:
        k_scale += g.to(tl.int64) * k_scale_g
        v_scale += g.to(tl.int64) * v_scale_g
    if WORDS:
        query, odd_query = split_channels(query)
        odd_sums = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    if TIED:
        whole_query, whole_odd = query, odd_query
        cos, sin = angles_of(cos_sin, tl.arange(0, TILE), D)
        if key_weight is not None:
            weight, odd_weight = split_channels(tl.load(key_weight + dims)[None, :])
    k += g.to(tl.int64) * k_stride_g
    v += g.to(tl.int64) * v_stride_g
    page_table += b.to(tl.int64) * max_pages

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    if sink_logits is not None:
        # One logit more in the softmax, of no value: the first split takes it in.
        sink = tl.load(sink_logits + head, mask=r < group * tokens, other=0.0).to(tl.float32)
        top = tl.where(split == 0, sink * LOG2E, top)
        total = tl.where(split == 0, 1.0, total)
    page = page_of(page_table, start, sink_tiles, sunk, oldest, last, PAGE, TILE, WINDOWED)
    for i in tl.range(start, end):
        row, held = rows_of(i, sink_tiles, sunk, oldest, last, TILE, WINDOWED)
        held_row = page.to(tl.int64) * PAGE + held % PAGE
        at = held_row[:, None] * WIDTH + columns[None, :]
        # The next page is looked up here: a load that feeds loads would cost pipeline stages.
        after = tl.minimum(i + 1, end - 1)
        page = page_of(page_table, after, sink_tiles, sunk, oldest, last, PAGE, TILE, WINDOWED)
        keys = tl.load(k + at)
        if WORDS:
            keys, odd_keys = halves(keys, FP8, query.dtype)
        if TIED:
            values, odd_values = keys, odd_keys
            if key_weight is not None:
                keys, odd_keys = keys.to(tl.float32) * weight, odd_keys.to(tl.float32) * odd_weight
            keys, odd_keys = turned(keys, odd_keys, cos, sin, whole_query.dtype)
            tile_cos, tile_sin = angles_of(cos_sin, i * TILE + tl.arange(0, 1), D)
            query, odd_query = turned(whole_query, whole_odd, tile_cos, -tile_sin, query.dtype)
        logits = tl.dot(query, tl.trans(keys), input_precision="ieee")
        if WORDS:
            logits = tl.dot(odd_query, tl.trans(odd_keys), logits, input_precision="ieee")
        if EIGHT_BIT:
            logits *= tl.load(k_scale + held_row)[None, :]
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
        if EIGHT_BIT:
            weights *= tl.load(v_scale + held_row)[None, :]
        weights = weights.to(query.dtype)
        if not TIED:
            values = tl.load(v + at)
            if WORDS:
                values, odd_values = halves(values, FP8, query.dtype)
        if WORDS:
            odd_sums = odd_sums * shrink[:, None]
            odd_sums = tl.dot(weights, odd_values, odd_sums, input_precision="ieee")
        sums = tl.dot(weights, values, sums * shrink[:, None], input_precision="ieee")
        top = new_top

    # Not before: what the next kernel asks for ahead would stand in the way of the rows.
    start_next(OVERLAP)
    if WORDS:
        sums = join_channels(sums, odd_sums)
    result = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    if WORDS:
        # Derived anew: kept through the loop, what tells the rows apart would cost it registers
        # that the conversion to 16 bits needs.
        token = position + tokens - tl.load(lengths + b, volatile=True)
        head = g * group + (part % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M) - token * group
        real = (token < tokens)[:, None]
    heads = group * (tl.num_programs(1) // row_blocks)
    out_rows = (b.to(tl.int64) * tokens + token) * heads + head
    out_at = out + out_rows[:, None] * D + dims[None, :]
    if used == 1:
        tl.store(out_at, result.to(out.dtype.element_ty), mask=real)
        return

    counter = b.to(tl.int64) * tl.num_programs(1) + part
    first = counter * splits * BLOCK_M + tl.arange(0, BLOCK_M)
    at = (split * BLOCK_M + first)[:, None] * D + dims[None, :]
    tl.store(partials + at, result, mask=real)
    tl.store(partial_lse + split * BLOCK_M + first, top + tl.log2(total))


def attention_decode(
    q: Tensor, k_pool: Tensor, v_pool: Tensor | None, page_table: Tensor, lengths: Tensor, *,
    page_size: int, scale: float | None = None, window: int | None = None, sinks: int = 0,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
    sink_logits: Tensor | None = None, cos_sin: Tensor | None = None,
    key_weight: Tensor | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(scale · q kᵀ) v over the rows that each new token may see.

    q: [B, K, H, d], K <= 9, bf16 or fp16; strides multiples of 16, so views of a packed
      projection will do.
    k_pool, v_pool: [G, pages * page_size, d]; q's dtype, or int8 or float8_e4m3fn with scales.
      v_pool None: rows of k_pool are values as they lie, and keys once their channels have been
      multiplied by `key_weight` and rotated by `cos_sin`; each is read once.
    page_table: int32 [B, max_pages]; entry j is the pool page of positions j * page_size and up.
      Pages of one row make it a list of rows, such as those of picked blocks (`kernels.blocks`).
    lengths: int32 [B]; rows in the cache, the K new ones included. Token i sits at position
      length - K + i and sees rows up to itself; a token at a negative position returns zeros.
    window, sinks: of the rows before it a token sees the newest `window` (itself counted) and the
      first `sinks`; pages that no new token sees may be anything.
    k_scale, v_scale: fp32 [G, pages * page_size], what a row's 8-bit values are multiplied by;
      rows of a head lie together.
    sink_logits: [H], q's dtype; one logit more in each head's softmax, of no value (gpt-oss,
      arXiv 2508.10925).
    cos_sin: float32 [>= 128 positions, d / 2, 2], of all positions that have rows; given exactly
      where v_pool is None, then without a window and with pages of more than one row.
    key_weight: [d], q's dtype; beside `cos_sin` alone.
    out: contiguous [B, K, H, d], written and returned.
    Raises ValueError for anything else, before any launch. Neither the contents of `page_table`
    nor those of `lengths` are checked: they are read on the device only.
    """
    batch, tokens, heads, dim, kv_heads = check(
        q, k_pool, v_pool, page_table, lengths, page_size, window, sinks, k_scale, v_scale,
        sink_logits, cos_sin, key_weight, out, kernel=attention_decode_fwd_kernel,
    )  # fmt: skip
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if batch == 0:
        return out
    group = heads // kv_heads
    kv_dtype, tied = k_pool.dtype, v_pool is None
    block_m, config = config_of(
        dim, group * tokens, eight_bit=kv_dtype in EIGHT_BIT, tied=tied, amd=gpu(q.device).amd
    )
    row_blocks = triton.cdiv(group * tokens, block_m)
    parts = kv_heads * row_blocks

    capacity = page_table.shape[1] * page_size
    if window is not None:
        capacity = min(capacity, window + tokens + sinks + 2 * config.tile)
    splits = triton.cdiv(PROGRAMS_PER_SM * multiprocessors(q.device), batch * parts)
    splits = max(1, min(splits, triton.cdiv(capacity, SPLIT_ROWS), MAX_SPLITS))
    early = triton.cdiv(capacity, splits) <= SPLIT_ROWS
    floats = functools.partial(torch.empty, dtype=torch.float32, device=q.device)
    partials = floats((batch, parts, splits, block_m, dim) if splits > 1 else (16,))
    partial_lse = floats((batch, parts, splits, block_m) if splits > 1 else (16,))
    used_splits = torch.empty(batch * parts, dtype=torch.int32, device=q.device)
    # The stride of a single element is arbitrary, and never used.
    stride_b, stride_t, stride_h = (q.stride(i) if q.shape[i] > 1 else 0 for i in range(3))
    if v_pool is None:
        v_pool, v_scale = k_pool, k_scale
    if tied or kv_dtype in EIGHT_BIT:
        k_pool, v_pool = as_words(k_pool), as_words(v_pool)
    scales = [partial_lse if t is None else t for t in (k_scale, v_scale)]
    several = kv_heads > 1
    stride_k, stride_v = (t.stride(0) if several else 0 for t in (k_pool, v_pool))
    stride_ks, stride_vs = (t.stride(0) if several else 0 for t in scales)
    attention_decode_fwd_kernel[(splits, parts, batch)](
        q, k_pool, v_pool, page_table, lengths, *scales, sink_logits, cos_sin, key_weight, out,
        partials, partial_lse, used_splits,
        (dim**-0.5 if scale is None else scale) * math.log2(math.e),
        stride_b, stride_t, stride_h, stride_k, stride_v, stride_ks, stride_vs,
        page_table.shape[1], group, tokens, row_blocks, window or 0, sinks,
        D=dim, PAGE=page_size, BLOCK_M=block_m, TILE=config.tile,
        SPLIT_TILES=SPLIT_ROWS // config.tile, WINDOWED=window is not None,
        EIGHT_BIT=kv_dtype in EIGHT_BIT, FP8=kv_dtype == torch.float8_e4m3fn,
        num_warps=config.warps, num_stages=config.stages,
        **overlapped(q.device, early=early),
    )  # fmt: skip
    if splits > 1:
        split_combine(partials, partial_lse, used_splits, out, row_blocks=row_blocks)
    return out


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETER_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def attention_decode_ref(
    q: Tensor, k_pool: Tensor, v_pool: Tensor | None, page_table: Tensor, lengths: Tensor, *,
    page_size: int, scale: float | None = None, window: int | None = None, sinks: int = 0,
    k_scale: Tensor | None = None, v_scale: Tensor | None = None,
    sink_logits: Tensor | None = None, cos_sin: Tensor | None = None,
    key_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The oracle: float64, one new token of one head at a time. Arguments as `attention_decode`."""
    batch, tokens, heads, dim = q.shape
    sink = torch.full((heads,), -math.inf) if sink_logits is None else sink_logits
    out = torch.zeros(q.shape, dtype=torch.float64)
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
                g = h // (heads // k_pool.shape[0])
                k = k_pool[g, at].double()
                k = k if k_scale is None else k * k_scale[g, at, None].double()
                if v_pool is None:
                    v, k = k, k if key_weight is None else k * key_weight.double()
                    assert cos_sin is not None
                    pairs = torch.view_as_complex(k.unflatten(1, (-1, 2)))
                    turns = torch.view_as_complex(cos_sin[rows].double())
                    k = torch.view_as_real(pairs * turns).flatten(1)
                else:
                    v = v_pool[g, at].double()
                    v = v if v_scale is None else v * v_scale[g, at, None].double()
                logits = k @ q[b, i, h].double() * (dim**-0.5 if scale is None else scale)
                logits = torch.cat((logits, sink[h, None].double()))
                out[b, i, h] = logits.softmax(0)[:-1] @ v
    return out


def variants() -> list[Variant]:
    """Every configuration that the wrapper can pick; first 64 query heads on 8 kv heads of 128.
    Pages: of whole tiles, and below a tile; those of fp16 K and V are left out, as their code is
    that of bf16 but for the type. Of one row: of plain bf16 without a window. Logits of sinks:
    pages of whole tiles, windows over bf16; rows that are keys and values: queries of bf16."""
    bf16, fp16 = torch.bfloat16, torch.float16

    def call(
        q: torch.dtype, kv: torch.dtype, dim: int, rows: int, windowed: bool, page: int,
        more: str = "",
    ) -> NamedCall:  # fmt: skip
        pool, weight = meta(1, page, dim, dtype=kv), meta(dim, dtype=q)
        table, lengths = meta(1, 1, dtype=torch.int32), meta(1, dtype=torch.int32)
        scale = meta(1, page, dtype=torch.float32) if kv in EIGHT_BIT else None
        tied, angles = more == "tied", meta(MAX_TILE, dim // 2, 2, dtype=torch.float32)
        name = f"attention_decode {q} kv {kv} d {dim} m {rows} page {page}" + " window" * windowed
        return f"{name} {more}".rstrip().replace("torch.", ""), functools.partial(
            attention_decode, meta(1, 1, rows, dim, dtype=q), pool, None if tied else pool, table,
            lengths, page_size=page, window=1 if windowed else None, k_scale=scale,
            v_scale=None if tied else scale, cos_sin=angles if tied else None,
            key_weight=weight if tied else None,
            sink_logits=meta(rows, dtype=q) if more == "sinks" else None,
        )  # fmt: skip

    cells = [
        (kv, dim, rows) for kv in (bf16, *EIGHT_BIT) for dim, rows, eight_bit in CONFIGS
        if eight_bit == (kv in EIGHT_BIT)
    ]  # fmt: skip
    calls = (
        call(q, q if kv == bf16 else kv, dim, rows, windowed, page)
        for q in (bf16, fp16)
        for kv, dim, rows in cells
        for windowed in (False, True)
        for page in (64, 16, 1)
        if page == 64 or (page == 16 and (q, kv) != (fp16, bf16))
        or (q == kv == bf16 and not windowed)
    )  # fmt: skip
    sinks = (
        call(bf16, kv, dim, rows, windowed, 64, "sinks")
        for kv, dim, rows in cells
        for windowed in (False, True)
        if kv == bf16 or not windowed
    )
    both = (
        call(bf16, kv, *cell, False, page, "tied")
        for kv in (bf16, *EIGHT_BIT) for cell in TIED_CONFIGS for page in (64, 16)
    )  # fmt: skip
    # Page numbers are narrow, and so are rows' scales.
    expected = Expected(wide_loads=2, narrow_in_loops=frozenset({4}), matrix=True, spills=SPILLS)
    default = call(bf16, bf16, 128, 16, False, 64)
    return variants_of((default, *calls, *sinks, *both), {attention_decode_fwd_kernel: expected})
