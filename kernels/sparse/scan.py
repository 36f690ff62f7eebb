"""An indexer's scores of all cached keys, as numbers whose order is that of the choice.

DeepSeek Sparse Attention (arXiv 2512.02556, equation 1) scores every row by Σ_h w_h · relu(q_h · k)
and reads the best rows alone. What comes out is one int64 a row: the score's bits, ordered, above
the row's place counted from the end. So no two are equal, among equal scores the earlier row is the
larger number, and any selection of the largest gives the same rows.

Legend: B sequences, K new tokens, H index heads, d channels of a key, S rows. Each program takes a
tile of rows for a block of tokens, all heads at once: one matrix product and a sum over heads a
token, of the same shape whatever K and S are.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot.ahead import Variant
from kernels.aot.recorded import Expected, NamedCall, meta, tile_loads, variants_of
from kernels.attention.tiles import page_of
from kernels.checks import form, require
from kernels.device import interpreted, require_gpu
from kernels.overlap import overlapped, start_next, wait_for_previous

#: Rows of a tile, warps of a program, and tokens that read a tile while it is at hand.
TILE, WARPS, TOKENS = 64, 4, 16
MAX_DIM, MAX_HEADS = 256, 128


@triton.jit(do_not_specialize=["max_pages", "tokens", "rows", "ends_stride_b"])
def index_scan_fwd_kernel(  # type: ignore[no-untyped-def]
    q, weights, pool, page_table, lengths, ends, ranks,
    q_stride_b, q_stride_t, q_stride_h, ends_stride_b, max_pages, tokens, rows,
    H: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr, TILE: tl.constexpr, TOKENS: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of rows, blocks of tokens, B). ends may be None, or else lengths."""
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    tile, b = tl.program_id(0), tl.program_id(2)
    first = tl.program_id(1) * TOKENS
    end = tl.minimum(first + TOKENS, tokens)
    past = 0
    if ends is None:
        past = tl.load(lengths + b)
    else:
        ends += b.to(tl.int64) * ends_stride_b
    row = tile * TILE + tl.arange(0, TILE)
    h = tl.arange(0, BLOCK_H)
    c = tl.arange(0, BLOCK_D)
    # The last of the block's tokens sees the most.
    last = past + end - 1
    if ends is not None:
        last = tl.load(ends + end - 1).to(tl.int32) - 1
    reached = tile * TILE <= last
    page_table += b.to(tl.int64) * max_pages
    keys = tl.zeros([TILE, BLOCK_D], pool.dtype.element_ty)
    if reached:
        page = page_of(page_table, tile, 0, 0, 0, last, PAGE, TILE, False)
        held = tl.minimum(row, last)
        at = (pool + page.to(tl.int64) * (PAGE * D) + held % PAGE * D)[:, None]
        if D == BLOCK_D:
            keys = tl.load(at + c[None, :])
        else:
            keys = tl.load(at + c[None, :], mask=(c < D)[None, :], other=0.0)
    place = (rows - 1 - row).to(tl.int64)
    for t in range(first, end):
        token = b.to(tl.int64) * tokens + t
        score = tl.zeros([TILE], tl.float32)
        if reached:
            heads = (q + b.to(tl.int64) * q_stride_b + t * q_stride_t + h * q_stride_h)[:, None]
            asked = (h < H)[:, None] & (c < D)[None, :]
            queries = tl.load(heads + c[None, :], mask=asked, other=0.0)
            weight = tl.load(weights + token * H + h, mask=h < H, other=0.0)
            dots = tl.dot(queries, tl.trans(keys), input_precision="ieee")
            score = tl.sum(tl.maximum(dots, 0.0) * weight[:, None], 0)
        newest = past + t
        if ends is not None:
            newest = tl.load(ends + t).to(tl.int32) - 1
        score = tl.where(row <= newest, score, float("-inf"))
        # Zeros of both signs are equal, but their bits are not.
        bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
        ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
        tl.store(ranks + token * rows + row, (ordered << 32) | place, mask=row < rows)


def index_scan(
    q: Tensor, weights: Tensor, pool: Tensor, page_table: Tensor, lengths: Tensor | None, *,
    rows: int, page_size: int, ends: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The rank of every row for every new token, int64 [B, K, S] with S = `rows`.

    q: [B, K, H, d]; d at most 256 and a multiple of 16, H at most 128; bfloat16 or float16; strides
      multiples of 16, the last 1.
    weights: contiguous float32 [B, K, H], scales included.
    pool: contiguous [pages * page_size, d], in q's dtype.
    page_table: int32 [B, max_pages]; entry j is the pool page of positions j * page_size and up.
    lengths: int32 [B], rows in the cache BEFORE this step: token i sits at position lengths[b] + i
      and sees rows up to itself; ranks of rows that it does not see are below those of all that it
      does, in order of their places. None: `ends` say what tokens see.
    ends: int64 [1 or B, K], of rows that are not one a token: before which row each token sees,
      the later one not less; last stride 1. One of both is given.
    Products are summed in float32. Raises ValueError naming the argument, its value and the rule,
    before any launch; the contents of the int32 tensors are not checked.
    """
    kernel = index_scan_fwd_kernel
    require_gpu("q", q, kernel)
    require(q.dim() == 4, "q", form(q), "must be [B, K, H, d]")
    dtypes = (torch.bfloat16, torch.float16) + ((torch.float32,) if interpreted(kernel) else ())
    require(q.dtype in dtypes, "q", form(q), "must be bfloat16 or float16")
    batch, tokens, heads, dim = q.shape
    require(16 <= dim <= MAX_DIM and dim % 16 == 0, "d", dim,
            "must be a multiple of 16, at most {}", MAX_DIM)  # fmt: skip
    require(tokens >= 1 and 1 <= heads <= MAX_HEADS, "q", form(q),
            "must have tokens, and 1 to {} heads", MAX_HEADS)  # fmt: skip
    strides = [q.stride(i) for i in range(3) if q.shape[i] > 1]
    aligned = q.stride(3) == 1 and not any(s % 16 for s in strides) and q.data_ptr() % 16 == 0
    require(aligned, "q", form(q), "must start at 16 bytes and have strides [16i, 16j, 16k, 1]")
    fits = weights.shape == q.shape[:3] and weights.dtype == torch.float32
    require(fits and weights.is_contiguous(), "weights", form(weights),
            "must be contiguous float32 {}", [batch, tokens, heads])  # fmt: skip
    require(page_size >= 16 and page_size % 16 == 0, "page_size", page_size,
            "must be a positive multiple of 16")  # fmt: skip
    fits = pool.dim() == 2 and pool.shape[1] == dim and pool.is_contiguous()
    fits = fits and pool.shape[0] % page_size == 0 and pool.dtype == q.dtype
    require(fits and pool.data_ptr() % 16 == 0, "pool", form(pool),
            "must be contiguous {} [pages * {}, {}]", q.dtype, page_size, dim)  # fmt: skip
    fits = page_table.dim() == 2 and page_table.shape[0] == batch and page_table.shape[1] > 0
    require(fits and page_table.dtype == torch.int32 and page_table.is_contiguous(), "page_table",
            form(page_table), "must be contiguous int32 [{}, max_pages]", batch)  # fmt: skip
    most = page_table.shape[1] * page_size
    require(1 <= rows <= most, "rows", rows, "must be 1 to the {} of the page table", most)
    told = ends if ends is None else form(ends)
    require((lengths is None) != (ends is None), "ends", told,
            "must be given where lengths are None, and only there")  # fmt: skip
    if lengths is not None:
        fits = lengths.shape == (batch,) and lengths.dtype == torch.int32
        require(fits and lengths.is_contiguous(), "lengths", form(lengths),
                "must be contiguous int32 [{}]", batch)  # fmt: skip
    if ends is not None:
        fits = ends.shape in ((1, tokens), (batch, tokens)) and ends.dtype == torch.int64
        require(fits and (tokens == 1 or ends.stride(1) == 1), "ends", told,
                "must be int64 [1 or {}, {}] with last stride 1", batch, tokens)  # fmt: skip
    others = {
        "weights": weights, "pool": pool, "page_table": page_table, "lengths": lengths,
        "ends": ends,
    }  # fmt: skip
    for name, tensor in others.items():
        require(tensor is None or tensor.device == q.device, name, getattr(tensor, "device", None),
                "must be on the device of q, {}", q.device)  # fmt: skip
    ranks = torch.empty((batch, tokens, rows), dtype=torch.int64, device=q.device)
    if batch == 0:
        return ranks
    # The stride of a single element is arbitrary, and never used.
    given = (q.stride(i) if q.shape[i] > 1 else 0 for i in range(3))
    grid = (triton.cdiv(rows, TILE), triton.cdiv(tokens, TOKENS), batch)
    index_scan_fwd_kernel[grid](
        q, weights, pool, page_table, lengths, ends, ranks, *given,
        ends.stride(0) if ends is not None and len(ends) > 1 else 0,
        page_table.shape[1], tokens, rows,
        H=heads, D=dim, PAGE=page_size, BLOCK_H=max(16, triton.next_power_of_2(heads)),
        BLOCK_D=triton.next_power_of_2(dim), TILE=TILE, TOKENS=TOKENS, num_warps=WARPS,
        **overlapped(q.device),
    )  # fmt: skip
    return ranks


def index_scan_ref(
    q: Tensor, weights: Tensor, pool: Tensor, page_table: Tensor, lengths: Tensor | None, *,
    rows: int, page_size: int, ends: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The oracle of the scores, float64 [B, K, S], -inf where a token does not see a row."""
    batch, tokens = q.shape[:2]
    found = torch.full((batch, tokens, rows), -torch.inf, dtype=torch.float64)
    if ends is None:
        assert lengths is not None
        ends = lengths.long()[:, None] + torch.arange(1, tokens + 1)
    ends = ends.expand(batch, -1)
    for b in range(batch):
        for i in range(tokens):
            seen = torch.arange(min(int(ends[b, i]), rows))
            at = page_table[b, seen // page_size].long() * page_size + seen % page_size
            dots = (q[b, i].double() @ pool[at].double().T).clamp(min=0)
            found[b, i, : len(seen)] = weights[b, i].double() @ dots
    return found


def scores_of(ranks: Tensor) -> Tensor:
    """The scores in ranks, float32 of the same shape."""
    ordered = ranks >> 32
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.to(torch.int32).view(torch.float32)


def variants() -> list[Variant]:
    """Keys of every scale's width, and head counts; first DeepSeek's."""

    def call(
        dtype: torch.dtype, heads: int, dim: int, page: int, *, pooled: bool = False
    ) -> NamedCall:
        row = functools.partial(meta, dtype=dtype)
        name = f"index_scan {str(dtype)[6:]} {heads} heads d {dim} page {page}"
        return name + " pooled" * pooled, functools.partial(
            index_scan, row(1, 1, heads, dim), meta(1, 1, heads, dtype=torch.float32),
            row(page, dim), meta(1, 1, dtype=torch.int32),
            None if pooled else meta(1, dtype=torch.int32), rows=page, page_size=page,
            ends=meta(1, 1, dtype=torch.int64) if pooled else None,
        )  # fmt: skip

    bf16 = torch.bfloat16
    calls = (
        call(bf16, 64, 128, 64),
        call(bf16, 64, 128, 16),
        *(call(bf16, heads, dim, 64) for heads, dim in ((2, 32), (4, 64), (16, 64), (16, 128))),
        call(bf16, 2, 32, 16),
        call(bf16, 4, 96, 64),
        call(torch.float16, 16, 128, 64),
        *(
            call(bf16, heads, dim, page, pooled=True)
            for heads, dim in ((64, 128), (32, 64), (16, 64), (8, 16))
            for page in (64, 16)
        ),
    )

    def spills(v: Variant) -> int:
        """Of d 64 the assembler for sm_100 puts 16 bytes on the stack, though most registers are
        free. Neither this nor another tile was timed there.
        """
        return 16 if v.constexprs["D"] == 64 else 0

    expected = Expected(
        wide_loads=tile_loads("pool", "TILE", "BLOCK_D"), matrix=True,
        narrow_in_loops=frozenset({2, 4, 8}), spills=spills,
    )  # fmt: skip
    return variants_of(calls, {index_scan_fwd_kernel: expected})
