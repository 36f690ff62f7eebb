"""Latent decode attention against its float64 oracle in the interpreter, and compiled ahead."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import kernels.latent.decode as module
from archs.grouped_latent import GroupedLatentConfig
from archs.gta import TiedConfig
from archs.mla import LatentConfig
from archs.sizes import SCALES
from kernels.latent.decode import CONFIGS, mla_decode_ref
from kernels.latent.decode_checks import WIDTHS, WIDTHS_APART
from tests.kernels.interpreter import GPUS, interpreted

TOLERANCES = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 1e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 8e-3},
}


def operands(
    lengths: list[int],
    *,
    new: int = 1,
    heads: tuple[int, int] = (4, 1),
    widths: tuple[int, int] = (64, 16),
    page_size: int = 64,
    dtype: torch.dtype = torch.float32,
    apart: bool = False,
    query: int | None = None,
    **options: Any,
) -> tuple[list[Tensor], dict[str, Any]]:
    """A pool of shuffled pages with spare ones; rows that nobody may read are NaN.

    apart: latent heads share the rotary keys of a pool of their own. query: width of queries (None:
    of latents).
    """
    h, g = heads
    batch, most = len(lengths), max(1, -(-max(lengths) // page_size))
    pages = batch * most + 3
    pool = torch.randn(g, pages * page_size, sum(widths)).to(dtype)
    table = torch.randperm(pages)[: batch * most].view(batch, most).int()
    readable = torch.zeros(pages * page_size, dtype=torch.bool)
    for b, length in enumerate(lengths):
        rows = torch.arange(length)
        if options.get("window") is not None:
            first = length - new - options["window"]
            rows = rows[(rows > first) | (rows < options.get("sinks", 0))]
        readable[table[b, rows // page_size].long() * page_size + rows % page_size] = True
        gone = torch.ones(most, dtype=torch.bool)
        gone[torch.unique(rows // page_size)] = False
        table[b, gone] = -(10**6)
    pool[:, ~readable] = torch.nan
    options = {"page_size": page_size, "scale": 0.15, **options}
    if apart:
        # Of the last latent head: the others' are not read.
        options["keys"] = pool[-1, :, widths[0] :].contiguous()
        pool = pool[..., : widths[0]].contiguous()
    # Queries are columns of a wider slab, where others would be NaN.
    query = query or widths[0]
    slab = torch.full((batch, new, h * (query + 48)), torch.nan, dtype=dtype)
    parts = [
        slab[..., : h * query].unflatten(-1, (h, query)),
        torch.empty(batch, new, h, widths[1]),
    ]
    parts = [part.copy_(torch.randn(part.shape)).to(dtype) for part in parts]
    held = torch.tensor(lengths, dtype=torch.int32)
    return [*parts, pool if g > 1 else pool[0], table, held], options


def assert_equals_the_oracle(lengths: list[int], **how: Any) -> None:
    tensors, options = operands(lengths, **how)
    with interpreted():
        got = module.mla_decode(*tensors, **options)
    expected = mla_decode_ref(*tensors, **options)
    assert got.dtype == tensors[0].dtype
    torch.testing.assert_close(got.double(), expected, **TOLERANCES[got.dtype])


@pytest.mark.parametrize("lengths", [[1], [63], [65], [1000], [0, 130, 5]], ids=str)
@pytest.mark.parametrize("page_size", [1, 16, 48, 64, 128])
def test_lengths_and_shuffled_pages(lengths: list[int], page_size: int) -> None:
    assert_equals_the_oracle(lengths, page_size=page_size)


@pytest.mark.parametrize("new", [1, 2, 3, 4])
@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (24, 1), (40, 2), (4, 4)], ids=str)
def test_new_tokens_are_causal_whatever_the_heads(new: int, heads: tuple[int, int]) -> None:
    # The shortest sequence has rows for one token only: the others return zeros.
    assert_equals_the_oracle([300, new, 1], new=new, heads=heads)


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (70, 0), (100, 4), (64, 70), (2000, 3)])
@pytest.mark.parametrize(("new", "page_size"), [(1, 64), (3, 16)])
def test_window_and_sinks(window: int, sinks: int, new: int, page_size: int) -> None:
    assert_equals_the_oracle([700, 90, 3], window=window, sinks=sinks, new=new, page_size=page_size)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(
    ("widths", "heads"),
    [((32, 16), 3), ((32, 16), 17), ((64, 32), 3), ((96, 16), 16), ((96, 16), 33), ((128, 16), 17),
     ((256, 32), 16), ((256, 32), 17), ((256, 64), 33), ((512, 64), 16), ((512, 64), 33)],
)  # fmt: skip
def test_every_tile(
    widths: tuple[int, int], heads: int, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "gpu", lambda device: GPUS[family])
    assert_equals_the_oracle([290], widths=widths, heads=(heads, 1))


@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_widths_and_dtypes(widths: tuple[int, int], dtype: torch.dtype) -> None:
    assert_equals_the_oracle([270, 70], widths=widths, dtype=dtype, new=2)


@pytest.mark.parametrize("widths", [(32, 16), (96, 16)], ids=str)
@pytest.mark.parametrize("options", [{}, {"window": 300, "sinks": 3}], ids=str)
def test_narrow_and_padded_latents_over_several_splits(
    widths: tuple[int, int], options: dict[str, Any]
) -> None:
    assert_equals_the_oracle([1000, 40, 0], widths=widths, new=3, heads=(6, 2), **options)


@pytest.mark.parametrize("widths", WIDTHS_APART, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_widths_of_keys_apart(widths: tuple[int, int], dtype: torch.dtype) -> None:
    how = {"widths": widths, "dtype": dtype, "new": 2, "heads": (6, 2)}
    assert_equals_the_oracle([270, 70], apart=True, **how)


@pytest.mark.parametrize("new", [1, 2, 4])
@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (40, 2), (4, 4)], ids=str)
@pytest.mark.parametrize("page_size", [16, 48, 64])
def test_keys_apart_over_pages_and_splits(new: int, heads: tuple[int, int], page_size: int) -> None:
    how = {"new": new, "heads": heads, "page_size": page_size, "widths": (32, 16)}
    assert_equals_the_oracle([1000, 65, new, 0], apart=True, **how)


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("heads", [(4, 4), (24, 2), (40, 2)], ids=str)
@pytest.mark.parametrize(("query", "widths"), [(16, (32, 16)), (64, (128, 64)), (48, (64, 16))])
def test_queries_meet_the_first_columns_alone(
    query: int, widths: tuple[int, int], heads: tuple[int, int], new: int
) -> None:
    how = {"new": new, "heads": heads, "widths": widths, "query": query}
    assert_equals_the_oracle([700, 65, new, 0], apart=True, **how)


def test_keys_apart_are_those_of_rows_that_repeat_them() -> None:
    (q, q_rotary, pool, table, lengths), options = operands([300, 7], heads=(4, 2), apart=True)
    keys = options.pop("keys")
    rows = torch.cat((pool, keys.expand(2, -1, -1)), -1)
    with interpreted():
        got = module.mla_decode(q, q_rotary, pool, table, lengths, keys=keys, **options)
        expected = module.mla_decode(q, q_rotary, rows, table, lengths, **options)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("scale", sorted(set(SCALES) - {"nano"}))  # nano: heads of 16 are refused.
def test_every_scale_is_served(scale: str) -> None:
    c = LatentConfig.defaults(SCALES[scale])
    assert (c["rank"], c["rope_dim"]) in WIDTHS
    tied = TiedConfig.at(SCALES[scale], {})
    assert (tied.head_dim, tied.half) in WIDTHS_APART
    # micro: latents of 16 are refused.
    grouped = GroupedLatentConfig.at(SCALES[scale], {})
    assert ((grouped.group_rank, grouped.rope_dim) in WIDTHS_APART) is (scale != "micro")


def test_equals_torch() -> None:
    tensors, options = operands([192, 192], heads=(8, 2))
    q, q_rotary, pool, table, _ = tensors
    q = torch.cat((q, q_rotary), -1)
    rows = (table.long()[:, :, None] * 64 + torch.arange(64)).flatten(1)
    c = pool[:, rows].transpose(0, 1)
    expected = F.scaled_dot_product_attention(
        q.transpose(1, 2), c, c[..., :64], enable_gqa=True, scale=options["scale"]
    )
    with interpreted():
        got = module.mla_decode(*tensors, **options)
    torch.testing.assert_close(got, expected.transpose(1, 2), **TOLERANCES[torch.float32])


@pytest.mark.parametrize("length", [100, 1000], ids=["one split", "four splits"])
def test_caller_buffers_are_used(length: int) -> None:
    tensors, options = operands([length, 0, length // 2], new=2, heads=(8, 2))
    # Latent queries as products by heads leave them, rotary ones as a view of a wider slab.
    products = torch.full((8, 6, 64), torch.nan).transpose(0, 1).unflatten(0, (3, 2))
    slab = torch.full((3, 2, 400), torch.nan)[..., 80:208].unflatten(-1, (8, 16))
    pools = torch.full((5, *tensors[2][0].shape), torch.nan)
    for wide, part, at in ((products, 0, ...), (slab, 1, ...), (pools, 2, slice(1, 4, 2))):
        wide[at] = tensors[part]
        tensors[part] = wide[at]
    expected = mla_decode_ref(*tensors, **options)
    out = torch.full((3, 2, 8, 64), torch.nan)
    for _ in range(2):
        with interpreted():
            got = module.mla_decode(*tensors, **options, out=out)
        assert got is out
        torch.testing.assert_close(out.double(), expected, **TOLERANCES[torch.float32])
        out.fill_(torch.nan)


def test_logits_of_any_size_stay_finite() -> None:
    tensors, options = operands([600, 70], scale=300.0)
    with interpreted():
        got = module.mla_decode(*tensors, **options)
    expected = mla_decode_ref(*tensors, **options)
    # fp32 logits of some thousands are off by some 1e-4 themselves.
    torch.testing.assert_close(got.double(), expected, rtol=1e-2, atol=1e-3)


def test_an_empty_batch_launches_nothing() -> None:
    (q, q_rotary, pool, table, lengths), options = operands([5])
    with interpreted():
        got = module.mla_decode(q[:0], q_rotary[:0], pool, table[:0], lengths[:0], **options)
    assert got.shape == (0, 1, 4, 64)


QUERIES = ("q", "q_rotary")
Change = Callable[[dict[str, Any]], dict[str, Any]]


def apart(given: dict[str, Any]) -> dict[str, Any]:
    """The same rows with their keys in a pool of their own."""
    rows = given["pool"]
    return {"pool": rows[:, :64].contiguous(), "keys": rows[:, 64:].contiguous()}


REFUSALS: dict[str, tuple[str, Change]] = {
    "q rank": (r"q=.*\[B, K, H, R\]", lambda a: {"q": a["q"][0]}),
    "q dtype": ("q=.*bfloat16 or float16", lambda a: {"q": a["q"].double()}),
    "q strides": ("q=.*strides", lambda a: {"q": torch.randn(1, 1, 4, 72)[..., :64]}),
    "q start": ("q=.*16 bytes", lambda a: {"q": torch.randn(257)[1:].view(1, 1, 4, 64)}),
    "rotary heads": (r"q_rotary=.*'r'\]", lambda a: {"q_rotary": a["q_rotary"][:, :, :2]}),
    "rotary dtype": ("q_rotary=.*float32", lambda a: {"q_rotary": a["q_rotary"].half()}),
    "rotary strides": (
        "q_rotary=.*strides",
        lambda a: {"q_rotary": torch.randn(1, 1, 4, 24)[..., :16]},
    ),
    "widths": (
        r"\(R, r\)=\(64, 48\) must be one of .*; use backend torch",
        lambda a: {"q_rotary": torch.randn(1, 1, 4, 48)},
    ),
    "no heads": ("q=.*at least one head", lambda a: {n: a[n][:, :, :0] for n in QUERIES}),
    "K": ("K=5 new tokens", lambda a: {n: a[n].repeat(1, 5, 1, 1) for n in QUERIES}),
    "no K": ("K=0 new tokens", lambda a: {n: a[n][:, :0] for n in QUERIES}),
    "page_size": ("page_size=24 .*multiple of 16", lambda a: {"page_size": 24}),
    "pool rank": (r"pool=.*\[G, pages \* 64, 80\]", lambda a: {"pool": a["pool"][None, None]}),
    "pool rows": (r"pool=.*pages \* 128", lambda a: {"page_size": 128}),
    "pool width": (r"pool=.*, 80\]", lambda a: {"pool": a["pool"][:, :64]}),
    "pool heads": ("pool=.*divide the 4", lambda a: {"pool": torch.randn(3, 256, 80)}),
    "pool dtype": ("pool=.*float32, as q is", lambda a: {"pool": a["pool"].half()}),
    "pool strides": ("pool=.*strides", lambda a: {"pool": a["pool"].repeat(1, 2)[:, :80]}),
    "head strides": (
        "pool=.*strides",
        lambda a: {"pool": torch.randn(2 * 10248).as_strided((2, 128, 80), (10248, 80, 1))},
    ),
    "table dtype": ("page_table=.*int32", lambda a: {"page_table": a["page_table"].long()}),
    "table batch": ("page_table=.*int32", lambda a: {"page_table": a["page_table"].repeat(2, 1)}),
    "table empty": ("page_table=.*int32", lambda a: {"page_table": a["page_table"][:, :0]}),
    "lengths": ("lengths=.*int32", lambda a: {"lengths": a["lengths"].long()}),
    "keys rows": ("keys=.*contiguous", lambda a: {**apart(a), "keys": torch.randn(64, 16)}),
    "keys dtype": ("keys=.*float32", lambda a: {**apart(a), "keys": apart(a)["keys"].half()}),
    "keys strides": (
        "keys=.*contiguous",
        lambda a: {**apart(a), "keys": torch.randn(len(a["pool"]), 32)[:, :16]},
    ),
    "keys device": (
        "keys=meta must be on",
        lambda a: {**apart(a), "keys": apart(a)["keys"].to("meta")},
    ),
    "keys window": ("window=3 must be None with keys", lambda a: {**apart(a), "window": 3}),
    "keys page": ("page_size=1 must be above 1", lambda a: {**apart(a), "page_size": 1}),
    "keys widths": (
        r"\(R, r\)=\(64, 48\) must be one of .*; use backend torch",
        lambda a: {**apart(a), "q_rotary": torch.randn(1, 1, 4, 48)},
    ),
    "rows too wide for keys": (
        r"\(R, r\)=\(80, 16\) must be one of",
        lambda a: {**apart(a), "pool": a["pool"]},
    ),
    "q too wide for keys": (
        "q=.*a multiple of 16 columns, up to 64",
        lambda a: {**apart(a), "q": torch.randn(1, 1, 4, 80)},
    ),
    "q odd for keys": (
        "q=.*a multiple of 16 columns, up to 64",
        lambda a: {**apart(a), "q": torch.randn(1, 1, 4, 40)},
    ),
    "q narrow without keys": (
        r"\(R, r\)=\(48, 16\) must be one of",
        lambda a: {"q": torch.randn(1, 1, 4, 48)},
    ),
    "pool without rows": (r"pool=.*\[G, pages", lambda a: {**apart(a), "pool": torch.zeros(())}),
    "window": ("window=0 must", lambda a: {"window": 0}),
    "sinks": ("sinks=-1 must", lambda a: {"sinks": -1}),
    "out": ("out=.*contiguous", lambda a: {"out": torch.empty(1, 1, 4, 80)[..., :64]}),
    "out shape": (r"out=.*\[1, 1, 4, 64\]", lambda a: {"out": torch.empty(1, 1, 4, 80)}),
    "device": ("lengths=meta must be on", lambda a: {"lengths": a["lengths"].to("meta")}),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_arguments_are_refused_before_any_launch(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, options = operands([100])
    names = (*QUERIES, "pool", "page_table", "lengths")
    given = dict(zip(names, tensors, strict=True)) | options
    message, change = REFUSALS[case]
    with interpreted():
        monkeypatch.setattr(type(module.mla_decode_fwd_kernel), "run", _no_launch)
        with pytest.raises(ValueError, match=message):
            module.mla_decode(**(given | change(given)))


def _no_launch(*_: Any, **__: Any) -> None:
    raise AssertionError("launched")


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    tensors, options = operands([100])
    with pytest.raises(ValueError, match="is on cpu, needs cuda"):
        module.mla_decode(*tensors, **options)
