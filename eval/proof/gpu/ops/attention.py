"""Attention on a device: decode, MLA decode and prefill, beside SDPA, FlexAttention and others."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eval.proof.gpu.case import Case, Check, Op, Run, installed, lazily
from eval.proof.gpu.ops import grouped, sparse
from eval.proof.gpu.ops.operands import PAGE, binary, dense, on_cpu, paged, random
from kernels.attention.decode import attention_decode, attention_decode_ref
from kernels.attention.decode_checks import EIGHT_BIT
from kernels.attention.prefill import attention_prefill, attention_prefill_ref
from kernels.latent.decode import mla_decode, mla_decode_ref
from kernels.rope.torch import rope_table

BF16_LIMIT = 8e-3
NAMES = {torch.bfloat16: "bf16", torch.int8: "int8", torch.float8_e4m3fn: "fp8"}
Pairs = Sequence[tuple[Tensor, Tensor]]


# -- decode ----------------------------------------------------------------------------------------


def keys_of(
    g: int, rows: int, dim: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """A pool [G, rows, d] of `dtype`, and the scales [G, rows] of one that holds 8 bits."""
    pool = random(g, rows, dim, device=device)
    if dtype == pool.dtype:
        return pool, None
    scale = torch.rand(g, rows, device=device) / 64 + 1 / 64
    unit = pool.float() / scale[..., None]
    return (unit.round().clamp(-127, 127) if dtype == torch.int8 else unit).to(dtype), scale


def check_decode(
    lengths: Sequence[int], heads: tuple[int, int], dim: int, new: int = 1,
    kv: torch.dtype = torch.bfloat16, sunk: bool = False, tied: bool = False, **options: Any,
) -> Callable[[torch.device], Pairs]:  # fmt: skip
    """Three times, since splits that do not wait for each other may differ from run to run.

    sunk: with logits of sinks; tied: of rows that are keys and values.
    """

    def run(device: torch.device) -> Pairs:
        table, held, pages = paged(lengths, device)
        h, g = heads
        q = random(len(lengths), new, h, dim, device=device)
        (k, k_scale), (v, v_scale) = (keys_of(g, pages * PAGE, dim, kv, device) for _ in range(2))
        given: dict[str, Any] = {"k_scale": k_scale, "v_scale": None if tied else v_scale}
        if sunk:
            given["sink_logits"] = random(h, device=device)
        if tied:
            turns = rope_table(max(lengths), dim, 1e4, device)
            given["cos_sin"] = torch.view_as_real(turns).squeeze(1)
            given["key_weight"] = random(dim, device=device)
        told: dict[str, Any] = {**options, "page_size": PAGE}
        on_host = {name: t.cpu() for name, t in given.items() if t is not None}
        values = None if tied else v
        host_values = None if tied else v.cpu()
        expected = attention_decode_ref(
            q.cpu(), k.cpu(), host_values, table.cpu(), held.cpu(), **told, **on_host
        )
        return [
            (attention_decode(q, k, values, table, held, **told, **given), expected)
            for _ in range(3)
        ]

    return run


def decode_case(
    order: int, batch: int, context: int, heads: tuple[int, int], dim: int, *, flex: bool = False,
    kv: torch.dtype = torch.bfloat16,
) -> Case:  # fmt: skip
    """One new token over `context` rows; flex: beside FlexAttention, too.

    FlexAttention compiles for half a minute a shape: it is timed where most depends on it.
    No baseline reads 8-bit rows with a scale for each.
    """
    h, g = heads
    scale_bytes = torch.float32.itemsize if kv in EIGHT_BIT else 0
    rows = batch * context * g * (dim * kv.itemsize + scale_bytes)

    def build(device: torch.device) -> Mapping[str, Run]:
        table, held, pages = paged([context] * batch, device)
        q = random(batch, 1, h, dim, device=device)
        (k, k_scale), (v, v_scale) = (keys_of(g, pages * PAGE, dim, kv, device) for _ in range(2))

        @cache
        def keys_values() -> tuple[Tensor, Tensor]:
            return dense(k, table, context), dense(v, table, context)

        def ours() -> Tensor:
            return attention_decode(
                q, k, v, table, held, page_size=PAGE, k_scale=k_scale, v_scale=v_scale
            )

        if kv != q.dtype:
            return {"triton": ours}
        runs: dict[str, Run] = {
            "triton": ours, "sdpa": lazily(lambda: _dense(_sdpa, q, *keys_values()))
        }  # fmt: skip
        if flex:
            runs["flex"] = lazily(lambda: _dense(_compiled_flex(), q, *keys_values()))
        if installed("flash-attn"):
            runs["flash-attn"] = lazily(lambda: _flash_attn(q, *keys_values(), held))
        if installed("flashinfer"):
            runs["flashinfer"] = lazily(lambda: _flashinfer(q, (k, v), table, held))
        return runs

    return Case(
        name=f"{h}/{g} heads d {dim} {NAMES[kv]} batch {batch} context {binary(context)}",
        order=order,
        moved_bytes=2 * rows + 4 * batch * h * dim, flops=4 * batch * context * h * dim,
        build=build, late=("flex",) if flex else (),
    )  # fmt: skip


Attention = Callable[..., Tensor]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, **options)


def _dense(attention: Attention, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Run:
    """By a function of [B, H, K, d]; the result as ours, [B, K, H, d], without a copy."""
    query = q.transpose(1, 2)
    return lambda: attention(query, k, v, enable_gqa=True, **options).transpose(1, 2)


@cache
def _compiled_flex() -> Attention:
    from torch.nn.attention.flex_attention import flex_attention
    from triton import knobs

    # Inductor would set another assembler for the whole process, and our kernels compile anew.
    os.environ.setdefault("TRITON_PTXAS_PATH", knobs.nvidia.ptxas.path)
    return torch.compile(flex_attention, dynamic=False)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Run:
    from flash_attn import flash_attn_with_kvcache

    k, v = (t.transpose(1, 2).contiguous() for t in (k, v))
    return lambda: flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths)


def _flashinfer(q: Tensor, pools: Sequence[Tensor], table: Tensor, lengths: Tensor) -> Run:
    flashinfer = import_module("flashinfer")
    batch, _, h, dim = q.shape
    g = pools[0].shape[0]
    # [pages, page, G, d], as the library keeps them.
    kv = tuple(t.unflatten(1, (-1, PAGE)).permute(1, 2, 0, 3).contiguous() for t in pools)
    space = torch.empty(128 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        space, "NHD", use_tensor_cores=h // g >= 4
    )
    pages = table.shape[1]
    starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * pages
    last = (lengths - 1) % PAGE + 1
    wrapper.plan(starts, table.flatten(), last, h, g, dim, PAGE, q_data_type=q.dtype)
    return lambda: wrapper.run(q[:, 0], kv)[:, None]


DECODE = Op(
    name="attention_decode",
    checks=[
        Check(
            name=f"{h}/{g} d {d} new {new} {options or ''}".strip(), limit=BF16_LIMIT,
            run=check_decode([700, 1, 64, 0, 1999], (h, g), d, new, **options),
        )
        for h, g, d, new, options in (
            (16, 2, 128, 1, {}), (8, 8, 64, 1, {}), (8, 1, 128, 4, {}), (16, 2, 32, 8, {}),
            (4, 2, 256, 1, {}), (16, 4, 128, 1, {"window": 300, "sinks": 4}),
            (8, 2, 64, 3, {"window": 100}), (64, 8, 128, 1, {"kv": torch.int8}),
            (64, 8, 128, 1, {"kv": torch.float8_e4m3fn}), (8, 2, 64, 4, {"kv": torch.int8}),
            (64, 8, 64, 1, {"sunk": True}), (64, 8, 64, 2, {"sunk": True, "window": 128}),
            (16, 2, 128, 1, {"sunk": True, "kv": torch.int8}), (16, 2, 128, 1, {"tied": True}),
            (8, 4, 256, 4, {"tied": True}), (8, 2, 64, 9, {"tied": True, "sunk": True}),
            (16, 2, 128, 1, {"tied": True, "kv": torch.int8}),
        )
    ],
    cases=[
        decode_case(0, 64, 16384, (64, 8), 128, flex=True),
        decode_case(0, 1, 32768, (64, 8), 128, flex=True),
        *(
            decode_case(1, batch, context, (64, 8), 128, kv=kv)
            for kv in (torch.int8, torch.float8_e4m3fn)
            for batch, context in ((64, 16384), (1, 32768))
        ),
        *(
            decode_case(2, batch, context, heads, dim)
            for heads, dim in (((64, 8), 128), ((32, 32), 64), ((32, 8), 128))
            for batch, context in ((1, 1024), (1, 4096), (1, 131072), (8, 16384), (64, 4096),
                                   (256, 1024))
        ),
    ],
)  # fmt: skip


# -- MLA -------------------------------------------------------------------------------------------


def check_mla(
    lengths: Sequence[int], heads: int, rank: int, rope: int, new: int = 1, latents: int = 1
) -> Callable[[torch.device], Pairs]:
    """Absorbed attention over one or several latent heads."""

    def run(device: torch.device) -> Pairs:
        table, held, pages = paged(lengths, device)
        q, turned = (random(len(lengths), new, heads, n, device=device) for n in (rank, rope))
        pool = random(latents, pages * PAGE, rank + rope, device=device)
        options: dict[str, Any] = {"scale": (rank + rope) ** -0.5, "page_size": PAGE}
        expected = mla_decode_ref(*on_cpu(q, turned, pool, table, held), **options)
        return [(mla_decode(q, turned, pool, table, held, **options), expected) for _ in range(3)]

    return run


def mla_case(
    order: int, batch: int, context: int, heads: int, new: int = 1,
    latent: tuple[int, int] = (512, 64),
) -> Case:  # fmt: skip
    """latent: rank and rotary channels, by default DeepSeek's."""
    rank, rope = latent
    row, scale = rank + rope, 192**-0.5

    def build(device: torch.device) -> Mapping[str, Run]:
        table, held, pages = paged([context] * batch, device)
        q, turned = (random(batch, new, heads, n, device=device) for n in (rank, rope))
        pool = random(pages * PAGE, row, device=device)
        whole = torch.cat((q, turned), -1)

        @cache
        def latents() -> Tensor:
            return dense(pool[None], table, context)

        def ours() -> Tensor:
            return mla_decode(q, turned, pool, table, held, scale=scale, page_size=PAGE)

        return {
            "triton": ours,
            "sdpa": lazily(lambda: _latent_sdpa(whole, latents(), rank, scale)),
            "cublas": lazily(lambda: _latent_products(whole, latents()[:, 0], rank, scale)),
        }

    return Case(
        name=f"{heads} heads {rank}+{rope} bf16 batch {batch} context {binary(context)} new {new}",
        order=order, moved_bytes=2 * batch * (context * row + new * heads * (row + rank)),
        flops=2 * batch * new * heads * context * (row + rank), build=build,
    )  # fmt: skip


def _visible(q: Tensor, rows: int) -> Tensor | None:
    """bool [K * H, rows]: what each token of each head may see; None where that is everything."""
    new, heads = q.shape[1:3]
    if new == 1:
        return None
    last = torch.arange(rows - new, rows, device=q.device).repeat_interleave(heads)
    return torch.arange(rows, device=q.device) <= last[:, None]


def _latent_sdpa(q: Tensor, latents: Tensor, rank: int, scale: float) -> Run:
    """Tokens and heads are queries of the one latent head [B, 1, S, R + r]."""
    query, seen = q.flatten(1, 2)[:, None], _visible(q, latents.shape[2])
    values = latents[..., :rank]

    def run() -> Tensor:
        found = F.scaled_dot_product_attention(query, latents, values, seen, scale=scale)
        return found.view(*q.shape[:3], rank)

    return run


def _latent_products(q: Tensor, latents: Tensor, rank: int, scale: float) -> Run:
    """Two batched products in bf16 with a softmax between them."""
    query, seen = q.flatten(1, 2), _visible(q, latents.shape[1])
    hidden = None if seen is None else ~seen
    keys, values = latents.transpose(1, 2), latents[..., :rank]

    def run() -> Tensor:
        logits = torch.bmm(query, keys).mul_(scale)
        if hidden is not None:
            logits.masked_fill_(hidden, -torch.inf)
        weights = logits.softmax(-1, dtype=torch.float32).to(q.dtype)
        return torch.bmm(weights, values).view(*q.shape[:3], rank)

    return run


MLA = Op(
    name="mla_decode",
    checks=[
        Check(name=f"{h} heads {rank}+{rope} new {new} latents {g}", limit=BF16_LIMIT,
              run=check_mla([500, 1, 65, 0], h, rank, rope, new, g))
        for h, rank, rope, new, g in (
            (16, 512, 64, 1, 1), (64, 512, 64, 1, 1), (32, 256, 32, 2, 1), (8, 128, 16, 4, 2),
            (4, 64, 16, 1, 1),
        )
    ] + grouped.CHECKS + sparse.PICKED,
    cases=[
        mla_case(0, 128, 4096, 16),
        mla_case(0, 128, 4096, 128),
        *(
            mla_case(2, batch, context, heads, new)
            for heads in (16, 64, 128)
            for batch, context, new in ((1, 32768, 1), (32, 16384, 1), (128, 8192, 2))
        ),
        *grouped.CASES,
    ],
)  # fmt: skip


# -- prefill ---------------------------------------------------------------------------------------


def check_prefill(
    past: Sequence[int], new: int, heads: tuple[int, int], dims: tuple[int, int],
    counts: Sequence[int] | None = None, sunk: bool = False, **options: Any,
) -> Callable[[torch.device], Pairs]:  # fmt: skip
    """A chunk after a past, ragged where `counts` says how many tokens are real; sunk: with logits
    of sinks.
    """

    def run(device: torch.device) -> Pairs:
        table, held, pages = paged([n + new for n in past], device)
        (h, g), (d, dv) = heads, dims
        q = random(len(past), new, h, d, device=device)
        k, v = (random(g, pages * PAGE, dim, device=device) for dim in (d, dv))
        given: dict[str, Any] = {}
        if counts is not None:
            given["new"] = torch.tensor(counts, dtype=torch.int32, device=device)
        if sunk:
            given["sink_logits"] = random(h, device=device)
        told: dict[str, Any] = {**options, "page_size": PAGE}
        on_host: dict[str, Any] = {**told, **{name: t.cpu() for name, t in given.items()}}
        expected = attention_prefill_ref(*on_cpu(q, k, v, table, held), **on_host)
        return [(attention_prefill(q, k, v, table, held, **told, **given), expected)]

    return run


def prefill_case(order: int, batch: int, tokens: int, heads: tuple[int, int], dim: int) -> Case:
    """A whole causal prompt."""
    h, g = heads

    def build(device: torch.device) -> Mapping[str, Run]:
        table, held, pages = paged([tokens] * batch, device)
        q = random(batch, tokens, h, dim, device=device)
        k, v = (random(g, pages * PAGE, dim, device=device) for _ in range(2))

        def by_sdpa() -> Run:
            keys, values = (dense(pool, table, tokens) for pool in (k, v))
            return _dense(_sdpa, q, keys, values, is_causal=True)

        return {
            "triton": lambda: attention_prefill(q, k, v, table, held, page_size=PAGE),
            "sdpa": lazily(by_sdpa),
        }

    return Case(
        name=f"{h}/{g} heads d {dim} bf16 batch {batch} tokens {binary(tokens)}", order=order,
        moved_bytes=4 * batch * tokens * (h + g) * dim, flops=2 * batch * h * tokens**2 * dim,
        build=build,
    )  # fmt: skip


PREFILL = Op(
    name="attention_prefill",
    checks=[
        Check(name="prompt 8/2 d 128", limit=BF16_LIMIT,
              run=check_prefill([0, 0], 130, (8, 2), (128, 128))),
        Check(name="chunk, ragged, d 64", limit=BF16_LIMIT,
              run=check_prefill([70, 0, 3], 65, (4, 4), (64, 64), [65, 12, 0])),
        Check(name="window 50, sinks 3", limit=BF16_LIMIT,
              run=check_prefill([200, 0], 100, (4, 1), (64, 64), window=50, sinks=3)),
        Check(name="window 128, logits of sinks", limit=BF16_LIMIT,
              run=check_prefill([200, 0], 150, (8, 1), (64, 64), sunk=True, window=128)),
        Check(name="d 192, dv 128", limit=BF16_LIMIT,
              run=check_prefill([30], 70, (4, 4), (192, 128))),
        Check(name="d 96, dv 64", limit=BF16_LIMIT,
              run=check_prefill([30], 70, (4, 4), (96, 64))),
    ],
    cases=[
        prefill_case(1, 1, 8192, (32, 8), 128),
        prefill_case(2, 4, 2048, (32, 32), 64),
        prefill_case(2, 1, 16384, (64, 8), 128),
    ],
)  # fmt: skip

OPS = (DECODE, MLA, PREFILL)
