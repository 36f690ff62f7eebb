"""Latent rows of new tokens, from projection to page, and rotary queries, in one launch.

Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) keeps one row per position: a latent
after its norm (arXiv 1910.07467), and a rotary key (arXiv 2104.09864) that all heads share.
Grouped-latent attention (arXiv 2505.21487) keeps several latents, each with a norm of its own, and
grouped-tied attention rows without a norm; their key lies in a pool of its own.

Legend: B sequences, K new tokens, H query heads, G latent heads, R latent width, r rotary width. Of
each token some programs norm the latents and write them to their page, a tile of latents each, of
which the first turns and writes the key; others turn the rotary queries in place, a tile of heads
each.
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
    q, key, latent, weight, cos_sin, pool, keys, page_table, lengths, new,
    q_stride_b, q_stride_t, key_stride_b, key_stride_t, latent_stride_b, latent_stride_t,
    pool_stride_g, tokens, max_pages, positions,
    EPS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_R: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (B * K, tiles of latents + tiles of heads). weight, keys and new may be None."""
    LATENTS: tl.constexpr = (G + BLOCK_G - 1) // BLOCK_G
    ROW: tl.constexpr = R + D if keys is None else R
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    b = tl.program_id(0) // tokens
    i = tl.program_id(0) % tokens
    part = tl.program_id(1)
    wide_b, wide_i = b.to(tl.int64), i.to(tl.int64)
    c = tl.arange(0, BLOCK_D)[None, :]
    if part < LATENTS:
        valid, kept, place, row = page_row(
            page_table, lengths, new, None, b, i, tokens, max_pages, 0, PAGE
        )
        kept = kept & valid
        g = part * BLOCK_G + tl.arange(0, BLOCK_G)[:, None]
        n = tl.arange(0, BLOCK_R)[None, :]
        inside = (g < G) & (n < R) & kept
        source = latent + wide_b * latent_stride_b + wide_i * latent_stride_t
        x = tl.load(source + g * R + n, mask=inside, other=0.0)
        if weight is not None:
            wide = x.to(tl.float32)
            w = tl.load(weight + g * R + n, mask=inside, other=0.0).to(tl.float32)
            normed = wide * tl.rsqrt(tl.sum(wide * wide, 1) / R + EPS)[:, None] * w
            # What is stored is what a norm in the projection's type gives.
            x = normed.to(x.dtype)
        to = pool + g.to(tl.int64) * pool_stride_g + row * ROW
        tl.store(to + n, x.to(pool.dtype.element_ty), mask=inside)
        held = (c < D) & kept & (part == 0)
        known = held & (place < positions)
        k = tl.load(key + wide_b * key_stride_b + wide_i * key_stride_t + c, mask=held, other=0.0)
        turn = tl.load(cos_sin + place.to(tl.int64) * D + c, mask=known, other=0.0)
        k = tl.where(known, turned(k, turn, 1, BLOCK_D), k)
        k_to = pool + row * ROW + R if keys is None else keys + row * D
        tl.store(k_to + c, k.to(k_to.dtype.element_ty), mask=held)
    else:
        position = tl.load(lengths + b) + i
        h = (part - LATENTS) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        turns = (h < H) & (c < D) & (position < positions)
        at = q + wide_b * q_stride_b + wide_i * q_stride_t + h * D + c
        heads = tl.load(at, mask=turns, other=0.0)
        # The same angles for each head: read again per head, from cache, they need no exchange.
        angle = tl.load(cos_sin + position.to(tl.int64) * D + c + 0 * h, mask=turns, other=0.0)
        tl.store(at, turned(heads, angle, BLOCK_H, BLOCK_D), mask=turns)


def latent_append(
    q: Tensor, key: Tensor, latent: Tensor, weight: Tensor | None, cos_sin: Tensor, pool: Tensor,
    page_table: Tensor, lengths: Tensor, *, page_size: int, eps: float = 0.0,
    keys: Tensor | None = None, new: Tensor | None = None,
) -> None:  # fmt: skip
    """Write norm(latent) · weight and the turned key to pages, and turn q in place.

    q: [B, K, H, r], rotary queries, each token's heads contiguous; key: [B, K, r]; latent:
      [B, K, R], or [B, K, G, R] where `keys` are given, each token's latents contiguous; one dtype
      of bfloat16, float16 and float32; last stride 1, so views of packed projections will do. r
      even and at most 512, R at most 1024. Norm and turns are float32, rounded to this dtype, then
      to the pool's.
    weight: [R] or [G, R], as the latents, contiguous, a float dtype; None: they are written as they
      are. eps: added to the mean square.
    cos_sin: contiguous float32 [positions, r / 2, 2], cosine and sine of each pair's angle.
    pool: contiguous [pages * page_size, R + r], whose rows are [latent | key]; with `keys`
      [G, pages * page_size, R], each latent head contiguous; a float dtype.
    keys: contiguous [pages * page_size, r], the key that all latents share, in the pool's dtype.
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
    fits = latent.dim() == (3 if keys is None else 4) and 1 <= latent.shape[-1] <= MAX_LATENT
    require(fits and latent.shape[2] > 0, "latent", form(latent), "must be {}, R at most {}",
            "[B, K, R]" if keys is None else "[B, K, G, R]", MAX_LATENT)  # fmt: skip
    width = latent.shape[-1]
    held = (width,) if keys is None else (latent.shape[2], width)
    groups = 1 if keys is None else held[0]
    for name, part, last in (("key", key, (rotary,)), ("latent", latent, held)):
        fits = part.shape == (batch, tokens, *last) and part.dtype == q.dtype
        fits = fits and (last[-1] == 1 or part.stride(-1) == 1)
        fits = fits and (len(last) == 1 or groups == 1 or part.stride(2) == width)
        rule = "must be {} {}, each token contiguous"
        require(fits, name, form(part), rule, q.dtype, [batch, tokens, *last])
    if weight is not None:
        fits = weight.shape == held and weight.dtype in FLOATS and weight.is_contiguous()
        require(fits, "weight", form(weight), "must be contiguous float {}", list(held))
    require(eps >= 0, "eps", eps, "must be at least 0")
    fits = cos_sin.dim() == 3 and cos_sin.shape[1:] == (rotary // 2, 2)
    fits = fits and cos_sin.dtype == torch.float32 and cos_sin.is_contiguous()
    require(fits, "cos_sin", form(cos_sin),
            "must be contiguous float32 [positions, {}, 2]", rotary // 2)  # fmt: skip
    _check_pools(pool, keys, groups, width, rotary, page_size)
    check_pages(q, page_table, lengths, new, None, page_size, 0, "q")
    others = {"key": key, "latent": latent, "cos_sin": cos_sin, "pool": pool}
    given = {name: t for name, t in (("weight", weight), ("keys", keys)) if t is not None}
    for name, tensor in (others | given).items():
        require(tensor.device == q.device, name, tensor.device,
                "must be on the device of q, {}", q.device)  # fmt: skip
    if batch == 0:
        return
    elements, warps = CONFIGS[q.dtype.itemsize]
    block_d = triton.next_power_of_2(rotary)
    block_r = triton.next_power_of_2(width)
    block_h = max(1, min(elements // block_d, triton.next_power_of_2(heads)))
    # Half the elements of a tile of heads: norms of as many spilled in float32.
    block_g = max(1, min(elements // 2 // block_r, triton.next_power_of_2(groups)))
    parts = triton.cdiv(groups, block_g) + triton.cdiv(heads, block_h)
    # The stride of a single element is arbitrary, and never used.
    strides = (t.stride(i) if t.shape[i] > 1 else 0 for t in (q, key, latent) for i in range(2))
    latent_append_fwd_kernel[(batch * tokens, parts)](
        q, key, latent, weight, cos_sin, pool, keys, page_table, lengths, new, *strides,
        pool.stride(0) if groups > 1 else 0, tokens, page_table.shape[1], cos_sin.shape[0],
        EPS=eps, H=heads, D=rotary, G=groups, R=width, PAGE=page_size, BLOCK_H=block_h,
        BLOCK_D=block_d, BLOCK_G=block_g, BLOCK_R=block_r, num_warps=warps, **overlapped(q.device),
    )  # fmt: skip


def _check_pools(
    pool: Tensor, keys: Tensor | None, groups: int, width: int, rotary: int, page_size: int
) -> None:
    """The rules of where rows and keys are written."""
    rows = pool.shape[-2] if pool.dim() > 1 else 0
    paged = rows % max(page_size, 1) == 0 and pool.dtype in FLOATS
    if keys is None:
        fits = paged and pool.shape == (rows, width + rotary) and pool.is_contiguous()
        require(fits, "pool", form(pool),
                "must be contiguous float [pages * {}, {}]", page_size, width + rotary)  # fmt: skip
        return
    fits = paged and pool.shape == (groups, rows, width)
    fits = fits and pool.stride(1) == width and (width == 1 or pool.stride(2) == 1)
    require(fits, "pool", form(pool), "must be float [{}, pages * {}, {}], latent heads contiguous",
            groups, page_size, width)  # fmt: skip
    fits = keys.shape == (rows, rotary) and keys.dtype == pool.dtype and keys.is_contiguous()
    require(fits, "keys", form(keys), "must be contiguous {} {}", pool.dtype, [rows, rotary])


def latent_append_ref(
    q: Tensor, key: Tensor, latent: Tensor, weight: Tensor | None, cos_sin: Tensor, pool: Tensor,
    page_table: Tensor, lengths: Tensor, *, page_size: int, eps: float = 0.0,
    keys: Tensor | None = None, new: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The oracle: float64, one token at a time; returns new q, pool and, if given, keys, all
    float64.
    """
    q, pool = q.double().clone(), pool.double().clone()
    keys = None if keys is None else keys.double().clone()
    for b in range(q.shape[0]):
        for i in range(q.shape[1] if new is None else int(new[b])):
            position = int(lengths[b]) + i
            angle = torch.view_as_complex(cos_sin[position].double())
            heads = torch.cat((q[b, i], key[b, i].double()[None]))
            pairs = torch.view_as_complex(heads.unflatten(-1, (-1, 2)))
            heads = torch.view_as_real(pairs * angle).flatten(-2)
            q[b, i] = heads[:-1]
            x = latent[b, i].double()
            if weight is not None:
                x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.double()
            row = int(page_table[b, position // page_size]) * page_size + position % page_size
            if keys is None:
                pool[row] = torch.cat((x, heads[-1]))
            else:
                pool[:, row], keys[row] = x, heads[-1]
    return (q, pool) if keys is None else (q, pool, keys)


def variants() -> list[Variant]:
    """Every dtype, and widths that the wrapper tiles differently; first DeepSeek's. Then latents
    and tied rows whose key lies apart."""
    bf16, ints = torch.bfloat16, partial(meta, dtype=torch.int32)

    def call(
        dtype: torch.dtype, heads: int, latent: int, rotary: int, *, ragged: bool = False,
        groups: int = 0, normed: bool = True,
    ) -> NamedCall:  # fmt: skip
        """groups: of latents whose key lies apart; 0: one, beside its key."""
        row = partial(meta, dtype=dtype)
        held = (groups, latent) if groups else (latent,)
        pool = row(groups, 64, latent) if groups else row(64, latent + rotary)
        angles = meta(64, rotary // 2, 2, dtype=torch.float32)
        name = (
            f"latent_append {str(dtype)[6:]} {heads} heads {latent}+{rotary}" + " ragged" * ragged
        )
        if groups:
            name += f" {groups} {'latents' if normed else 'tied'}"
        return name, partial(
            latent_append, row(1, 1, heads, rotary), row(1, 1, rotary), row(1, 1, *held),
            row(*held) if normed else None, angles, pool, ints(1, 1), ints(1),
            keys=row(64, rotary) if groups else None, eps=1e-6 if normed else 0.0, page_size=64,
            new=ints(1) if ragged else None,
        )  # fmt: skip

    calls = (
        call(bf16, 128, 512, 64),
        *(
            call(dtype, heads, latent, rotary)
            for dtype in FLOATS
            for heads, latent, rotary in ((32, 256, 32), (32, 512, 64), (8, 96, 16))
        ),
        call(bf16, 32, 512, 64, ragged=True),
        *(
            call(dtype, heads, latent, rotary, groups=2)
            for dtype in FLOATS
            for heads, latent, rotary in ((32, 256, 64), (16, 128, 32), (6, 48, 16))
        ),
        *(
            call(dtype, heads, dim, dim // 2, groups=groups, normed=False)
            for dtype in FLOATS
            for heads, groups, dim in ((32, 8, 128), (8, 2, 64), (6, 3, 32))
        ),
        call(bf16, 32, 256, 64, ragged=True, groups=2),
        call(bf16, 32, 128, 64, ragged=True, groups=8, normed=False),
    )
    # A tile of few narrow heads has too few bytes for 16 on each thread.
    loads = tile_loads("q", "BLOCK_H", "BLOCK_D")
    expected = Expected(wide_loads=lambda v: 2 * loads(v))
    return variants_of(calls, {latent_append_fwd_kernel: expected})
