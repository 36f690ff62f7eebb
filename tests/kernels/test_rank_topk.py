"""The places of the largest ranks against Python's sort, in the interpreter; refusals."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import kernels.sparse.topk as module
from kernels.sparse.topk import rank_topk_ref
from tests.kernels.interpreter import interpreted


def ranks_of(scores: Tensor) -> Tensor:
    """As `kernels.sparse.scan` writes them."""
    bits = (scores + 0.0).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    return (ordered << 32) | torch.arange(scores.shape[-1] - 1, -1, -1)


def run(ranks: Tensor, count: int) -> Tensor:
    with interpreted():
        return module.rank_topk(ranks, count)


@pytest.mark.parametrize("rows", [1, 63, 130, 2048, 4100])
@pytest.mark.parametrize("values", [1, 3, 10**6])
def test_places_are_those_of_a_sort(rows: int, values: int) -> None:
    """Of few values, so that ties are everywhere, at the edge too and across tiles; of both signs,
    and of rows that no token sees.
    """
    scores = torch.randint(-values, values, (2, 2, rows)) / 7
    scores[0, 0, rows // 2 :] = -torch.inf
    ranks = ranks_of(scores)
    for count in {1, max(1, rows // 3), rows}:
        got = run(ranks, count)
        assert got.dtype == torch.int64
        assert torch.equal(got, rank_topk_ref(ranks, count))
        # Any other selection of the largest gives the same.
        assert torch.equal(got, ranks.topk(count, -1).indices.sort(-1).values)


@pytest.mark.parametrize("scale", [1e-38, 1.0, 1e38])
def test_scores_that_differ_in_any_bits(scale: float) -> None:
    ranks = ranks_of(torch.randn(3, 500) * scale)
    for count in (1, 7, 499):
        assert torch.equal(run(ranks, count), rank_topk_ref(ranks, count))


def test_whole_numbers_of_the_largest_size() -> None:
    upper = torch.tensor([2**31 - 1, -(2**31), 0, -1, 2**31 - 1, -(2**31)])
    ranks = (upper << 32) | torch.arange(5, -1, -1)
    for count, places in ((1, [0]), (2, [0, 4]), (4, [0, 2, 3, 4]), (5, [0, 1, 2, 3, 4])):
        assert run(ranks, count).tolist() == places


def test_no_lists_launch_nothing() -> None:
    assert run(torch.zeros(0, 3, 5, dtype=torch.int64), 2).shape == (0, 3, 2)


REFUSALS: dict[str, tuple[str, Callable[[Tensor], tuple[Tensor, int]]]] = {
    "dtype": ("ranks=.*contiguous int64", lambda r: (r.int(), 2)),
    "strides": ("ranks=.*contiguous int64", lambda r: (r.mT, 2)),
    "none": ("count=0 must be 1 to the 5 ranks", lambda r: (r, 0)),
    "more": ("count=6 must be 1 to the 5 ranks", lambda r: (r, 6)),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_arguments_are_refused(case: str) -> None:
    message, change = REFUSALS[case]
    with pytest.raises(ValueError, match=message):
        run(*change(torch.zeros(3, 5, dtype=torch.int64)))


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    with pytest.raises(ValueError, match="is on cpu, needs cuda"):
        module.rank_topk(torch.zeros(3, 5, dtype=torch.int64), 2)
