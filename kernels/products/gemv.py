"""The product of one row with a matrix: y = W x, what most of a decode step at batch 1 is.

Every byte of W is read once and used once, so the rate of memory is all that counts: a program
asks for whole rows of W at once, before the kernel that computes x has ended (`kernels.overlap`),
and no matrix unit takes part. What stands around the product in a block costs a launch of its own
elsewhere and nothing here: the residual sum and RMSNorm (arXiv 1910.07467) in its read, SwiGLU
(arXiv 2002.05202) in its write.

N rows of W, K columns.
"""

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.aot.ahead import Variant
from kernels.aot.recorded import Expected, NamedCall, meta, tile_loads, variants_of
from kernels.checks import form, require
from kernels.device import require_gpu
from kernels.overlap import overlapped, start_next, wait_for_previous

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True, slots=True)
class Config:
    """Rows and columns of a tile; warps."""

    rows: int
    columns: int
    warps: int


#: By the widest K that it serves; the last one serves all that is wider, in several tiles.
CONFIGS: dict[int, Config] = {
    256: Config(8, 256, 4), 512: Config(4, 512, 4), 2048: Config(2, 1024, 4),
    1 << 31: Config(1, 2048, 4),
}  # fmt: skip
#: The same where the row is normed: one tile holds it.
WHOLE_CONFIGS: dict[int, Config] = {
    256: Config(8, 256, 4), 512: Config(4, 512, 4), 1024: Config(4, 1024, 4),
    2048: Config(2, 2048, 4), 4096: Config(2, 4096, 4), 8192: Config(1, 8192, 8),
}  # fmt: skip
#: Widest row that is normed.
MAX_NORMED = max(WHOLE_CONFIGS)


@triton.jit
def sum_of(x, residual, summed, k, K):  # type: ignore[no-untyped-def]
    """Channels k of the row that a product reads, float32: x, or x + residual, which the first
    program stores.
    """
    part = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
    if residual is not None:
        part += tl.load(residual + k, mask=k < K, other=0.0).to(tl.float32)
        rounded = part.to(summed.dtype.element_ty)
        tl.store(summed + k, rounded, mask=(k < K) & (tl.program_id(0) == 0))
        part = rounded.to(tl.float32)
    return part


@triton.jit
def normed(part, scale, EPS, K):  # type: ignore[no-untyped-def]
    """RMSNorm of a whole row of K channels."""
    return part * scale.to(tl.float32) * tl.rsqrt(tl.sum(part * part, 0) / K + EPS)


@triton.jit(do_not_specialize=["rows"])
def gemv_fwd_kernel(  # type: ignore[no-untyped-def]
    x, residual, norm_weight, weight, y, summed, rows, row_stride,
    EPS: tl.constexpr, GATED: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows of y). residual (with summed) and norm_weight may be None."""
    start_next(OVERLAP)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    at = weight + n.to(tl.int64)[:, None] * row_stride + k[None, :]
    inside = (k < K)[None, :] & (n < rows)[:, None]
    tile = tl.load(at, mask=inside, other=0.0)
    if GATED:
        below = at + rows.to(tl.int64) * row_stride
        up_tile = tl.load(below, mask=inside, other=0.0)
    if norm_weight is not None:
        scale = tl.load(norm_weight + k, mask=k < K, other=0.0)
    wait_for_previous(OVERLAP)
    part = sum_of(x, residual, summed, k, K)
    if norm_weight is not None:
        part = normed(part, scale, EPS, K)
    sums = tile.to(tl.float32) * part[None, :]
    if GATED:
        up_sums = up_tile.to(tl.float32) * part[None, :]
    for start in range(BLOCK_K, K, BLOCK_K):
        inside = (start + k < K)[None, :] & (n < rows)[:, None]
        part = tl.load(x + start + k, mask=start + k < K, other=0.0).to(tl.float32)
        sums += tl.load(at + start, mask=inside, other=0.0).to(tl.float32) * part[None, :]
        if GATED:
            up_tile = tl.load(below + start, mask=inside, other=0.0)
            up_sums += up_tile.to(tl.float32) * part[None, :]
    out = tl.sum(sums, 1)
    if GATED:
        out *= tl.sigmoid(out) * tl.sum(up_sums, 1)
    tl.store(y + n, out.to(y.dtype.element_ty), mask=n < rows)


def gemv(x: Tensor, weight: Tensor, *, gated: bool = False) -> Tensor:
    """W x for the one row that x holds.

    x: [..., K] of K elements in all, contiguous; weight: [N, K] in x's dtype (float32, bfloat16,
    float16), rows starting at 16 bytes and contiguous, not written by the launch right before.
    gated: weight is [2F, K], and silu(first half) · second half is returned. Sums are float32.
    Returns [..., N], gated [..., F].
    Raises ValueError naming the argument, its value and the rule it breaks.
    """
    check_row(x, weight, gated)
    return _launch(x, None, None, weight, 0.0, gated)[0]


def norm_gemv(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, weight: Tensor, *, eps: float,
    gated: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """W norm(x + residual), RMSNorm with `norm_weight`, and the sum.

    residual: as x, or None for x alone; norm_weight: [K] in x's dtype, from 16 bytes on and, like
    weight, not written by the launch right before; K at most 8192; otherwise as `gemv`. The norm is
    that of the sum rounded to x's dtype, and goes into the product in float32.
    Returns ([..., N] or gated [..., F], the sum [..., K]: x itself where residual is None).
    """
    check_row(x, weight, gated)
    check_norm(x, residual, norm_weight)
    y, summed = _launch(x, residual, norm_weight, weight, eps, gated)
    return y, x if summed is None else summed


def check_norm(x: Tensor, residual: Tensor | None, norm_weight: Tensor | None) -> None:
    """Raise ValueError unless these can stand around the row x."""
    k = x.numel()
    require(k <= MAX_NORMED, "x", form(x), "must have at most {} channels", MAX_NORMED)
    for name, tensor in (("residual", residual), ("norm_weight", norm_weight)):
        if tensor is None:
            continue
        like = tensor.numel() == k and tensor.dtype == x.dtype and tensor.device == x.device
        rule = "must be {} contiguous {} on {}, from 16 bytes on"
        require(like and tensor.is_contiguous() and tensor.data_ptr() % 16 == 0, name, form(tensor),
                rule, k, x.dtype, x.device)  # fmt: skip


def check_row(x: Tensor, weight: Tensor, gated: bool = False) -> None:
    """Raise ValueError unless x is one row and weight a matrix for it."""
    require_gpu("x", x, gemv_fwd_kernel)
    require(weight.dim() == 2, "weight", form(weight), "must be [N, K]")
    n, k = weight.shape
    require(not gated or n % 2 == 0, "weight", form(weight), "must be [2F, K]")
    require(x.dim() >= 1 and x.shape[-1] == k and x.numel() == k, "x", form(x),
            "must be one row of {}", k)  # fmt: skip
    require(x.is_contiguous() and x.data_ptr() % 16 == 0, "x", form(x),
            "must be contiguous, from 16 bytes on")  # fmt: skip
    require(x.dtype in DTYPES, "x", form(x), "must be float32, bfloat16 or float16")
    same = weight.dtype == x.dtype and weight.device == x.device
    require(same, "weight", form(weight), "must be {} on {}", x.dtype, x.device)
    stride = weight.stride(0) if n > 1 else k
    aligned = stride * weight.element_size() % 16 == 0 and weight.data_ptr() % 16 == 0
    require(weight.stride(1) == 1 and aligned, "weight", form(weight),
            "must have contiguous rows that start at 16 bytes")  # fmt: skip


def _launch(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor | None, weight: Tensor, eps: float,
    gated: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    n, k = weight.shape
    rows = n // 2 if gated else n
    y = torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device=x.device)
    summed = None if residual is None else torch.empty_like(x)
    if n:
        config = config_of(k, whole=norm_weight is not None)
        per_program = max(1, config.rows // 2) if gated else config.rows
        gemv_fwd_kernel[(triton.cdiv(rows, per_program),)](
            x, residual, norm_weight, weight, y, summed, rows, weight.stride(0) if n > 1 else k,
            EPS=eps, GATED=gated, K=k, BLOCK_N=per_program, BLOCK_K=config.columns,
            num_warps=config.warps, **overlapped(x.device),
        )  # fmt: skip
    return y, summed


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether `gemv` takes these operands: one row of a kind that it knows, well aligned."""
    k = weight.shape[1]
    stride = weight.stride(0) * weight.element_size()
    return (
        x.numel() == k and x.is_contiguous() and x.dtype == weight.dtype and x.dtype in DTYPES
        and weight.stride(1) == 1 and stride % 16 == 0
        and weight.data_ptr() % 16 == 0 and x.data_ptr() % 16 == 0
    )  # fmt: skip


def norm_serves(x: Tensor, residual: Tensor | None, norm_weight: Tensor, weight: Tensor) -> bool:
    """Whether `norm_gemv` takes these operands."""
    around = (norm_weight,) if residual is None else (norm_weight, residual)
    return (
        serves(x, weight) and weight.shape[1] <= MAX_NORMED
        and all(t.dtype == x.dtype and t.is_contiguous() and t.data_ptr() % 16 == 0 for t in around)
    )  # fmt: skip


def config_of(k: int, *, whole: bool = False) -> Config:
    """The configuration for matrices of K columns; whole: a tile must hold a row."""
    table = WHOLE_CONFIGS if whole else CONFIGS
    return table[min(most for most in table if k <= most)]


def gemv_ref(x: Tensor, weight: Tensor, *, gated: bool = False) -> Tensor:
    """The oracle: float64."""
    y = x.double() @ weight.double().t()
    if not gated:
        return y
    gate, up = y.chunk(2, -1)
    return F.silu(gate) * up


def norm_gemv_ref(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, weight: Tensor, *, eps: float,
    gated: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The oracle: float64, of the sum in x's dtype."""
    summed = x if residual is None else x + residual
    wide = summed.double()
    rms = (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    return gemv_ref(wide / rms * norm_weight.double(), weight, gated=gated), summed


def variants() -> list[Variant]:
    """Every configuration and dtype; the first gives norm, gate, up and SwiGLU of a 1b model."""

    def call(dtype: torch.dtype, n: int, k: int, around: str = "") -> NamedCall:
        row, gated = meta(1, k, dtype=dtype), "gated" in around
        weight = meta(n, -(-k // 16) * 16, dtype=dtype)[:, :k]
        name = f"gemv {DTYPES[dtype]} {n}x{k} {around}".strip()
        if "normed" not in around:
            return name, partial(gemv, row, weight, gated=gated)
        norm = meta(k, dtype=dtype)
        return name, partial(norm_gemv, row, row, norm, weight, eps=1e-5, gated=gated)

    calls = [
        call(dtype, n, k, around)
        for dtype in (torch.bfloat16, torch.float32, torch.float16)
        for n, k, around in (
            (11008, 2048, "normed gated"), (2048, 256, ""), (2048, 488, ""), (11008, 2048, ""),
            (2048, 5504, ""), (4096, 14336, ""), (11008, 2048, "gated"), (3072, 2048, "normed"),
            *((8 * k, k, "normed gated") for k in WHOLE_CONFIGS),
        )
    ]  # fmt: skip
    expected = Expected(
        # None where a tile leaves the threads of AMD's wider warps 8 bytes each.
        wide_loads=tile_loads("weight", "BLOCK_N", "BLOCK_K"),
        # The row itself, once for each warp's lanes, from the first-level cache.
        narrow_in_loops=frozenset({4, 8}),
    )
    return variants_of(calls, {gemv_fwd_kernel: expected})
