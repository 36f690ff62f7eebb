"""Writing the rows of new tokens into a paged pool, as they are or in 8 bits.

Legend: B sequences, K new tokens, P planes (heads, or one), R row width.
A pool is [*planes, pages * page_size, R]; position p of sequence b lies in the pool row
page_table[b, p // page_size] * page_size + p % page_size (paged attention, arXiv 2309.06180).
One program moves a tile of planes by channels of one token, so a page table entry is read once
per tile and every row is written in whole 16-byte pieces where its width allows.
"""

import math
from collections.abc import Mapping
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot.ahead import Variant
from kernels.aot.recorded import Expected, NamedCall, meta, variants_of
from kernels.attention.decode_checks import EIGHT_BIT
from kernels.checks import form, require
from kernels.device import gpu, require_gpu
from kernels.overlap import overlapped, start_next, wait_for_previous

FLOATS = (torch.bfloat16, torch.float16, torch.float32)

#: Bytes of one element of `rows` -> (elements of a tile, warps): two 16-byte loads per thread of
#: a warp of 32, one per thread of a wave of 64.
CONFIGS: dict[int, tuple[int, int]] = {2: (1024, 2), 4: (512, 2)}


@triton.jit
def page_row(  # type: ignore[no-untyped-def]
    page_table, lengths, new, first_kept, b, i, tokens, max_pages, sinks, PAGE
):
    """Token i of sequence b: whether it is valid, whether it is kept, its position and pool row."""
    position = tl.load(lengths + b) + i
    count = tokens
    if new is not None:
        count = tl.load(new + b)
    valid = i < count
    kept = valid & (position // PAGE < max_pages)
    if first_kept is not None:
        kept = kept & ((position >= tl.load(first_kept + b)) | (position < sinks))
    entry = page_table + b.to(tl.int64) * max_pages + position // PAGE
    page = tl.load(entry, mask=kept, other=-1)
    return valid, page >= 0, position, page.to(tl.int64) * PAGE + position % PAGE


@triton.jit
def quantised(x, MOST, WHOLE):  # type: ignore[no-untyped-def]
    """Rows x [P, R] as codes from -MOST to MOST, and their scales [P]: a row's largest is MOST.

    Codes are rounded to the nearest (half to even) where only whole numbers are held. A row that is
    no number has a scale that is none; one of zeros has scale 0.
    """
    x = x.to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(x), 1), tl.full([x.shape[0]], MOST, tl.float32))
    scale = tl.where(tl.max((x != x).to(tl.int32), 1) > 0, float("nan"), scale)
    steps = tl.where(scale == 0.0, 1.0, scale)
    codes = tl.div_rn(x, tl.broadcast_to(steps[:, None], x.shape))
    codes = tl.minimum(tl.maximum(codes, -MOST), MOST)
    if WHOLE:
        # Beside 1.5 * 2^23 a float32 has no room for a fraction.
        codes = (codes + 12582912.0) - 12582912.0
    return codes, scale


@triton.jit(do_not_specialize=["tokens", "max_pages", "sinks"])
def page_write_fwd_kernel(  # type: ignore[no-untyped-def]
    rows, pool, scales, page_table, lengths, new, first_kept,
    stride_b, stride_t, stride_p, pool_stride_p, scale_stride_p, tokens, max_pages, sinks,
    P: tl.constexpr, R: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_R: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (B * K, tiles of planes, tiles of channels). new, first_kept, scales may be None."""
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    b = tl.program_id(0) // tokens
    i = tl.program_id(0) % tokens
    _, kept, _, row = page_row(
        page_table, lengths, new, first_kept, b, i, tokens, max_pages, sinks, PAGE
    )
    if not kept:
        return
    p = (tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = (p < P)[:, None] & (r < R)[None, :]
    rows += b.to(tl.int64) * stride_b + i.to(tl.int64) * stride_t
    x = tl.load(rows + p[:, None] * stride_p + r[None, :], mask=inside, other=0.0)
    if scales is not None:
        if pool.dtype.element_ty == tl.int8:
            x, scale = quantised(x, 127.0, True)
        else:
            x, scale = quantised(x, 448.0, False)
        tl.store(scales + p * scale_stride_p + row, scale, mask=p < P)
    at = pool + p[:, None] * pool_stride_p + row * R + r[None, :]
    tl.store(at, x.to(pool.dtype.element_ty), mask=inside)


def page_write(
    rows: Tensor, pool: Tensor, page_table: Tensor, lengths: Tensor, *, page_size: int,
    new: Tensor | None = None, first_kept: Tensor | None = None, sinks: int = 0,
    scales: Tensor | None = None,
) -> None:  # fmt: skip
    """Write the rows of K new tokens per sequence into the pages of a pool, in place.

    rows: [B, K, *planes, R] with no plane dimension, one or two; bfloat16, float16 or float32;
      any strides whose last is 1 and whose planes flatten to one dimension.
    pool: [*planes, pages * page_size, R], each plane contiguous; rows are cast to its float dtype,
      or stored as codes: round(row / scale) (half to even) in int8, row / scale in float8_e4m3fn.
    scales: float32 [*planes, pages * page_size], written beside codes: what a row's are multiplied
      by, its largest magnitude over 127 or 448.
    page_table: int32 [B, max_pages]; entry j is the pool page of positions j * page_size and up.
    lengths: int32 [B], rows in the cache BEFORE this step: token i has position lengths[b] + i.
    new: int32 [B], valid tokens of right-padded rows (None: K); padded ones are not read.
    first_kept, sinks: int32 [B]; of the new tokens only those at positions from first_kept[b] on,
      or below `sinks`, are written (None: all), for prompts longer than a ring of pages.
    A token without a page (its position lies past the table, or its entry is negative) is not
    written. Tokens kept must have pages of their own. Raises ValueError naming the argument, its
    value and the rule, before any launch; the contents of the int32 tensors are not checked.
    """
    require_gpu("rows", rows, page_write_fwd_kernel)
    require(3 <= rows.dim() <= 5, "rows", form(rows), "must be [B, K, R] with up to 2 plane dims")
    require(rows.dtype in FLOATS, "rows", form(rows), "must be bfloat16, float16 or float32")
    batch, tokens, *planes, width = rows.shape
    require(rows.numel() > 0 or batch == 0, "rows", form(rows), "must have tokens and channels")
    require(width == 1 or rows.stride(-1) == 1, "rows", form(rows), "must have last stride 1")
    flat = rows.dim() < 5 or planes[0] == 1 or planes[1] == 1
    flat = flat or rows.stride(2) == planes[1] * rows.stride(3)
    require(flat, "rows", form(rows), "must have planes that flatten to one dimension")

    require(pool.dim() == len(planes) + 2 and list(pool.shape[:-2]) == planes
            and pool.shape[-1] == width and pool.shape[-2] % max(page_size, 1) == 0,
            "pool", form(pool), "must be {}", [*planes, f'pages * {page_size}', width])  # fmt: skip
    require(pool.dtype in (*FLOATS, *EIGHT_BIT), "pool", form(pool),
            "must be bfloat16, float16, float32, int8 or float8_e4m3fn")  # fmt: skip
    whole = pool.stride(-2) == width and (width == 1 or pool.stride(-1) == 1)
    flat = len(planes) < 2 or planes[0] == 1 or planes[1] == 1
    flat = flat or pool.stride(0) == planes[1] * pool.stride(1)
    require(whole and flat, "pool", form(pool),
            "must have strides [.., {}, 1] and planes that flatten", width)  # fmt: skip
    require_capable(pool, "pool")
    check_pages(rows, page_table, lengths, new, first_kept, page_size, sinks, "rows")
    eight_bit = pool.dtype in EIGHT_BIT
    require((scales is not None) == eight_bit, "scales", scales if scales is None else form(scales),
            "must be given exactly when the pool holds 8 bits")  # fmt: skip
    if scales is not None:
        fits = scales.shape == pool.shape[:-1] and scales.dtype == torch.float32
        fits = fits and scales.stride(-1) == 1
        flat = len(planes) < 2 or planes[0] == 1 or planes[1] == 1
        flat = flat or scales.stride(0) == planes[1] * scales.stride(1)
        rule = "must be float32 {}, the rows of a plane together"
        require(fits and flat, "scales", form(scales), rule, list(pool.shape[:-1]))
    for name, tensor in (("pool", pool), ("scales", scales)):
        here = tensor is None or tensor.device == rows.device
        require(here, name, tensor.device if tensor is not None else None,
                "must be on the device of rows, {}", rows.device)  # fmt: skip
    if batch == 0:
        return

    # Flattened planes are as far apart as those of the last dimension that has several.
    stride_p = pool_stride_p = scale_stride_p = 0
    for plane, size in enumerate(planes):
        if size > 1:
            stride_p, pool_stride_p = rows.stride(2 + plane), pool.stride(plane)
            scale_stride_p = 0 if scales is None else scales.stride(plane)
    # The stride of a single element is arbitrary, and never used.
    stride_b, stride_t = (rows.stride(d) if rows.shape[d] > 1 else 0 for d in range(2))
    count = math.prod(planes)
    elements, warps = CONFIGS[rows.dtype.itemsize]
    block_r = triton.next_power_of_2(width)
    if scales is None:
        block_r = min(elements, block_r)
    block_p = max(1, min(elements // block_r, triton.next_power_of_2(count)))
    blocks = (triton.cdiv(count, block_p), triton.cdiv(width, block_r))
    page_write_fwd_kernel[(batch * tokens, *blocks)](
        rows, pool, scales, page_table, lengths, new, first_kept,
        stride_b, stride_t, stride_p, pool_stride_p, scale_stride_p,
        tokens, page_table.shape[1], sinks,
        P=count, R=width, PAGE=page_size, BLOCK_P=block_p, BLOCK_R=block_r, num_warps=warps,
        **overlapped(rows.device),
    )  # fmt: skip


def require_capable(pool: Tensor, name: str) -> None:
    """Raise ValueError where the device lacks the pool's 8-bit float."""
    if pool.dtype == torch.float8_e4m3fn:
        able = gpu(pool.device).capability >= (8, 9)
        require(able, name, form(pool), "needs compute capability 8.9; use int8")


def check_pages(
    rows: Tensor, page_table: Tensor, lengths: Tensor, new: Tensor | None,
    first_kept: Tensor | None, page_size: int, sinks: int, name: str,
) -> None:  # fmt: skip
    """The rules of what says where new tokens go, beside the tensor `name` [B, ...]."""
    batch = rows.shape[0]
    require(page_size >= 1, "page_size", page_size, "must be at least 1")
    require(sinks >= 0, "sinks", sinks, "must be at least 0")
    fits = page_table.dim() == 2 and page_table.shape[0] == batch and page_table.shape[1] > 0
    fits = fits and page_table.dtype == torch.int32 and page_table.is_contiguous()
    require(fits, "page_table", form(page_table), "must be contiguous int32 [{}, max_pages]", batch)
    vectors: Mapping[str, Tensor | None] = {
        "lengths": lengths, "new": new, "first_kept": first_kept,
    }  # fmt: skip
    for vector, given in vectors.items():
        if given is None:
            continue
        fits = given.shape == (batch,) and given.dtype == torch.int32 and given.is_contiguous()
        require(fits, vector, form(given), "must be contiguous int32 [{}]", batch)
    for other, given in ({"page_table": page_table} | dict(vectors)).items():
        here = given is None or given.device == rows.device
        require(here, other, given.device if given is not None else None,
                "must be on the device of {}, {}", name, rows.device)  # fmt: skip


def page_write_ref(
    rows: Tensor, pool: Tensor, page_table: Tensor, lengths: Tensor, *, page_size: int,
    new: Tensor | None = None, first_kept: Tensor | None = None, sinks: int = 0,
) -> Tensor:  # fmt: skip
    """The oracle: float64, one token at a time, into a copy. Arguments as `page_write`; rows for a
    pool of codes are codes (`coded_ref`).
    """
    pool = pool.clone()
    for b in range(rows.shape[0]):
        for i in range(rows.shape[1] if new is None else int(new[b])):
            position = int(lengths[b]) + i
            if first_kept is not None and sinks <= position < int(first_kept[b]):
                continue
            row = int(page_table[b, position // page_size]) * page_size + position % page_size
            pool[..., row, :] = rows[b, i].double().to(pool.dtype)
    return pool


def coded_ref(rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The oracle of codes: float64 [..., R] of rows [..., R], and scales, float32 [..., 1]."""
    most = 127 if dtype == torch.int8 else 448
    scales = (rows.float().abs().amax(-1, keepdim=True) / most).float()
    steps = torch.where(scales == 0, 1, scales).double()
    codes = (rows.double() / steps).clamp(-most, most)
    return codes.round() if dtype == torch.int8 else codes, scales


def variants() -> list[Variant]:
    """Every pair of dtypes, and rows of several widths and planes; first latent rows, one plane."""
    bf16, ints = torch.bfloat16, partial(meta, dtype=torch.int32)

    def call(
        dtype: torch.dtype, held: torch.dtype, planes: int, width: int, *, ragged: bool = False
    ) -> NamedCall:
        # Views of wider ones: strides are multiples of 16 only where the width is.
        rows = meta(2, 2, planes, 3 * width, dtype=dtype)[..., :width]
        pool = meta(planes, 65, width, dtype=held)[:, :64]
        some = ints(2) if ragged else None
        scales = meta(planes, 65, dtype=torch.float32)[:, :64] if held in EIGHT_BIT else None
        name = f"page_write {dtype} to {held} {planes}x{width}" + " ragged" * ragged
        return name.replace("torch.", ""), partial(
            page_write, rows, pool, ints(2, 1), ints(2),
            page_size=64, new=some, first_kept=some, scales=scales,
        )  # fmt: skip

    calls = (
        *(call(bf16, held, 1, 576) for held in (bf16, *EIGHT_BIT)),
        *(
            call(dtype, held, 8, 128, ragged=True)
            for dtype in FLOATS
            for held in (*FLOATS, *EIGHT_BIT)
        ),
        call(bf16, bf16, 16, 64),
        call(bf16, bf16, 3, 100),
        call(torch.float32, torch.float32, 4, 1),
    )
    expected = Expected(wide_loads=lambda v: int(v.constexprs["R"] % 16 == 0))
    return variants_of(calls, {page_write_fwd_kernel: expected})
