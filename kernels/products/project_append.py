"""One token's way into attention in one launch: residual sum and RMSNorm (arXiv 1910.07467),
projection to queries, keys and values, rotary positions (arXiv 2104.09864), and the paged write.

The product of one row (`gemv`) ends with a few outputs to a program: a program's are
pairs of one head, which it turns by the angle of the token's position and puts where they belong.
Apart these are three launches, and on a GPU each costs what its bytes would take many times.

N = (H + 2G) d rows of W, K columns.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot.ahead import Variant
from kernels.aot.recorded import Expected, NamedCall, meta, tile_loads, variants_of
from kernels.checks import form, require
from kernels.overlap import overlapped, start_next, wait_for_previous
from kernels.pages.write import check_pages
from kernels.products.gemv import (
    DTYPES,
    MAX_NORMED,
    Config,
    check_norm,
    check_row,
    config_of,
    norm_gemv_ref,
    norm_serves,
    normed,
    sum_of,
)
from kernels.rope.append import rope_append_ref


@triton.jit(do_not_specialize=["max_pages", "positions"])
def project_append_fwd_kernel(  # type: ignore[no-untyped-def]
    x, residual, norm_weight, weight, cos_sin, q, k_pool, v_pool, page_table, lengths, summed,
    row_stride, k_stride_g, v_stride_g, max_pages, positions,
    EPS: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of outputs). residual, with summed, may be None."""
    start_next(OVERLAP)
    first = tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    at = weight + n.to(tl.int64)[:, None] * row_stride + k[None, :]
    tile = tl.load(at, mask=(k < K)[None, :], other=0.0)
    scale = tl.load(norm_weight + k, mask=k < K, other=0.0)
    wait_for_previous(OVERLAP)
    # Loads that need one another come first, and are there before the product is.
    position = tl.load(lengths)
    part = sum_of(x, residual, summed, k, K)
    kept = position // PAGE < max_pages
    page = tl.load(page_table + position // PAGE, mask=kept, other=-1)
    head = first // D
    c = n % D
    turns = (head < H + G) & (position < positions)
    pair = cos_sin + position.to(tl.int64) * D + c // 2 * 2
    cos = tl.load(pair, mask=turns, other=1.0)
    sin = tl.load(pair + 1, mask=turns, other=0.0)
    part = normed(part, scale, EPS, K)
    row = page.to(tl.int64) * PAGE + position % PAGE
    out = tl.sum(tile.to(tl.float32) * part[None, :], 1)
    even, odd = tl.split(tl.reshape(out, (BLOCK_N // 2, 2)))
    other = tl.reshape(tl.join(-odd, even), (BLOCK_N,))
    out = out * cos + other * sin
    if head < H:
        tl.store(q + n, out.to(q.dtype.element_ty))
    elif head < H + G:
        to = k_pool + (head - H).to(tl.int64) * k_stride_g + row * D + c
        tl.store(to, out.to(k_pool.dtype.element_ty), mask=page >= 0)
    else:
        to = v_pool + (head - H - G).to(tl.int64) * v_stride_g + row * D + c
        tl.store(to, out.to(v_pool.dtype.element_ty), mask=page >= 0)


def project_append(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, weight: Tensor, cos_sin: Tensor,
    k_pool: Tensor, v_pool: Tensor, page_table: Tensor, lengths: Tensor, *, eps: float,
    page_size: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Norm x + residual, project it, turn queries and keys, write keys and values to their pages.

    x, residual, norm_weight, eps: one row of K channels, as in `gemv.norm_gemv`.
    weight: [(H + 2G) d, K] in x's dtype: queries, keys, values; d a multiple of 16. Not written by
      the launch right before.
    cos_sin, k_pool, v_pool [G, pages * page_size, d], page_table [1, max_pages], lengths [1]: as
      in `rope_append`, pools in x's dtype; the token sits at position lengths[0]. Queries and keys
      are turned in float32, before they are rounded.
    Returns queries [1, 1, H, d] and the sum (x itself where residual is None).
    Raises ValueError naming the argument, its value and the rule it breaks, before any launch.
    """
    check_row(x, weight)
    check_norm(x, residual, norm_weight)
    groups, _, dim = k_pool.shape if k_pool.dim() == 3 else (0, 0, 0)
    require(groups >= 1 and dim % 16 == 0 and dim > 0, "k_pool", form(k_pool),
            "must be [G, rows, d] with d a multiple of 16")  # fmt: skip
    heads, rest = divmod(weight.shape[0], dim)
    heads -= 2 * groups
    require(rest == 0 and heads >= 1, "weight", form(weight),
            "must have (H + 2 * {}) * {} rows", groups, dim)  # fmt: skip
    for name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
        fits = pool.shape == k_pool.shape and pool.shape[1] % max(page_size, 1) == 0
        fits = fits and pool.dtype == x.dtype and pool.device == x.device
        require(fits and pool.stride()[1:] == (dim, 1), name, form(pool),
                "must be {} [{}, pages * {}, {}] on {}, each head contiguous", x.dtype, groups,
                page_size, dim, x.device)  # fmt: skip
    fits = cos_sin.dim() == 3 and cos_sin.shape[1:] == (dim // 2, 2) and cos_sin.is_contiguous()
    require(fits and cos_sin.dtype == torch.float32 and cos_sin.device == x.device, "cos_sin",
            form(cos_sin), "must be contiguous float32 [positions, {}, 2]", dim // 2)  # fmt: skip
    check_pages(x.view(1, 1, -1), page_table, lengths, None, None, page_size, 0, "x")

    k = weight.shape[1]
    config = _config(k)
    q = torch.empty(1, 1, heads, dim, dtype=x.dtype, device=x.device)
    summed = None if residual is None else torch.empty_like(x)
    stride_k, stride_v = (t.stride(0) if groups > 1 else 0 for t in (k_pool, v_pool))
    project_append_fwd_kernel[(weight.shape[0] // config.rows,)](
        x, residual, norm_weight, weight, cos_sin, q, k_pool, v_pool, page_table, lengths, summed,
        weight.stride(0), stride_k, stride_v, page_table.shape[1], cos_sin.shape[0],
        EPS=eps, H=heads, G=groups, D=dim, PAGE=page_size, K=k, BLOCK_N=config.rows,
        BLOCK_K=config.columns, num_warps=config.warps, **overlapped(x.device),
    )  # fmt: skip
    return q, x if summed is None else summed


def serves(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, weight: Tensor, pool: Tensor
) -> bool:
    """Whether `project_append` takes these operands: pool as one of K and V, [G, rows, d]."""
    return (
        norm_serves(x, residual, norm_weight, weight)
        and pool.dtype == x.dtype and pool.shape[-1] % 16 == 0
    )  # fmt: skip


def _config(k: int) -> Config:
    """As for the product alone, with whole pairs to a program; what a program does beside it makes
    few high tiles better than many.
    """
    config = config_of(k, whole=True)
    rows = 8 if config.columns <= 2048 else 2
    return Config(rows, config.columns, config.warps)


def project_append_ref(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, weight: Tensor, cos_sin: Tensor,
    k_pool: Tensor, v_pool: Tensor, page_table: Tensor, lengths: Tensor, *, eps: float,
    page_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The oracle: float64; returns queries, the sum, and the new k_pool and v_pool."""
    groups, _, dim = k_pool.shape
    qkv, summed = norm_gemv_ref(x, residual, norm_weight, weight, eps=eps)
    qkv = qkv.reshape(1, 1, -1, dim)
    heads = qkv.shape[2] - 2 * groups
    turned, k_pool, v_pool = rope_append_ref(
        qkv, cos_sin, k_pool, v_pool, page_table, lengths, heads=heads, kv_heads=groups,
        page_size=page_size,
    )  # fmt: skip
    return turned[:, :, :heads], summed, k_pool, v_pool


def variants() -> list[Variant]:
    """Every configuration and dtype, the first layer, one kv head and as many as query heads."""

    def call(
        dtype: torch.dtype, heads: int, groups: int, dim: int, k: int, added: bool = True
    ) -> NamedCall:
        of, int32 = partial(meta, dtype=dtype), partial(meta, dtype=torch.int32)
        row, pool = of(1, k), of(groups, 8 * 64, dim)
        angles = meta(1001, dim // 2, 2, dtype=torch.float32)
        name = f"project_append {DTYPES[dtype]} {heads}+{groups} heads d {dim} of {k}"
        return name + " first" * (not added), partial(
            project_append, row, row if added else None, of(k), of((heads + 2 * groups) * dim, k),
            angles, pool, pool, int32(1, 9), int32(1), eps=1e-5, page_size=64,
        )  # fmt: skip

    calls = [
        call(dtype, *sizes)
        for dtype in DTYPES
        for sizes in (
            (32, 8, 64, 2048), (4, 2, 64, 256), (8, 8, 64, 512), (16, 4, 64, 1024),
            (32, 8, 64, 2048, False), (32, 1, 64, 2048), (32, 8, 128, 4096),
            (64, 8, 128, MAX_NORMED),
        )
    ]  # fmt: skip
    expected = Expected(wide_loads=tile_loads("weight", "BLOCK_N", "BLOCK_K", least=1))
    return variants_of(calls, {project_append_fwd_kernel: expected})
