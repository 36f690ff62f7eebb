"""Attention over a window and pooled rows against its float64 oracle in the interpreter."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.pooling.decode as module
from archs.csa import CompressedSparseConfig
from archs.hca import HeavilyCompressedConfig
from archs.sizes import SCALES
from kernels.pooling.decode import CONFIGS, pooled_decode_ref
from kernels.pooling.decode_checks import WIDTHS
from tests.kernels.interpreter import GPUS, interpreted

TOLERANCES = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float16: {"rtol": 2e-3, "atol": 1e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 8e-3},
}


def pool_of(
    read: list[Tensor], most: int, dim: int, page_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rows and their table: of each sequence those at the places `read`, others are NaN, and pages
    without any are nowhere."""
    batch, pages = len(read), len(read) * most + 2
    pool = torch.randn(pages * page_size, dim).to(dtype)
    table = torch.randperm(pages)[: batch * most].view(batch, most).int()
    readable = torch.zeros(len(pool), dtype=torch.bool)
    for b, rows in enumerate(read):
        readable[table[b, rows // page_size].long() * page_size + rows % page_size] = True
        gone = torch.ones(most, dtype=torch.bool)
        gone[torch.unique(rows // page_size)] = False
        table[b, gone] = -(10**6)
    pool[~readable] = torch.nan
    return pool, table


def operands(
    lengths: list[int],
    *,
    new: int = 1,
    heads: int = 4,
    dim: int = 64,
    rope: int = 16,
    page_size: int = 64,
    window: int = 70,
    every: int = 4,
    picks: int | None = None,
    shift: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Sequences of `lengths` tokens, the `new` ones included, in pages of their own.

    shift: by how many places rows of the window stand before their positions. picks: places
    behind those that a token sees are anything.
    """
    near = [torch.arange(max(0, n - new + 1 - window), n) - shift for n in lengths]
    seen = [[(n - new + i + 1) // every for i in range(new)] for n in lengths]
    far, options = [torch.arange(of[-1]) for of in seen], {}
    if picks is not None:
        drawn = torch.full((len(lengths), new, picks), 10**9)
        for b, of in enumerate(seen):
            for i, count in enumerate(of):
                own = torch.randperm(count)[:picks].sort().values
                drawn[b, i, : len(own)] = own
        far = [at[at < 10**9].unique() for at in drawn]
        options["picks"] = drawn
    most = max(lengths)
    (near_pool, near_table), (far_pool, far_table) = (
        pool_of(read, max(1, -(-rows // page_size)), dim, page_size, dtype)
        for read, rows in ((near, most), (far, most // every))
    )
    held, turn = torch.tensor(lengths, dtype=torch.int32), torch.rand(most + 1, rope // 2) * 6
    tensors = {
        "q": torch.randn(len(lengths), new, heads, dim).to(dtype), "near": near_pool,
        "near_table": near_table, "lengths": held - shift, "far": far_pool, "far_table": far_table,
        "past": held - new, "sinks": torch.randn(heads),
        "cos_sin": torch.stack((turn.cos(), turn.sin()), -1), **options,
    }  # fmt: skip
    return tensors, {"scale": 0.15, "page_size": page_size, "window": window, "every": every}


def assert_equals_the_oracle(lengths: list[int], **how: Any) -> None:
    tensors, options = operands(lengths, **how)
    with interpreted():
        got = module.pooled_decode(**tensors, **options)
    expected = pooled_decode_ref(**tensors, **options)
    assert got.dtype == tensors["q"].dtype
    torch.testing.assert_close(got.double(), expected, **TOLERANCES[got.dtype])


@pytest.mark.parametrize("lengths", [[1], [3], [64], [65], [1000], [900, 1, 131, 7]], ids=str)
@pytest.mark.parametrize("page_size", [16, 48, 64, 128])
def test_lengths_and_shuffled_pages(lengths: list[int], page_size: int) -> None:
    """From no pooled row and a window that is not full to several splits."""
    assert_equals_the_oracle(lengths, page_size=page_size)


@pytest.mark.parametrize("new", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("heads", [1, 8, 17, 40])
def test_every_new_token_sees_its_own_rows(new: int, heads: int) -> None:
    """Before a group's end, at it and behind it."""
    assert_equals_the_oracle([300, new, 130, 129], new=new, heads=heads)


@pytest.mark.parametrize("window", [1, 5, 64, 200, 5000])
@pytest.mark.parametrize("every", [1, 3, 128])
def test_windows_and_groups(window: int, every: int) -> None:
    assert_equals_the_oracle([700, 90, 3], window=window, every=every, new=3, page_size=16)


@pytest.mark.parametrize("picks", [1, 3, 40, 70, 150])
@pytest.mark.parametrize(("new", "page_size"), [(1, 64), (3, 16), (4, 48)])
def test_picked_rows(picks: int, new: int, page_size: int) -> None:
    """More than there are, and fewer; over several splits."""
    assert_equals_the_oracle([700, 90, 15, new], picks=picks, new=new, page_size=page_size)


@pytest.mark.parametrize("picks", [None, 100])
def test_places_of_the_window_are_not_positions(picks: int | None) -> None:
    """Where a step's rows and those before them were joined, they stand at places of their own."""
    assert_equals_the_oracle([700, 600], shift=500, new=2, picks=picks)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("heads", [16, 20, 64, 70])
@pytest.mark.parametrize("dim", [32, 64, 96, 256, 512])
def test_every_tile(dim: int, heads: int, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "gpu", lambda device: GPUS[family])
    # A small GPU, so that a program has as many heads as it can.
    monkeypatch.setattr(module, "multiprocessors", lambda device: 4)
    assert_equals_the_oracle([290], dim=dim, heads=heads, picks=33 if heads == 20 else None)


@pytest.mark.parametrize("dim", WIDTHS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_widths_and_dtypes(dim: int, dtype: torch.dtype) -> None:
    assert_equals_the_oracle([270, 70], dim=dim, rope=dim // 2, dtype=dtype, new=2, picks=9)


@pytest.mark.parametrize("rope", [2, 16, 96])
def test_channels_with_positions(rope: int) -> None:
    assert_equals_the_oracle([200, 5], dim=96, rope=rope, new=2)


@pytest.mark.parametrize("scale", sorted(set(SCALES) - {"nano"}))  # nano: rows of 16 are refused.
@pytest.mark.parametrize("config", [HeavilyCompressedConfig, CompressedSparseConfig])
def test_every_scale_is_served(scale: str, config: type[HeavilyCompressedConfig]) -> None:
    assert config.at(SCALES[scale], {}).dim in WIDTHS


@pytest.mark.parametrize(("batch", "heads"), [(1, 16), (40, 64), (200, 64)])
def test_a_small_batch_divides_heads_further(batch: int, heads: int) -> None:
    q = torch.empty(batch, 1, 64, 256, dtype=torch.bfloat16)
    assert module.config_of(q, splits=2 if batch < 100 else 20, programs=132)[0] == heads


@pytest.mark.parametrize("length", [100, 1000], ids=["one split", "several splits"])
def test_caller_buffers_are_used(length: int) -> None:
    tensors, options = operands([length, 1 + length // 2], new=1, heads=8)
    slab = torch.full((2, 1, 1024), torch.nan)[..., 80:592].unflatten(-1, (8, 64))
    slab.copy_(tensors["q"])
    expected = pooled_decode_ref(**tensors, **options)
    out = torch.full((2, 1, 8, 64), torch.nan)
    for _ in range(2):
        with interpreted():
            got = module.pooled_decode(**{**tensors, "q": slab}, **options, out=out)
        assert got is out
        torch.testing.assert_close(out.double(), expected, **TOLERANCES[torch.float32])
        out.fill_(torch.nan)


def test_logits_of_any_size_stay_finite() -> None:
    tensors, options = operands([600, 70])
    options["scale"], tensors["sinks"] = 300.0, torch.tensor([3e4, -3e4, 1e3, -torch.inf])
    with interpreted():
        got = module.pooled_decode(**tensors, **options)
    expected = pooled_decode_ref(**tensors, **options)
    # fp32 logits of some thousands are off by some 1e-4 themselves.
    torch.testing.assert_close(got.double(), expected, rtol=1e-2, atol=1e-3)


def test_a_token_past_the_angles_is_not_turned() -> None:
    tensors, options = operands([80, 20])
    tensors["cos_sin"] = tensors["cos_sin"][:40].contiguous()
    with interpreted():
        got = module.pooled_decode(**tensors, **options)
    expected = pooled_decode_ref(**tensors, **options)
    torch.testing.assert_close(got.double(), expected, **TOLERANCES[torch.float32])


def test_an_empty_batch_launches_nothing() -> None:
    tensors, options = operands([5])
    whole = ("near", "far", "sinks", "cos_sin")
    of_none = {name: t if name in whole else t[:0] for name, t in tensors.items()}
    with interpreted():
        assert module.pooled_decode(**of_none, **options).shape == (0, 1, 4, 64)


Change = Callable[[dict[str, Any]], dict[str, Any]]


def replaced(name: str, change: Callable[[Tensor], Tensor]) -> Change:
    return lambda given: {name: change(given[name])}


REFUSALS: dict[str, tuple[str, Change]] = {
    "q rank": (r"q=.*\[B, K, H, d\]", replaced("q", lambda q: q[0])),
    "q dtype": ("q=.*bfloat16 or float16", replaced("q", Tensor.double)),
    "q strides": ("q=.*strides", lambda _: {"q": torch.randn(1, 1, 4, 72)[..., :64]}),
    "q start": ("q=.*16 bytes", lambda _: {"q": torch.randn(257)[1:].view(1, 1, 4, 64)}),
    "width": (
        r"d=48 must be one of .*; use backend torch",
        lambda _: {"q": torch.randn(1, 1, 4, 48)},
    ),
    "no heads": ("q=.*at least one head", replaced("q", lambda q: q[:, :, :0])),
    "K": ("K=10 new tokens", replaced("q", lambda q: q.repeat(1, 10, 1, 1))),
    "no K": ("K=0 new tokens", replaced("q", lambda q: q[:, :0])),
    "page_size": ("page_size=24 .*multiple of 16", lambda _: {"page_size": 24}),
    "page of one row": ("page_size=1 .*multiple of 16", lambda _: {"page_size": 1}),
    "window": ("window=0 must", lambda _: {"window": 0}),
    "every": ("every=0 must", lambda _: {"every": 0}),
    **{
        f"{pool} {what}": (f"{pool}=.*contiguous", replaced(pool, change))
        for pool in ("near", "far")
        for what, change in (
            ("rank", lambda t: t[None]), ("rows", lambda t: t[:-1]), ("dtype", Tensor.half),
            ("width", lambda t: t[:, :32]), ("strides", lambda t: t.repeat(1, 2)[:, :64]),
            ("start", lambda t: torch.randn(t.numel() + 1)[1:].view_as(t)),
        )
    },
    **{
        f"{table} {what}": (f"{table}=.*int32", replaced(table, change))
        for table in ("near_table", "far_table")
        for what, change in (
            ("dtype", Tensor.long), ("batch", lambda t: t.repeat(2, 1)),
            ("empty", lambda t: t[:, :0]),
        )
    },
    "lengths": ("lengths=.*int32", replaced("lengths", Tensor.long)),
    "past": ("past=.*int32", replaced("past", lambda t: t.repeat(2))),
    "sinks": (r"sinks=.*\[4\]", replaced("sinks", lambda t: t[:3])),
    "sinks dtype": ("sinks=.*float32", replaced("sinks", Tensor.half)),
    "angles": ("cos_sin=.*1 to 32", replaced("cos_sin", lambda t: t.repeat(1, 5, 1))),
    "angles dtype": ("cos_sin=.*float32", replaced("cos_sin", Tensor.double)),
    "picks": (r"picks=.*int64 \[1, 1, picks\]", replaced("picks", Tensor.int)),
    "no picks": ("picks=.*int64", replaced("picks", lambda t: t[..., :0])),
    "out": ("out=.*contiguous", lambda _: {"out": torch.empty(1, 1, 4, 80)[..., :64]}),
    "out shape": (r"out=.*\[1, 1, 4, 64\]", lambda _: {"out": torch.empty(1, 1, 4, 32)}),
    "device": ("past=meta must be on", replaced("past", lambda t: t.to("meta"))),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_arguments_are_refused_before_any_launch(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors, options = operands([100], picks=3)
    given, (message, change) = tensors | options, REFUSALS[case]
    with interpreted():
        monkeypatch.setattr(type(module.pooled_decode_fwd_kernel), "run", _no_launch)
        with pytest.raises(ValueError, match=message):
            module.pooled_decode(**(given | change(given)))


def _no_launch(*_: Any, **__: Any) -> None:
    raise AssertionError("launched")


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    tensors, options = operands([100])
    with pytest.raises(ValueError, match="is on cpu, needs cuda"):
        module.pooled_decode(**tensors, **options)
