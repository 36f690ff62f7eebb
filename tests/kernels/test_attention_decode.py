"""Split decode attention against its float64 oracle in the interpreter, and compiled ahead."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import kernels.attention.decode as module
from archs.sizes import SCALES
from kernels.attention.decode import CONFIGS, TIED_CONFIGS, attention_decode_ref
from kernels.attention.decode_checks import HEAD_DIMS
from kernels.rope.torch import rope_table
from tests.kernels.interpreter import interpreted

TOLERANCES = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 1e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 8e-3},
}


def operands(
    lengths: list[int],
    *,
    new: int = 1,
    heads: tuple[int, int] = (8, 2),
    dim: int = 32,
    page_size: int = 64,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    sunk: bool = False,
    tied: bool = False,
    **options: Any,
) -> tuple[list[Any], dict[str, Any]]:
    """A pool of shuffled pages with spare ones; rows that nobody may read are NaN.

    sunk: with logits of sinks; tied: rows are keys and values.
    """
    h, g = heads
    batch, most = len(lengths), max(1, -(-max(lengths) // page_size))
    pages = batch * most + 3
    pool = torch.randn(2, g, pages * page_size, dim)
    options = {"page_size": page_size, **options}
    if kv_dtype is not None:
        scales = torch.rand(2, g, pages * page_size) + 0.5
        if kv_dtype == torch.int8:
            pool = (pool * 40).round().clamp(-128, 127)
            scales /= 40
    table = torch.randperm(pages)[: batch * most].view(batch, most).int()
    readable = torch.zeros(pages * page_size, dtype=torch.bool)
    for b, length in enumerate(lengths):
        rows = torch.arange(length)
        if options.get("window") is not None:
            first = length - new - options["window"]
            rows = rows[(rows > first) | (rows < options.get("sinks", 0))]
        readable[table[b, rows // page_size].long() * page_size + rows % page_size] = True
        held = torch.unique(rows // page_size)
        gone = torch.ones(most, dtype=torch.bool).index_fill_(0, held, False)
        table[b, gone] = -(10**6)
    if kv_dtype != torch.int8:
        pool[:, :, ~readable] = torch.nan
    if kv_dtype is not None:
        scales[..., ~readable] = torch.nan
        options["k_scale"], options["v_scale"] = scales
    k, v = pool.to(kv_dtype or dtype)
    q = torch.randn(batch, new, h, dim).to(dtype)
    if sunk:
        options["sink_logits"] = 2 * torch.randn(h).to(dtype)
    if tied:
        angles = rope_table(max(lengths), dim, 1e4, torch.device("cpu"))
        options |= {"cos_sin": torch.view_as_real(angles).squeeze(1), "v_scale": None}
        options.setdefault("key_weight", torch.randn(dim).to(dtype))
    rows = [q, k, None if tied else v]
    return [*rows, table, torch.tensor(lengths, dtype=torch.int32)], options


def assert_equals_the_oracle(lengths: list[int], **how: Any) -> None:
    tensors, options = operands(lengths, **how)
    with interpreted():
        got = module.attention_decode(*tensors, **options)
    expected = attention_decode_ref(*tensors, **options)
    assert got.dtype == tensors[0].dtype
    torch.testing.assert_close(got.double(), expected, **TOLERANCES[got.dtype])


@pytest.mark.parametrize("lengths", [[1], [63], [64], [1000], [0, 130, 5]], ids=str)
@pytest.mark.parametrize("page_size", [1, 16, 48, 64, 128])
def test_lengths_and_shuffled_pages(lengths: list[int], page_size: int) -> None:
    assert_equals_the_oracle(lengths, page_size=page_size)


@pytest.mark.parametrize("new", [1, 2, 3, 9])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (6, 2), (16, 1)], ids=str)
def test_new_tokens_are_causal_whatever_the_heads(new: int, heads: tuple[int, int]) -> None:
    # The shortest sequence has rows for one token only: the others return zeros.
    assert_equals_the_oracle([600, new, 1], new=new, heads=heads)


@pytest.mark.parametrize(("window", "sinks"), [(1, 0), (70, 0), (100, 4), (64, 70), (2000, 3)])
@pytest.mark.parametrize(("new", "page_size"), [(1, 64), (3, 16)])
def test_window_and_sinks(window: int, sinks: int, new: int, page_size: int) -> None:
    assert_equals_the_oracle(
        [1000, 90, 3], window=window, sinks=sinks, new=new, page_size=page_size
    )


@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_head_dims_and_dtypes(dim: int, dtype: torch.dtype) -> None:
    assert_equals_the_oracle([300, 70], dim=dim, dtype=dtype, new=2, scale=0.2)


@pytest.mark.parametrize("kv_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("lengths", "new"), [([300, 0], 1), ([700], 1), ([300, 2], 3)], ids=str)
def test_eight_bit_cache(
    lengths: list[int], new: int, dtype: torch.dtype, kv_dtype: torch.dtype
) -> None:
    assert_equals_the_oracle(lengths, new=new, dtype=dtype, kv_dtype=kv_dtype, dim=64)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    "how",
    [
        {"new": 3},
        {"window": 70, "new": 2},
        {"window": 40, "sinks": 5, "page_size": 16},
        {"page_size": 1},
        {"kv_dtype": torch.int8, "new": 2},
        {"kv_dtype": torch.float8_e4m3fn, "window": 100, "sinks": 3},
    ],
    ids=str,
)
def test_logits_of_sinks(how: dict[str, Any], dtype: torch.dtype) -> None:
    # Of one split and of several, and of nothing that is seen beside the sink.
    assert_equals_the_oracle([1000, 90, 3, 0], dtype=dtype, sunk=True, **how)


@pytest.mark.parametrize("logit", [-math.inf, -200.0, 200.0])
def test_a_sink_may_take_nothing_or_all(logit: float) -> None:
    tensors, options = operands([600, 40])
    plain = attention_decode_ref(*tensors, **options)
    options["sink_logits"] = torch.full((8,), logit)
    with interpreted():
        got = module.attention_decode(*tensors, **options).double()
    expected = plain if logit < 0 else torch.zeros_like(plain)
    torch.testing.assert_close(got, expected, **TOLERANCES[torch.float32])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("kv_dtype", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(
    "how",
    [{"new": 3}, {"page_size": 16, "sunk": True, "dim": 64}, {"key_weight": None, "heads": (4, 4)}],
    ids=str,
)
def test_rows_that_are_keys_and_values(
    how: dict[str, Any], kv_dtype: torch.dtype | None, dtype: torch.dtype
) -> None:
    assert_equals_the_oracle([1000, 90, 3, 0], dtype=dtype, kv_dtype=kv_dtype, tied=True, **how)


@pytest.mark.parametrize("hip", [None, "6"], ids=["nvidia", "amd"])
@pytest.mark.parametrize(("dim", "m"), TIED_CONFIGS)
def test_every_tile_of_rows_that_are_both(
    dim: int, m: int, hip: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    assert_equals_the_oracle([290], dim=dim, heads=(m - 1, 1), tied=True)


@pytest.mark.parametrize("hip", [None, "6"], ids=["nvidia", "amd"])
@pytest.mark.parametrize(("dim", "m", "eight_bit"), CONFIGS)
def test_every_tile(
    dim: int, m: int, eight_bit: bool, hip: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    kv_dtype = torch.int8 if eight_bit else None
    assert_equals_the_oracle([290], dim=dim, heads=(m - 1, 1), kv_dtype=kv_dtype)


@pytest.mark.parametrize("scale", sorted(set(SCALES) - {"nano"}))  # nano: heads of 16 are refused.
def test_every_scale_is_served(scale: str) -> None:
    assert SCALES[scale].head_dim in HEAD_DIMS


def test_equals_torch() -> None:
    tensors, options = operands([192, 192], heads=(8, 2), dim=64)
    q, k, v, table, _ = tensors
    rows = (table.long()[:, :, None] * 64 + torch.arange(64)).flatten(1)
    k, v = (t[:, rows].transpose(0, 1) for t in (k, v))
    expected = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, enable_gqa=True)
    with interpreted():
        got = module.attention_decode(*tensors, **options)
    torch.testing.assert_close(got, expected.transpose(1, 2), **TOLERANCES[torch.float32])


@pytest.mark.parametrize("length", [100, 1000], ids=["one split", "four splits"])
def test_caller_buffers_are_used(length: int) -> None:
    tensors, options = operands([length, 0, length // 2], new=2)
    wide = torch.randn(3, 2, 24, 32)
    tensors[0] = wide[:, :, 8:16]
    expected = attention_decode_ref(*tensors, **options)
    out = torch.full((3, 2, 8, 32), torch.nan)
    for _ in range(2):
        with interpreted():
            got = module.attention_decode(*tensors, **options, out=out)
        assert got is out
        torch.testing.assert_close(out.double(), expected, **TOLERANCES[torch.float32])
        out.fill_(torch.nan)


def test_an_empty_batch_launches_nothing() -> None:
    (q, k, v, table, lengths), options = operands([5])
    with interpreted():
        got = module.attention_decode(q[:0], k, v, table[:0], lengths[:0], **options)
    assert got.shape == (0, 1, 8, 32)


Change = Callable[[dict[str, Any]], dict[str, Any]]
FACTORS = {"k_scale": torch.ones(2, 320), "v_scale": torch.ones(2, 320)}
ANGLES = torch.zeros(200, 16, 2)
REFUSALS: dict[str, tuple[str, Change]] = {
    "q rank": (r"q=.*\[B, K, H, d\]", lambda a: {"q": a["q"][0]}),
    "q dtype": ("q=.*bfloat16 or float16", lambda a: {"q": a["q"].double()}),
    "q strides": ("q=.*strides", lambda a: {"q": torch.randn(1, 1, 8, 40)[..., :32]}),
    "q start": ("q=.*16 bytes", lambda a: {"q": torch.randn(257)[1:].view(1, 1, 8, 32)}),
    "head_dim": ("head_dim=48 must be one of", lambda a: {"q": torch.randn(1, 1, 8, 48)}),
    "K": ("K=10 new tokens", lambda a: {"q": torch.randn(1, 10, 8, 32)}),
    "page_size": (
        "page_size=24 must be 1 or a positive multiple of 16",
        lambda a: {"page_size": 24},
    ),
    "window of rows": (
        "window=9 must be None with pages of 1",
        lambda a: {"page_size": 1, "window": 9},
    ),
    "pool rows": (r"k_pool=.*pages \* 128", lambda a: {"page_size": 128}),
    "pool heads": ("k_pool=.*divide the 8", lambda a: {"k_pool": torch.randn(3, 256, 32)}),
    "pool dtype": ("v_pool=.*int8 or", lambda a: {"v_pool": a["v_pool"].half()}),
    "pool strides": (
        "v_pool=.*strides",
        lambda a: {"v_pool": a["v_pool"].repeat(1, 1, 2)[..., :32]},
    ),
    "words of a pool": (
        r"k_pool=.*strides \[32i",
        lambda a: {
            "k_pool": torch.zeros(20_000, dtype=torch.int8).as_strided((2, 256, 32), (8208, 32, 1)),
            **FACTORS,
        },
    ),
    "pools differ": ("v_pool=.*k_pool's form", lambda a: {"v_pool": a["v_pool"][:, :64]}),
    "table dtype": ("page_table=.*int32", lambda a: {"page_table": a["page_table"].long()}),
    "table batch": ("page_table=.*int32", lambda a: {"page_table": a["page_table"].repeat(2, 1)}),
    "table empty": ("page_table=.*int32", lambda a: {"page_table": a["page_table"][:, :0]}),
    "lengths": ("lengths=.*int32", lambda a: {"lengths": a["lengths"].long()}),
    "window": ("window=0 must", lambda a: {"window": 0}),
    "sinks": ("sinks=-1 must", lambda a: {"sinks": -1}),
    "scales unwanted": ("k_scale=.*8 bits", lambda a: FACTORS),
    "scales missing": (
        "k_scale=None .*8 bits",
        lambda a: {n: a[n].to(torch.int8) for n in ("k_pool", "v_pool")},
    ),
    "scale shape": (
        r"v_scale=.*\[2, 320\]",
        lambda a: {
            **{n: a[n].nan_to_num().to(torch.int8) for n in ("k_pool", "v_pool")},
            **FACTORS,
            "v_scale": torch.ones(2),
        },
    ),
    "logits of sinks": (
        r"sink_logits=.*float32 \[8\]",
        lambda a: {"sink_logits": torch.zeros(8).half()},
    ),
    "angles unwanted": ("cos_sin=.*exactly when v_pool is None", lambda a: {"cos_sin": ANGLES}),
    "angles missing": ("cos_sin=None must be given", lambda a: {"v_pool": None}),
    "angles too few": (
        r"cos_sin=.*\[>= 128, 16, 2\]",
        lambda a: {"v_pool": None, "cos_sin": ANGLES[:100]},
    ),
    "angles and a window": (
        "cos_sin=.*must be None with a window",
        lambda a: {"v_pool": None, "cos_sin": ANGLES, "window": 9},
    ),
    "weight of no keys": (
        "key_weight=.*must be None without",
        lambda a: {"key_weight": torch.ones(32)},
    ),
    "weight shape": (
        r"key_weight=.*\[32\]",
        lambda a: {"v_pool": None, "cos_sin": ANGLES, "key_weight": torch.ones(16)},
    ),
    "out": ("out=.*contiguous", lambda a: {"out": torch.empty(1, 1, 8, 64)[..., :32]}),
    "device": ("lengths=meta must be on", lambda a: {"lengths": a["lengths"].to("meta")}),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_arguments_are_refused_before_any_launch(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, options = operands([100])
    given = dict(zip(("q", "k_pool", "v_pool", "page_table", "lengths"), tensors, strict=True))
    given |= options
    message, change = REFUSALS[case]
    with interpreted():
        monkeypatch.setattr(type(module.attention_decode_fwd_kernel), "run", _no_launch)
        with pytest.raises(ValueError, match=message):
            module.attention_decode(**(given | change(given)))


def _no_launch(*_: Any, **__: Any) -> None:
    raise AssertionError("launched")


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    tensors, options = operands([100])
    with pytest.raises(ValueError, match="is on cpu, needs cuda"):
        module.attention_decode(*tensors, **options)
