"""The product of 2 to 16 rows with a matrix: y = x Wᵀ, what most of a decode step of a batch is.

As with one row (`gemv`), every byte of W is read once and the rate of memory is all that
counts. Rows of W are the long side of the matrix unit's tile and x, padded to 16 rows, the short
one. Each warp takes its own columns of a tile and the warps' sums are added at the end: no warp
repeats another's work, and few rows of W with many columns keep enough bytes in flight. Half the
rows of a gated tile come from W's first half, half from its second, so SwiGLU is applied to sums.

M rows of x, N rows of W, K columns; F = N / 2.
"""

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot.ahead import Variant
from kernels.aot.recorded import Expected, meta, variants_of
from kernels.checks import form, require
from kernels.device import gpu, require_gpu
from kernels.overlap import fetch, overlapped, start_next, wait_for_previous

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
#: Rows of x, padded, whatever their number: so a row's sums do not depend on it.
ROWS = 16


@dataclass(frozen=True, slots=True)
class Config:
    """Rows and columns of a tile of W; warps, which share its columns; stages of the pipeline.

    2 · rows · columns · (stages - 1) bytes of W are in flight in a program, and 2 · 16 · columns ·
    (stages - 1) of x lie beside them in shared memory.
    """

    rows: int
    columns: int
    warps: int
    stages: int


#: By family of GPUs, plain and gated. On an H100, of the tables tried in whole steps of 1b and 8b
#: models, none was faster beyond the noise; 48 KB of W are in flight in a program, 32 KB where it
#: is gated. AMD's, which never ran, fit 64 KiB of shared memory.
CONFIGS: dict[str, tuple[Config, Config]] = {
    "nvidia": (Config(16, 512, 4, 4), Config(16, 512, 4, 3)),
    "amd": (Config(16, 512, 4, 2), Config(32, 256, 4, 2)),
}


@triton.jit(do_not_specialize=["m_rows", "n_rows", "stride_eighths", "k_eighths"])
def few_rows_fwd_kernel(  # type: ignore[no-untyped-def]
    x, weight, y, m_rows, n_rows, stride_eighths, k_eighths,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WARPS: tl.constexpr, AHEAD: tl.constexpr,
    GATED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of y's columns). The stride of W's rows and K come as eighths: so the compiler
    knows that they are multiples of 8, whose loads are 16 bytes wide."""
    start_next(OVERLAP)
    K = k_eighths * 8
    HALVES: tl.constexpr = 2 if GATED else 1
    OUT: tl.constexpr = BLOCK_N // HALVES
    width = n_rows // HALVES
    # Rows past the last one are the last one again, and not written.
    i = tl.arange(0, BLOCK_N)
    row = tl.minimum(tl.program_id(0) * OUT + i % OUT, width - 1) + i // OUT * width
    rows = weight + row.to(tl.int64) * (stride_eighths * 8)
    if OVERLAP:
        for tile in tl.static_range(AHEAD):
            fetch(rows, tile * BLOCK_K + tl.arange(0, BLOCK_K // 64) * 64, K)
    wait_for_previous(OVERLAP)

    SHARE: tl.constexpr = BLOCK_K // WARPS
    k = tl.arange(0, WARPS)[:, None, None] * SHARE + tl.arange(0, SHARE)[None, None, :]
    m = tl.arange(0, 16)
    real = (m < m_rows)[None, :, None]
    w_at = rows[None, :, None] + k
    x_at = x + m[None, :, None] * K + k
    sums = tl.zeros([WARPS, BLOCK_N, 16], tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        inside = start + k < K
        w = tl.load(w_at + start, mask=inside, other=0.0)
        part = tl.load(x_at + start, mask=inside & real, other=0.0)
        sums = tl.dot(w, tl.permute(part, (0, 2, 1)), sums)

    result = tl.sum(sums, 0)
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(result, (2, OUT, 16)), (1, 2, 0)))
        result = gate / (1.0 + tl.exp(-gate)) * up
    n = tl.program_id(0) * OUT + tl.arange(0, OUT)
    at = y + m.to(tl.int64)[None, :] * width + n[:, None]
    stored = (m < m_rows)[None, :] & (n < width)[:, None]
    tl.store(at, result.to(y.dtype.element_ty), mask=stored)


def few_rows(x: Tensor, weight: Tensor, *, gated: bool = False) -> Tensor:
    """x Wᵀ of the 2 to 16 rows that x holds.

    x: [..., K] of 2 to 16 rows, contiguous from 16 bytes on, bfloat16 or float16, K a multiple of
      8; weight: [N, K] in x's dtype, rows starting at 16 bytes and contiguous.
    gated: weight is [2F, K], rows of the gate first; silu(x Wgateᵀ) · (x Wupᵀ) is returned.
    Sums, and silu, are float32; a result row depends on its own row of x alone, to the last bit.
    Returns [..., N], gated [..., F]. Raises ValueError naming the argument, its value and the rule
    it breaks.
    """
    require_gpu("x", x, few_rows_fwd_kernel)
    require(weight.dim() == 2, "weight", form(weight), "must be [N, K]")
    n, k = weight.shape
    require(k > 0 and k % 8 == 0, "weight", form(weight), "must have K a multiple of 8")
    fits = x.dim() >= 1 and x.shape[-1] == k and 2 <= x.numel() // k <= ROWS
    require(fits, "x", form(x), "must be 2 to {} rows of {}", ROWS, k)
    require(x.is_contiguous() and x.data_ptr() % 16 == 0, "x", form(x),
            "must be contiguous, from 16 bytes on")  # fmt: skip
    require(x.dtype in DTYPES, "x", form(x), "must be bfloat16 or float16")
    same = weight.dtype == x.dtype and weight.device == x.device
    require(same, "weight", form(weight), "must be {} on {}", x.dtype, x.device)
    stride = weight.stride(0) if n > 1 else k
    aligned = stride % 8 == 0 and weight.data_ptr() % 16 == 0
    require(weight.stride(1) == 1 and aligned, "weight", form(weight),
            "must have contiguous rows that start at 16 bytes")  # fmt: skip
    require(not gated or n % 2 == 0, "weight", form(weight), "must have N even where gated")
    width = n // 2 if gated else n
    y = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
    if width:
        config = CONFIGS[_family(x.device)][gated]
        constants = _constants(config, gated)
        out_rows = config.rows // 2 if gated else config.rows
        few_rows_fwd_kernel[(triton.cdiv(width, out_rows),)](
            x, weight, y, x.numel() // k, n, stride // 8, k // 8, **constants,
            num_warps=config.warps, num_stages=config.stages, **overlapped(x.device),
        )  # fmt: skip
    return y


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether `few_rows` takes these operands: 2 to 16 rows of a kind it knows, well aligned."""
    n, k = weight.shape
    return (
        k > 0 and k % 8 == 0 and x.shape[-1] == k and 2 * k <= x.numel() <= ROWS * k
        and x.is_contiguous() and x.dtype == weight.dtype and x.dtype in DTYPES
        and weight.stride(1) == 1 and (n <= 1 or weight.stride(0) % 8 == 0)
        and weight.data_ptr() % 16 == 0 and x.data_ptr() % 16 == 0
    )  # fmt: skip


def _constants(config: Config, gated: bool) -> dict[str, int | bool]:
    return {
        "BLOCK_N": config.rows, "BLOCK_K": config.columns, "WARPS": config.warps,
        "AHEAD": config.stages - 1, "GATED": gated,
    }  # fmt: skip


def _family(device: torch.device) -> str:
    return "amd" if gpu(device).amd else "nvidia"


def few_rows_ref(x: Tensor, weight: Tensor, *, gated: bool = False) -> Tensor:
    """The oracle: float64."""
    y = x.double() @ weight.double().t()
    if not gated:
        return y
    gate, up = y.chunk(2, -1)
    return gate / (1 + torch.exp(-gate)) * up


def variants() -> list[Variant]:
    """Every configuration and dtype; the first gives gate, up and SwiGLU of a 1b model."""

    def loads(v: Variant) -> int:
        c, lanes = v.constexprs, v.num_warps * (64 if "gfx942" in v.targets else 32)
        return max(1, int(c["BLOCK_N"] + ROWS) * int(c["BLOCK_K"]) * 2 // (16 * lanes))

    calls = [
        (f"few_rows {name}" + " gated" * gated, partial(few_rows, x, weight, gated=gated))
        for dtype, name in DTYPES.items()
        for x, weight in [(meta(8, 2048, dtype=dtype), meta(11008, 2048, dtype=dtype))]
        for gated in (True, False)
    ]
    return variants_of(calls, {few_rows_fwd_kernel: Expected(wide_loads=loads, matrix=True)})
