"""A step of compressed attention from projections to pages, up to attention, in one launch.

DeepSeek-V4 norms each query head to length 1 and keeps a row of each token after an RMSNorm (arXiv
1910.07467); of both the last channels are turned by position (arXiv 2104.09864). Values and gates
join the part of their group (`pooling.torch`), and a group's last token completes a row, which is
normed, too, and turned by the position of the group's first token. An indexer's queries are turned
alone, and it has no rows of single tokens.

Legend: B sequences, K new tokens, H heads, d channels, r of them rotary; M tokens a group, S series
of values and gates. One program takes a sequence's tokens into its part, in order. Of each token
one makes its row, others norm and turn queries in place, a tile of heads each.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot.ahead import TOKEN_LOADS, Variant
from kernels.aot.recorded import Expected, NamedCall, meta, tile_loads, variants_of
from kernels.overlap import overlapped, start_next, wait_for_previous
from kernels.pages.write import FLOATS
from kernels.pooling.append_checks import Target, check
from kernels.recurrent.step import last_slot, softplus
from kernels.rope.rotate import CONFIGS, turned

#: In place of the logarithm of nothing, from which -inf can be subtracted.
LEAST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def turned_last(  # type: ignore[no-untyped-def]
    x, cos_sin, position, positions, c, D: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """x [ROWS, WIDTH], whose columns are the channels c of D, the last R turned by `position`.

    The first of those is in an even column. Past the table's `positions` nothing turns.
    """
    known = (c >= D - R) & (c < D) & (position < positions)
    angle = tl.load(cos_sin + position.to(tl.int64) * R + c - (D - R), mask=known, other=0.0)
    even = (c - (D - R)) % 2 == 0
    return turned(x, tl.where(known, angle, even.to(tl.float32)), ROWS, WIDTH)


@triton.jit
def write_row(  # type: ignore[no-untyped-def]
    x, weight, cos_sin, pool, page_table, b, place, position, positions, max_pages, c, valid,
    EPS: tl.constexpr, D: tl.constexpr, R: tl.constexpr, PAGE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store RMSNorm(x) [1, WIDTH], turned by `position`, as the sequence's row `place`; rounded to
    x's type after the norm. Columns are the channels c. Nothing is stored that is not valid or has
    no page.
    """
    entry = page_table + b.to(tl.int64) * max_pages + place // PAGE
    page = tl.load(entry, mask=valid & (place // PAGE < max_pages), other=-1).to(tl.int64)
    inside = (c >= 0) & (c < D)
    wide = x.to(tl.float32)
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, 1)[:, None] / D + EPS) * w
    normed = turned_last(normed.to(x.dtype), cos_sin, position, positions, c, D, R, 1, WIDTH)
    to = pool + (page * PAGE + place % PAGE) * D + c
    tl.store(to, normed.to(pool.dtype.element_ty), mask=inside & (page >= 0))


@triton.jit
def store_part(to, total, mean, inside, SERIES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store a part: logarithms, and means SERIES numbers behind them."""
    tl.store(to, total, mask=inside)
    tl.store(to + SERIES, mean, mask=inside)


@triton.jit(do_not_specialize=["max_pages", "row_max_pages", "positions"])
def pooled_append_fwd_kernel(  # type: ignore[no-untyped-def]
    q, values, gates, bias, part, weight, pool, page_table, row, row_weight, row_pool, row_table,
    cos_sin, lengths, read, write, new,
    q_row, values_row, gates_row, row_row, slot_stride, max_pages, row_max_pages, positions,
    EPS: tl.constexpr, Q_EPS: tl.constexpr, K: tl.constexpr, EACH: tl.constexpr,
    M: tl.constexpr, S: tl.constexpr, H: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
    PAGE: tl.constexpr, ROW_PAGE: tl.constexpr, PER_TOKEN: tl.constexpr, W: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_D: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (B, 1 + K * PER_TOKEN). W: the last channels of a query that are read. Tokens lie *_row
    apart; row and all that is its own, Q_EPS and new may be None.
    """
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    b, role = tl.program_id(0), tl.program_id(1)
    past = tl.load(lengths + b)
    count = K
    if new is not None:
        count = tl.minimum(tl.maximum(tl.load(new + b), 0), K)
    first_token = b.to(tl.int64) * K
    # Rotary channels begin in an even column.
    c = tl.arange(0, BLOCK_D)[None, :] - D % 2
    t, tile = (role - 1) // PER_TOKEN, (role - 1) % PER_TOKEN
    if row is not None:
        # The first of a token's programs makes its row.
        tile -= 1
    if role == 0:
        s = tl.arange(0, S)[:, None]
        inside = (c >= 0) & (c < D)
        at = s * D + c
        own = part + at
        target = last_slot(write + first_token, count, K)
        source = own + tl.load(read + b).to(tl.int64) * slot_stride
        total = tl.load(source, mask=inside, other=0.0)
        mean = tl.load(source + S * D, mask=inside, other=0.0)
        for i in range(count):
            token, position = first_token + i, past + i
            value = tl.load(values + token * values_row + at, mask=inside, other=0.0)
            gate = tl.load(gates + token * gates_row + at, mask=inside, other=0.0).to(tl.float32)
            shift = bias + position % M * (S * D) + at
            gate += tl.load(shift, mask=inside, other=0.0).to(tl.float32)
            if position % M == 0:
                # The last series of the group before is what is begun of this one's row.
                begun = tl.sum(tl.where(s == S - 1, total, 0.0), 0)[None, :]
                begun_mean = tl.sum(tl.where(s == S - 1, mean, 0.0), 0)[None, :]
                nothing = (s == S - 1) | (position == 0)
                total = tl.where(nothing, float("-inf"), begun)
                mean = tl.where(nothing, 0.0, begun_mean)
            high = tl.maximum(tl.maximum(total, gate), LEAST)
            total = high + softplus(tl.minimum(total, gate) - high)
            mean += tl.exp(gate - total) * (value.to(tl.float32) - mean)
            if position % M == M - 1:
                pooled = tl.sum(tl.where(s == 0, mean, 0.0), 0)[None, :]
                write_row(
                    pooled.to(values.dtype.element_ty), weight, cos_sin, pool, page_table, b,
                    position // M, position - (M - 1), positions, max_pages, c, True,
                    EPS, D, R, PAGE, BLOCK_D,
                )  # fmt: skip
            if EACH:
                slot = tl.load(write + token).to(tl.int64)
                kept = inside & (i < count - 1) & (slot >= 0)
                store_part(own + slot * slot_stride, total, mean, kept, S * D)
        # Lanes that hold the same numbers have all read them before the slot is overwritten.
        tl.debug_barrier()
        last = inside & (target >= 0)
        store_part(own + target.to(tl.int64) * slot_stride, total, mean, last, S * D)
    elif tile < 0:
        if row is not None:
            there = (c >= 0) & (c < D) & (t < count)
            x = tl.load(row + (first_token + t) * row_row + c, mask=there, other=0.0)
            write_row(
                x, row_weight, cos_sin, row_pool, row_table, b, past + t, past + t, positions,
                row_max_pages, c, t < count, EPS, D, R, ROW_PAGE, BLOCK_D,
            )  # fmt: skip
    else:
        n = tl.arange(0, BLOCK_W)[None, :] - (W - R) % 2
        h = tile * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
        asked = (h < H) & (n >= 0) & (n < W)
        to = q + (first_token + t) * q_row + h * D + (D - W) + n
        heads = tl.load(to, mask=asked, other=0.0)
        if Q_EPS is not None:
            wide = heads.to(tl.float32)
            heads = (wide * tl.rsqrt(tl.sum(wide * wide, 1)[:, None] + Q_EPS)).to(heads.dtype)
        # The same angles for each head: read again per head, from cache, they need no exchange.
        heads = turned_last(heads, cos_sin, past + t, positions, n + 0 * h, W, R, BLOCK_H, BLOCK_W)
        tl.store(to, heads, mask=asked)


def pooled_append(
    q: Tensor, values: Tensor, gates: Tensor, bias: Tensor, part: Tensor, pooled: Target,
    cos_sin: Tensor, lengths: Tensor, *, read: Tensor, write: Tensor, every: int, eps: float,
    each: bool = False, q_eps: float | None = None, row: Tensor | None = None,
    rows: Target | None = None, new: Tensor | None = None,
) -> None:  # fmt: skip
    """Norm and turn queries in place, write rows of tokens and of whole groups, advance the parts.

    q: [B, K, H, d], K at most 9, d at most 512; bfloat16, float16 or float32; tokens evenly spaced
      and each one's channels contiguous, as of all that is projected. q_eps: added to the squared
      length of each head, by which it is divided; None: queries are turned alone.
    values, gates: [B, K, S * d] in q's dtype, S 1 or 2. bias: [every, S * d], contiguous, a float
      dtype: added to the gates of a group's tokens, in their order.
    part: float32 [slots, 2, S, d]; read, write, each: its slots, as `recurrent.step` says.
    pooled: where a row goes with the last of each `every` tokens. row: [B, K, d] in q's dtype, and
      rows: where it goes; both or none. eps: of both norms, added to the mean square.
    cos_sin: contiguous float32 [positions, r / 2, 2], cosine and sine of each pair's angle; the
      last r channels turn, r at most d.
    lengths: int32 [B], tokens BEFORE this step: token i has position lengths[b] + i.
    new: int32 [B], valid tokens of right-padded rows (None: K); padded ones write nothing.
    All is float32; means, norms and turned channels are rounded to q's dtype, then to the pool's.
    A row without a page (it lies past the table, or its entry is negative) is not written, and past
    `cos_sin` nothing turns. Raises ValueError naming the argument, its value and the rule, before
    any launch; the contents of the int32 tensors are not checked.
    """
    strides = check(
        q, values, gates, bias, part, pooled, cos_sin, lengths, read, write, every, eps, q_eps, row,
        rows, new, kernel=pooled_append_fwd_kernel,
    )  # fmt: skip
    (batch, tokens, heads, dim), series = q.shape, part.shape[2]
    rotary = 2 * cos_sin.shape[1]
    width = rotary if q_eps is None else dim
    block_d = triton.next_power_of_2(dim + dim % 2)
    # A thread of 32 lanes has 8 numbers of a part's logarithms at most.
    elements, warps = (max(1, series * block_d // 512) * n for n in CONFIGS[q.dtype.itemsize])
    block_w = triton.next_power_of_2(width + (width - rotary) % 2)
    block_h = max(1, min(elements // block_w, triton.next_power_of_2(heads)))
    per_token = triton.cdiv(heads, block_h) + (row is not None)
    own: tuple[Any, ...] = rows or (None, None, None, None)
    pooled_append_fwd_kernel[(batch, 1 + tokens * per_token)](
        q, values, gates, bias, part, *pooled[:3], row, *own[:3], cos_sin, lengths, read, write,
        new, *strides, part.stride(0), pooled.page_table.shape[1],
        rows.page_table.shape[1] if rows else 0, cos_sin.shape[0],
        EPS=eps, Q_EPS=q_eps, K=tokens, EACH=each and tokens > 1, M=every, S=series, H=heads,
        D=dim, R=rotary, PAGE=pooled.page_size, ROW_PAGE=own[3], PER_TOKEN=per_token,
        W=width, BLOCK_H=block_h, BLOCK_W=block_w, BLOCK_D=block_d, num_warps=warps,
        **overlapped(q.device),
    )  # fmt: skip


class Appended(NamedTuple):
    """What the oracle gives: queries, both pools, and the part after each token [B, K, 2, S, d]."""

    q: Tensor
    pooled: Tensor
    rows: Tensor | None
    parts: Tensor


def pooled_append_ref(
    q: Tensor, values: Tensor, gates: Tensor, bias: Tensor, part: Tensor, pooled: Target,
    cos_sin: Tensor, lengths: Tensor, *, every: int, eps: float, q_eps: float | None = None,
    row: Tensor | None = None, rows: Target | None = None, new: Tensor | None = None,
) -> Appended:  # fmt: skip
    """The oracle: float64, one token at a time; part [B, 2, S, d] already taken from its slots."""
    q, rotary, series = q.double().clone(), 2 * cos_sin.shape[1], part.shape[2]
    into, own = pooled.pool.double().clone(), None if rows is None else rows.pool.double().clone()
    parts = part.double()[:, None].repeat(1, q.shape[1], 1, 1, 1)

    def turned_by(x: Tensor, position: int) -> Tensor:
        cos, sin = cos_sin[position].double().unbind(-1)
        even, odd = x[..., -rotary:].unflatten(-1, (-1, 2)).unbind(-1)
        pairs = torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1)
        return torch.cat((x[..., :-rotary], pairs.flatten(-2)), -1)

    def put(x: Tensor, to: Target, held: Tensor, b: int, place: int, position: int) -> None:
        normed = x * (x.square().mean() + eps).rsqrt() * to.weight.double()
        page = int(to.page_table[b, place // to.page_size])
        held[page * to.page_size + place % to.page_size] = turned_by(normed, position)

    for b, past in enumerate(lengths.tolist()):
        total, mean = part[b].double()
        for i in range(q.shape[1] if new is None else int(new[b])):
            at = past + i
            if q_eps is not None:
                q[b, i] *= (q[b, i].square().sum(-1, keepdim=True) + q_eps).rsqrt()
            q[b, i] = turned_by(q[b, i], at)
            if row is not None and rows is not None and own is not None:
                put(row[b, i].double(), rows, own, b, at, at)
            if at % every == 0:
                total = torch.cat((total[1:], torch.full_like(total[:1], -math.inf)))
                mean = torch.cat((mean[1:], torch.zeros_like(mean[:1])))
            if at == 0:
                total, mean = torch.full_like(total, -math.inf), torch.zeros_like(mean)
            gate = gates[b, i].double() + bias[at % every].double()
            value, gate = values[b, i].double().view(series, -1), gate.view(series, -1)
            both = torch.stack((total, gate)).logsumexp(0)
            mean = (total - both).exp() * mean + (gate - both).exp() * value
            total = both
            if at % every == every - 1:
                put(mean[0], pooled, into, b, at // every, at - (every - 1))
            parts[b, i:] = torch.stack((total, mean))
    return Appended(q, into, own, parts)


#: Heads, d, r and tokens of `hca`'s pooled rows at every scale, the largest first.
SIZES = (
    (64, 512, 64, 128), (64, 256, 32, 128), (32, 256, 32, 128), (16, 256, 32, 128),
    (16, 256, 32, 32), (16, 128, 16, 16), (12, 96, 16, 8), (8, 64, 16, 8), (4, 32, 16, 8),
    (4, 16, 8, 8),
)  # fmt: skip
#: Tokens of `csa`'s, which has two series.
FEW = 4


def _call(
    dtype: torch.dtype, heads: int, dim: int, rotary: int, every: int, *, tokens: int = 1,
    ragged: bool = False, index: bool = False,
) -> NamedCall:  # fmt: skip
    """A step on columns of the mixer's projection; index: as an indexer's, a quarter as wide."""
    ints, of, page = partial(meta, dtype=torch.int32), partial(meta, dtype=dtype), 64
    series = 2 if every == FEW else 1
    down = heads * rotary // 4 + (1 + 2 * series) * dim
    if index:
        dim = max(rotary, dim // 4)
        down = heads + 2 * series * dim
    projected, to = of(1, tokens, down), Target(of(dim), of(page, dim), ints(1, 1), page)
    wide, own = projected[..., : series * dim], dict[str, Any]()
    if not index:
        own = {"q_eps": 1e-6, "row": projected[..., :dim], "rows": to}
    bias = meta(every, series * dim, dtype=torch.float32)
    angles = meta(64, rotary // 2, 2, dtype=torch.float32)
    name = f"pooled_append {str(dtype)[6:]} {heads} heads d {dim} r {rotary} every {every}"
    name += f" new {tokens}" + " ragged each" * ragged + " index" * index
    return name, partial(
        pooled_append, of(1, tokens, heads, dim), wide, wide, bias,
        meta(1, 2, series, dim, dtype=torch.float32), to, angles, ints(1), read=ints(1),
        write=ints(1, tokens), every=every, eps=1e-6, each=ragged, new=ints(1) if ragged else None,
        **own,
    )  # fmt: skip


def variants() -> list[Variant]:
    """Every scale's `hca`, `csa` and indexer with one token; several tokens and every dtype."""
    bf16, few = torch.bfloat16, [(*size[:3], FEW) for size in SIZES]
    some = (SIZES[0], few[0], SIZES[1], few[1], SIZES[7], few[7])
    calls = [
        *(_call(bf16, *size) for size in (*SIZES, *few)),
        *(_call(bf16, *size, index=True) for size in few),
        *(_call(bf16, *size, tokens=4, ragged=True) for size in some),
        *(_call(bf16, *size, tokens=4, ragged=True, index=True) for size in few[:2]),
        *(_call(bf16, *size, tokens=2) for size in some[:2]),
        *(_call(bf16, *size, tokens=9, ragged=True) for size in some[:2]),
        *(_call(dtype, *size) for dtype in FLOATS[1:] for size in some),
        *(_call(dtype, *few[1], index=True) for dtype in FLOATS[1:]),
    ]
    queries, numbers = tile_loads("q", "BLOCK_H", "BLOCK_W"), tile_loads("part", "S", "BLOCK_D")

    def loads(v: Variant) -> int:
        """Of queries, and of both numbers of a part."""
        return queries(v) + 2 * numbers(v)

    # Narrow in loops are the values and gates of a token, slots and page numbers.
    expected = Expected(wide_loads=loads, narrow_in_loops=TOKEN_LOADS)
    return variants_of(calls, {pooled_append_fwd_kernel: expected})
