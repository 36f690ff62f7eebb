"""The product of 2 to 16 rows with a matrix: y = x Wᵀ, most of a decode step at small batches.

Bytes of W still decide, and libraries reach half of them here: a tile of W high enough for their
matrix instructions leaves too few programs to keep the memory busy. Here W stands on the tall side
of the instruction and the rows on its narrow one, always 16 wide, so that a program can be as
narrow as 16 rows of W, and what a row gets does not depend on how many there are beside it.
SwiGLU (arXiv 2002.05202) stands in the write: a program then reads the same rows of both halves.

N rows of W, K columns, M rows of x.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from kernels.ahead import Variant
from kernels.attention_decode_checks import form, require
from kernels.overlap import overlapped, start_next, wait_for_previous

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
#: The narrow side of the matrix instruction: as many rows of x there may be.
MOST_ROWS = 16


@dataclass(frozen=True, slots=True)
class Config:
    """Rows of W and columns of a tile; warps; stages of the load pipeline."""

    rows: int
    columns: int
    warps: int
    stages: int


#: By the most rows of y that it serves: few leave room for narrow tiles alone.
CONFIGS: dict[int, Config] = {
    8192: Config(16, 256, 4, 5), 1 << 31: Config(32, 128, 4, 5),
}  # fmt: skip
#: The same with SwiGLU, where a tile is read twice.
GATED_CONFIGS: dict[int, Config] = {
    8192: Config(16, 128, 4, 5), 1 << 31: Config(32, 64, 4, 5),
}  # fmt: skip


@triton.jit
def prefetch(at, inside):  # type: ignore[no-untyped-def]
    """Bring what lies at these addresses into the second-level cache."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l,r", [at.to(tl.int64), inside.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "tokens"])
def few_rows_fwd_kernel(  # type: ignore[no-untyped-def]
    x, weight, y, rows, tokens, row_stride,
    GATED: tl.constexpr, K: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, AHEAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows of y). AHEAD: columns that are asked for before x is there."""
    start_next(OVERLAP)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, M)
    k = tl.arange(0, BLOCK_K)
    of_y = (n < rows)[:, None]
    at = weight + n.to(tl.int64)[:, None] * row_stride
    below = at + rows.to(tl.int64) * row_stride
    if OVERLAP:
        line = 64 * tl.arange(0, AHEAD // 64)[None, :]
        prefetch(at + line, of_y & (line < K))
        if GATED:
            prefetch(below + line, of_y & (line < K))
    wait_for_previous(OVERLAP)
    sums = tl.zeros([BLOCK_N, M], tl.float32)
    up_sums = tl.zeros([BLOCK_N, M], tl.float32)
    for start in range(0, K, BLOCK_K):
        column = start + k
        inside = of_y & (column < K)[None, :]
        tile = tl.load(at + column[None, :], mask=inside, other=0.0)
        part = tl.load(x + m[:, None] * K + column[None, :],
                       mask=(m < tokens)[:, None] & (column < K)[None, :], other=0.0)  # fmt: skip
        part = tl.trans(part)
        sums = tl.dot(tile, part, sums, input_precision="ieee")
        if GATED:
            up = tl.load(below + column[None, :], mask=inside, other=0.0)
            up_sums = tl.dot(up, part, up_sums, input_precision="ieee")
    if GATED:
        sums *= tl.sigmoid(sums) * up_sums
    to = y + m.to(tl.int64)[None, :] * rows + n[:, None]
    tl.store(to, sums.to(y.dtype.element_ty), mask=of_y & (m < tokens)[None, :])


def few_rows(x: Tensor, weight: Tensor, *, gated: bool = False) -> Tensor:
    """x Wᵀ of 2 to 16 rows.

    x: [..., K], contiguous from 16 bytes on, bfloat16 or float16; weight: [N, K] in x's dtype, K a
    multiple of 8, rows contiguous and starting at 16 bytes, not written by the launch right before.
    gated: weight is [2F, K], and silu(first half) · second half is returned. Sums are float32.
    Returns [..., N], gated [..., F]; each row is what it would be beside any others.
    Raises ValueError naming the argument, its value and the rule it breaks.
    """
    compiled = isinstance(few_rows_fwd_kernel, triton.JITFunction)
    require(x.is_cuda or not compiled, "x", form(x), f"is on {x.device}, needs cuda")
    require(weight.dim() == 2, "weight", form(weight), "must be [N, K]")
    n, k = weight.shape
    require(not gated or n % 2 == 0, "weight", form(weight), "must be [2F, K]")
    tokens = x.numel() // max(k, 1)
    fits = x.dim() >= 1 and x.shape[-1] == k and 2 <= tokens <= MOST_ROWS
    require(fits, "x", form(x), f"must be 2 to {MOST_ROWS} rows of {k}")
    require(x.is_contiguous() and x.data_ptr() % 16 == 0, "x", form(x),
            "must be contiguous, from 16 bytes on")  # fmt: skip
    require(x.dtype in DTYPES, "x", form(x), "must be bfloat16 or float16")
    same = weight.dtype == x.dtype and weight.device == x.device
    require(same, "weight", form(weight), f"must be {x.dtype} on {x.device}")
    require(_readable(weight), "weight", form(weight),
            "must have contiguous rows of whole 16 bytes that start at 16 bytes")  # fmt: skip
    rows = n // 2 if gated else n
    y = torch.empty((*x.shape[:-1], rows), dtype=x.dtype, device=x.device)
    if n:
        config = config_of(rows, gated=gated, amd=torch.version.hip is not None)
        few_rows_fwd_kernel[(triton.cdiv(rows, config.rows),)](
            x, weight, y, rows, tokens, weight.stride(0), **_constants(config, k, gated),
            num_warps=config.warps, num_stages=config.stages, **overlapped(x.device),
        )  # fmt: skip
    return y


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether `few_rows` takes these operands."""
    k = weight.shape[1]
    return (
        x.shape[-1] == k and 2 * k <= x.numel() <= MOST_ROWS * k
        and x.dtype in DTYPES and x.dtype == weight.dtype
        and x.is_contiguous() and x.data_ptr() % 16 == 0 and _readable(weight)
    )  # fmt: skip


def _readable(weight: Tensor) -> bool:
    n, k = weight.shape
    stride = weight.stride(0) if n > 1 else k
    return (
        k > 0 and k % 8 == 0 and stride % 8 == 0 and weight.stride(1) == 1
        and weight.data_ptr() % 16 == 0
    )  # fmt: skip


def config_of(rows: int, *, gated: bool, amd: bool) -> Config:
    """The configuration for this many rows of y."""
    table = GATED_CONFIGS if gated else CONFIGS
    config = table[min(most for most in table if rows <= most)]
    # AMD GPUs have 64 KiB of shared memory and a stage of loads more than they say.
    return Config(config.rows, config.columns, config.warps, 2) if amd else config


def _constants(config: Config, k: int, gated: bool) -> dict[str, int | bool]:
    ahead = min(config.columns * (config.stages - 1), triton.next_power_of_2(k))
    return {
        "GATED": gated, "K": k, "M": MOST_ROWS, "BLOCK_N": config.rows,
        "BLOCK_K": config.columns, "AHEAD": max(64, triton.next_power_of_2(ahead)),
    }  # fmt: skip


def few_rows_ref(x: Tensor, weight: Tensor, *, gated: bool = False) -> Tensor:
    """The oracle: float64."""
    y = x.double() @ weight.double().t()
    if not gated:
        return y
    gate, up = y.chunk(2, -1)
    return F.silu(gate) * up


def _variant(dtype: torch.dtype, rows: int, k: int, gated: bool, amd: bool) -> Variant:
    config, kind = config_of(rows, gated=gated, amd=amd), DTYPES[dtype]
    pointers = {"x": f"*{kind}", "weight": f"*{kind}", "y": f"*{kind}"}
    return Variant(
        name=f"few_rows {kind} {rows}x{k}" + " gated" * gated + " amd" * amd,
        kernel=few_rows_fwd_kernel,
        signature=pointers | {"rows": "i32", "tokens": "i32", "row_stride": "i32"},
        constexprs=_constants(config, k, gated),
        divisible=frozenset([*pointers, "row_stride"]),
        num_warps=config.warps,
        num_stages=config.stages,
        wide_loads=0,
        matrix=True,
        targets=("gfx942",) if amd else ("sm_80", "sm_90", "sm_100"),
    )


def default_variant() -> Variant:
    """The output projection of a 1b model, bf16."""
    return _variant(torch.bfloat16, 2048, 2048, False, False)


def variants() -> list[Variant]:
    """Every configuration and dtype, whole tiles and rows that end within one."""
    return [
        _variant(dtype, rows, k, gated, amd)
        for amd in (False, True)
        for dtype in DTYPES
        for rows, k, gated in (
            (2048, 2048, False), (2048, 200, False), (2048, 5504, False), (128256, 2048, False),
            (5504, 2048, True), (14336, 4096, True),
        )
    ]  # fmt: skip
