"""`nucleus` in Triton: greedy, and top-p (nucleus sampling, arXiv 1904.09751, eq. 3).

Legend: B sequences, V tokens of the vocabulary. A key is a logit's bit pattern as an int32 that
orders as the logits do. Top-p needs no sort: bisection over keys finds the smallest one whose
token has less than top_p mass before it, counting the mass above a key in each pass; of tokens
with that very key the first ones are kept, as a stable sort would. Mass is counted in fixed point
(2^-44 of the likeliest token's): sums of integers are the same in any order, so that every pass
and the final draw agree to the last bit.
"""

import math
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot.ahead import Variant
from kernels.aot.recorded import Expected, meta, variants_of
from kernels.checks import form, require
from kernels.device import require_gpu
from kernels.overlap import overlapped, start_next, wait_for_previous
from kernels.sampling.nucleus import NO_TOKEN, SLACK

#: So many tokens of the full mass fit in 62 bits.
MAX_VOCABULARY = 1 << 18
#: Tokens per program of the first greedy launch, its warps.
GREEDY = (4096, 4)
#: Top-p, by largest vocabulary and whether all rows are whole 16-byte pieces: tokens per turn of
#: its loops, warps of the one program per row. Narrow loads take more registers a token.
CONFIGS: dict[tuple[int, bool], tuple[int, int]] = {
    (1024, True): (1024, 2), (MAX_VOCABULARY, True): (4096, 8),
    (1024, False): (512, 2), (MAX_VOCABULARY, False): (1024, 8),
}  # fmt: skip
#: The key of +inf; only NaN has a greater one. What is stored where logits decide no token.
INFINITY = tl.constexpr(0x7F800000)
NONE = tl.constexpr(NO_TOKEN)
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@triton.jit
def _keys(row, v, V):  # type: ignore[no-untyped-def]
    """Keys of the logits at v, NaN the greatest of all, and past the end the least."""
    x = tl.load(row + v, mask=v < V, other=float("-inf")).to(tl.float32)
    # The two zeros are equal, so their keys must be.
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    keys = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(v < V, tl.where(x == x, keys, 0x7FFFFFFF), -0x80000000)


@triton.jit
def _masses(keys, top, scale_log2):  # type: ignore[no-untyped-def]
    """exp((logit - top) / temperature) in fixed point, int64; top is the largest logit."""
    logits = tl.where(keys < 0, keys ^ 0x7FFFFFFF, keys).to(tl.float32, bitcast=True)
    mass = tl.exp2((logits - top) * scale_log2) * 17592186044416.0
    return tl.where(keys == -0x80000000, 0.0, mass).to(tl.int64)


@triton.jit
def greedy_fwd_kernel(logits, best, stride_b, V, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Grid (pieces of V, B). The largest (key, -index) of a piece, packed into an int64."""
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    b = tl.program_id(1).to(tl.int64)
    v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    keys = _keys(logits + b * stride_b, v, V)
    packed = tl.max((keys.to(tl.int64) << 32) | (0x7FFFFFFF - v), 0)
    tl.store(best + b * tl.num_programs(0) + tl.program_id(0), packed)


@triton.jit(do_not_specialize=["pieces"])
def greedy_combine_fwd_kernel(best, out, pieces, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Grid (B,). The token of the largest packed value of a row."""
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    packed = tl.load(best + b * pieces + i, mask=i < pieces, other=-0x7FFFFFFFFFFFFFFF)
    largest = tl.max(packed, 0)
    token = 0x7FFFFFFF - (largest & 0x7FFFFFFF)
    tl.store(out + b, tl.where((largest >> 32) > INFINITY, NONE, token))


@triton.jit
def top_p_fwd_kernel(  # type: ignore[no-untyped-def]
    logits, uniform, out, scale_log2, top_p, stride_b, V,
    NUCLEUS: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (B,). NUCLEUS: False where every token is kept."""
    start_next(OVERLAP)
    wait_for_previous(OVERLAP)
    b = tl.program_id(0).to(tl.int64)
    logits += b * stride_b
    block = tl.arange(0, BLOCK)

    highest = tl.full([BLOCK], -0x80000000, tl.int32)
    lowest = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
    for start in range(0, V, BLOCK):
        keys = _keys(logits, start + block, V)
        highest = tl.maximum(highest, keys)
        lowest = tl.minimum(lowest, tl.where(start + block < V, keys, 0x7FFFFFFF))
    high, low = tl.max(highest, 0), tl.min(lowest, 0)
    top = tl.where(high < 0, high ^ 0x7FFFFFFF, high).to(tl.float32, bitcast=True)
    masses = tl.zeros([BLOCK], tl.int64)
    for start in range(0, V, BLOCK):
        masses += _masses(_keys(logits, start + block, V), top, scale_log2)
    kept = tl.sum(masses, 0)

    # Kept are all tokens above the `edge` key and the first `ties` of those that have it.
    edge = tl.full([], -0x80000000, tl.int32)
    ties = tl.zeros([], tl.int64)
    each = tl.zeros([], tl.int64)
    if NUCLEUS:
        # The mass that must lie before a token for it to go. The edge is a key between low and
        # high that some token has, and so are these after each pass: few passes remain of 32.
        limit = tl.ceil(kept.to(tl.float64) * top_p).to(tl.int64)
        limit = tl.maximum(limit, 1)
        above = tl.zeros([], tl.int64)
        while low < high:
            middle = (low & high) + ((low ^ high) >> 1)
            masses = tl.zeros([BLOCK], tl.int64)
            below = tl.full([BLOCK], -0x80000000, tl.int32)
            beyond = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
            for start in range(0, V, BLOCK):
                keys = _keys(logits, start + block, V)
                higher = keys > middle
                masses += tl.where(higher, _masses(keys, top, scale_log2), 0)
                below = tl.maximum(below, tl.where(higher, -0x80000000, keys))
                beyond = tl.minimum(beyond, tl.where(higher, keys, 0x7FFFFFFF))
            mass = tl.sum(masses, 0)
            if mass < limit:
                high = tl.max(below, 0)
                above = mass
            else:
                low = tl.min(beyond, 0)
        edge = high
        each = tl.maximum(_masses(edge, top, scale_log2), 1)
        ties = (limit - above + each - 1) // each
        kept = above + ties * each

    # The first token at which the mass kept so far, in the order of tokens, exceeds `target`.
    share = tl.load(uniform + b).to(tl.float64) * kept.to(tl.float64)
    target = tl.minimum(share.to(tl.int64), kept - 1)
    token = tl.zeros([], tl.int32)
    before = tl.zeros([], tl.int64)
    i = tl.zeros([], tl.int32)
    while i * BLOCK < V:
        keys = _keys(logits, i * BLOCK + block, V)
        masses = tl.where(keys > edge, _masses(keys, top, scale_log2), 0)
        if NUCLEUS:
            tied = (keys == edge).to(tl.int32)
            first = tied.to(tl.int64) * (tl.cumsum(tied, 0) <= ties)
            masses += first * each
            ties -= tl.sum(first, 0)
        mass = tl.sum(masses, 0)
        if before + mass > target:
            passed = before + tl.cumsum(masses, 0) <= target
            token = i * BLOCK + tl.sum(passed.to(tl.int32), 0)
            i = tl.cdiv(V, BLOCK)
        else:
            before += mass
            i += 1
    token = tl.minimum(token, V - 1).to(tl.int64)
    tl.store(out + b, tl.where((top > float("-inf")) & (top < float("inf")), token, NONE))


def greedy(logits: Tensor) -> Tensor:
    """The first token of the largest logit of each row; NO_TOKEN where one is NaN.

    logits: [B, V], bfloat16, float16 or float32, last stride 1; V up to 262144.
    Returns int64 [B].
    Two launches, of pieces and of their combination: one that combines on the last arrival needs
    counters cleared beforehand, which is a launch again or a buffer that every caller must own.
    Raises ValueError naming the argument, its value and the rule, before any launch.
    """
    batch, vocabulary, stride = _check(logits, greedy_fwd_kernel)
    out = torch.empty(batch, dtype=torch.int64, device=logits.device)
    if batch == 0:
        return out
    block, warps = GREEDY
    pieces = triton.cdiv(vocabulary, block)
    best = torch.empty(batch, pieces, dtype=torch.int64, device=logits.device)
    greedy_fwd_kernel[(pieces, batch)](
        logits, best, stride, vocabulary, BLOCK=block, num_warps=warps,
        **overlapped(logits.device),
    )  # fmt: skip
    greedy_combine_fwd_kernel[(batch,)](
        best, out, pieces, BLOCK=MAX_VOCABULARY // block, num_warps=1,
        **overlapped(logits.device),
    )  # fmt: skip
    return out


def top_p(logits: Tensor, uniform: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """One token per row from the nucleus: the smallest set of likeliest tokens with mass top_p.

    logits: [B, V], bfloat16, float16 or float32, last stride 1; V up to 262144.
    uniform: contiguous float32 [B] in [0, 1): where to invert the distribution function of the
      kept tokens, in the order of their indices.
    temperature: above 0; top_p: in (0, 1], taken as a float32.
    A token is kept while the mass of those before it, by falling logit and rising index, is less
    than top_p by more than `SLACK`. Returns int64 [B], NO_TOKEN where the largest logit is NaN or
    infinite.
    Raises ValueError naming the argument, its value and the rule, before any launch.
    """
    batch, vocabulary, stride = _check(logits, top_p_fwd_kernel)
    fits = uniform.shape == (batch,) and uniform.dtype == torch.float32
    fits = fits and uniform.is_contiguous() and uniform.device == logits.device
    rule = "must be contiguous float32 [{}] on {}"
    require(fits, "uniform", form(uniform), rule, batch, logits.device)
    require(temperature > 0 and math.isfinite(temperature), "temperature", temperature,
            "must be finite and above 0; for temperature 0 call `greedy`")  # fmt: skip
    require(0 < top_p <= 1, "top_p", top_p, "must lie in (0, 1]")
    out = torch.empty(batch, dtype=torch.int64, device=logits.device)
    if batch == 0:
        return out
    wide = stride % 16 == 0 and vocabulary % 16 == 0 and logits.data_ptr() % 16 == 0
    block, warps = _config(vocabulary, wide)
    # Finite, so that the largest logit itself, 0 times this, keeps its full mass.
    scale_log2 = min(math.log2(math.e) / temperature, 3e38)
    top_p_fwd_kernel[(batch,)](
        logits, uniform, out, scale_log2, max(top_p - SLACK, 0.0), stride, vocabulary,
        NUCLEUS=top_p < 1, BLOCK=block, num_warps=warps, **overlapped(logits.device),
    )  # fmt: skip
    return out


def _check(logits: Tensor, kernel: object) -> tuple[int, int, int]:
    """B, V and the stride of rows; raises ValueError."""
    require_gpu("logits", logits, kernel)
    require(logits.dim() == 2, "logits", form(logits), "must be [B, V]")
    require(logits.dtype in _TYPES, "logits", form(logits), "must be bfloat16, float16 or float32")
    batch, vocabulary = logits.shape
    require(1 <= vocabulary <= MAX_VOCABULARY, "V", vocabulary, "must be 1 to {}", MAX_VOCABULARY)
    dense = vocabulary == 1 or logits.stride(1) == 1
    require(dense, "logits", form(logits), "must have last stride 1")
    # The stride of a single row is arbitrary, and never used.
    return batch, vocabulary, logits.stride(0) if batch > 1 else 0


def _config(vocabulary: int, wide: bool) -> tuple[int, int]:
    most = min(most for most, _ in CONFIGS if vocabulary <= most)
    return CONFIGS[most, wide]


def greedy_ref(logits: Tensor) -> Tensor:
    """The oracle of `greedy`: one token at a time."""
    out = torch.zeros(len(logits), dtype=torch.int64)
    for b, row in enumerate(logits.double().tolist()):
        for v, x in enumerate(row):
            if x > row[out[b]]:
                out[b] = v
        if any(math.isnan(x) for x in row):
            out[b] = NO_TOKEN
    return out


def nucleus_ref(logits: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """The distribution that `top_p` draws from, float64 [B, V], one token at a time."""
    wide = logits.double()
    probabilities = ((wide - wide.amax(-1, keepdim=True)) / temperature).softmax(-1)
    kept = torch.zeros_like(probabilities)
    order = torch.sort(logits.double(), dim=-1, descending=True, stable=True).indices
    for b, row in enumerate(order.tolist()):
        before = 0.0
        for v in row:
            if before < top_p - SLACK or before == 0 or top_p == 1:
                kept[b, v] = probabilities[b, v]
            before += float(probabilities[b, v])
    return kept / kept.sum(-1, keepdim=True)


def top_p_ref(logits: Tensor, uniform: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """The oracle of `top_p`: float64, the first token whose cumulative probability exceeds."""
    bounds = nucleus_ref(logits, temperature=temperature, top_p=top_p).cumsum(-1)
    tokens = (bounds <= uniform.double()[:, None]).sum(-1)
    return tokens.masked_fill(bounds[:, -1].isnan(), NO_TOKEN)


def variants() -> list[Variant]:
    """Every kernel, dtype and configuration; rows whose length or distance is no multiple of 16."""

    def rows(dtype: torch.dtype, vocabulary: int, aligned: str) -> Tensor:
        width = vocabulary if "V" in aligned else vocabulary - 1
        apart = vocabulary + 16 if "stride_b" in aligned else vocabulary + 1
        return meta(2, apart, dtype=dtype)[:, :width]

    uniform = meta(2, dtype=torch.float32)
    draws = [
        (
            f"top_p {name} {most}{'' if mass < 1 else ' all'} aligned {aligned or 'nowhere'}",
            partial(top_p, rows(dtype, most, aligned), uniform, temperature=1.0, top_p=mass),
        )
        for dtype, name in _TYPES.items()
        for most in (MAX_VOCABULARY, 1024)
        for mass in (0.9, 1.0)
        for aligned in ("stride_b V", "stride_b", "V", "")
    ]
    choices = [
        (f"greedy {name}" + " odd" * (not aligned), partial(greedy, rows(dtype, 151936, aligned)))
        for dtype, name in _TYPES.items()
        for aligned in ("stride_b V", "")
    ]

    def whole(v: Variant) -> bool:
        """Rows that start anywhere are read value by value."""
        return v.divisible >= {"stride_b", "V"}

    drawn = Expected(
        wide_loads=lambda v: 3 * whole(v),
        narrow_in_loops=lambda v: frozenset() if whole(v) else frozenset({2, 4}),
    )
    expected = {
        top_p_fwd_kernel: drawn, greedy_fwd_kernel: Expected(wide_loads=whole),
        greedy_combine_fwd_kernel: Expected(wide_loads=0),
    }  # fmt: skip
    return variants_of([*draws, *choices], expected)
