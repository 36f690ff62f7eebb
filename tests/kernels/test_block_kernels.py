"""Kernels of native sparse attention in the interpreter, against float64 oracles; refusals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.blocks.append as append_module
import kernels.blocks.pages as pages_module
import kernels.blocks.scan as scan_module
from kernels.blocks.append import block_append_ref
from kernels.blocks.pages import block_pages_ref, unit_of
from kernels.blocks.scan import block_scan_ref, scores_of
from kernels.blocks.torch import best_blocks
from tests.kernels.interpreter import interpreted

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
#: Weights are made of products in float32.
WEIGHTS = 2e-6
#: What means are before.
OLD = 7.0
Given = dict[str, Any]


def table_of(lengths: tuple[int, ...], tokens: int, page_size: int) -> tuple[Tensor, int]:
    """Shuffled pages of these and `tokens` more rows, and how many pages there are; what a sequence
    does not hold is no page.
    """
    batch, most = len(lengths), max(1, -(-(max(lengths) + tokens) // page_size))
    pages = batch * most + 2
    table = torch.randperm(pages)[: batch * most].view(batch, most).int()
    for b, length in enumerate(lengths):
        table[b, -(-(length + tokens) // page_size) :] = -(10**6)
    return table, pages


def place(table: Tensor, rows: Tensor, page_size: int) -> Tensor:
    return table[rows // page_size].long() * page_size + rows % page_size


# -- means -----------------------------------------------------------------------------------------


def append_operands(
    lengths: tuple[int, ...] = (70, 0, 3), *, tokens: int = 3, block: int = 8, heads: int = 2,
    dim: int = 32, page_size: int = 16, dtype: torch.dtype = torch.float32, ragged: bool = False,
) -> Given:  # fmt: skip
    """Rows in shuffled pages, unwritten ones NaN, and means that nobody asked for."""
    table, pages = table_of(lengths, tokens, page_size)
    whole = tuple(n // block for n in lengths)
    mean_table, mean_pages = table_of(whole, -(-tokens // block) + 1, page_size)
    pool = torch.full((2, heads, pages * page_size, dim), torch.nan, dtype=dtype)
    for b, length in enumerate(lengths):
        at = place(table[b], torch.arange(length + tokens), page_size)
        pool[:, :, at] = torch.randn(2, heads, len(at), dim).to(dtype)
    counts = torch.tensor([(tokens, 0, 1)[b % 3] for b in range(len(lengths))], dtype=torch.int32)
    return {
        "pool": pool, "page_table": table, "lengths": torch.tensor(lengths, dtype=torch.int32),
        "means": torch.full((2, heads, mean_pages * page_size, dim), OLD, dtype=dtype),
        "mean_table": mean_table, "tokens": tokens, "block": block, "page_size": page_size,
        "new": counts if ragged else None,
    }  # fmt: skip


def run_append(given: Given) -> Tensor:
    means = given["means"].clone()
    with interpreted():
        append_module.block_append(**given | {"means": means})
    return means


@pytest.mark.parametrize("block", [1, 3, 8, 64, 100])
@pytest.mark.parametrize("tokens", [1, 7, 9])
@pytest.mark.parametrize("ragged", [False, True])
def test_means_of_completed_blocks_equal_the_oracle(block: int, tokens: int, ragged: bool) -> None:
    lengths = (block * 2 - 1, 0, 130, max(0, block - 3))
    given = append_operands(lengths, tokens=tokens, block=block, ragged=ragged)
    wanted = block_append_ref(**given)
    torch.testing.assert_close(run_append(given).double(), wanted, rtol=1e-6, atol=1e-6)
    assert (wanted != OLD).any() or ragged


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("dim", "page_size"), [(32, 16), (48, 5), (256, 64)])
def test_means_in_every_dtype_width_and_page(dtype: torch.dtype, dim: int, page_size: int) -> None:
    given = append_operands((63, 20), dtype=dtype, dim=dim, page_size=page_size, tokens=9)
    wanted, limit = block_append_ref(**given), TOLERANCES[dtype]
    torch.testing.assert_close(run_append(given).double(), wanted, rtol=limit, atol=limit)
    assert (wanted != OLD).any()


def test_a_mean_does_not_depend_on_how_its_rows_came() -> None:
    given = append_operands((0,), tokens=40, block=8)
    whole = run_append(given)
    for past, tokens in ((7, 1), (30, 3), (15, 25)):
        step = given | {"lengths": torch.tensor([past], dtype=torch.int32), "tokens": tokens}
        part = run_append(step)
        made = part != OLD
        assert made.any() and torch.equal(part[made], whole[made])


# -- attention over means --------------------------------------------------------------------------


def scan_operands(
    lengths: tuple[int, ...] = (70, 0, 3), *, tokens: int = 1, block: int = 4,
    heads: tuple[int, int] = (4, 2), dim: int = 32, page_size: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Given:  # fmt: skip
    """Queries as columns of a wider projection of NaN; shuffled pages, unwritten means NaN."""
    h, g = heads
    held = tuple((n + tokens) // block for n in lengths)
    table, pages = table_of(held, 0, page_size)
    wide = torch.full((len(lengths), tokens, (h + 2) * dim), torch.nan, dtype=dtype)
    q = wide[..., 2 * dim :].unflatten(-1, (h, dim))
    q.copy_(torch.randn(q.shape))
    pool = torch.full((2, g, pages * page_size, dim), torch.nan, dtype=dtype)
    for b, count in enumerate(held):
        at = place(table[b], torch.arange(count), page_size)
        pool[:, :, at] = torch.randn(2, g, count, dim).to(dtype)
    return {
        "q": q, "k_pool": pool[0], "v_pool": pool[1], "page_table": table,
        "lengths": torch.tensor(lengths, dtype=torch.int32), "means": table.shape[1] * page_size,
        "block": block, "page_size": page_size,
    }  # fmt: skip


def run_scan(given: Given) -> tuple[Tensor, Tensor]:
    with interpreted():
        found: tuple[Tensor, Tensor] = scan_module.block_scan(**given)
    return found


def assert_scan_equals_the_oracle(given: Given) -> None:
    out, ranks = run_scan(given)
    wanted, scores = block_scan_ref(**given)
    limit = TOLERANCES[given["q"].dtype]
    torch.testing.assert_close(out.double(), wanted, rtol=limit, atol=limit)
    got = scores_of(ranks).double()
    torch.testing.assert_close(got, scores, rtol=WEIGHTS, atol=WEIGHTS)
    # Their order is that of the torch form's choice on the same scores.
    tokens = given["q"].shape[1]
    own = (given["lengths"].long()[:, None] + torch.arange(tokens)) // given["block"]
    for count in (3, 5, given["means"] + 2):
        at, valid = best_blocks(scores_of(ranks).clamp(min=0.0), own, count)
        chosen = ranks.topk(count - 2, -1).indices
        there = torch.arange(count - 2) < (own - 1)[..., None, None]
        for a, v, c, kept in zip(*(t.flatten(0, -2) for t in (
            at, valid, chosen, there.expand(chosen.shape)
        )), strict=True):  # fmt: skip
            assert set(a[v].tolist()) == set(c[kept].tolist())


@pytest.mark.parametrize("page_size", [16, 48, 64, 128])
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("block", [1, 4])
def test_scan_of_tokens_pages_and_lengths(tokens: int, page_size: int, block: int) -> None:
    assert_scan_equals_the_oracle(
        scan_operands((300, 0, 63), tokens=tokens, page_size=page_size, block=block)
    )


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (17, 1), (64, 1)], ids=str)
@pytest.mark.parametrize("dim", [32, 128])
def test_scan_of_heads_and_widths(heads: tuple[int, int], dim: int) -> None:
    assert_scan_equals_the_oracle(scan_operands((100,), heads=heads, dim=dim))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_scan_in_every_dtype(dtype: torch.dtype) -> None:
    assert_scan_equals_the_oracle(scan_operands(dtype=dtype, tokens=2))


def test_a_rank_does_not_depend_on_other_tokens_or_on_later_blocks() -> None:
    given = scan_operands((600,), tokens=9)
    out, whole = run_scan(given)
    for i in (0, 4, 8):
        alone = given | {"q": given["q"][:, i : i + 1], "lengths": given["lengths"] + i}
        mine, ranks = run_scan(alone)
        assert torch.equal(ranks[:, 0], whole[:, i]) and torch.equal(mine[:, 0], out[:, i])
    _, fewer = run_scan(given | {"means": 153})
    assert torch.equal(scores_of(fewer), scores_of(whole)[..., :153])


def test_the_first_block_stands_above_and_the_newest_below_all() -> None:
    given = scan_operands((40,), block=4)
    given["q"].zero_()
    _, ranks = run_scan(given)
    # The token is in block 10; without a preference the earlier blocks come first.
    assert ranks[0, 0, 0].topk(9).indices.tolist() == list(range(9))
    assert scores_of(ranks)[0, 0, 0, 9:].max() == -torch.inf


# -- pages of picked blocks ------------------------------------------------------------------------


def pages_operands(
    lengths: tuple[int, ...] = (70, 0, 3, 40), *, tokens: int = 2, block: int = 8, picked: int = 3,
    heads: int = 2, page_size: int = 16,
) -> Given:  # fmt: skip
    table, pages = table_of(lengths, tokens, page_size)
    picks = torch.full((len(lengths), tokens, heads, picked), 10**9)
    for b, length in enumerate(lengths):
        for i in range(tokens):
            older = max(0, (length + i) // block - 1)
            for g in range(heads):
                chosen = torch.randperm(older)[:picked]
                picks[b, i, g, : len(chosen)] = chosen
    return {
        "picks": picks, "page_table": table.clamp(min=0), "block": block, "page_size": page_size,
        "lengths": torch.tensor(lengths, dtype=torch.int32), "pool_rows": pages * page_size,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("block", "page_size"), [(1, 16), (8, 16), (16, 16), (64, 16), (16, 64), (48, 32), (3, 5)]
)
@pytest.mark.parametrize("picked", [1, 3, 14])
def test_pages_are_those_of_the_blocks_in_order(block: int, page_size: int, picked: int) -> None:
    lengths = (9 * block, 0, 1, 2 * block - 1, 40 * block + 1)
    given = pages_operands(lengths, block=block, page_size=page_size, picked=picked)
    with interpreted():
        table, counts = pages_module.block_pages(**given)
    unit, rows = unit_of(block, page_size), given["pool_rows"]
    assert table.shape[1] == (picked + 2) * block // unit
    options = {name: value for name, value in given.items() if name != "pool_rows"}
    for each, wanted in enumerate(block_pages_ref(**options)):
        at = torch.arange(int(counts[each]))
        got = table[each, at // unit].long() * unit + at % unit
        assert torch.equal(got - each % 2 * rows, wanted)
    # Entries behind the last row are pages, too.
    assert int(table.min()) >= 0 and int(table.max()) < 2 * rows // unit


@pytest.mark.parametrize(
    ("block", "page_size", "unit"),
    [(64, 64, 64), (64, 16, 16), (32, 64, 32), (48, 64, 16), (96, 64, 32), (8, 16, 1), (24, 48, 1)],
)
def test_units_divide_blocks_and_pages(block: int, page_size: int, unit: int) -> None:
    assert unit_of(block, page_size) == unit


# -- refusals --------------------------------------------------------------------------------------

Change = Callable[[Given], Given]
OPS: dict[str, tuple[Any, Callable[[], Given]]] = {
    "block_append": (append_module, append_operands),
    "block_scan": (scan_module, scan_operands),
    "block_pages": (pages_module, pages_operands),
}
REFUSALS: list[tuple[str, str, Change]] = [
    ("block_append", "tokens=0 must be at least 1", lambda a: {"tokens": 0}),
    ("block_append", "block=0 must be at least 1", lambda a: {"block": 0}),
    ("block_append", "page_size=0 must be", lambda a: {"page_size": 0}),
    ("block_append", r"pool=.*must be contiguous float \[2, G", lambda a: {"pool": a["pool"][0]}),
    ("block_append", "means=.*heads, chan", lambda a: {"means": a["means"][:, :1].contiguous()}),
    ("block_append", "page_table=.*int32", lambda a: {"page_table": a["page_table"].long()}),
    ("block_append", "mean_table=.*int32", lambda a: {"mean_table": a["mean_table"][:1]}),
    ("block_append", "lengths=.*int32", lambda a: {"lengths": a["lengths"].long()}),
    ("block_append", "new=.*int32", lambda a: {"new": a["lengths"][:1]}),
    ("block_append", "means=meta must be on", lambda a: {"means": a["means"].to("meta")}),
    ("block_scan", r"q=.*must be \[B, K, H, d\]", lambda a: {"q": a["q"][0]}),
    ("block_scan", "q=.*bfloat16 or float16", lambda a: {"q": a["q"].double()}),
    ("block_scan", "head_dim=16 must be one of", lambda a: {"q": a["q"][..., :16]}),
    ("block_scan", "q=.*strides", lambda a: {"q": a["q"].mT.contiguous().mT}),
    ("block_scan", "page_size=24 must be a", lambda a: {"page_size": 24}),
    ("block_scan", "block=0 must be at least 1", lambda a: {"block": 0}),
    ("block_scan", "k_pool=.*rows packed", lambda a: {"k_pool": a["k_pool"].half()}),
    ("block_scan", "v_pool=.*must have k_pool", lambda a: {"v_pool": a["v_pool"][:1]}),
    ("block_scan", "k_pool=.*divide the 3 of q", lambda a: {"q": a["q"][:, :, :3]}),
    ("block_scan", "page_table=.*int32", lambda a: {"page_table": a["page_table"].long()}),
    ("block_scan", "means=99 must be 1 to the 32", lambda a: {"means": 99}),
    ("block_scan", "lengths=.*int32", lambda a: {"lengths": a["lengths"].long()}),
    ("block_scan", "lengths=meta must be on", lambda a: {"lengths": a["lengths"].to("meta")}),
    ("block_pages", "picks=.*contiguous int64", lambda a: {"picks": a["picks"].int()}),
    ("block_pages", "picks=.*contiguous int64", lambda a: {"picks": a["picks"][..., :0]}),
    ("block_pages", "block=0 must be at least 1", lambda a: {"block": 0}),
    ("block_pages", "page_size=0 must be", lambda a: {"page_size": 0}),
    ("block_pages", "pool_rows=8 must be a positive multiple of 16", lambda a: {"pool_rows": 8}),
    ("block_pages", "page_table=.*int32", lambda a: {"page_table": a["page_table"].long()}),
    ("block_pages", "lengths=.*int32", lambda a: {"lengths": a["lengths"][:1]}),
    ("block_pages", "lengths=meta must be on", lambda a: {"lengths": a["lengths"].to("meta")}),
]


def _no_launch(*_: Any, **__: Any) -> None:
    raise AssertionError("launched")


@pytest.mark.parametrize(("op", "message", "change"), REFUSALS)
def test_bad_arguments_are_refused_before_any_launch(
    op: str, message: str, change: Change, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, operands = OPS[op]
    given = operands()
    with interpreted():
        monkeypatch.setattr(type(getattr(module, f"{op}_fwd_kernel")), "run", _no_launch)
        with pytest.raises(ValueError, match=message):
            getattr(module, op)(**given | change(given))


@pytest.mark.parametrize("op", OPS)
def test_cpu_tensors_are_refused_outside_the_interpreter(op: str) -> None:
    module, operands = OPS[op]
    with pytest.raises(ValueError, match="is on cpu, needs cuda"):
        getattr(module, op)(**operands())


def test_empty_batches_launch_nothing() -> None:
    append, scan, pages = append_operands(), scan_operands(), pages_operands()
    for given in (append, scan, pages):
        for name in ("q", "picks", "page_table", "mean_table", "lengths"):
            if name in given:
                given[name] = given[name][:0]
    assert (run_append(append) == OLD).all()
    assert [t.shape[0] for t in run_scan(scan)] == [0, 0]
    with interpreted():
        assert [t.shape[0] for t in pages_module.block_pages(**pages)] == [0, 0]
