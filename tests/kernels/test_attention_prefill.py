"""Prefill attention over a paged cache against its float64 oracle, and compiled ahead."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels.attention.prefill as module
from archs.mla import LatentConfig
from archs.sizes import SCALES
from kernels.attention.prefill import attention_prefill_ref
from kernels.attention.prefill_checks import DIMS
from tests.kernels.interpreter import interpreted

TOLERANCES = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 1e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 8e-3},
}


def operands(
    lengths: list[int],
    tokens: int,
    *,
    new: list[int] | None = None,
    heads: tuple[int, int] = (4, 2),
    dims: tuple[int, int] = (32, 32),
    page_size: int = 64,
    dtype: torch.dtype = torch.float32,
    sunk: bool = False,
    **options: Any,
) -> tuple[list[Tensor], dict[str, Any]]:
    """A pool of shuffled pages with spare ones; rows and queries that nobody may read are NaN."""
    (h, g), (d, dv), batch = heads, dims, len(lengths)
    most = max(1, -(-max(lengths) // page_size))
    pages = batch * most + 2
    k, v = torch.randn(g, pages * page_size, d), torch.randn(g, pages * page_size, dv)
    q = torch.randn(batch, tokens, h, d)
    table = torch.randperm(pages)[: batch * most].view(batch, most).int()
    readable = torch.zeros(pages * page_size, dtype=torch.bool)
    for b, length in enumerate(lengths):
        end = length - tokens + (tokens if new is None else new[b])
        rows = torch.arange(max(end, 0) if new is None or new[b] else 0)
        if options.get("window") is not None:
            first = length - tokens - options["window"]
            rows = rows[(rows > first) | (rows < options.get("sinks", 0))]
        readable[table[b, rows // page_size].long() * page_size + rows % page_size] = True
        gone = torch.ones(most, dtype=torch.bool)
        gone[torch.unique(rows // page_size)] = False
        table[b, gone] = -(10**6)
        q[b, tokens if new is None else new[b] :] = torch.nan
    k[:, ~readable] = torch.nan
    v[:, ~readable] = torch.nan
    options = {"page_size": page_size, **options}
    if sunk:
        options["sink_logits"] = 2 * torch.randn(h).to(dtype)
    if new is not None:
        options["new"] = torch.tensor(new, dtype=torch.int32)
    cache = [q.to(dtype), k.to(dtype), v.to(dtype), table]
    return [*cache, torch.tensor(lengths, dtype=torch.int32)], options


def assert_equals_the_oracle(lengths: list[int], tokens: int, **how: Any) -> None:
    tensors, options = operands(lengths, tokens, **how)
    with interpreted():
        got = module.attention_prefill(*tensors, **options)
    expected = attention_prefill_ref(*tensors, **options)
    assert got.dtype == tensors[0].dtype
    torch.testing.assert_close(got.double(), expected, **TOLERANCES[got.dtype])


@pytest.mark.parametrize("tokens", [1, 9, 63, 65, 200])
@pytest.mark.parametrize("past", [0, 1, 100, 192])
@pytest.mark.parametrize("page_size", [16, 48, 64, 128])
def test_prompts_and_chunks_after_a_past(tokens: int, past: int, page_size: int) -> None:
    assert_equals_the_oracle([past + tokens], tokens, heads=(2, 1), page_size=page_size)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (8, 1), (6, 2), (10, 2)], ids=str)
@pytest.mark.parametrize("tokens", [2, 15, 70])
def test_query_groups(heads: tuple[int, int], tokens: int) -> None:
    assert_equals_the_oracle([tokens + 75], tokens, heads=heads)


@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize("options", [{}, {"window": 33, "sinks": 5}], ids=str)
def test_ragged_batches(options: dict[str, Any], page_size: int) -> None:
    # Full, padded, without a new token, without a past, and partly or wholly before position 0.
    lengths, new = [150, 170, 90, 80, 60, 0], [80, 7, 0, 1, 79, 80]
    assert_equals_the_oracle(lengths, 80, new=new, page_size=page_size, **options)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 33, "sinks": 5}, {"window": 200}], ids=str)
def test_logits_of_sinks(options: dict[str, Any], dtype: torch.dtype) -> None:
    lengths, new = [150, 170, 90, 80, 60, 0], [80, 7, 0, 1, 79, 80]
    assert_equals_the_oracle(lengths, 80, new=new, sunk=True, dtype=dtype, **options)
    assert_equals_the_oracle([300, 140], 140, sunk=True, dtype=dtype, **options)


def test_tokens_before_the_first_position_return_zeros() -> None:
    assert_equals_the_oracle([100, 40, 3, 0], 100)


@pytest.mark.parametrize(
    ("window", "sinks"),
    [(1, 0), (16, 4), (64, 0), (65, 64), (100, 70), (200, 3), (999, 3), (2**40, 2**40)],
)
@pytest.mark.parametrize(("tokens", "page_size"), [(70, 16), (70, 64), (3, 48), (140, 128)])
def test_window_and_sinks(window: int, sinks: int, tokens: int, page_size: int) -> None:
    how: dict[str, Any] = {"window": window, "sinks": sinks, "page_size": page_size}
    assert_equals_the_oracle([300, tokens], tokens, heads=(2, 1), **how)


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_head_dims_and_dtypes(dims: tuple[int, int], dtype: torch.dtype) -> None:
    assert_equals_the_oracle([140, 90], 40, dims=dims, dtype=dtype, scale=0.2, heads=(2, 1))


@pytest.mark.parametrize("scale", sorted(set(SCALES) - {"nano"}))  # nano: heads of 16 are refused.
def test_every_scale_is_served(scale: str) -> None:
    latent = LatentConfig.defaults(SCALES[scale])
    dim = SCALES[scale].head_dim
    assert (dim, dim) in DIMS
    assert (latent["nope_dim"] + latent["rope_dim"], latent["v_dim"]) in DIMS


@pytest.mark.parametrize("dims", [(32, 32), (48, 32)], ids=str)
def test_equals_torch_on_a_dense_layout(dims: tuple[int, int]) -> None:
    batch, h, g, rows, tokens, page = 2, 6, 2, 192, 100, 16
    dense = [torch.randn(batch, g, rows, d) for d in dims]
    q = torch.randn(batch, tokens, h, dims[0])
    length = 170
    mask = torch.ones(tokens, rows, dtype=torch.bool).tril(length - tokens)
    expected = F.scaled_dot_product_attention(
        q.transpose(1, 2), *dense, attn_mask=mask, enable_gqa=True
    ).transpose(1, 2)
    reach = rows * (g * (batch - 1) + 1)
    pools = [
        t.as_strided((g, reach, d), (rows * d, d, 1)) for t, d in zip(dense, dims, strict=True)
    ]
    table = (torch.arange(batch)[:, None] * g * rows // page + torch.arange(rows // page)).int()
    lengths = torch.full((batch,), length, dtype=torch.int32)
    with interpreted():
        got = module.attention_prefill(q, *pools, table, lengths, page_size=page)
    torch.testing.assert_close(got, expected, **TOLERANCES[torch.float32])


def test_packed_queries_and_the_output_given() -> None:
    tensors, options = operands([90, 50], 30, dims=(48, 32))
    packed = torch.full((2, 30, 16, 48), torch.nan)
    packed[:, :, 8:12] = tensors[0]
    tensors[0] = packed[:, :, 8:12]
    out = torch.full((2, 30, 4, 32), torch.nan)
    with interpreted():
        assert module.attention_prefill(*tensors, **options, out=out) is out
    expected = attention_prefill_ref(*tensors, **options)
    torch.testing.assert_close(out.double(), expected, **TOLERANCES[torch.float32])


def test_an_empty_batch_launches_nothing() -> None:
    (q, k, v, table, lengths), options = operands([20], 20)
    with interpreted():
        got = module.attention_prefill(q[:0], k, v, table[:0], lengths[:0], **options)
    assert got.shape == (0, 20, 4, 32)


Change = Callable[[dict[str, Any]], dict[str, Any]]
REFUSALS: dict[str, tuple[str, Change]] = {
    "q rank": (r"q=.*\[B, K >= 1, H, d\]", lambda a: {"q": a["q"][0]}),
    "no token": (r"q=.*\[B, K >= 1, H, d\]", lambda a: {"q": a["q"][:, :0]}),
    "q dtype": ("q=.*bfloat16 or float16", lambda a: {"q": a["q"].double()}),
    "q strides": ("q=.*strides", lambda a: {"q": torch.randn(1, 20, 4, 40)[..., :32]}),
    "q start": ("q=.*16 bytes", lambda a: {"q": torch.randn(2561)[1:].view(1, 20, 4, 32)}),
    "page_size": ("page_size=24 .*multiple of 16", lambda a: {"page_size": 24}),
    "pool rank": ("v_pool=.*must be .G", lambda a: {"v_pool": a["v_pool"][0]}),
    "pool rows": (r"k_pool=.*pages \* 128", lambda a: {"page_size": 128}),
    "pool size": (
        r"k_pool=.*< 2\^31",
        lambda a: {"k_pool": a["k_pool"][:, :1].expand(2, 2**31, 32)},
    ),
    "head_dim of values": (
        r"\(d, dv\)=\(32, 48\) must be one of .*; use backend torch",
        lambda a: {"v_pool": torch.randn(2, 192, 48)},
    ),
    "head_dim of both": (
        r"\(d, dv\)=\(80, 80\) must be one of",
        lambda a: {
            "q": torch.randn(1, 20, 4, 80),
            **{n: torch.randn(2, 192, 80) for n in ("k_pool", "v_pool")},
        },
    ),
    "head_dim of q": ("k_pool=.*head_dim, 32", lambda a: {"k_pool": torch.randn(2, 192, 48)}),
    "pool heads": ("k_pool=.*divide the 4", lambda a: {"k_pool": torch.randn(3, 192, 32)}),
    "pool dtype": ("v_pool=.*as q is", lambda a: {"v_pool": a["v_pool"].half()}),
    "pool strides": (
        r"v_pool=.*\[16i, 32, 1\]",
        lambda a: {"v_pool": a["v_pool"].repeat(1, 1, 2)[..., :32]},
    ),
    "pool head stride": (
        r"k_pool=.*\[16i, 32, 1\]",
        lambda a: {"k_pool": torch.randn(18000).as_strided((2, 192, 32), (6152, 32, 1))},
    ),
    "pools differ": ("v_pool=.*heads and rows", lambda a: {"v_pool": a["v_pool"][:, :64]}),
    "scale": ("scale=0.0 must", lambda a: {"scale": 0.0}),
    "window": ("window=0 must", lambda a: {"window": 0}),
    "sinks": ("sinks=-1 must", lambda a: {"sinks": -1}),
    "table dtype": ("page_table=.*int32", lambda a: {"page_table": a["page_table"].long()}),
    "table batch": ("page_table=.*int32", lambda a: {"page_table": a["page_table"].repeat(2, 1)}),
    "table empty": ("page_table=.*int32", lambda a: {"page_table": a["page_table"][:, :0]}),
    "lengths": ("lengths=.*int32", lambda a: {"lengths": a["lengths"].long()}),
    "new": (r"new=.*int32 \[1\]", lambda a: {"new": torch.zeros(2, dtype=torch.int32)}),
    "out": ("out=.*contiguous", lambda a: {"out": torch.empty(1, 20, 4, 64)[..., :32]}),
    "device": ("lengths=meta must be on", lambda a: {"lengths": a["lengths"].to("meta")}),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_arguments_are_refused_before_any_launch(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, options = operands([20], 20)
    given = dict(zip(("q", "k_pool", "v_pool", "page_table", "lengths"), tensors, strict=True))
    given |= options
    message, change = REFUSALS[case]
    with interpreted():
        monkeypatch.setattr(type(module.attention_prefill_fwd_kernel), "run", _no_launch)
        with pytest.raises(ValueError, match=message):
            module.attention_prefill(**(given | change(given)))


def _no_launch(*_: Any, **__: Any) -> None:
    raise AssertionError("launched")


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    tensors, options = operands([20], 20)
    with pytest.raises(ValueError, match="is on cpu, needs cuda"):
        module.attention_prefill(*tensors, **options)
