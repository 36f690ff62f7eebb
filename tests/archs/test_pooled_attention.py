"""Attention over pooled rows by kernels, in Triton's interpreter, against torch's form."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from archs.ops.pooling import Pooling, attend_picked_rows, attend_pooled
from archs.ops.sparse import Picked
from archs.state import PagedSeen, Pages, Rows, Seen
from kernels.rope.torch import rope_table
from tests.kernels.interpreter import interpreted

HOW = Pooling(size=4, rope_dim=16, theta=1e4, eps=1e-6)
HEADS, DIM, WINDOW, PAGE = 6, 64, 21, 16
PAST = torch.tensor([90, 2, 33], dtype=torch.int32)


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    with interpreted():
        yield


class Given(NamedTuple):
    """Arguments of both attentions."""

    q: Tensor
    near: PagedSeen
    far: PagedSeen
    sinks: Tensor
    state: Any


def given(new: int, far_page: int = PAGE) -> Given:
    torch.manual_seed(0)
    positions = PAST.long()[:, None] + torch.arange(new)
    table = rope_table(256, HOW.rope_dim, HOW.theta, torch.device("cpu"))
    state = SimpleNamespace(
        past=PAST,
        rope=lambda dim, theta: table[positions],
        rotary=lambda dim, theta: torch.view_as_real(table)[:, 0].contiguous(),
    )

    def rows(every: int, page_size: int, **more: Any) -> PagedSeen:
        count = -(-(128 // every) // page_size)
        before, total = PAST // every, (PAST + new) // every
        pages = Pages(
            pool=torch.randn(len(PAST) * count * page_size, DIM), past=before, total=total,
            table=torch.randperm(len(PAST) * count).view(-1, count).int(), new=None,
            page_size=page_size, sinks=0, **more,
        )  # fmt: skip
        return PagedSeen(pages, new, int(total.max()))

    return Given(
        torch.randn(len(PAST), new, HEADS, DIM), rows(1, PAGE, window=WINDOW),
        rows(HOW.size, far_page, window=None, ends=(positions + 1) // HOW.size),
        torch.randn(HEADS), state,
    )  # fmt: skip


def picked_of(new: int, count: int) -> Picked:
    """Rows that every token sees, or all of those."""
    ends = (PAST.long()[:, None] + torch.arange(new) + 1) // HOW.size
    at = torch.full((len(PAST), new, count), 31)
    for b, i in torch.cartesian_prod(torch.arange(len(PAST)), torch.arange(new)).tolist():
        own = torch.randperm(int(ends[b, i]))[:count].sort().values
        at[b, i, : len(own)] = own
    return Picked(at, torch.arange(count) < ends[..., None], 32)


def attended(a: Given, near: Rows, far: Rows, picked: Picked | None, backend: str) -> Tensor:
    q, more = a.q.clone(), (a.sinks, a.state, HOW)
    if picked is None:
        return attend_pooled(q, near, far, *more, scale=0.2, backend=backend)
    return attend_picked_rows(q, near, far, picked, *more, scale=0.2, backend=backend)


@pytest.mark.parametrize("picks", [None, 5, 30])
@pytest.mark.parametrize("new", [1, 3, 9])
def test_short_steps_read_pages_where_they_lie(new: int, picks: int | None) -> None:
    a, picked = given(new), None if picks is None else picked_of(new, picks)
    got = attended(a, a.near, a.far, picked, "triton")
    assert not a.near.gathered and not a.far.gathered
    expected = attended(a, a.near, a.far, picked, "torch")
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("picks", [None, 5])
@pytest.mark.parametrize("case", ["long", "other pages", "rows", "pooled rows"])
def test_other_steps_are_of_torchs_form(
    case: str, picks: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = 10 if case == "long" else 2
    a = given(new, far_page=32 if case == "other pages" else PAGE)
    picked = None if picks is None else picked_of(new, picks)
    near: Rows = Seen(a.near.rows, a.near.mask, False) if case == "rows" else a.near
    far: Rows = Seen(a.far.rows, a.far.mask, False) if case == "pooled rows" else a.far
    monkeypatch.setattr("kernels.pooling.decode.pooled_decode", None)
    got = attended(a, near, far, picked, "triton")
    torch.testing.assert_close(got, attended(a, near, far, picked, "torch"), rtol=0, atol=0)
