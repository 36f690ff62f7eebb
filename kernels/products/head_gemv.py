"""The product of one token's heads with a matrix for each: y[h] = x[h] W[h], as latent attention
takes queries into the latent space and results out of it (arXiv 2405.04434, weight absorption).

Such matrices are small, and a library's batched product costs a launch that the next kernel waits
for; here the weights are asked for before the kernel that computes x has ended
(`kernels.overlap`), whichever way they lie.

H heads, D channels in, N out.
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
from kernels.products.gemv import DTYPES

#: Elements of a tile, and warps.
TILE, WARPS = 4096, 4
MAX_DIM = 1024


@triton.jit
def head_gemv_fwd_kernel(  # type: ignore[no-untyped-def]
    x, weight, y, x_stride_h, w_stride_h, w_stride_d, w_stride_n,
    D: tl.constexpr, N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of N, H)."""
    start_next(OVERLAP)
    h = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    at = weight + h.to(tl.int64) * w_stride_h + d[:, None] * w_stride_d + n[None, :] * w_stride_n
    tile = tl.load(at, mask=(d < D)[:, None] & (n < N)[None, :], other=0.0)
    wait_for_previous(OVERLAP)
    part = tl.load(x + h * x_stride_h + d, mask=d < D, other=0.0)
    sums = tl.sum(tile.to(tl.float32) * part.to(tl.float32)[:, None], 0)
    tl.store(y + h * N + n, sums.to(y.dtype.element_ty), mask=n < N)


def head_gemv(x: Tensor, weight: Tensor, *, out: Tensor | None = None) -> Tensor:
    """x[h] W[h] of one token.

    x: [1, 1, H, D], D at most 1024 and contiguous; weight: [H, D, N] in x's dtype (float32,
    bfloat16, float16), D or N contiguous, not written by the launch right before. Sums are float32.
    out: contiguous [1, 1, H, N] in x's dtype, written and returned.
    Returns [1, 1, H, N].
    Raises ValueError naming the argument, its value and the rule it breaks.
    """
    require_gpu("x", x, head_gemv_fwd_kernel)
    require(weight.dim() == 3, "weight", form(weight), "must be [H, D, N]")
    heads, dim, width = weight.shape
    fits = x.shape == (1, 1, heads, dim) and dim <= MAX_DIM and x.stride(3) == 1
    require(
        fits,
        "x",
        form(x),
        "must be [1, 1, {}, {}], contiguous heads of at most {}",
        heads,
        dim,
        MAX_DIM,
    )
    require(x.dtype in DTYPES, "x", form(x), "must be float32, bfloat16 or float16")
    same = weight.dtype == x.dtype and weight.device == x.device
    require(same, "weight", form(weight), "must be {} on {}", x.dtype, x.device)
    require(1 in weight.stride()[1:], "weight", form(weight), "must have D or N contiguous")
    if out is None:
        out = torch.empty(1, 1, heads, width, dtype=x.dtype, device=x.device)
    fits = out.shape == (1, 1, heads, width) and out.dtype == x.dtype and out.device == x.device
    rule = "must be contiguous {} [1, 1, {}, {}] on {}"
    require(fits and out.is_contiguous(), "out", form(out), rule, x.dtype, heads, width, x.device)
    constants = _constants(dim, width)
    head_gemv_fwd_kernel[(triton.cdiv(width, constants["BLOCK_N"]), heads)](
        x, weight, out, x.stride(2), *weight.stride(), **constants, num_warps=WARPS,
        **overlapped(x.device),
    )  # fmt: skip
    return out


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether `head_gemv` takes these operands: one token of a kind that it knows."""
    return (
        x.shape[:2] == (1, 1) and x.shape[3] <= MAX_DIM and x.stride(3) == 1
        and x.dtype in DTYPES and x.dtype == weight.dtype and 1 in weight.stride()[1:]
    )  # fmt: skip


def _constants(dim: int, width: int) -> dict[str, int]:
    block_d = triton.next_power_of_2(dim)
    block_n = min(max(16, TILE // block_d), triton.next_power_of_2(width))
    return {"D": dim, "N": width, "BLOCK_D": block_d, "BLOCK_N": block_n}


def head_gemv_ref(x: Tensor, weight: Tensor) -> Tensor:
    """The oracle: float64."""
    return torch.einsum("bkhd,hdn->bkhn", x.double(), weight.double())


def variants() -> list[Variant]:
    """Into latent spaces and out of them, every dtype; along: which of the two lies dense."""

    def call(dtype: torch.dtype, dim: int, width: int, along: str) -> NamedCall:
        weight = meta(16, dim, width, dtype=dtype)
        if along == "D":
            weight = meta(16, width, dim, dtype=dtype).mT
        name = f"head_gemv {DTYPES[dtype]} {dim} to {width} along {along}"
        return name, partial(head_gemv, meta(1, 1, 16, dim, dtype=dtype), weight)

    calls = [
        call(dtype, dim, width, along)
        for dtype in (torch.bfloat16, torch.float32, torch.float16)
        for dim, width, along in (
            (64, 256, "N"), (256, 64, "D"), (128, 512, "N"), (512, 128, "D"), (1024, 128, "D"),
        )
    ]  # fmt: skip
    expected = Expected(wide_loads=tile_loads("weight", "BLOCK_D", "BLOCK_N", least=1))
    return variants_of(calls, {head_gemv_fwd_kernel: expected})
