"""Rotary positions and the paged write of keys and values, in one launch (arXiv 2104.09864).

Legend: B sequences, K new tokens, H query heads, G kv heads, d head dim.
Channels (0, 1), (2, 3), … of a head are one complex number each, turned by the angle of the
token's position, in float32 (`torch`). Queries and keys are turned in place; keys and
values then go to their pages (`pages.write`). One program takes a tile of heads of one
token, so that loads, turns and stores share one layout and nothing crosses threads.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot.ahead import Variant
from kernels.aot.recorded import Expected, NamedCall, meta, tile_loads, variants_of
from kernels.checks import form, require
from kernels.device import require_gpu
from kernels.overlap import overlapped, start_next, wait_for_previous
from kernels.pages.write import FLOATS, check_pages, page_row

MAX_HEAD_DIM = 512
#: Bytes of one element of `qkv` -> (elements of a tile, warps): two 16-byte loads per thread of
#: a warp of 32, one per thread of a wave of 64.
CONFIGS: dict[int, tuple[int, int]] = {2: (1024, 2), 4: (512, 2)}


@triton.jit(do_not_specialize=["tokens", "max_pages", "positions", "sinks"])
def rope_append_fwd_kernel(  # type: ignore[no-untyped-def]
    qkv, cos_sin, k_pool, v_pool, page_table, lengths, new, first_kept,
    stride_b, stride_t, k_stride_g, v_stride_g, tokens, max_pages, positions, sinks,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (B * K, tiles of heads). new and first_kept may be None."""
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    b = tl.program_id(0) // tokens
    i = tl.program_id(0) % tokens
    first = tl.program_id(1) * BLOCK_H
    valid, kept, position, row = page_row(
        page_table, lengths, new, first_kept, b, i, tokens, max_pages, sinks, PAGE
    )
    if not valid:
        return
    h = first + tl.arange(0, BLOCK_H)[:, None]
    c = tl.arange(0, BLOCK_D)[None, :]
    inside = (h < H + 2 * G) & (c < D)
    at = qkv + b.to(tl.int64) * stride_b + i.to(tl.int64) * stride_t + h * D + c
    x = tl.load(at, mask=inside, other=0.0)
    # The same angles for each head: read again per head, from cache, they need no exchange.
    turns = (h < H + G) & (c < D) & (position < positions)
    angle = tl.load(cos_sin + position.to(tl.int64) * D + c + 0 * h, mask=turns, other=0.0)
    cos, sin = tl.split(tl.reshape(angle, (BLOCK_H, BLOCK_D // 2, 2)))
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (BLOCK_H, BLOCK_D // 2, 2)))
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    turned = tl.reshape(turned, (BLOCK_H, BLOCK_D)).to(x.dtype)
    tl.store(at, turned, mask=turns)
    if first + BLOCK_H > H:
        x = tl.where(turns, turned, x)
        g = (h - H).to(tl.int64)
        keys = k_pool + g * k_stride_g + row * D + c
        tl.store(keys, x.to(k_pool.dtype.element_ty), mask=inside & kept & (g >= 0) & (g < G))
        values = v_pool + (g - G) * v_stride_g + row * D + c
        tl.store(values, x.to(v_pool.dtype.element_ty), mask=inside & kept & (g >= G))


def rope_append(
    qkv: Tensor, cos_sin: Tensor, k_pool: Tensor, v_pool: Tensor, page_table: Tensor,
    lengths: Tensor, *, heads: int, kv_heads: int, page_size: int, new: Tensor | None = None,
    first_kept: Tensor | None = None, sinks: int = 0,
) -> None:  # fmt: skip
    """Turn queries and keys by their positions in place, and write keys and values to pages.

    qkv: [B, K, H + 2G, d], queries, keys, values; bfloat16, float16 or float32; strides
      [16i, 16j, d, 1], so a view of a wider packed projection will do. d: a multiple of 16 up to
      512. Queries and keys are turned in float32 and rounded to qkv's dtype; what is stored is
      what is left in qkv.
    cos_sin: contiguous float32 [positions, d / 2, 2], cosine and sine of each pair's angle.
    k_pool, v_pool: [G, pages * page_size, d], each head contiguous; a float dtype, cast to.
    page_table: int32 [B, max_pages]; entry j is the pool page of positions j * page_size and up.
    lengths: int32 [B], rows in the cache BEFORE this step (`attention_decode` wants those after
      it): token i sits at position lengths[b] + i.
    new: int32 [B], valid tokens of right-padded rows (None: K); padded ones are left alone.
    first_kept, sinks: int32 [B]; of the new tokens only those at positions from first_kept[b] on,
      or below `sinks`, are written (None: all), for prompts longer than a ring of pages. All
      valid ones are turned.
    A token past `cos_sin` is not turned; one without a page (its position lies past the table, or
    its entry is negative) is not written. Tokens kept must have pages of their own. Raises
    ValueError naming the argument, its value and the rule, before any launch; the contents of the
    int32 tensors are not checked: they are read on the device only.
    """
    require_gpu("qkv", qkv, rope_append_fwd_kernel)
    require(qkv.dim() == 4, "qkv", form(qkv), "must be [B, K, H + 2G, d]")
    require(qkv.dtype in FLOATS, "qkv", form(qkv), "must be bfloat16, float16 or float32")
    batch, tokens, packed, dim = qkv.shape
    require(kv_heads >= 1, "kv_heads", kv_heads, "must be at least 1")
    divides = heads >= 1 and heads % kv_heads == 0
    require(divides, "heads", heads, "must be a positive multiple of kv_heads={}", kv_heads)
    require(packed == heads + 2 * kv_heads, "qkv", form(qkv),
            "must hold {} + 2 * {} heads", heads, kv_heads)  # fmt: skip
    require(16 <= dim <= MAX_HEAD_DIM and dim % 16 == 0, "head_dim", dim,
            "must be a multiple of 16 up to {}", MAX_HEAD_DIM)  # fmt: skip
    require(tokens >= 1, "K", tokens, "must be at least 1")
    strides = [qkv.stride(i) for i in range(2) if qkv.shape[i] > 1]
    apart = all(s % 16 == 0 and s >= packed * dim for s in strides)
    apart = apart and qkv.stride()[2:] == (dim, 1) and qkv.data_ptr() % 16 == 0
    require(apart, "qkv", form(qkv),
            "must start at 16 bytes and have strides [16i, 16j, {}, 1]", dim)  # fmt: skip

    fits = cos_sin.dim() == 3 and cos_sin.shape[1:] == (dim // 2, 2) and cos_sin.shape[0] > 0
    fits = fits and cos_sin.dtype == torch.float32 and cos_sin.is_contiguous()
    rule = "must be contiguous float32 [positions, {}, 2], from 16 bytes on"
    require(fits and cos_sin.data_ptr() % 16 == 0, "cos_sin", form(cos_sin), rule, dim // 2)
    for name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
        fits = pool.dim() == 3 and pool.shape[0] == kv_heads and pool.shape[2] == dim
        require(fits and pool.shape[1] % max(page_size, 1) == 0, name, form(pool),
                "must be [{}, pages * {}, {}]", kv_heads, page_size, dim)  # fmt: skip
        require(pool.dtype in FLOATS, name, form(pool), "must be bfloat16, float16 or float32")
        whole = pool.stride()[1:] == (dim, 1) and (kv_heads == 1 or pool.stride(0) % 16 == 0)
        require(whole and pool.data_ptr() % 16 == 0, name, form(pool),
                "must start at 16 bytes and have strides [16i, {}, 1]", dim)  # fmt: skip
    check_pages(qkv, page_table, lengths, new, first_kept, page_size, sinks, "qkv")
    for name, tensor in (("cos_sin", cos_sin), ("k_pool", k_pool), ("v_pool", v_pool)):
        require(tensor.device == qkv.device, name, tensor.device,
                "must be on the device of qkv, {}", qkv.device)  # fmt: skip
    if batch == 0:
        return

    elements, warps = CONFIGS[qkv.dtype.itemsize]
    block_d = triton.next_power_of_2(dim)
    block_h = max(1, min(elements // block_d, triton.next_power_of_2(packed)))
    # The stride of a single element is arbitrary, and never used.
    stride_b, stride_t = (qkv.stride(i) if qkv.shape[i] > 1 else 0 for i in range(2))
    stride_k, stride_v = (t.stride(0) if kv_heads > 1 else 0 for t in (k_pool, v_pool))
    rope_append_fwd_kernel[(batch * tokens, triton.cdiv(packed, block_h))](
        qkv, cos_sin, k_pool, v_pool, page_table, lengths, new, first_kept,
        stride_b, stride_t, stride_k, stride_v,
        tokens, page_table.shape[1], cos_sin.shape[0], sinks,
        H=heads, G=kv_heads, D=dim, PAGE=page_size, BLOCK_H=block_h, BLOCK_D=block_d,
        num_warps=warps, **overlapped(qkv.device),
    )  # fmt: skip


def rope_append_ref(
    qkv: Tensor, cos_sin: Tensor, k_pool: Tensor, v_pool: Tensor, page_table: Tensor,
    lengths: Tensor, *, heads: int, kv_heads: int, page_size: int,
    new: Tensor | None = None, first_kept: Tensor | None = None, sinks: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The oracle: float64, one token at a time; returns new qkv, k_pool, v_pool, all float64."""
    qkv, k_pool, v_pool = (t.double().clone() for t in (qkv, k_pool, v_pool))
    for b in range(qkv.shape[0]):
        for i in range(qkv.shape[1] if new is None else int(new[b])):
            position = int(lengths[b]) + i
            angle = torch.view_as_complex(cos_sin[position].double())
            pairs = torch.view_as_complex(qkv[b, i, : heads + kv_heads].unflatten(-1, (-1, 2)))
            qkv[b, i, : heads + kv_heads] = torch.view_as_real(pairs * angle).flatten(-2)
            if first_kept is not None and sinks <= position < int(first_kept[b]):
                continue
            row = int(page_table[b, position // page_size]) * page_size + position % page_size
            k_pool[:, row] = qkv[b, i, heads : heads + kv_heads]
            v_pool[:, row] = qkv[b, i, heads + kv_heads :]
    return qkv, k_pool, v_pool


def variants() -> list[Variant]:
    """Every pair of dtypes, and heads of every width that the wrapper tiles differently; first 64
    query heads on 8 kv heads of 128."""
    bf16, ints = torch.bfloat16, partial(meta, dtype=torch.int32)

    def call(
        dtype: torch.dtype, held: torch.dtype, heads: int, kv_heads: int, dim: int,
        *, ragged: bool = False,
    ) -> NamedCall:  # fmt: skip
        qkv = meta(1, 1, heads + 2 * kv_heads, dim, dtype=dtype)
        pool = meta(kv_heads, 64, dim, dtype=held)
        angles = meta(64, dim // 2, 2, dtype=torch.float32)
        some = ints(1) if ragged else None
        name = f"rope_append {dtype} to {held} {heads}+{kv_heads} heads d {dim}"
        return name.replace("torch.", "") + " ragged" * ragged, partial(
            rope_append, qkv, angles, pool, pool, ints(1, 1), ints(1), heads=heads,
            kv_heads=kv_heads, page_size=64, new=some, first_kept=some,
        )  # fmt: skip

    calls = (
        call(bf16, bf16, 64, 8, 128),
        *(call(t, held, 32, 8, 128, ragged=True) for t in FLOATS for held in FLOATS),
        *(
            call(t, t, 16, 4, dim)
            for t in (bf16, torch.float32)
            for dim in (16, 32, 64, 80, 256, 512)
        ),
        call(bf16, bf16, 16, 16, 192),
    )
    # Those of the heads and of their angles; a tile of few small heads leaves AMD's 128 threads 8
    # bytes each of the former.
    loads = tile_loads("qkv", "BLOCK_H", "BLOCK_D")
    expected = Expected(wide_loads=lambda v: 1 + loads(v))
    return variants_of(calls, {rope_append_fwd_kernel: expected})
