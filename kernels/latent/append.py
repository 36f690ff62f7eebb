"""Latent rows of new tokens, from projection to page, and rotary queries, in one launch.

Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) keeps one row per position: a latent
after its norm (arXiv 1910.07467), and a rotary key (arXiv 2104.09864) that all heads share.

Legend: B sequences, K new tokens, H query heads, R latent width, r rotary width. Of each token one
program norms the latent, turns the key and writes both to their page; others turn the rotary
queries in place, a tile of heads each.
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
from kernels.pages.write import FLOATS, check_pages, page_row
from kernels.rope.rotate import CONFIGS, turned

MAX_LATENT = 1024
MAX_ROTARY = 512


@triton.jit(do_not_specialize=["tokens", "max_pages", "positions"])
def latent_append_fwd_kernel(  # type: ignore[no-untyped-def]
    q, key, latent, weight, cos_sin, pool, page_table, lengths, new,
    q_stride_b, q_stride_t, key_stride_b, key_stride_t, latent_stride_b, latent_stride_t,
    tokens, max_pages, positions,
    EPS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, R: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (B * K, 1 + tiles of heads). new may be None."""
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    b = tl.program_id(0) // tokens
    i = tl.program_id(0) % tokens
    wide_b, wide_i = b.to(tl.int64), i.to(tl.int64)
    c = tl.arange(0, BLOCK_D)[None, :]
    if tl.program_id(1) == 0:
        valid, kept, place, row = page_row(
            page_table, lengths, new, None, b, i, tokens, max_pages, 0, PAGE
        )
        kept = kept & valid
        to = pool + row * (R + D)
        n = tl.arange(0, BLOCK_R)
        inside = (n < R) & kept
        source = latent + wide_b * latent_stride_b + wide_i * latent_stride_t
        x = tl.load(source + n, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + n, mask=inside, other=0.0).to(tl.float32)
        normed = x * tl.rsqrt(tl.sum(x * x, 0) / R + EPS) * w
        # What is stored is what a norm in the projection's type gives.
        normed = normed.to(latent.dtype.element_ty)
        tl.store(to + n, normed.to(pool.dtype.element_ty), mask=inside)
        held = (c < D) & kept
        known = held & (place < positions)
        k = tl.load(key + wide_b * key_stride_b + wide_i * key_stride_t + c, mask=held, other=0.0)
        turn = tl.load(cos_sin + place.to(tl.int64) * D + c, mask=known, other=0.0)
        k = tl.where(known, turned(k, turn, 1, BLOCK_D), k)
        tl.store(to + R + c, k.to(pool.dtype.element_ty), mask=held)
    else:
        position = tl.load(lengths + b) + i
        h = (tl.program_id(1) - 1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        turns = (h < H) & (c < D) & (position < positions)
        at = q + wide_b * q_stride_b + wide_i * q_stride_t + h * D + c
        heads = tl.load(at, mask=turns, other=0.0)
        # The same angles for each head: read again per head, from cache, they need no exchange.
        angle = tl.load(cos_sin + position.to(tl.int64) * D + c + 0 * h, mask=turns, other=0.0)
        tl.store(at, turned(heads, angle, BLOCK_H, BLOCK_D), mask=turns)


def latent_append(
    q: Tensor, key: Tensor, latent: Tensor, weight: Tensor, cos_sin: Tensor, pool: Tensor,
    page_table: Tensor, lengths: Tensor, *, eps: float, page_size: int, new: Tensor | None = None,
) -> None:  # fmt: skip
    """Write [norm(latent) · weight, turned key] to pages, and turn q in place.

    q: [B, K, H, r], rotary queries, each token's heads contiguous; key: [B, K, r]; latent:
      [B, K, R]; one dtype of bfloat16, float16 and float32; last stride 1, so views of packed
      projections will do. r even and at most 512, R at most 1024. Norm and turns are float32,
      rounded to this dtype, then to the pool's.
    weight: [R], contiguous, a float dtype. eps: added to the mean square.
    cos_sin: contiguous float32 [positions, r / 2, 2], cosine and sine of each pair's angle.
    pool: contiguous [pages * page_size, R + r], a float dtype.
    page_table: int32 [B, max_pages]; entry j is the pool page of positions j * page_size and up.
    lengths: int32 [B], rows in the cache BEFORE this step: token i sits at position lengths[b] + i.
    new: int32 [B], valid tokens of right-padded rows (None: K); padded ones are not written.
    A token past `cos_sin` is not turned; one without a page (its position lies past the table, or
    its entry is negative) is not written. Raises ValueError naming the argument, its value and the
    rule, before any launch; the contents of the int32 tensors are not checked.
    """
    require_gpu("q", q, latent_append_fwd_kernel)
    require(q.dim() == 4, "q", form(q), "must be [B, K, H, r]")
    require(q.dtype in FLOATS, "q", form(q), "must be bfloat16, float16 or float32")
    batch, tokens, heads, rotary = q.shape
    require(tokens >= 1 and heads >= 1, "q", form(q), "must have tokens and heads")
    require(2 <= rotary <= MAX_ROTARY and rotary % 2 == 0, "r", rotary,
            "must be even, 2 to {}", MAX_ROTARY)  # fmt: skip
    together = q.stride(3) == 1 and (heads == 1 or q.stride(2) == rotary)
    apart = all(q.stride(i) >= heads * rotary for i in range(2) if q.shape[i] > 1)
    require(together and apart, "q", form(q), "must have strides [.., .., {}, 1]", rotary)
    require(latent.dim() == 3 and 1 <= latent.shape[-1] <= MAX_LATENT, "latent", form(latent),
            "must be [B, K, R], R at most {}", MAX_LATENT)  # fmt: skip
    width = latent.shape[-1]
    for name, part, last in (("key", key, rotary), ("latent", latent, width)):
        fits = part.shape == (batch, tokens, last) and part.dtype == q.dtype
        fits = fits and (last == 1 or part.stride(2) == 1)
        require(fits, name, form(part),
                "must be {} {} with last stride 1", q.dtype, [batch, tokens, last])  # fmt: skip
    fits = weight.shape == (width,) and weight.dtype in FLOATS and weight.is_contiguous()
    require(fits, "weight", form(weight), "must be contiguous float [{}]", width)
    require(eps >= 0, "eps", eps, "must be at least 0")
    fits = cos_sin.dim() == 3 and cos_sin.shape[1:] == (rotary // 2, 2)
    fits = fits and cos_sin.dtype == torch.float32 and cos_sin.is_contiguous()
    require(fits, "cos_sin", form(cos_sin),
            "must be contiguous float32 [positions, {}, 2]", rotary // 2)  # fmt: skip
    fits = pool.dim() == 2 and pool.shape[1] == width + rotary and pool.is_contiguous()
    fits = fits and pool.shape[0] % max(page_size, 1) == 0 and pool.dtype in FLOATS
    require(fits, "pool", form(pool),
            "must be contiguous float [pages * {}, {}]", page_size, width + rotary)  # fmt: skip
    check_pages(q, page_table, lengths, new, None, page_size, 0, "q")
    others = {"key": key, "latent": latent, "weight": weight, "cos_sin": cos_sin, "pool": pool}
    for name, tensor in others.items():
        require(tensor.device == q.device, name, tensor.device,
                "must be on the device of q, {}", q.device)  # fmt: skip
    if batch == 0:
        return
    elements, warps = CONFIGS[q.dtype.itemsize]
    block_d = triton.next_power_of_2(rotary)
    block_h = max(1, min(elements // block_d, triton.next_power_of_2(heads)))
    # The stride of a single element is arbitrary, and never used.
    strides = (t.stride(i) if t.shape[i] > 1 else 0 for t in (q, key, latent) for i in range(2))
    latent_append_fwd_kernel[(batch * tokens, 1 + triton.cdiv(heads, block_h))](
        q, key, latent, weight, cos_sin, pool, page_table, lengths, new, *strides,
        tokens, page_table.shape[1], cos_sin.shape[0],
        EPS=eps, H=heads, D=rotary, R=width, PAGE=page_size, BLOCK_H=block_h, BLOCK_D=block_d,
        BLOCK_R=triton.next_power_of_2(width), num_warps=warps, **overlapped(q.device),
    )  # fmt: skip


def latent_append_ref(
    q: Tensor, key: Tensor, latent: Tensor, weight: Tensor, cos_sin: Tensor, pool: Tensor,
    page_table: Tensor, lengths: Tensor, *, eps: float, page_size: int, new: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The oracle: float64, one token at a time; returns new q and pool, both float64."""
    q, pool = q.double().clone(), pool.double().clone()
    for b in range(q.shape[0]):
        for i in range(q.shape[1] if new is None else int(new[b])):
            position = int(lengths[b]) + i
            angle = torch.view_as_complex(cos_sin[position].double())
            heads = torch.cat((q[b, i], key[b, i].double()[None]))
            pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)))
            heads = torch.view_as_real(pairs * angle).flatten(-2)
            q[b, i] = heads[:-1]
            x = latent[b, i].double()
            normed = x * (x.square().mean() + eps).rsqrt() * weight.double()
            row = int(page_table[b, position // page_size]) * page_size + position % page_size
            pool[row] = torch.cat((normed, heads[-1]))
    return q, pool


def variants() -> list[Variant]:
    """Every dtype, and widths that the wrapper tiles differently; first DeepSeek's."""
    bf16, ints = torch.bfloat16, partial(meta, dtype=torch.int32)

    def call(
        dtype: torch.dtype, heads: int, latent: int, rotary: int, *, ragged: bool = False
    ) -> NamedCall:
        row = partial(meta, dtype=dtype)
        angles = meta(64, rotary // 2, 2, dtype=torch.float32)
        name = f"latent_append {str(dtype)[6:]} {heads} heads {latent}+{rotary}"
        return name + " ragged" * ragged, partial(
            latent_append, row(1, 1, heads, rotary), row(1, 1, rotary), row(1, 1, latent),
            row(latent), angles, row(64, latent + rotary), ints(1, 1), ints(1),
            eps=1e-6, page_size=64, new=ints(1) if ragged else None,
        )  # fmt: skip

    calls = (
        call(bf16, 128, 512, 64),
        *(
            call(dtype, heads, latent, rotary)
            for dtype in FLOATS
            for heads, latent, rotary in ((32, 256, 32), (32, 512, 64), (8, 96, 16))
        ),
        call(bf16, 32, 512, 64, ragged=True),
    )
    # A tile of few narrow heads has too few bytes for 16 on each thread.
    loads = tile_loads("q", "BLOCK_H", "BLOCK_D")
    expected = Expected(wide_loads=lambda v: 2 * loads(v))
    return variants_of(calls, {latent_append_fwd_kernel: expected})
