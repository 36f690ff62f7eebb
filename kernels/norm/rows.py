"""RMSNorm (arXiv 1910.07467), alone, after a residual add or with a gate, and SwiGLU (arXiv
2002.05202), each in one pass over its inputs; forward and backward.

y = x / sqrt(mean(x²) + eps) · w. Rows of D channels (a group of channels is a row of its own); a
tensor's rows lie at outer · stride + head · stride, so slices of a packed projection need no copy.
Everything is float32 between load and store. Backward computes the statistics again from the
inputs; the gradient of w is summed per block of rows, then over blocks: always in the same order.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kernels.aot.ahead import Variant
from kernels.aot.recorded import Expected, NamedCall, both_ways, meta, tile_loads, variants_of
from kernels.checks import form, require
from kernels.norm.row_parts import DTYPES, block_of, check_rows, check_weight, row_strides
from kernels.norm.rows_bwd import norm_bwd, norm_bwd_kernel, norm_bwd_wide_kernel
from kernels.norm.torch import OPENED
from kernels.overlap import overlapped, start_next, wait_for_previous

#: BLOCK_D -> (BLOCK_R, num_warps): 16 elements per thread of 32 lanes until warps run out.
CONFIGS: dict[int, tuple[int, int]] = {
    16: (32, 1), 32: (16, 1), 64: (8, 1), 128: (4, 1), 256: (2, 1), 512: (1, 1), 1024: (1, 2),
    2048: (1, 4), 4096: (1, 8), 8192: (1, 8), 16384: (1, 16),
}  # fmt: skip
#: BLOCK_F and num_warps of SwiGLU.
SWIGLU_CONFIG = (2048, 4)


@triton.jit
def norm_fwd_kernel(  # type: ignore[no-untyped-def]
    x, residual, gate, weight, y, summed, rows, inner,
    x_outer, x_inner, r_outer, r_inner, g_outer, g_inner,
    EPS: tl.constexpr, GATE_FIRST: tl.constexpr, SIGMOID: tl.constexpr, D: tl.constexpr,
    GROUPS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, GROUPS): one program's rows share a slice of weight.

    residual (with summed) and gate may be None; y and summed are dense.
    """
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    group = tl.program_id(1)
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)) * GROUPS + group
    d = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (d < D)[None, :]
    outer, head = (row // inner).to(tl.int64), (row % inner).to(tl.int64)
    at = (outer * x_outer + head * x_inner)[:, None] + d[None, :]
    dense = row.to(tl.int64)[:, None] * D + d[None, :]
    xt = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + group * D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    if residual is not None:
        at = (outer * r_outer + head * r_inner)[:, None] + d[None, :]
        total = xt + tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        rounded = total.to(summed.dtype.element_ty)
        tl.store(summed + dense, rounded, mask=inside)
        xt = rounded.to(tl.float32)
    if gate is not None:
        at = (outer * g_outer + head * g_inner)[:, None] + d[None, :]
        z = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
        if SIGMOID:
            z = tl.sigmoid(z)
        else:
            z *= tl.sigmoid(z)
        if GATE_FIRST:
            xt *= z
    out = xt * tl.rsqrt(tl.sum(xt * xt, 1) / D + EPS)[:, None] * w
    if gate is not None and not GATE_FIRST:
        out *= z
    tl.store(y + dense, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_fwd_kernel(  # type: ignore[no-untyped-def]
    gate_up, y, inner, x_outer, x_inner, F: tl.constexpr, BLOCK_F: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (rows, tiles of F); y is dense."""
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    row = tl.program_id(0)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    source = gate_up + (row // inner).to(tl.int64) * x_outer + (row % inner).to(tl.int64) * x_inner
    z = tl.load(source + f, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(source + F + f, mask=f < F, other=0.0).to(tl.float32)
    out = z * tl.sigmoid(z) * up
    tl.store(y + row.to(tl.int64) * F + f, out.to(y.dtype.element_ty), mask=f < F)


@triton.jit
def swiglu_bwd_kernel(  # type: ignore[no-untyped-def]
    gate_up, dy, dx, inner, x_outer, x_inner, F: tl.constexpr, BLOCK_F: tl.constexpr
):
    """Grid (rows, tiles of F); dy and dx are dense."""
    row = tl.program_id(0)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    source = gate_up + (row // inner).to(tl.int64) * x_outer + (row % inner).to(tl.int64) * x_inner
    z = tl.load(source + f, mask=f < F, other=0.0).to(tl.float32)
    up = tl.load(source + F + f, mask=f < F, other=0.0).to(tl.float32)
    grad = tl.load(dy + row.to(tl.int64) * F + f, mask=f < F, other=0.0).to(tl.float32)
    sig = tl.sigmoid(z)
    to = dx + row.to(tl.int64) * 2 * F + f
    dz = grad * up * sig * (1.0 + z * (1.0 - sig))
    tl.store(to, dz.to(dx.dtype.element_ty), mask=f < F)
    tl.store(to + F, (grad * z * sig).to(dx.dtype.element_ty), mask=f < F)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last dimension.

    x: [..., D], D at most 16384; weight: [D]; both float32, bfloat16 or float16. Rows of x may be
    strided in two levels (tokens, heads), the last dimension must be dense.
    Returns [..., D] in x's dtype. Differentiable once.
    Raises ValueError naming the argument, its value and the rule it breaks.
    """
    _check(x=x)
    check_weight(weight, x, x.shape[-1])
    if _differentiable(x, weight):
        normed: Tensor = _Norm.apply(x, None, weight, eps, False, 1, False)
        return normed
    return _norm(x, None, None, weight, eps, False, 1)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """RMSNorm of x + residual, and the sum; the norm is that of the sum rounded to x's dtype.

    x, residual: [..., D] of one dtype; weight: [D]; otherwise as `rms_norm`.
    Returns (normed, summed), [..., D] in x's dtype, equal to the two steps apart. Differentiable.
    """
    _check(x=x, residual=residual)
    check_weight(weight, x, x.shape[-1])
    same = residual.dtype == x.dtype
    require(same, "residual", form(residual), "must have x's dtype, {}", x.dtype)
    if _differentiable(x, residual, weight):
        pair: tuple[Tensor, Tensor] = _AddNorm.apply(x, residual, weight, eps)
        return pair
    normed, summed = _norm(x, residual, None, weight, eps, False, 1)
    assert summed is not None
    return normed, summed


def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, eps: float, *, gate_first: bool,
    group: int | None = None, opened: str = "silu",
) -> Tensor:  # fmt: skip
    """norm(x · silu(gate)) where gate_first, else norm(x) · silu(gate), over groups of channels.

    x, gate: [..., D], strided as in `rms_norm`, each in its own way; weight: [D]; group: channels
    that share one statistic (None: D), a divisor of D and at most 16384; opened: silu or sigmoid.
    Returns [..., D] in x's dtype. Differentiable once.
    Raises ValueError naming the argument, its value and the rule it breaks.
    """
    _check(x=x, gate=gate)
    dim = x.shape[-1]
    size = dim if group is None else group
    check_weight(weight, x, size)
    sigmoid, groups = is_sigmoid(opened), dim // size
    if _differentiable(x, gate, weight):
        gated: Tensor = _Norm.apply(x, gate, weight, eps, gate_first, groups, sigmoid)
        return gated
    return _norm(x, None, gate, weight, eps, gate_first, groups, sigmoid)[0]


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(first half) · second half. [..., 2F] -> [..., F], in gate_up's dtype; differentiable.

    Rows of gate_up may be strided as in `rms_norm`.
    Raises ValueError naming the argument, its value and the rule it breaks.
    """
    _check(gate_up=gate_up)
    require(gate_up.shape[-1] % 2 == 0, "gate_up", form(gate_up), "must be [..., 2F]")
    if _differentiable(gate_up):
        y: Tensor = _SwiGLU.apply(gate_up)
        return y
    return _swiglu(gate_up)


def is_sigmoid(opened: str) -> bool:
    """Whether a gate opens by a sigmoid, not by a SiLU. Raises ValueError on any other function."""
    require(opened in OPENED, "opened", opened, "must be one of {}", ", ".join(OPENED))
    return opened == "sigmoid"


def _check(**tensors: Tensor) -> None:
    check_rows(norm_fwd_kernel, **tensors)


def _differentiable(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor | None, weight: Tensor, eps: float, first: bool,
        groups: int, sigmoid: bool,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, gate, weight)
        ctx.options = eps, first, groups, sigmoid
        return _norm(x, None, gate, weight, eps, first, groups, sigmoid)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight = ctx.saved_tensors
        return *norm_bwd(x, gate, weight, dy, None, *ctx.options), None, None, None, None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor | None]:
        normed, summed = _norm(x, residual, None, weight, eps, False, 1)
        ctx.save_for_backward(summed, weight)
        ctx.eps = eps
        return normed, summed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, d_summed: Tensor) -> tuple[Tensor | None, ...]:
        summed, weight = ctx.saved_tensors
        dx, _, d_weight = norm_bwd(summed, None, weight, dy, d_summed, ctx.eps, False, 1, False)
        return dx, dx, d_weight, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return _swiglu(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        inner, strides = row_strides(gate_up=gate_up)
        dx = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
        half, (block, warps) = dx.shape[-1] // 2, SWIGLU_CONFIG
        swiglu_bwd_kernel[(dx.numel() // (2 * half), triton.cdiv(half, block))](
            gate_up, dy.contiguous(), dx, inner, *strides, F=half, BLOCK_F=block, num_warps=warps
        )
        return dx


def _norm(
    x: Tensor, residual: Tensor | None, gate: Tensor | None, weight: Tensor, eps: float,
    first: bool, groups: int, sigmoid: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    size = x.shape[-1] // groups
    inner, strides = row_strides(groups, x=x, residual=residual, gate=gate)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    summed = None if residual is None else torch.empty_like(y)
    block_d = block_of(size)
    block_r, warps = CONFIGS[block_d]
    rows = x.numel() // size
    norm_fwd_kernel[(triton.cdiv(rows // groups, block_r), groups)](
        x, residual, gate, weight, y, summed, rows, inner, *strides, EPS=eps, GATE_FIRST=first,
        SIGMOID=sigmoid, D=size, GROUPS=groups, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=warps,
        **overlapped(x.device),
    )  # fmt: skip
    return y, summed


def _swiglu(gate_up: Tensor) -> Tensor:
    inner, strides = row_strides(gate_up=gate_up)
    *lead, width = gate_up.shape
    half, (block, warps) = width // 2, SWIGLU_CONFIG
    y = torch.empty(*lead, half, dtype=gate_up.dtype, device=gate_up.device)
    swiglu_fwd_kernel[(y.numel() // half, triton.cdiv(half, block))](
        gate_up, y, inner, *strides, F=half, BLOCK_F=block, num_warps=warps,
        **overlapped(gate_up.device),
    )  # fmt: skip
    return y


def norm_ref(
    x: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None, *,
    gate_first: bool = False, group: int | None = None, opened: str = "silu",
) -> Tensor:  # fmt: skip
    """The oracle of every norm here: float64, one group of channels at a time."""
    x, weight = x.double(), weight.double()
    factor = None if gate is None else OPENED[opened](gate.double())
    if factor is not None and gate_first:
        x = x * factor
    size = group or x.shape[-1]
    parts = []
    for part, scale in zip(x.split(size, -1), weight.split(size), strict=True):
        rms = (part.square().mean(-1, keepdim=True) + eps).sqrt()
        parts.append(part / rms * scale)
    y = torch.cat(parts, -1)
    return y if factor is None or gate_first else y * factor


def swiglu_ref(gate_up: Tensor) -> Tensor:
    """The oracle: float64."""
    gate, up = gate_up.double().chunk(2, -1)
    return F.silu(gate) * up


def variants() -> list[Variant]:
    """Every kernel, tile, option and dtype, forward and backward; the first is a plain RMSNorm."""
    wide, narrow, half = torch.float32, torch.bfloat16, torch.float16

    def rows(dim: int, dtype: torch.dtype) -> Tensor:
        return meta(64, 512, dim, dtype=dtype)

    def heads(dim: int, dtype: torch.dtype) -> Tensor:
        """Rows in two levels: four heads of what a projection left."""
        return rows(5 * dim, dtype)[..., : 4 * dim].unflatten(-1, (4, dim))

    calls: list[NamedCall] = []
    for dtype, weight in ((narrow, narrow), (half, wide)):
        norm = partial(rms_norm, eps=1e-6)
        given = rows(4096, dtype), meta(4096, dtype=weight)
        calls.append(both_ways(f"norm {dtype} 4096", norm, *given))
    for dim in (16, 32, 64, 128, 256, 512, 1008, 2048, 4096, 8192, 16384):
        after = partial(gated_rms_norm, eps=1e-6, gate_first=False)
        first = partial(gated_rms_norm, eps=1e-6, gate_first=True, group=dim)
        scale = meta(dim, dtype=wide), meta(2 * dim, dtype=wide)
        calls += [
            both_ways(f"gated {narrow} {dim}", after, *[heads(dim, narrow)] * 2, scale[0]),
            both_ways(f"gated first {wide} 2x{dim}", first, *[rows(2 * dim, wide)] * 2, scale[1]),
        ]
    for dim in (64, 128):
        opened = partial(gated_rms_norm, eps=1e-6, gate_first=False, opened="sigmoid")
        each = heads(dim, narrow)
        calls.append(
            both_ways(f"gated sigmoid {narrow} {dim}", opened, each, each, meta(dim, dtype=wide))
        )
    for dtype, dim in ((narrow, 2048), (half, 2048), (wide, 2048), (narrow, 16384), (wide, 16384)):
        summing = partial(add_rms_norm, eps=1e-6)
        added = [*[rows(dim, dtype)] * 2, meta(dim, dtype=dtype)]
        calls.append(both_ways(f"add {dtype} {dim}", summing, *added))
    calls += [both_ways(f"swiglu {d}", swiglu, rows(2 * 5632, d)) for d in DTYPES]

    def streams(v: Variant) -> int:
        """Of x, dy, gate and what is added; the weight may be narrow where its slice is short."""
        read = [t for t in ("x", "dy", "gate", "residual", "d_summed") if t in v.signature]
        blocks = [b for b in ("BLOCK_R", "BLOCK_D") if b in v.constexprs]
        return len(read) * tile_loads("x", *blocks, least=1)(v)

    def halves(v: Variant) -> int:
        return (3 if "dy" in v.signature else 2) * tile_loads("gate_up", "BLOCK_F")(v)

    norms, products = Expected(wide_loads=streams), Expected(wide_loads=halves)
    expected = {
        norm_fwd_kernel: norms, norm_bwd_kernel: norms, norm_bwd_wide_kernel: norms,
        swiglu_fwd_kernel: products, swiglu_bwd_kernel: products,
    }  # fmt: skip
    return variants_of(calls, expected)
