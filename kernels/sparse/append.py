"""Index keys of new tokens, from projection to page, and index queries, in one launch.

DeepSeek Sparse Attention (arXiv 2512.02556) keeps one small key per position for its indexer: after
a LayerNorm (arXiv 1607.06450), its first channels turned by position (arXiv 2104.09864), as are
those of every index query.

Legend: B sequences, K new tokens, H index heads, d channels of a key, r of them rotary. Of each
token one program norms and turns the key and writes it to its page; others turn the queries in
place, a tile of heads each.
"""

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot.ahead import Variant
from kernels.aot.recorded import Expected, NamedCall, meta, variants_of
from kernels.checks import form, require
from kernels.device import require_gpu
from kernels.overlap import overlapped, start_next, wait_for_previous
from kernels.pages.write import FLOATS, check_pages, page_row
from kernels.rope.rotate import CONFIGS, turned

MAX_DIM = 512


@triton.jit(do_not_specialize=["tokens", "max_pages", "positions"])
def index_append_fwd_kernel(  # type: ignore[no-untyped-def]
    q, key, weight, bias, cos_sin, pool, page_table, lengths, new,
    q_stride_b, q_stride_t, key_stride_b, key_stride_t, tokens, max_pages, positions,
    EPS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, R: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (B * K, 1 + tiles of heads). new may be None."""
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    b = tl.program_id(0) // tokens
    i = tl.program_id(0) % tokens
    wide_b, wide_i = b.to(tl.int64), i.to(tl.int64)
    if tl.program_id(1) == 0:
        valid, kept, place, row = page_row(
            page_table, lengths, new, None, b, i, tokens, max_pages, 0, PAGE
        )
        kept = kept & valid
        n = tl.arange(0, BLOCK_D)[None, :]
        inside = (n < D) & kept
        source = key + wide_b * key_stride_b + wide_i * key_stride_t
        x = tl.load(source + n, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(weight + n, mask=inside, other=0.0).to(tl.float32)
        shift = tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(n < D, x - tl.sum(x, 1)[:, None] / D, 0.0)
        normed = centred * tl.rsqrt(tl.sum(centred * centred, 1)[:, None] / D + EPS) * w + shift
        # What is turned is what a norm in the projection's type gives.
        normed = normed.to(key.dtype.element_ty)
        # Channels without positions, and tokens past the angles, turn by nothing.
        known = (n < R) & kept & (place < positions)
        turn = tl.load(cos_sin + place.to(tl.int64) * R + n, mask=known, other=0.0)
        turn = tl.where(known, turn, (n % 2 == 0).to(tl.float32))
        normed = turned(normed, turn, 1, BLOCK_D)
        tl.store(pool + row * D + n, normed.to(pool.dtype.element_ty), mask=inside)
    else:
        position = tl.load(lengths + b) + i
        h = (tl.program_id(1) - 1) * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        c = tl.arange(0, BLOCK_R)[None, :]
        turns = (h < H) & (c < R) & (position < positions)
        at = q + wide_b * q_stride_b + wide_i * q_stride_t + h * D + c
        heads = tl.load(at, mask=turns, other=0.0)
        # The same angles for each head: read again per head, from cache, they need no exchange.
        angle = tl.load(cos_sin + position.to(tl.int64) * R + c + 0 * h, mask=turns, other=0.0)
        tl.store(at, turned(heads, angle, BLOCK_H, BLOCK_R), mask=turns)


def index_append(
    q: Tensor, key: Tensor, weight: Tensor, bias: Tensor, cos_sin: Tensor, pool: Tensor,
    page_table: Tensor, lengths: Tensor, *, eps: float, page_size: int, new: Tensor | None = None,
) -> None:  # fmt: skip
    """Write turned LayerNorm(key) to pages, and turn q in place.

    q: [B, K, H, d], each token's heads contiguous; key: [B, K, d]; one dtype of bfloat16, float16
      and float32; last stride 1, so views of packed projections will do. d at most 512. Norm and
      turns are float32, rounded to this dtype, then to the pool's.
    weight, bias: [d], contiguous, a float dtype. eps: added to the variance.
    cos_sin: contiguous float32 [positions, r / 2, 2], cosine and sine of each pair's angle; the
      first r channels turn, r at most d.
    pool: contiguous [pages * page_size, d], a float dtype.
    page_table: int32 [B, max_pages]; entry j is the pool page of positions j * page_size and up.
    lengths: int32 [B], rows in the cache BEFORE this step: token i sits at position lengths[b] + i.
    new: int32 [B], valid tokens of right-padded rows (None: K); padded ones are not written.
    A token past `cos_sin` is not turned; one without a page (its position lies past the table, or
    its entry is negative) is not written. Raises ValueError naming the argument, its value and the
    rule, before any launch; the contents of the int32 tensors are not checked.
    """
    require_gpu("q", q, index_append_fwd_kernel)
    require(q.dim() == 4, "q", form(q), "must be [B, K, H, d]")
    require(q.dtype in FLOATS, "q", form(q), "must be bfloat16, float16 or float32")
    batch, tokens, heads, dim = q.shape
    require(tokens >= 1 and heads >= 1, "q", form(q), "must have tokens and heads")
    require(2 <= dim <= MAX_DIM, "d", dim, "must be 2 to {}", MAX_DIM)
    together = q.stride(3) == 1 and (heads == 1 or q.stride(2) == dim)
    apart = all(q.stride(i) >= heads * dim for i in range(2) if q.shape[i] > 1)
    require(together and apart, "q", form(q), "must have strides [.., .., {}, 1]", dim)
    fits = key.shape == (batch, tokens, dim) and key.dtype == q.dtype and key.stride(2) == 1
    require(fits, "key", form(key),
            "must be {} {} with last stride 1", q.dtype, [batch, tokens, dim])  # fmt: skip
    for name, vector in (("weight", weight), ("bias", bias)):
        fits = vector.shape == (dim,) and vector.dtype in FLOATS and vector.is_contiguous()
        require(fits, name, form(vector), "must be contiguous float [{}]", dim)
    require(eps >= 0, "eps", eps, "must be at least 0")
    fits = cos_sin.dim() == 3 and cos_sin.shape[2] == 2 and 2 <= 2 * cos_sin.shape[1] <= dim
    fits = fits and cos_sin.dtype == torch.float32 and cos_sin.is_contiguous()
    require(fits, "cos_sin", form(cos_sin),
            "must be contiguous float32 [positions, r / 2, 2], r at most {}", dim)  # fmt: skip
    fits = pool.dim() == 2 and pool.shape[1] == dim and pool.is_contiguous()
    fits = fits and pool.shape[0] % max(page_size, 1) == 0 and pool.dtype in FLOATS
    require(fits, "pool", form(pool), "must be contiguous float [pages * {}, {}]", page_size, dim)
    check_pages(q, page_table, lengths, new, None, page_size, 0, "q")
    others = {"key": key, "weight": weight, "bias": bias, "cos_sin": cos_sin, "pool": pool}
    for name, tensor in others.items():
        require(tensor.device == q.device, name, tensor.device,
                "must be on the device of q, {}", q.device)  # fmt: skip
    if batch == 0:
        return
    rotary = 2 * cos_sin.shape[1]
    elements, warps = CONFIGS[q.dtype.itemsize]
    block_r = triton.next_power_of_2(rotary)
    block_h = max(1, min(elements // block_r, triton.next_power_of_2(heads)))
    # The stride of a single element is arbitrary, and never used.
    strides = (t.stride(i) if t.shape[i] > 1 else 0 for t in (q, key) for i in range(2))
    index_append_fwd_kernel[(batch * tokens, 1 + triton.cdiv(heads, block_h))](
        q, key, weight, bias, cos_sin, pool, page_table, lengths, new, *strides,
        tokens, page_table.shape[1], cos_sin.shape[0],
        EPS=eps, H=heads, D=dim, R=rotary, PAGE=page_size, BLOCK_H=block_h, BLOCK_R=block_r,
        BLOCK_D=max(2, triton.next_power_of_2(dim)), num_warps=warps, **overlapped(q.device),
    )  # fmt: skip


def index_append_ref(
    q: Tensor, key: Tensor, weight: Tensor, bias: Tensor, cos_sin: Tensor, pool: Tensor,
    page_table: Tensor, lengths: Tensor, *, eps: float, page_size: int, new: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The oracle: float64, one token at a time; returns new q and pool, both float64."""
    q, pool, rotary = q.double().clone(), pool.double().clone(), 2 * cos_sin.shape[1]
    for b in range(q.shape[0]):
        for i in range(q.shape[1] if new is None else int(new[b])):
            position = int(lengths[b]) + i
            x = key[b, i].double()
            centred = x - x.mean()
            normed = centred * (centred.square().mean() + eps).rsqrt()
            heads = torch.cat((q[b, i], (normed * weight.double() + bias.double())[None]))
            pairs = torch.view_as_complex(heads[:, :rotary].unflatten(-1, (-1, 2)).contiguous())
            angle = torch.view_as_complex(cos_sin[position].double())
            heads[:, :rotary] = torch.view_as_real(pairs * angle).flatten(-2)
            q[b, i] = heads[:-1]
            row = int(page_table[b, position // page_size]) * page_size + position % page_size
            pool[row] = heads[-1]
    return q, pool


def variants() -> list[Variant]:
    """Every dtype, and widths that the wrapper tiles differently; first DeepSeek's."""
    bf16, ints = torch.bfloat16, partial(meta, dtype=torch.int32)

    def call(
        dtype: torch.dtype, heads: int, dim: int, rotary: int, *, ragged: bool = False
    ) -> NamedCall:
        row = partial(meta, dtype=dtype)
        angles = meta(64, rotary // 2, 2, dtype=torch.float32)
        name = f"index_append {str(dtype)[6:]} {heads} heads d {dim} rotary {rotary}"
        return name + " ragged" * ragged, partial(
            index_append, row(1, 1, heads, dim), row(1, 1, dim), row(dim), row(dim), angles,
            row(64, dim), ints(1, 1), ints(1), eps=1e-6, page_size=64,
            new=ints(1) if ragged else None,
        )  # fmt: skip

    calls = (
        call(bf16, 64, 128, 64),
        *(
            call(dtype, heads, dim, rotary)
            for dtype in FLOATS
            for heads, dim, rotary in ((16, 128, 64), (16, 64, 32), (2, 32, 16))
        ),
        call(bf16, 16, 128, 64, ragged=True),
    )

    def loads(v: Variant) -> int:
        """Of 16 bytes a thread: none where a tile of few narrow heads has too few bytes."""
        item = 4 if v.signature["q"] == "*fp32" else 2
        tile = v.constexprs["BLOCK_H"] * v.constexprs["BLOCK_R"] * item
        return tile // (16 * 64 * v.num_warps)

    return variants_of(calls, {index_append_fwd_kernel: Expected(wide_loads=loads)})
