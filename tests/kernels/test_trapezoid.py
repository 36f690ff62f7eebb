"""The trapezoidal recurrence in torch: oracle, split law, padding, FLOPs."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kernels.trapezoid import torch as op
from kernels.trapezoid.torch import Before, Tokens
from tests.kernels.trapezoids import inputs_of, sizes_of, weights_of

B = 2
SIZES = [
    pytest.param(sizes_of(), id="siso"),
    pytest.param(sizes_of(groups=2, angles=4, p=5), id="groups-all-turn"),
    pytest.param(sizes_of(rank=2, groups=2), id="rank-2-groups"),
    pytest.param(sizes_of(rank=4, n=7, angles=0, heads=1), id="rank-4-one-head-none-turns"),
]
TOLERANCE = 1e-10


def close(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


def made(
    s: op.TrapezoidSizes, tokens: int, dtype: torch.dtype = torch.float64,
    valid: Tensor | None = None,
) -> tuple[Tokens, Before]:  # fmt: skip
    """Tokens, and what is known before them."""
    angle = torch.rand(B, s.heads, s.angles, dtype=torch.float64)
    inputs = inputs_of(s, B, tokens, dtype)
    found = op.tokens_of(inputs, s, weights_of(s, dtype), angle, valid)
    before = Before(
        torch.randn(B, s.heads, s.n, s.p, dtype=torch.promote_types(dtype, torch.float32)),
        torch.randn(B, s.rank, s.heads, s.n).to(dtype),
        torch.randn(B, s.rank, s.heads, s.p).to(dtype),
    )
    return found, before


def copied(before: Before) -> Before:
    return Before(*(t.clone() for t in before))


def cut(tokens: Tokens, rows: slice) -> Tokens:
    return Tokens(*(t[:, rows] for t in tokens))


@pytest.mark.parametrize("s", SIZES)
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 130])
def test_both_forms_equal_the_oracle(s: op.TrapezoidSizes, tokens: int) -> None:
    given, before = made(s, tokens)
    expected, states = op.trapezoid_ref(given, before)
    y, last = op.trapezoid_chunk(given, copied(before))
    close(y, expected)
    close(last, states[:, -1])
    y, each = op.trapezoid_step(given, held := copied(before), each=True)
    assert each is not None
    close(y, expected)
    close(each, states)
    close(held.state, states[:, -1])
    zeros = Before(*(torch.zeros_like(t) for t in before))
    close(op.trapezoid_chunk(given)[0], op.trapezoid_ref(given, zeros)[0])


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, 2e-5), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)],
    ids=["float32", "bfloat16", "float16"],
)
@pytest.mark.parametrize("s", SIZES)
def test_narrow_inputs_are_near_the_oracle(
    s: op.TrapezoidSizes, dtype: torch.dtype, tolerance: float
) -> None:
    given, before = made(s, 70, dtype)
    expected, states = op.trapezoid_ref(given, before)
    forms: list[Any] = [op.trapezoid_chunk(given, copied(before))]
    forms += [(op.trapezoid_step(given, held := copied(before))[0], held.state)]
    for y, last in forms:
        assert y.dtype == dtype and last.dtype == torch.float32
        for got, wanted in ((y, expected), (last, states[:, -1])):
            error = (got.double() - wanted).norm() / wanted.norm()
            assert float(error) < tolerance


@pytest.mark.parametrize("s", SIZES)
def test_pieces_equal_the_whole(s: op.TrapezoidSizes) -> None:
    given, before = made(s, 100)
    whole, last = op.trapezoid_chunk(given, copied(before))
    pieces, at = [], 0
    for size in (1, 70, 3, 26):
        part = cut(given, slice(at, at + size))
        y, state = op.trapezoid_chunk(part, before)
        pieces.append(y)
        before, at = Before(state, part.k[:, -1], part.v[:, -1]), at + size
    close(torch.cat(pieces, 1), whole)
    close(before.state, last)


@pytest.mark.parametrize("s", SIZES)
def test_padded_tokens_change_nothing(s: op.TrapezoidSizes) -> None:
    valid = torch.arange(9) < torch.tensor([5, 0])[:, None]
    given, before = made(s, 9, valid=valid)
    assert torch.equal(given.angles[0, 4], given.angles[0, -1])
    expected, states = op.trapezoid_ref(cut(given, slice(0, 5)), before)
    forms: list[Any] = [op.trapezoid_chunk(given, copied(before))]
    forms += [(op.trapezoid_step(given, held := copied(before))[0], held.state)]
    for y, last in forms:
        close(y[0, :5], expected[0])
        close(last, torch.stack((states[0, -1], before.state[1])))


@pytest.mark.parametrize("s", SIZES)
@pytest.mark.parametrize("tokens", [1, 3, 64, 100])
def test_flops_are_what_torch_counts(s: op.TrapezoidSizes, tokens: int) -> None:
    given, before = made(s, tokens)
    with FlopCounterMode(display=False) as counter:
        op.trapezoid_chunk(given, before)
    assert counter.get_total_flops() == op.trapezoid_chunk_matrix_flops(B, tokens, s)
    with FlopCounterMode(display=False) as counter:
        op.trapezoid_step(given, before)
    assert counter.get_total_flops() == op.trapezoid_step_matrix_flops(B, tokens, s)


def test_sizes_say_how_wide_inputs_and_the_last_token_are() -> None:
    s = sizes_of(heads=4, groups=2, n=8, p=6, rank=3, angles=2)
    assert s.parts == (24, 24, 48, 48, 4, 4, 4, 2)
    assert s.last == 4 * (3 * 8 + 6)
    assert replace(s, rank=1).last == 4 * (8 + 6)
