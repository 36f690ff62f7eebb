"""Index scores and their order against the float64 oracle, in the interpreter; refusals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.sparse.scan as module
from kernels.sparse.scan import index_scan_ref, scores_of
from kernels.sparse.torch import best_rows
from tests.kernels.interpreter import interpreted

TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5}


def operands(
    lengths: tuple[int, ...] = (70, 0, 3),
    *,
    tokens: int = 1,
    heads: int = 4,
    dim: int = 32,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Queries as columns of a wider projection of NaN; shuffled pages, unwritten rows NaN."""
    batch, most = len(lengths), -(-(max(lengths) + tokens) // page_size)
    pages = batch * most + 2
    wide = torch.full((batch, tokens, heads * (dim + 16)), torch.nan, dtype=dtype)
    q = wide[..., 16 * heads :].unflatten(-1, (heads, dim))
    q.copy_(torch.randn(q.shape))
    pool = torch.full((pages * page_size, dim), torch.nan, dtype=dtype)
    table = torch.randperm(pages)[: batch * most].view(batch, most).int()
    for b, length in enumerate(lengths):
        rows = torch.arange(length + tokens)
        at = table[b, rows // page_size].long() * page_size + rows % page_size
        pool[at] = torch.randn(len(rows), dim).to(dtype)
        table[b, len(rows[::page_size]) :] = -(10**6)
    return {
        "q": q, "weights": torch.randn(batch, tokens, heads), "pool": pool, "page_table": table,
        "lengths": torch.tensor(lengths, dtype=torch.int32), "rows": most * page_size,
        "page_size": page_size,
    }  # fmt: skip


def run(given: dict[str, Any]) -> Tensor:
    with interpreted():
        return module.index_scan(**given)


def assert_equals_the_oracle(given: dict[str, Any]) -> None:
    ranks, wanted = run(given), index_scan_ref(**given)
    got, limit = scores_of(ranks).double(), TOLERANCES[given["q"].dtype]
    seen = wanted > -torch.inf
    assert torch.equal(got > -torch.inf, seen)
    size = float(wanted[seen].abs().max())
    assert float((got[seen] - wanted[seen]).abs().max()) <= limit * size
    # Their order is that of the torch form's choice on the same scores.
    scores = scores_of(ranks)
    for count in (1, 5, given["rows"]):
        at, valid = best_rows(scores, seen, count)
        chosen = ranks.topk(count, -1).indices
        kept = torch.arange(count) < seen.sum(-1, keepdim=True)
        assert picks(at, valid) == picks(chosen, kept)


def picks(at: Tensor, valid: Tensor) -> list[set[int]]:
    """Of each token."""
    pairs = zip(at.flatten(0, 1), valid.flatten(0, 1), strict=True)
    return [set(rows[kept].tolist()) for rows, kept in pairs]


@pytest.mark.parametrize("page_size", [16, 48, 64, 128])
@pytest.mark.parametrize("tokens", [1, 3, 35])
def test_tokens_pages_and_lengths(tokens: int, page_size: int) -> None:
    assert_equals_the_oracle(operands((63, 0, 130), tokens=tokens, page_size=page_size))


@pytest.mark.parametrize("every", [1, 4, 128])
@pytest.mark.parametrize("tokens", [1, 3, 35])
def test_rows_that_stand_for_several_tokens_are_seen_up_to_an_end(tokens: int, every: int) -> None:
    """Of rows that are there for a whole group each token sees those of groups before its end."""
    past = torch.tensor([[63 * every + every - 2], [0], [70 * every]])
    ends = (past + torch.arange(1, tokens + 1)) // every
    given = operands((63, 0, 70), tokens=-(-tokens // every)) | {"lengths": None, "ends": ends}
    given |= {"q": torch.randn(3, tokens, 4, 32), "weights": torch.randn(3, tokens, 4)}
    assert_equals_the_oracle(given)


def test_sequences_of_one_length_share_their_ends() -> None:
    given = operands((40, 40), tokens=3) | {"lengths": None}
    ends = torch.tensor([[10, 10, 11]])
    shared, apart = (run(given | {"ends": e}) for e in (ends, ends.repeat(2, 1)))
    assert torch.equal(shared, apart)
    assert (scores_of(shared) > -torch.inf).sum(-1).tolist() == [[10, 10, 11]] * 2


@pytest.mark.parametrize("heads", [1, 2, 16, 17, 64])
@pytest.mark.parametrize("dim", [16, 48, 128, 256])
def test_heads_and_widths(heads: int, dim: int) -> None:
    assert_equals_the_oracle(operands((100,), heads=heads, dim=dim))


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    assert_equals_the_oracle(operands(dtype=dtype, tokens=2))


def test_the_earlier_of_equal_rows_ranks_higher_and_zeros_are_equal() -> None:
    given = operands((20,), heads=2)
    # A negative weight on no activation is -0.0.
    given["q"][:] = -1.0
    given["pool"].nan_to_num_(0.0).abs_()
    given["weights"] = torch.tensor([[[-1.0, -2.0]]])
    ranks = run(given)
    assert ranks[0, 0].topk(21).indices.tolist() == list(range(21))
    assert (scores_of(ranks)[0, 0, :21] == 0).all()


def test_a_rank_does_not_depend_on_other_tokens_or_on_later_rows() -> None:
    given = operands((120,), tokens=20)
    whole = run(given)
    for i in (0, 7, 19):
        alone = given | {
            "q": given["q"][:, i : i + 1], "lengths": given["lengths"] + i,
            "weights": given["weights"][:, i : i + 1].contiguous(),
        }  # fmt: skip
        assert torch.equal(run(alone)[:, 0], whole[:, i])
    fewer = run(given | {"rows": 130})
    assert torch.equal(scores_of(fewer), scores_of(whole)[..., :130])


def test_an_empty_batch_launches_nothing() -> None:
    given = operands()
    for name in ("q", "weights", "page_table", "lengths"):
        given[name] = given[name][:0]
    assert run(given).shape == (0, 1, 80)


Change = Callable[[dict[str, Any]], dict[str, Any]]
REFUSALS: dict[str, tuple[str, Change]] = {
    "q rank": (r"q=.*\[B, K, H, d\]", lambda a: {"q": a["q"][0]}),
    "q dtype": ("q=.*bfloat16", lambda a: {"q": a["q"].double()}),
    "d": ("d=24 must be a multiple of 16", lambda a: {"q": torch.zeros(3, 1, 4, 24)}),
    "heads": ("q=.*1 to 128 heads", lambda a: {"q": torch.zeros(3, 1, 129, 32)}),
    "strides": ("q=.*strides", lambda a: {"q": torch.zeros(3, 1, 4, 40)[..., :32]}),
    "weights": ("weights=.*float32", lambda a: {"weights": a["weights"].half()}),
    "page_size": ("page_size=8 must", lambda a: {"page_size": 8}),
    "pool width": (r"pool=.*pages \* 16, 32\]", lambda a: {"pool": a["pool"][:, :16]}),
    "pool dtype": ("pool=.*float32", lambda a: {"pool": a["pool"].half()}),
    "table": ("page_table=.*int32", lambda a: {"page_table": a["page_table"].long()}),
    "rows": ("rows=81 must be 1 to the 80", lambda a: {"rows": 81}),
    "lengths": ("lengths=.*int32", lambda a: {"lengths": a["lengths"].long()}),
    "neither": ("ends=None must be given where lengths are None", lambda a: {"lengths": None}),
    "both": ("ends=.*only there", lambda a: {"ends": a["lengths"].long()[:, None]}),
    "ends": (
        "ends=.*int64 .1 or 3, 1.",
        lambda a: {"lengths": None, "ends": a["lengths"][:, None]},
    ),
    "device": ("pool=meta must be on", lambda a: {"pool": a["pool"].to("meta")}),
}


def _no_launch(*_: Any, **__: Any) -> None:
    raise AssertionError("launched")


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_arguments_are_refused_before_any_launch(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = operands()
    message, change = REFUSALS[case]
    with interpreted():
        monkeypatch.setattr(type(module.index_scan_fwd_kernel), "run", _no_launch)
        with pytest.raises(ValueError, match=message):
            module.index_scan(**given | change(given))


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    with pytest.raises(ValueError, match="is on cpu, needs cuda"):
        module.index_scan(**operands())
