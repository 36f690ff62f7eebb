"""Rotary positions in place, for heads that are not written as they are (arXiv 2104.09864).

B sequences, K new tokens, H heads, d channels that turn. Serves queries of layers that read other
layers' keys, and retention. Interleaved pairs, as `torch`; `append` is the form
that also writes keys and values, `latent.append` the one that writes latent rows.
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
from kernels.pages.write import FLOATS

MAX_DIM = 512
#: Bytes of an element -> (elements of a tile, warps).
CONFIGS: dict[int, tuple[int, int]] = {2: (1024, 2), 4: (512, 2)}


@triton.jit
def turned(x, angle, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """x [ROWS, WIDTH], whose channels are pairs, by angle, their cosines and sines; in float32."""
    cos, sin = tl.split(tl.reshape(angle, (ROWS, WIDTH // 2, 2)))
    even, odd = tl.split(tl.reshape(x.to(tl.float32), (ROWS, WIDTH // 2, 2)))
    both = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.reshape(both, (ROWS, WIDTH)).to(x.dtype)


@triton.jit(do_not_specialize=["tokens", "positions"])
def rope_rotate_fwd_kernel(  # type: ignore[no-untyped-def]
    x, cos_sin, lengths, stride_b, stride_t, tokens, positions,
    H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (B * K, tiles of heads)."""
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    b = (tl.program_id(0) // tokens).to(tl.int64)
    i = tl.program_id(0) % tokens
    position = tl.load(lengths + b) + i
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    c = tl.arange(0, BLOCK_D)[None, :]
    turns = (h < H) & (c < D) & (position < positions)
    at = x + b * stride_b + i.to(tl.int64) * stride_t + h * D + c
    pairs = tl.load(at, mask=turns, other=0.0)
    # The same angles for each head: read again per head, from cache, they need no exchange.
    angle = tl.load(cos_sin + position.to(tl.int64) * D + c + 0 * h, mask=turns, other=0.0)
    tl.store(at, turned(pairs, angle, BLOCK_H, BLOCK_D), mask=turns)


def rope_rotate(x: Tensor, cos_sin: Tensor, lengths: Tensor) -> Tensor:
    """Turn the heads of new tokens by their positions, in place; returns x.

    x: [B, K, H, d], d even and at most 512, each token's heads contiguous; bfloat16, float16 or
      float32, turned in float32.
    cos_sin: contiguous float32 [positions, d / 2, 2], cosine and sine of each pair's angle.
    lengths: int32 [B], tokens before this step: token i has position lengths[b] + i. A token past
      `cos_sin` is not turned.
    Raises ValueError naming the argument, its value and the rule, before any launch.
    """
    require_gpu("x", x, rope_rotate_fwd_kernel)
    require(x.dim() == 4, "x", form(x), "must be [B, K, H, d]")
    require(x.dtype in FLOATS, "x", form(x), "must be bfloat16, float16 or float32")
    batch, tokens, heads, dim = x.shape
    require(2 <= dim <= MAX_DIM and dim % 2 == 0, "d", dim, "must be even, 2 to {}", MAX_DIM)
    together = x.stride(3) == 1 and (heads == 1 or x.stride(2) == dim)
    apart = all(x.stride(i) >= heads * dim for i in range(2) if x.shape[i] > 1)
    require(together and apart, "x", form(x), "must have strides [.., .., {}, 1]", dim)
    fits = cos_sin.dim() == 3 and cos_sin.shape[1:] == (dim // 2, 2)
    fits = fits and cos_sin.dtype == torch.float32 and cos_sin.is_contiguous()
    require(fits, "cos_sin", form(cos_sin),
            "must be contiguous float32 [positions, {}, 2]", dim // 2)  # fmt: skip
    fits = lengths.shape == (batch,) and lengths.dtype == torch.int32 and lengths.is_contiguous()
    require(fits, "lengths", form(lengths), "must be contiguous int32 [{}]", batch)
    for name, tensor in (("cos_sin", cos_sin), ("lengths", lengths)):
        require(tensor.device == x.device, name, tensor.device,
                "must be on the device of x, {}", x.device)  # fmt: skip
    if x.numel() == 0:
        return x
    elements, warps = CONFIGS[x.dtype.itemsize]
    block_d = triton.next_power_of_2(dim)
    block_h = max(1, min(elements // block_d, triton.next_power_of_2(heads)))
    stride_b, stride_t = (x.stride(i) if x.shape[i] > 1 else 0 for i in range(2))
    rope_rotate_fwd_kernel[(batch * tokens, triton.cdiv(heads, block_h))](
        x, cos_sin, lengths, stride_b, stride_t, tokens, cos_sin.shape[0],
        H=heads, D=dim, BLOCK_H=block_h, BLOCK_D=block_d, num_warps=warps, **overlapped(x.device),
    )  # fmt: skip
    return x


def rope_rotate_ref(x: Tensor, cos_sin: Tensor, lengths: Tensor) -> Tensor:
    """The oracle: float64, one token at a time, into a copy."""
    x = x.double().clone()
    for b in range(x.shape[0]):
        for i in range(x.shape[1]):
            angle = torch.view_as_complex(cos_sin[int(lengths[b]) + i].double())
            pairs = torch.view_as_complex(x[b, i].unflatten(-1, (-1, 2)))
            x[b, i] = torch.view_as_real(pairs * angle).flatten(-2)
    return x


def variants() -> list[Variant]:
    """Every dtype, and widths that the wrapper tiles differently; first DeepSeek's rotary queries
    and key."""

    def call(dtype: torch.dtype, heads: int, dim: int) -> NamedCall:
        x, angles = meta(1, 1, heads, dim, dtype=dtype), meta(64, dim // 2, 2, dtype=torch.float32)
        name = f"rope_rotate {str(dtype)[6:]} {heads} heads d {dim}"
        return name, partial(rope_rotate, x, angles, meta(1, dtype=torch.int32))

    sizes = ((32, 128), (17, 32), (64, 64), (8, 256), (5, 16))
    calls = (
        call(torch.bfloat16, 129, 64),
        *(call(dtype, heads, dim) for dtype in FLOATS for heads, dim in sizes),
    )
    # A tile of few narrow heads has too few bytes for 16 on each thread.
    loads = tile_loads("x", "BLOCK_H", "BLOCK_D")
    expected = Expected(wide_loads=lambda v: 2 * loads(v))
    return variants_of(calls, {rope_rotate_fwd_kernel: expected})
