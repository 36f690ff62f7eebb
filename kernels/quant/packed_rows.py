"""The product of 1 to 64 rows with a matrix of few bits: y = x Wᵀ (`kernels.quant.torch`).

Every packed byte is read once, in 16-byte loads. Codes become exact numbers of x's dtype
(`kernels.quant.fields`) and go through the matrix unit as they are; a group's scale s and zero
point z are applied to its float32 sums. With code c as 1 + c/BASE, a group of b-bit codes gives
    Σ x·(s·(c - 2^(b-1)) + z) = s·BASE · Σ x·(1 + c/BASE) + (z - s·(BASE + 2^(b-1))) · Σ x.
A byte holds 8/b neighbouring columns. Each of its fields is one dot with every (8/b)-th column of
x, so codes never move between threads.

Each warp takes its own groups of a tile and the warps' sums are added at the end, as in
`kernels.products.few_rows`. x is padded to 8, 16 or 32 rows. One row goes through the matrix unit
too: sums in registers would take one more instruction for each code, and instructions, not the
matrix unit, are what this kernel is short of.

M rows of x, N rows of W, K columns.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot.ahead import Variant
from kernels.aot.recorded import Expected, NamedCall, meta, variants_of
from kernels.checks import form, require
from kernels.device import gpu, interpreted, require_gpu
from kernels.overlap import fetch, overlapped, start_next, wait_for_previous
from kernels.quant.fields import number, planes, ptx_planes
from kernels.quant.torch import SCALE_DTYPE, Rounded

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
#: Most rows of x.
ROWS = 64
#: Columns that share a scale, of narrow integers.
GROUPS = (32, 64, 128)
#: Columns that a warp takes at once where a scale is a row's.
RUN = 64
EIGHT_BITS = {torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


@dataclass(frozen=True, slots=True)
class Config:
    """Tile of W: its rows, its columns, and the most groups that these may be; warps, which share
    the groups; stages of the pipeline.

    rows · columns · bits / 8 · (stages - 1) bytes of W are in flight in a program.
    """

    rows: int
    columns: int
    groups: int
    warps: int
    stages: int


#: By family of GPUs and by the rows that x is padded to; more rows are several blocks of the most.
#: Chosen by what the compiler makes of them (no spills, 64 KiB of shared memory on AMD): none has
#: been timed on a GPU yet.
CONFIGS: dict[str, dict[int, Config]] = {
    "nvidia": {
        8: Config(32, 512, 8, 4, 4), 16: Config(32, 512, 8, 4, 4), 32: Config(32, 512, 4, 4, 3),
    },
    "amd": {16: Config(32, 512, 16, 4, 2), 32: Config(32, 512, 16, 4, 2)},
}  # fmt: skip


@triton.jit(do_not_specialize=["m_rows", "n_rows", "row_steps", "k_eighths"])
def packed_rows_fwd_kernel(  # type: ignore[no-untyped-def]
    x, codes, scale, zero, y, m_rows, n_rows, row_steps, k_eighths,
    STEP: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, FLOAT8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE: tl.constexpr, AHEAD: tl.constexpr,
    PTX: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of W's rows · blocks of x's rows; the latter are neighbours, which share W).

    A row of W is row_steps · STEP bytes, and K comes as eighths: so the compiler knows how they are
    aligned. TILE is the number of groups in a tile. zero is None for 8 bits: a scale per row.
    """
    start_next(OVERLAP)
    dtype: tl.constexpr = x.dtype.element_ty
    K = k_eighths * 8
    BYTES: tl.constexpr = GROUP * BITS // 8
    row_bytes = row_steps * STEP
    m_blocks = tl.cdiv(m_rows, BLOCK_M)
    m = tl.program_id(0) % m_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) // m_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows past the last one are the last one again, and not written.
    row = tl.minimum(n, n_rows - 1).to(tl.int64)
    rows = codes + row * row_bytes
    g = tl.arange(0, TILE)
    column = g[:, None, None] * BYTES + tl.arange(0, BYTES)[None, None, :]
    codes_at = rows[None, :, None] + column
    if zero is not None:
        groups = row_bytes // BYTES
        scale_at = row[None, :] * groups + g[:, None]
        inside = (g < groups)[:, None]
        next_scale = tl.load(scale + scale_at, mask=inside, other=0.0)
        next_zero = tl.load(zero + scale_at, mask=inside, other=0.0)
        ones = _ones(codes, TILE, tl.constexpr(max(16, GROUP * BITS // 8)), dtype)
    if OVERLAP:
        LINES: tl.constexpr = (TILE * BYTES + 127) // 128
        for tile in tl.static_range(AHEAD):
            fetch(rows, tile * (TILE * BYTES) + tl.arange(0, LINES) * 128, row_bytes)
    wait_for_previous(OVERLAP)

    k = g[:, None, None] * GROUP + tl.arange(0, GROUP)[None, None, :]
    x_at = x + m.to(tl.int64)[None, :, None] * K + k
    real = (m < m_rows)[None, :, None]
    sums = tl.zeros([TILE, BLOCK_N, BLOCK_M], tl.float32)
    for tile in tl.range(0, tl.cdiv(row_bytes, TILE * BYTES)):
        at = tile * (TILE * BYTES)
        w = tl.load(codes_at + at, mask=at + column < row_bytes, other=0)
        first = tile * (TILE * GROUP)
        part = tl.load(x_at + first, mask=real & (first + k < K), other=0.0)
        if zero is None:
            sums = tl.dot(number(w, FLOAT8, dtype), tl.permute(part, (0, 2, 1)), sums)
        else:
            s, z = next_scale.to(tl.float32), next_zero.to(tl.float32)
            later = tile * TILE + TILE
            inside = (later + g < groups)[:, None]
            next_scale = tl.load(scale + scale_at + later, mask=inside, other=0.0)
            next_zero = tl.load(zero + scale_at + later, mask=inside, other=0.0)
            product, total = _group_sums(w, part, ones, BITS, GROUP, BLOCK_M, BLOCK_N, TILE, PTX)
            BASE: tl.constexpr = 1 << (BITS if dtype == tl.bfloat16 else BITS + 2)
            sums += product * (s * BASE)[:, :, None]
            sums += total[:, None, :] * (z - s * (BASE + (1 << BITS - 1)))[:, :, None]

    result = tl.sum(sums, 0)
    if zero is None:
        factor = tl.load(scale + row).to(tl.float32) * (256.0 if FLOAT8 else 1.0)
        result *= factor[:, None]
    y_at = y + m.to(tl.int64)[None, :] * n_rows + n[:, None]
    stored = (m < m_rows)[None, :] & (n < n_rows)[:, None]
    tl.store(y_at, result.to(y.dtype.element_ty), mask=stored)


@triton.jit
def _group_sums(  # type: ignore[no-untyped-def]
    w, x, ones, BITS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, TILE: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """For each group: bytes w [TILE, BLOCK_N, ·] times x [TILE, BLOCK_M, GROUP], and sums of x."""
    product = tl.zeros([TILE, BLOCK_N, BLOCK_M], tl.float32)
    total = tl.zeros([TILE, 16, BLOCK_M], tl.float32)
    if BITS == 4:
        even, odd = tl.split(tl.reshape(x, (TILE, BLOCK_M, GROUP // 2, 2)))
        w0, w1 = planes(w, BITS, x.dtype, PTX)
        product, total = _plane(product, total, w0, even, ones)
        product, total = _plane(product, total, w1, odd, ones)
    else:
        w0, w1, w2, w3 = planes(w, BITS, x.dtype, PTX)
        quads = tl.reshape(x, (TILE, BLOCK_M, GROUP // 4, 2, 2))
        if GROUP // 4 >= 16:
            even, odd = tl.split(quads)
            x0, x2 = tl.split(even)
            x1, x3 = tl.split(odd)
            product, total = _plane(product, total, w0, x0, ones)
            product, total = _plane(product, total, w2, x2, ones)
            product, total = _plane(product, total, w1, x1, ones)
            product, total = _plane(product, total, w3, x3, ones)
        else:
            # A dot takes at least 16 columns: two fields side by side.
            low, high = tl.split(tl.permute(quads, (0, 1, 2, 4, 3)))
            low = tl.reshape(low, (TILE, BLOCK_M, GROUP // 2))
            high = tl.reshape(high, (TILE, BLOCK_M, GROUP // 2))
            w0 = tl.reshape(tl.join(w0, w1), (TILE, BLOCK_N, GROUP // 2))
            w2 = tl.reshape(tl.join(w2, w3), (TILE, BLOCK_N, GROUP // 2))
            product, total = _plane(product, total, w0, low, ones)
            product, total = _plane(product, total, w2, high, ones)
    # All 16 rows of total are equal.
    return product, tl.max(total, 1)


@triton.jit
def _plane(product, total, w, x, ones):  # type: ignore[no-untyped-def]
    turned = tl.permute(x, (0, 2, 1))
    return tl.dot(w, turned, product), tl.dot(ones, turned, total)


@triton.jit
def _ones(codes, TILE: tl.constexpr, WIDTH: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Ones [TILE, 16, WIDTH], made of bytes.

    Triton lays out a dot's operands by the narrowest load behind them. Made of bytes, the ones give
    the sums of x the layout of its product with W, so x stays in the pipeline and is read once for
    both. The compiler drops the load itself.
    """
    loaded = tl.load(codes + tl.zeros([TILE, 16, WIDTH], tl.int32))
    return ((loaded.to(tl.int16) >> 8) + 1).to(dtype)


def packed_rows(x: Tensor, rounded: Rounded, bits: int) -> Tensor:
    """x Wᵀ of the 1 to 64 rows that x holds.

    x: [..., K] of 1 to 64 rows, contiguous from 16 bytes on, bfloat16 or float16, K a multiple
      of 8.
    rounded: W [N, K] as `kernels.quant.torch` stores it, contiguous, codes from 16 bytes on, not
      written by the launch right before. bits 4 or 2: groups of 32, 64 or 128 columns; bits 8:
      int8 or float8_e4m3fn without NaN.
    Sums are float32. A result row depends on its own row of x alone, to the last bit, as long as
    the number of rows is padded to the same one (`config_of`).
    Returns [..., N] in x's dtype. Raises ValueError naming the argument, its value and the rule it
    breaks.
    """
    require_gpu("x", x, packed_rows_fwd_kernel)
    layout = _checked(x, rounded, bits)
    codes, scale, zero = rounded
    n, k = len(codes), x.shape[-1]
    m = x.numel() // k
    y = torch.empty((*x.shape[:-1], n), dtype=x.dtype, device=x.device)
    if n:
        padded, config = config_of(m, amd=gpu(x.device).amd)
        step = 16 if layout.row_bytes % 16 == 0 else 8
        packed_rows_fwd_kernel[(triton.cdiv(n, config.rows) * triton.cdiv(m, padded),)](
            x, codes.view(torch.int8) if zero is None else codes, scale, zero, y, m, n,
            layout.row_bytes // step, k // 8, STEP=step, BITS=bits, GROUP=layout.group,
            FLOAT8=codes.dtype == torch.float8_e4m3fn, BLOCK_M=padded, BLOCK_N=config.rows,
            TILE=min(config.groups, config.columns // layout.group), AHEAD=config.stages - 1,
            PTX=None if zero is None else _ptx(x, bits), num_warps=config.warps,
            num_stages=config.stages, **overlapped(x.device),
        )  # fmt: skip
    return y


def config_of(m: int, *, amd: bool = False) -> tuple[int, Config]:
    """The rows that m rows of x are padded to, or blocks of them, and the configuration."""
    configs = CONFIGS["amd" if amd else "nvidia"]
    padded = min((rows for rows in configs if rows >= m), default=max(configs))
    return padded, configs[padded]


def _ptx(x: Tensor, bits: int) -> str | None:
    plain = gpu(x.device).amd or interpreted(packed_rows_fwd_kernel)
    return None if plain else ptx_planes(bits, x.dtype)


class _Layout(NamedTuple):
    """Columns of a group, or that a warp takes at once, and bytes of a row."""

    group: int
    row_bytes: int


def serves(x: Tensor, rounded: Rounded, bits: int) -> bool:
    """Whether `packed_rows` takes these operands, on whatever device."""
    try:
        _checked(x, rounded, bits)
    except ValueError:
        return False
    return True


def _checked(x: Tensor, rounded: Rounded, bits: int) -> _Layout:
    """Raises ValueError unless `packed_rows` takes them."""
    codes, scale, zero = rounded
    require(bits in (2, 4, 8), "bits", bits, "must be 2, 4 or 8")
    require(x.dim() >= 1 and x.shape[-1] > 0 and x.shape[-1] % 8 == 0, "x", form(x),
            "must be rows of a multiple of 8")  # fmt: skip
    k = x.shape[-1]
    require(1 <= x.numel() // k <= ROWS, "x", form(x), "must be 1 to {} rows", ROWS)
    require(x.is_contiguous() and x.data_ptr() % 16 == 0, "x", form(x),
            "must be contiguous, from 16 bytes on")  # fmt: skip
    require(x.dtype in DTYPES, "x", form(x), "must be bfloat16 or float16")
    known = codes.dtype in EIGHT_BITS if bits == 8 else codes.dtype == torch.uint8
    kinds = "int8 or float8_e4m3fn" if bits == 8 else "uint8"
    require(known and codes.dim() == 2, "rounded.codes", form(codes), "must be {} [N, bytes]",
            kinds)  # fmt: skip
    rule = "must be contiguous on {}, from 16 bytes on"
    require(codes.is_contiguous() and codes.data_ptr() % 16 == 0 and codes.device == x.device,
            "rounded.codes", form(codes), rule, x.device)  # fmt: skip
    n, row_bytes = codes.shape
    _require_scale("rounded.scale", scale, n, x.device)
    if bits == 8:
        require(zero is None, "rounded.zero", zero is None or form(zero), "must be None of 8 bits")
        require(scale.shape[1] == 1, "rounded.scale", form(scale), "must be [{}, 1]", n)
        require(row_bytes == k, "rounded.codes", form(codes), "must be of {} columns", k)
        return _Layout(RUN, row_bytes)
    if zero is None:
        raise ValueError(f"rounded.zero=None must be as rounded.scale of {bits} bits")
    _require_scale("rounded.zero", zero, n, x.device)
    require(zero.shape == scale.shape, "rounded.zero", form(zero), "must be as rounded.scale, {}",
            form(scale))  # fmt: skip
    columns = row_bytes * 8 // bits
    group, over = divmod(columns, scale.shape[1])
    require(over == 0 and group in GROUPS, "rounded.scale", form(scale),
            "must be of groups of 32, 64 or 128 of {} columns", columns)  # fmt: skip
    require(0 <= columns - k < group, "rounded.codes", form(codes),
            "must be of {} columns, in whole groups of {}", k, group)  # fmt: skip
    return _Layout(group, row_bytes)


def _require_scale(name: str, scale: Tensor, n: int, device: torch.device) -> None:
    fits = scale.dim() == 2 and scale.shape[0] == n and scale.shape[1] > 0
    like = scale.dtype == SCALE_DTYPE and scale.device == device
    require(fits and like and scale.is_contiguous(), name, form(scale),
            "must be contiguous {} [{}, groups] on {}", SCALE_DTYPE, n, device)  # fmt: skip


def variants() -> list[Variant]:
    """Every configuration, format and dtype; the first is few rows of a 1b model, of 4 bits."""
    formats: list[tuple[str, int, int, torch.dtype]] = [
        *((f"int{bits} g{group}", bits, group, torch.uint8)
          for bits, group in ((4, 64), (4, 32), (4, 128), (2, 64), (2, 32), (2, 128))),
        *((name, 8, 0, kind) for kind, name in EIGHT_BITS.items()),
    ]  # fmt: skip

    def call(
        m: int, k: int, dtype: torch.dtype, name: str, bits: int, group: int, kind: torch.dtype
    ) -> NamedCall:
        n, groups = 11008, -(-k // group) if group else 1
        codes = meta(n, groups * group * bits // 8 if group else k, dtype=kind)
        rounded = Rounded(codes, meta(n, groups), meta(n, groups) if group else None)
        run = partial(packed_rows, meta(m, k, dtype=dtype), rounded, bits)
        return f"packed_rows {DTYPES[dtype]} {name} {m} rows of {k}", run

    def loads(v: Variant) -> int:
        c, lanes = v.constexprs, v.num_warps * (64 if "gfx942" in v.targets else 32)
        run = c["GROUP"] * c["BITS"] // 8
        wide = run * c["BLOCK_N"] if run % 16 == 0 and c["STEP"] == 16 else 0
        return int(max(1, c["TILE"] * (wide + 2 * c["GROUP"] * c["BLOCK_M"]) // (16 * lanes)))

    def narrow(v: Variant) -> frozenset[int]:
        # Scales and zero points; bytes of rows that start at 8, and groups of 8 bytes.
        c = v.constexprs
        scales = {2, 4} if v.signature.get("zero") else set()
        return frozenset(
            scales | ({8} if c["STEP"] == 8 or c["GROUP"] * c["BITS"] == 64 else set())
        )

    calls = [
        call(m, k, dtype, *of)
        for dtype in DTYPES
        for of in formats
        # The second has rows that start at 8 bytes, where the format has any.
        for k in (2048, 2072)
        for m in (8, 16, 32)
    ]
    expected = Expected(wide_loads=loads, narrow_in_loops=narrow, matrix=True)
    return variants_of(calls, {packed_rows_fwd_kernel: expected})
