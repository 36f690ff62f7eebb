"""Attention of new tokens over the means of blocks, and the order of blocks that it gives.

Native sparse attention (arXiv 2502.11089, equations 8 and 10): the weights that a token's query
heads give the means, added up over the heads of a KV head, say which blocks it reads row by row.
What comes out beside the attention is one int64 a block, as of `kernels.sparse.scan`: the weight's
bits above the block's place counted from the end, so among equal weights the earlier block is the
larger number. The first block stands above all; a token's own block and the one before, which it
reads anyway, stand below all, as do those that it does not see.

Legend: B sequences, K new tokens, H query heads, G KV heads, d channels, C means, S rows of a
block. One program takes the H/G query heads of a KV head for one token and goes through the means
twice: for the attention, and for the weights once their sum is known. Its tiles are the same
whatever K and C are, and so are its results. Logits, softmax and sums are fp32; exponents are base
2.
"""

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot.ahead import Variant
from kernels.aot.recorded import Expected, NamedCall, meta, tile_loads, variants_of
from kernels.attention.decode_checks import HEAD_DIMS
from kernels.attention.tiles import page_of
from kernels.blocks.torch import ALWAYS, NEWEST
from kernels.checks import form, require
from kernels.device import interpreted, require_gpu
from kernels.overlap import overlapped, start_next, wait_for_previous

#: Means of a tile, warps of a program, and most query heads of a KV head.
TILE, WARPS, MAX_GROUP = 64, 4, 64


@triton.jit(do_not_specialize=["max_pages", "tokens", "means", "group"])
def block_scan_fwd_kernel(  # type: ignore[no-untyped-def]
    q, k, v, page_table, lengths, out, ranks, scale_log2,
    q_stride_b, q_stride_t, q_stride_h, stride_g, max_pages, tokens, means, group,
    S: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK_H: tl.constexpr,
    TILE: tl.constexpr, FIRST: tl.constexpr, NEWEST: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (G, K, B)."""
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    g, t, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position = tl.load(lengths + b) + t
    seen = (position + 1) // S
    last = seen - 1
    h = tl.arange(0, BLOCK_H)
    dims = tl.arange(0, D)
    real = (h < group)[:, None]
    at = q + b.to(tl.int64) * q_stride_b + t * q_stride_t + (g * group + h)[:, None] * q_stride_h
    query = tl.load(at + dims[None, :], mask=real, other=0.0)
    k += g.to(tl.int64) * stride_g
    v += g.to(tl.int64) * stride_g
    page_table += b.to(tl.int64) * max_pages

    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    sums = tl.zeros([BLOCK_H, D], tl.float32)
    for i in tl.range(0, tl.cdiv(seen, TILE)):
        row = i * TILE + tl.arange(0, TILE)
        held = tl.minimum(row, last)
        page = page_of(page_table, i, 0, 0, 0, last, PAGE, TILE, False)
        place = (page.to(tl.int64) * PAGE + held % PAGE)[:, None] * D + dims[None, :]
        logits = tl.dot(query, tl.trans(tl.load(k + place)), input_precision="ieee")
        logits = tl.where((row < seen)[None, :], logits * scale_log2, float("-inf"))
        # Every tile has a mean that is seen, so the new top is finite.
        new_top = tl.maximum(top, tl.max(logits, 1))
        weights = tl.exp2(logits - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        values = tl.load(v + place)
        sums = tl.dot(
            weights.to(query.dtype), values, sums * shrink[:, None], input_precision="ieee"
        )
        top = new_top
    total = tl.where(seen > 0, total, 1.0)
    heads = tl.num_programs(0) * group
    token = b.to(tl.int64) * tokens + t
    to = out + (token * heads + g * group + h)[:, None] * D + dims[None, :]
    tl.store(to, (sums / total[:, None]).to(out.dtype.element_ty), mask=real)

    ranks += (token * tl.num_programs(0) + g) * means
    older = position // S - NEWEST
    for i in tl.range(0, tl.cdiv(means, TILE)):
        row = i * TILE + tl.arange(0, TILE)
        score = tl.zeros([TILE], tl.float32)
        if i * TILE <= older:
            held = tl.minimum(row, last)
            page = page_of(page_table, i, 0, 0, 0, last, PAGE, TILE, False)
            place = (page.to(tl.int64) * PAGE + held % PAGE)[:, None] * D + dims[None, :]
            logits = tl.dot(query, tl.trans(tl.load(k + place)), input_precision="ieee")
            weights = tl.exp2(logits * scale_log2 - top[:, None]) / total[:, None]
            score = tl.sum(tl.where(real, weights, 0.0), 0) / group
        score = tl.where(row == 0, FIRST, score)
        score = tl.where(row <= older, score, float("-inf"))
        # Weights are not negative, so their bits are in order; -inf has a sign and is below them.
        bits = score.to(tl.int32, bitcast=True).to(tl.int64)
        tl.store(ranks + row, (bits << 32) | (means - 1 - row), mask=row < means)


def block_scan(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, page_table: Tensor, lengths: Tensor, *,
    means: int, block: int, page_size: int, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(scale · q kᵀ) v over the means that each new token sees, zeros where it sees none,
    [B, K, H, d]; and the rank of every block, int64 [B, K, G, C] with C = `means`.

    q: [B, K, H, d], bfloat16 or float16; strides multiples of 16, the last 1; H/G at most 64.
    k_pool, v_pool: [G, pages * page_size, d], one layout, in q's dtype.
    page_table: int32 [B, max_pages]; entry j is the pool page of means j * page_size and up.
    lengths: int32 [B], tokens in the cache BEFORE this step: token i sits at position
      lengths[b] + i and sees the means of blocks of `block` tokens that end with it or before.
    Raises ValueError naming the argument, its value and the rule, before any launch; the contents
    of the int32 tensors are not checked.
    """
    kernel = block_scan_fwd_kernel
    require_gpu("q", q, kernel)
    require(q.dim() == 4, "q", form(q), "must be [B, K, H, d]")
    dtypes = (torch.bfloat16, torch.float16) + ((torch.float32,) if interpreted(kernel) else ())
    require(q.dtype in dtypes, "q", form(q), "must be bfloat16 or float16")
    batch, tokens, heads, dim = q.shape
    require(tokens >= 1, "q", form(q), "must have tokens")
    require(dim in HEAD_DIMS, "head_dim", dim, "must be one of {}", HEAD_DIMS)
    strides = [q.stride(i) for i in range(3) if q.shape[i] > 1]
    aligned = q.stride(3) == 1 and not any(s % 16 for s in strides) and q.data_ptr() % 16 == 0
    require(aligned, "q", form(q), "must start at 16 bytes and have strides [16i, 16j, 16k, 1]")
    require(page_size >= 16 and page_size % 16 == 0, "page_size", page_size,
            "must be a positive multiple of 16")  # fmt: skip
    require(block >= 1, "block", block, "must be at least 1")
    for name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
        fits = pool.dim() == 3 and pool.shape[2] == dim and pool.shape[1] % page_size == 0
        fits = fits and pool.dtype == q.dtype and pool.stride()[1:] == (dim, 1)
        require(fits and pool.data_ptr() % 16 == 0, name, form(pool),
                "must be {} [G, pages * {}, {}], rows packed", q.dtype, page_size, dim)  # fmt: skip
    kv_heads = k_pool.shape[0]
    same = v_pool.shape == k_pool.shape and v_pool.stride() == k_pool.stride()
    require(same, "v_pool", form(v_pool), "must have k_pool's form, {}", form(k_pool))
    divides = kv_heads > 0 and heads % kv_heads == 0 and heads // kv_heads <= MAX_GROUP
    require(divides, "k_pool", form(k_pool),
            "must have heads that divide the {} of q, by {} at most", heads, MAX_GROUP)  # fmt: skip
    fits = page_table.dim() == 2 and page_table.shape[0] == batch and page_table.shape[1] > 0
    require(fits and page_table.dtype == torch.int32 and page_table.is_contiguous(), "page_table",
            form(page_table), "must be contiguous int32 [{}, max_pages]", batch)  # fmt: skip
    most = page_table.shape[1] * page_size
    require(1 <= means <= most, "means", means, "must be 1 to the {} of the page table", most)
    fits = lengths.shape == (batch,) and lengths.dtype == torch.int32 and lengths.is_contiguous()
    require(fits, "lengths", form(lengths), "must be contiguous int32 [{}]", batch)
    others = {
        "k_pool": k_pool, "v_pool": v_pool, "page_table": page_table, "lengths": lengths,
    }  # fmt: skip
    for name, tensor in others.items():
        require(tensor.device == q.device, name, tensor.device,
                "must be on the device of q, {}", q.device)  # fmt: skip
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    ranks = torch.empty((batch, tokens, kv_heads, means), dtype=torch.int64, device=q.device)
    if batch == 0:
        return out, ranks
    # The stride of a single element is arbitrary, and never used.
    given = (q.stride(i) if q.shape[i] > 1 else 0 for i in range(3))
    group = heads // kv_heads
    block_scan_fwd_kernel[(kv_heads, tokens, batch)](
        q, k_pool, v_pool, page_table, lengths, out, ranks,
        (dim**-0.5 if scale is None else scale) * math.log2(math.e), *given,
        k_pool.stride(0) if kv_heads > 1 else 0, page_table.shape[1], tokens, means, group,
        S=block, D=dim, PAGE=page_size, BLOCK_H=max(16, triton.next_power_of_2(group)), TILE=TILE,
        FIRST=ALWAYS, NEWEST=NEWEST, num_warps=WARPS, **overlapped(q.device),
    )  # fmt: skip
    return out, ranks


def block_scan_ref(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, page_table: Tensor, lengths: Tensor, *,
    means: int, block: int, page_size: int, scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The oracle, float64: the attention, and the scores by which blocks are ranked, -inf for a
    token's own block, the one before and later ones; [B, K, G, C].
    """
    batch, tokens, _, dim = q.shape
    groups = k_pool.shape[0]
    out = torch.zeros(q.shape, dtype=torch.float64)
    scores = torch.full((batch, tokens, groups, means), -torch.inf, dtype=torch.float64)
    for b in range(batch):
        for i in range(tokens):
            position = int(lengths[b]) + i
            seen = torch.arange((position + 1) // block)
            at = page_table[b, seen // page_size].long() * page_size + seen % page_size
            older = min(max(0, position // block - NEWEST + 1), means)
            for g in range(groups):
                own = q[b, i].unflatten(0, (groups, -1))[g].double()
                logits = own @ k_pool[g, at].double().T * (dim**-0.5 if scale is None else scale)
                weights = logits.softmax(-1)
                out[b, i].unflatten(0, (groups, -1))[g] = weights @ v_pool[g, at].double()
                scores[b, i, g, :older] = weights.mean(0)[:older]
                scores[b, i, g, : min(1, older)] = ALWAYS
    return out, scores


def scores_of(ranks: Tensor) -> Tensor:
    """The scores in ranks, float32 of the same shape."""
    return (ranks >> 32).to(torch.int32).view(torch.float32)


def variants() -> list[Variant]:
    """Heads of every scale, and of larger groups; first the paper's."""

    def call(dtype: torch.dtype, group: int, dim: int, block: int, page: int) -> NamedCall:
        row = functools.partial(meta, dtype=dtype)
        name = f"block_scan {str(dtype)[6:]} group {group} d {dim} block {block} page {page}"
        return name, functools.partial(
            block_scan, row(1, 1, group, dim), row(1, page, dim), row(1, page, dim),
            meta(1, 1, dtype=torch.int32), meta(1, dtype=torch.int32), means=page, block=block,
            page_size=page,
        )  # fmt: skip

    bf16 = torch.bfloat16
    calls = (
        call(bf16, 16, 128, 64, 64),
        *(call(bf16, group, dim, 64, 64) for group, dim in ((4, 64), (32, 128), (16, 256))),
        *(call(bf16, 4, dim, block, 16) for dim, block in ((32, 8), (64, 32), (128, 64))),
        call(torch.float16, 16, 128, 64, 64),
    )
    expected = Expected(
        wide_loads=tile_loads("k", "TILE", "D"), matrix=True,
        narrow_in_loops=frozenset({2, 4, 8}),
    )  # fmt: skip
    return variants_of(calls, {block_scan_fwd_kernel: expected})
