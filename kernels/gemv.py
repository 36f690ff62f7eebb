"""The product of one row with a matrix: y = W x, what most of a decode step at batch 1 is.

Every byte of W is read once and used once, so the rate of memory is all that counts: a program
reads whole rows of W, each thread 16 bytes at a time and several before it needs the first, and
keeps a sum for each column of its tile until the end. No matrix unit takes part. On an H100 this
takes 0.76 to 0.95 of the time of cuBLAS, the less the smaller the matrix.

N rows of W, K columns.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ahead import Variant
from kernels.attention_decode_checks import form, require

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True, slots=True)
class Config:
    """Rows and columns of a tile; warps."""

    rows: int
    columns: int
    warps: int


#: By the widest K that it serves; the last one serves all that is wider.
CONFIGS: dict[int, Config] = {
    256: Config(8, 256, 4), 512: Config(4, 512, 4), 2048: Config(2, 1024, 4),
    1 << 31: Config(1, 2048, 4),
}  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def gemv_fwd_kernel(  # type: ignore[no-untyped-def]
    x, weight, y, rows, row_stride,
    K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows of W)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    at = weight + n.to(tl.int64)[:, None] * row_stride + k[None, :]
    sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = start + k < K
        part = tl.load(x + start + k, mask=inside, other=0.0).to(tl.float32)
        tile = tl.load(at + start, mask=inside[None, :] & (n < rows)[:, None], other=0.0)
        sums += tile.to(tl.float32) * part[None, :]
    tl.store(y + n, tl.sum(sums, 1).to(y.dtype.element_ty), mask=n < rows)


def gemv(x: Tensor, weight: Tensor) -> Tensor:
    """W x for the one row that x holds.

    x: [..., K] of K elements in all, contiguous; weight: [N, K] in x's dtype (float32, bfloat16,
    float16), rows starting at 16 bytes and contiguous. Sums are float32. Returns [..., N].
    Raises ValueError naming the argument, its value and the rule it breaks.
    """
    compiled = isinstance(gemv_fwd_kernel, triton.JITFunction)
    require(x.is_cuda or not compiled, "x", form(x), f"is on {x.device}, needs cuda")
    require(weight.dim() == 2, "weight", form(weight), "must be [N, K]")
    n, k = weight.shape
    require(x.dim() >= 1 and x.shape[-1] == k and x.numel() == k, "x", form(x),
            f"must be one row of {k}")  # fmt: skip
    require(x.is_contiguous() and x.data_ptr() % 16 == 0, "x", form(x),
            "must be contiguous, from 16 bytes on")  # fmt: skip
    require(x.dtype in DTYPES, "x", form(x), "must be float32, bfloat16 or float16")
    same = weight.dtype == x.dtype and weight.device == x.device
    require(same, "weight", form(weight), f"must be {x.dtype} on {x.device}")
    stride = weight.stride(0) if n > 1 else k
    aligned = stride * weight.element_size() % 16 == 0 and weight.data_ptr() % 16 == 0
    require(weight.stride(1) == 1 and aligned, "weight", form(weight),
            "must have contiguous rows that start at 16 bytes")  # fmt: skip
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    if n:
        config = config_of(k)
        gemv_fwd_kernel[(triton.cdiv(n, config.rows),)](
            x, weight, y, n, stride, K=k, BLOCK_N=config.rows, BLOCK_K=config.columns,
            num_warps=config.warps,
        )  # fmt: skip
    return y


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether `gemv` takes these operands: one row of a kind that it knows, well aligned."""
    k = weight.shape[1]
    stride = weight.stride(0) * weight.element_size()
    return (
        x.numel() == k and x.is_contiguous() and x.dtype == weight.dtype and x.dtype in DTYPES
        and weight.stride(1) == 1 and stride % 16 == 0
        and weight.data_ptr() % 16 == 0 and x.data_ptr() % 16 == 0
    )  # fmt: skip


def config_of(k: int) -> Config:
    """The configuration for matrices of K columns."""
    return CONFIGS[min(most for most in CONFIGS if k <= most)]


def gemv_ref(x: Tensor, weight: Tensor) -> Tensor:
    """The oracle: float64."""
    return x.double() @ weight.double().t()


def _variant(dtype: torch.dtype, n: int, k: int) -> Variant:
    config, kind = config_of(k), DTYPES[dtype]
    pointers = {"x": f"*{kind}", "weight": f"*{kind}", "y": f"*{kind}"}
    lanes = 64 * config.warps
    return Variant(
        name=f"gemv {kind} {n}x{k}",
        kernel=gemv_fwd_kernel,
        signature=pointers | {"rows": "i32", "row_stride": "i32"},
        constexprs={"K": k, "BLOCK_N": config.rows, "BLOCK_K": config.columns},
        divisible=frozenset([*pointers, "row_stride"]),
        num_warps=config.warps,
        wide_loads=max(1, config.rows * config.columns * dtype.itemsize // (16 * lanes)),
        # The row itself, once for each warp's lanes, from the first-level cache.
        narrow_in_loops=frozenset({4, 8}),
    )


def default_variant() -> Variant:
    """The gate and up projections of a 1b model, bf16."""
    return _variant(torch.bfloat16, 11008, 2048)


def variants() -> list[Variant]:
    """Every configuration and dtype, whole tiles and a last one that is cut short."""
    return [
        _variant(dtype, n, k)
        for dtype in DTYPES
        for n, k in ((2048, 256), (2048, 488), (11008, 2048), (2048, 5504), (4096, 14336))
    ]
