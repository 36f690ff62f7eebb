"""Attention of 1 to 9 new tokens per sequence over a window's rows and over rows that pool tokens.

DeepSeek-V4's heavily compressed and compressed sparse attention: a row is key and value of all
heads at once, so it is loaded once. One softmax runs over the newest rows, of one token each, over
pooled rows, one for every `every` tokens (all of them, or those that a token picks), and over a
sink of each head, a learned logit without a value. Outputs are turned back by their token's
position, since rows carry positions and are values.

Legend: B sequences, K new tokens, H query heads, d channels of a row, r of them with positions.
A program takes some heads of one token over some tiles of rows: first those of the window, then
pooled ones. All heads of a token see the same rows, so a tile has one mask for all rows of its
product. Splits and their combination are those of `attention.decode`, with a token in place of a
sequence.
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
from kernels.attention.decode import SPILLS, multiprocessors
from kernels.attention.tiles import LOG2E
from kernels.attention.words import join_channels, split_channels
from kernels.device import gpu
from kernels.latent.decode import Config
from kernels.overlap import overlapped, start_next, wait_for_previous
from kernels.pooling.decode_checks import WIDTHS, check

#: Fewest rows worth a split of their own.
SPLIT_ROWS = 64


#: By family of GPUs, then by width of rows, up to a power of two, and heads of a program: what
#: does not spill, after the tiles of `mla_decode`. None was timed.
CONFIGS: dict[str, dict[tuple[int, int], Config]] = {
    "hopper": {
        (32, 16): Config(64, 4, 3), (32, 32): Config(64, 4, 3), (32, 64): Config(64, 4, 3),
        (64, 16): Config(64, 4, 3), (64, 32): Config(64, 4, 3), (64, 64): Config(64, 4, 3),
        (128, 16): Config(64, 4, 3), (128, 32): Config(64, 4, 3), (128, 64): Config(64, 8, 3),
        (256, 16): Config(32, 4, 3), (256, 32): Config(64, 8, 3), (256, 64): Config(64, 8, 3),
        (512, 16): Config(32, 4, 3), (512, 32): Config(32, 8, 3), (512, 64): Config(32, 8, 3),
    },
    "nvidia": {
        (32, 16): Config(64, 4, 3), (32, 32): Config(64, 4, 3), (32, 64): Config(32, 4, 3),
        (64, 16): Config(64, 4, 3), (64, 32): Config(64, 4, 3), (64, 64): Config(32, 4, 3),
        (128, 16): Config(64, 4, 3), (128, 32): Config(32, 4, 3), (128, 64): Config(64, 8, 3),
        (256, 16): Config(16, 4, 3), (256, 32): Config(32, 8, 3),
        (512, 16): Config(32, 8, 3), (512, 32): Config(32, 8, 3),
    },
    "amd": {
        (32, 16): Config(64, 2, 3), (32, 32): Config(64, 4, 3), (32, 64): Config(64, 4, 3),
        (64, 16): Config(64, 2, 3), (64, 32): Config(64, 4, 3), (64, 64): Config(64, 4, 3),
        (128, 16): Config(64, 2, 3), (128, 32): Config(32, 4, 3), (128, 64): Config(32, 4, 3),
        (256, 16): Config(32, 4, 3), (256, 32): Config(32, 4, 2),
        (512, 16): Config(32, 4, 2), (512, 32): Config(16, 4, 2),
    },
}  # fmt: skip


@triton.jit
def tile_of(i, near_tiles, oldest, last, far_last, TILE):  # type: ignore[no-untyped-def]
    """Whether the i-th tile is one of pooled rows, the place of its first row, and the places to
    load: in place of a row that is not seen, one that is."""
    far = i >= near_tiles
    first = tl.where(far, i - near_tiles, i + oldest // TILE) * TILE
    held = tl.maximum(first + tl.arange(0, TILE), tl.where(far, 0, oldest))
    return far, first, tl.minimum(held, tl.where(far, far_last, last))


@triton.jit
def page_of(near_table, far_table, picks, i, near_tiles, oldest, last, far_last, PAGE, TILE):  # type: ignore[no-untyped-def]
    """The pool pages of the i-th tile's rows, a single one where a page holds whole tiles; or their
    pool rows, where pooled ones are picked."""
    far, first, held = tile_of(i, near_tiles, oldest, last, far_last, TILE)
    table = tl.where(far, far_table, near_table)
    if picks is not None:
        place = tl.load(picks + held, mask=far & (held >= 0), other=0).to(tl.int32)
        place = tl.where(far, place, held)
        return tl.load(table + place // PAGE) * PAGE + place % PAGE
    elif PAGE % TILE == 0:
        return tl.load(table + first // PAGE)
    else:
        return tl.load(table + held // PAGE)


@triton.jit(
    do_not_specialize=[
        "near_pages", "far_pages", "picked", "heads", "tokens", "window", "every", "rope",
        "positions",
    ]
)  # fmt: skip
def pooled_decode_fwd_kernel(  # type: ignore[no-untyped-def]
    q, near, far, near_table, far_table, lengths, past, picks, sinks, cos_sin, out, partials,
    partial_lse, used_splits,
    scale_log2, q_stride_b, q_stride_t, q_stride_h, near_pages, far_pages, picked, heads, tokens,
    window, every, rope, positions,
    D: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr,
    TILE: tl.constexpr, SPLIT_TILES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (splits, tiles of heads, B * K). picks may be None."""
    wait_for_previous(OVERLAP)
    split, part, each = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    splits = tl.num_programs(0)
    b, token = (each // tokens).to(tl.int64), each % tokens

    # The tiles to visit: from the window's oldest row to the token's own, then pooled ones.
    length = tl.load(lengths + b)
    end = tl.maximum(length - tokens + token + 1, 0)
    oldest = tl.maximum(end - window, 0)
    position = tl.load(past + b) + token
    far_end = tl.maximum(position + 1, 0) // every
    if picks is not None:
        far_end = tl.minimum(far_end, picked)
        picks += each.to(tl.int64) * picked
    last, far_last = tl.maximum(end - 1, 0), tl.maximum(far_end - 1, 0)
    near_tiles = tl.cdiv(end, TILE) - oldest // TILE
    tiles = near_tiles + tl.cdiv(far_end, TILE)
    per_split = tl.maximum(tl.cdiv(tiles, splits), SPLIT_TILES)
    used = tl.maximum(tl.cdiv(tiles, per_split), 1)
    if split >= used:
        return
    counter = each.to(tl.int64) * tl.num_programs(1) + part
    if split == 0:
        tl.store(used_splits + counter, used)
    start = split * per_split
    stop = tl.minimum(start + per_split, tiles)

    head = part * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    real = (head < heads)[:, None] & (dims < D)[None, :]
    q_rows = q + b * q_stride_b + token * q_stride_t + head[:, None] * q_stride_h
    query = tl.load(q_rows + dims[None, :], mask=real, other=0.0)
    near_table += b * near_pages
    far_table += b * far_pages

    # One logit more in the softmax, of no value: the first split takes it in.
    sink = tl.load(sinks + head, mask=head < heads, other=0.0).to(tl.float32)
    top = tl.where(split == 0, sink * LOG2E, float("-inf"))
    total = tl.where(split == 0, 1.0, tl.zeros([BLOCK_M], tl.float32))
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    ROWS: tl.constexpr = PAGE if picks is None else 1
    page = page_of(
        near_table, far_table, picks, start, near_tiles, oldest, last, far_last, PAGE, TILE
    )
    for i in tl.range(start, stop):
        is_far, first, held = tile_of(i, near_tiles, oldest, last, far_last, TILE)
        at = tl.where(is_far, far, near) + page.to(tl.int64) * (ROWS * D)
        at = (at + held % ROWS * D)[:, None]
        # The next page is looked up here: a load that feeds loads would cost pipeline stages.
        after = tl.minimum(i + 1, stop - 1)
        page = page_of(
            near_table, far_table, picks, after, near_tiles, oldest, last, far_last, PAGE, TILE
        )
        if D == BLOCK_D:
            c = tl.load(at + dims[None, :])
        else:
            c = tl.load(at + dims[None, :], mask=(dims < D)[None, :], other=0.0)
        logits = tl.dot(query, tl.trans(c), input_precision="ieee")
        # Every tile has a row that is seen, so `new_top` is a number.
        seen = held == first + tl.arange(0, TILE)
        logits = tl.where(seen[None, :], logits * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp2(logits - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        sums = tl.dot(weights.to(c.dtype), c, sums * shrink[:, None], input_precision="ieee")
        top = new_top

    # Not before: what the next kernel asks for ahead would stand in the way of the rows.
    start_next(OVERLAP)
    # Derived anew: kept through the loop, what tells heads apart would cost it registers.
    head += tl.load(lengths + b, volatile=True) - length
    real = (head < heads)[:, None] & (dims < D)[None, :]
    # Parts are turned before they are put together: a rotation of a sum is the sum of rotations.
    even, odd = split_channels(sums * (1.0 / total)[:, None])
    pair = tl.arange(0, BLOCK_D // 2) - (D - rope) // 2
    turns = (pair >= 0) & (pair < rope // 2) & (position < positions)
    angle = cos_sin + position.to(tl.int64) * rope + 2 * pair
    cos = tl.load(angle, mask=turns, other=1.0)[None, :]
    sin = tl.load(angle + 1, mask=turns, other=0.0)[None, :]
    result = join_channels(even * cos + odd * sin, odd * cos - even * sin)
    if used == 1:
        at = out + (each.to(tl.int64) * heads + head)[:, None] * D + dims[None, :]
        tl.store(at, result.to(out.dtype.element_ty), mask=real)
        return
    row = (counter * splits + split) * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(partials + row[:, None] * D + dims[None, :], result, mask=real)
    tl.store(partial_lse + row, top + tl.log2(total))


def pooled_decode(
    q: Tensor, near: Tensor, near_table: Tensor, lengths: Tensor, far: Tensor, far_table: Tensor,
    past: Tensor, sinks: Tensor, cos_sin: Tensor, *, scale: float, page_size: int, window: int,
    every: int, picks: Tensor | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(scale · q cᵀ, sinks) c over the rows c that a token sees, turned back: [B, K, H, d].

    q: [B, K, H, d], K <= 9, d one of `WIDTHS`, bf16 or fp16; strides multiples of 16, so views of
      a packed projection will do.
    near: contiguous [pages * page_size, d], rows of one token each, and far: of `every` tokens;
      q's dtype. Both are keys and values of all heads.
    near_table, far_table: int32 [B, max_pages]; entry j is the pool page of places j * page_size
      and up.
    lengths: int32 [B]; rows of `near`, the K new ones included. Token i sits at place
      length - K + i and sees the newest `window` rows up to itself; pages that no new token sees
      may be anything.
    past: int32 [B], tokens before this step. Token i has position past + i, sees the first
      (past + i + 1) // every rows of `far`, and its output is turned by minus its position.
    sinks: [H], float32 or q's dtype; one logit more in each head's softmax, of no value.
    cos_sin: contiguous float32 [positions, r / 2, 2]: the last r channels are turned, in pairs; a
      token past `cos_sin` is not.
    picks: int64 [B, K, k], places of the rows of `far` that each token reads; if it sees fewer
      than k, those come first, and what stands behind them may be anything. None: it reads all.
    out: contiguous [B, K, H, d], written and returned.
    Raises ValueError for anything else, before any launch. The contents of integer tensors are not
    checked: they are read on the device only.
    """
    check(
        q, near, near_table, lengths, far, far_table, past, sinks, cos_sin, page_size, window,
        every, picks, out, kernel=pooled_decode_fwd_kernel,
    )  # fmt: skip
    batch, tokens, heads, dim = q.shape
    if out is None:
        out = torch.empty((batch, tokens, heads, dim), dtype=q.dtype, device=q.device)
    if batch == 0:
        return out
    picked = 0 if picks is None else picks.shape[2]
    capacity = min(near_table.shape[1] * page_size, window) + (
        picked or far_table.shape[1] * page_size
    )
    most = min(triton.cdiv(capacity, SPLIT_ROWS), MAX_SPLITS)
    programs = multiprocessors(q.device)
    block_m, config = config_of(q, most, programs)
    parts = triton.cdiv(heads, block_m)
    splits = min(most, triton.cdiv(programs, batch * tokens * parts))
    early = triton.cdiv(capacity, splits) <= SPLIT_ROWS
    floats = functools.partial(torch.empty, dtype=torch.float32, device=q.device)
    partials = floats((batch * tokens, parts, splits, block_m, dim) if splits > 1 else (16,))
    partial_lse = floats((batch * tokens, parts, splits, block_m) if splits > 1 else (16,))
    used_splits = torch.empty(batch * tokens * parts, dtype=torch.int32, device=q.device)
    # The stride of a single element is arbitrary, and never used.
    strides = (q.stride(i) if q.shape[i] > 1 else 0 for i in range(3))
    pooled_decode_fwd_kernel[(splits, parts, batch * tokens)](
        q, near, far, near_table, far_table, lengths, past, picks, sinks, cos_sin, out, partials,
        partial_lse, used_splits, scale * math.log2(math.e), *strides, near_table.shape[1],
        far_table.shape[1], picked, heads, tokens, window, every, 2 * cos_sin.shape[1],
        cos_sin.shape[0],
        D=dim, BLOCK_D=triton.next_power_of_2(dim), PAGE=page_size, BLOCK_M=block_m,
        TILE=config.tile, SPLIT_TILES=SPLIT_ROWS // config.tile,
        num_warps=config.warps, num_stages=config.stages,
        **overlapped(q.device, early=early),
    )  # fmt: skip
    if splits > 1:
        each = out.view(batch * tokens, 1, heads, dim)
        split_combine(partials, partial_lse, used_splits, each, row_blocks=parts)
    return out


def config_of(q: Tensor, splits: int, programs: int) -> tuple[int, Config]:
    """Heads of a program and its configuration.

    As few heads as leave no more than `programs` with so many splits of each token: a small batch
    does not fill the GPU, and what other heads read again comes from its cache.
    """
    batch, tokens, heads, dim = q.shape
    width = triton.next_power_of_2(dim)
    configs = {m: config for (w, m), config in CONFIGS[gpu(q.device).family].items() if w == width}
    all_at_once = min((m for m in configs if m >= heads), default=max(configs))
    few = programs // (batch * tokens * splits)
    block_m = min((m for m in configs if triton.cdiv(heads, m) <= few), default=all_at_once)
    return block_m, configs[block_m]


def pooled_decode_ref(
    q: Tensor, near: Tensor, near_table: Tensor, lengths: Tensor, far: Tensor, far_table: Tensor,
    past: Tensor, sinks: Tensor, cos_sin: Tensor, *, scale: float, page_size: int, window: int,
    every: int, picks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The oracle: float64, one new token of one head at a time. Arguments as `pooled_decode`."""
    batch, tokens, heads, _ = q.shape
    out = torch.zeros(q.shape, dtype=torch.float64)
    for b in range(batch):
        for i in range(tokens):
            end, position = int(lengths[b]) - tokens + i + 1, int(past[b]) + i
            own = torch.arange(max(0, end - window), max(0, end))
            pooled = torch.arange(max(0, position + 1) // every)
            if picks is not None:
                pooled = picks[b, i, : len(pooled)]
            c = torch.cat(
                [
                    pool[table[b, at // page_size].long() * page_size + at % page_size]
                    for pool, table, at in ((near, near_table, own), (far, far_table, pooled))
                ]
            ).double()
            for h in range(heads):
                logits = torch.cat((c @ q[b, i, h].double() * scale, sinks[h, None].double()))
                out[b, i, h] = logits.softmax(0)[:-1] @ c
            if position < len(cos_sin):
                pairs = torch.view_as_complex(out[b, i].unflatten(1, (-1, 2)))
                pairs[:, -cos_sin.shape[1] :] *= torch.view_as_complex(
                    cos_sin[position].double()
                ).conj()
    return out


def variants() -> list[Variant]:
    """Every configuration that the wrapper can pick; first DeepSeek-V4's rows of 512. Pages: of
    whole tiles, below a tile, and rows that are picked; those of fp16 are left out, as its code is
    that of bf16 but for the type."""
    bf16 = torch.bfloat16

    def call(dtype: torch.dtype, dim: int, heads: int, page: int, picked: bool) -> NamedCall:
        ints = functools.partial(meta, dtype=torch.int32)
        pool, floats = meta(page, dim, dtype=dtype), functools.partial(meta, dtype=torch.float32)
        # So many sequences that all heads of a token are a program's.
        batch, table, lengths = 1024, ints(1024, 1), ints(1024)
        name = f"pooled_decode {str(dtype)[6:]} d {dim} heads {heads} page {page}"
        return name + " picked" * picked, functools.partial(
            pooled_decode, meta(batch, 1, heads, dim, dtype=dtype), pool, table, lengths, pool,
            table, lengths, floats(heads), floats(page, dim // 8, 2), scale=1.0, page_size=page,
            window=128, every=128, picks=meta(batch, 1, 1, dtype=torch.int64) if picked else None,
        )  # fmt: skip

    calls = (
        call(dtype, dim, heads, page, picked)
        for dtype in (bf16, torch.float16)
        for dim in WIDTHS
        for heads in (16, 32, 64)
        for page, picked in ((64, False), (16, False), (64, True))
        if (page, picked) == (64, False) or dtype == bf16
    )
    # Pages, and places of picked rows, are narrow.
    expected = Expected(wide_loads=2, narrow_in_loops=frozenset({4, 8}), matrix=True, spills=SPILLS)
    return variants_of(
        (call(bf16, 512, 64, 64, False), *calls), {pooled_decode_fwd_kernel: expected}
    )
