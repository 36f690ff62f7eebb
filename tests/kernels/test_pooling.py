"""Gated pooling in one pass, token by token and many at once, each against its float64 oracle."""

import pytest
import torch
from torch import Tensor

from kernels.pooling.torch import (
    group_parts,
    merged,
    pooled,
    step_parts,
    whole_rows,
    whole_rows_ref,
)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
#: Tokens, tokens a group, series, channels.
SHAPES = [(1, 1, 1, 1), (17, 4, 2, 3), (40, 7, 1, 5), (12, 1, 2, 2), (63, 16, 2, 2), (5, 9, 2, 3)]


def operands(
    shape: tuple[int, int, int, int], dtype: torch.dtype, spread: float = 3.0
) -> tuple[Tensor, Tensor]:
    """Values and gates of two sequences; gates so far apart that one token may outweigh all."""
    tokens, _, series, channels = shape
    draw = torch.Generator().manual_seed(sum(shape))
    values, gates = torch.randn(2, 2, tokens, series, channels, generator=draw, dtype=dtype)
    return values, spread * gates


def nothing(values: Tensor) -> Tensor:
    """What a store holds of an empty sequence."""
    return values.new_zeros(len(values), 2, *values.shape[2:])


@pytest.mark.parametrize("spread", [3.0, 300.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_whole_groups_equal_the_oracle(
    shape: tuple[int, int, int, int], dtype: torch.dtype, spread: float
) -> None:
    values, gates = operands(shape, dtype, spread)
    rows = whole_rows(values, gates, shape[1])
    assert rows.dtype == dtype and rows.shape[1] == shape[0] // shape[1]
    wanted, limit = whole_rows_ref(values, gates, shape[1]), TOLERANCE[dtype] * spread
    torch.testing.assert_close(rows.double(), wanted, rtol=limit, atol=limit)


def test_gradients_are_finite_and_those_of_the_oracle() -> None:
    given = [t.requires_grad_() for t in operands((17, 4, 2, 3), torch.float64)]
    mine = torch.autograd.grad(whole_rows(*given, 4).square().sum(), given)
    theirs = torch.autograd.grad(whole_rows_ref(*given, 4).square().sum(), given)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("first", [0, 1, 6, 7, 8])
@pytest.mark.parametrize("shape", [(33, 4, 2, 3), (40, 7, 1, 5), (20, 1, 2, 2)], ids=str)
def test_many_tokens_and_single_ones_leave_the_same(
    shape: tuple[int, int, int, int], first: int
) -> None:
    """Sequences of two lengths, the second padded; rows are those of one pass over each."""
    tokens, size, series, channels = shape
    values, gates = operands(shape, torch.float64)
    part, past = nothing(values), torch.tensor([first, max(0, first - 3)])
    for t in range(first):
        at = torch.tensor([[t], [t]])
        valid = at < past[:, None]
        part = step_parts(part, values[:, t : t + 1], gates[:, t : t + 1], at, valid, size)[:, 0]
    count = tokens - first
    at = past[:, None] + torch.arange(count)
    new = torch.tensor([count, count - 2])
    taken = at[..., None, None].expand(-1, -1, series, channels)
    given = values.gather(1, taken), gates.gather(1, taken)
    valid = torch.arange(count) < new[:, None]
    each = step_parts(part, *given, at, valid, size)
    parts, last = group_parts(part, *given, past, new, size)
    torch.testing.assert_close(last, each[:, -1])
    for b in (0, 1):
        end = int(past[b] + new[b])
        wanted = whole_rows_ref(values[b : b + 1, :end], gates[b : b + 1, :end], size)[0]
        old = int(past[b]) // size
        torch.testing.assert_close(parts[b, : len(wanted) - old, 1, 0], wanted[old:])
        # A row is whole with the last token of its group.
        ends = torch.arange(old + 1, len(wanted) + 1) * size - 1 - int(past[b])
        torch.testing.assert_close(each[b, ends, 1, 0], wanted[old:])


@pytest.mark.parametrize("count", [1, 12])
def test_a_sequence_without_new_tokens_keeps_its_part(count: int) -> None:
    values, gates = operands((count, 4, 2, 3), torch.float64)
    part, past = torch.randn(2, 2, 2, 3, dtype=torch.float64), torch.tensor([8, 5])
    new = torch.tensor([0, count])
    at = past[:, None] + torch.arange(count)
    each = step_parts(part, values, gates, at, torch.arange(count) < new[:, None], 4)
    _, last = group_parts(part, values, gates, past, new, 4)
    assert torch.equal(each[0, -1], part[0]) and torch.equal(last[0], part[0])
    torch.testing.assert_close(last[1], each[1, -1])


def test_parts_merge_in_any_order_and_nothing_changes_nothing() -> None:
    values, gates = operands((9, 9, 1, 4), torch.float64)
    whole = pooled(values, gates)
    one, other = (pooled(values[:, at], gates[:, at]) for at in (slice(0, 4), slice(4, 9)))
    torch.testing.assert_close(merged(one, other), whole)
    torch.testing.assert_close(merged(other, one), whole)
    empty = pooled(values, torch.full_like(gates, -torch.inf))
    assert torch.equal(merged(empty, whole), whole) and torch.equal(merged(whole, empty), whole)
    assert not merged(empty, empty)[:, 1].any()
