"""Runs of numbers as bytes: round trips against float64, sizes, zeros, outliers, what repeats."""

from math import ceil

import pytest
import torch
from torch import Tensor

from kernels.quant.runs import Runs, hashed_uniform, stochastic
from kernels.quant.torch import NARROW

FP8 = torch.float8_e4m3fn
#: Widths that fill bytes and groups, and that do not.
WIDTHS = (1, 5, 16, 33, 80, 128)
LAYOUTS = [
    (bits, group, dtype)
    for bits, dtype in [*((b, torch.int8) for b in NARROW), (8, torch.int8), (8, FP8)]
    for group in (32, 1000)
]


def runs_of(numbers: int, bits: int, group: int, dtype: torch.dtype, residual: int = 0) -> Runs:
    return Runs(numbers, bits, min(group, numbers), dtype, residual)


def step_of(x: Tensor, runs: Runs) -> Tensor:
    """The distance between neighbouring codes at each number, in float64."""
    found = []
    for at in range(0, runs.numbers, runs.group):
        part = x[..., at : at + runs.group]
        low, high = part.aminmax(dim=-1, keepdim=True)
        step = (high - low) / (2**runs.bits - 1)
        if runs.bits == 8:
            most = torch.maximum(low.abs(), high.abs())
            step = most / 127 if runs.dtype == torch.int8 else most / 8
        found.append(step.expand_as(part))
    return torch.cat(found, -1)


@pytest.mark.parametrize("numbers", WIDTHS)
@pytest.mark.parametrize(("bits", "group", "dtype"), LAYOUTS)
def test_numbers_come_back_within_half_a_step(
    bits: int, group: int, dtype: torch.dtype, numbers: int
) -> None:
    runs = runs_of(numbers, bits, group, dtype)
    x = torch.randn(3, 2, numbers, dtype=torch.float64)
    x[0] *= 1e-4
    x[1, 0, 0] = 50.0
    held = runs.encode(x)
    assert held.dtype == torch.uint8
    assert held.shape == (3, 2, sum(runs.sizes))
    scales = runs.groups * 4
    assert sum(runs.sizes) == ceil(numbers * bits / 8) + scales
    error = (runs.decode(held, torch.float64) - x).abs()
    # Scales and zero points of narrow codes are rounded to bfloat16, of eight bits.
    slack = (x.abs().amax(-1, keepdim=True) * 2**-7) if bits < 8 else 1e-6 * step_of(x, runs)
    assert (error <= 0.501 * step_of(x, runs) + slack).all()
    # float32 finds the same codes but for ties.
    narrow = runs.decode(runs.encode(x.float()), torch.float32)
    assert (narrow - x).abs().max() <= error.max() + 1e-3 * x.abs().max()


@pytest.mark.parametrize(("bits", "group", "dtype"), LAYOUTS)
def test_zeros_stay_zeros_and_what_is_no_number_stays_none(
    bits: int, group: int, dtype: torch.dtype
) -> None:
    runs = runs_of(48, bits, group, dtype)
    assert not runs.decode(runs.encode(torch.zeros(2, 48)), torch.float32).any()
    # Memory that nobody wrote to reads as zeros.
    empty = torch.zeros(2, sum(runs.sizes), dtype=torch.uint8)
    assert not runs.decode(empty, torch.float32).any()
    x = torch.randn(4, 48)
    for at, bad in enumerate((torch.nan, torch.inf, -torch.inf)):
        x[at, 7] = bad
    found = runs.decode(runs.encode(x), torch.float32)
    assert not found[:3, 7].isfinite().any() and found[3].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.int8, FP8])
def test_what_is_stored_again_is_stored_alike(dtype: torch.dtype) -> None:
    """Values that a step leaves as they are do not creep."""
    runs = runs_of(64, 8, 32, dtype)
    first = runs.decode(runs.encode(torch.randn(500, 64)), torch.float32)
    found = first
    for _ in range(50):
        found = runs.decode(runs.encode(found), torch.float32)
    assert ((found - first).abs() <= 1e-6 * first.abs()).all()


def test_a_residual_is_what_rounding_left() -> None:
    runs = runs_of(40, 8, 40, torch.int8, residual=4)
    x = torch.randn(6, 40, dtype=torch.float64)
    held = runs.encode(x)
    assert held.shape[-1] == 40 + 4 + 20
    left = runs.residual(held, torch.float64)
    step = x.abs().amax(-1, keepdim=True) / 127
    whole = runs.decode(held, torch.float64) + left
    # Four bits more: a sixteenth of a step; its largest code is one short of half a step.
    assert ((whole - x).abs() <= 1.001 * step / 16).all()
    assert ((whole - x).abs() <= 0.501 * step / 16).float().mean() > 0.9


def test_errors_that_are_fed_back_do_not_add_up() -> None:
    """A number that grows by less than half a step each time, over many roundings."""
    plain, fed = runs_of(8, 8, 8, torch.int8), runs_of(8, 8, 8, torch.int8, residual=4)
    start = torch.full((1, 8), 0.5, dtype=torch.float64)
    start[0, 0] = 1.0
    growth = torch.zeros_like(start)
    growth[0, 1:] = 0.002
    held, kept = plain.encode(start), fed.encode(start)
    for _ in range(100):
        held = plain.encode(plain.decode(held, torch.float64) + growth)
        value, left = fed.decode(kept, torch.float64), fed.residual(kept, torch.float64)
        kept = fed.encode(value + growth, left)
    true = start + 100 * growth
    assert (plain.decode(held, torch.float64) - true)[0, 1:].abs().min() > 0.15
    assert (fed.decode(kept, torch.float64) - true)[0, 1:].abs().max() < 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_stochastic_rounding_takes_a_neighbour_and_keeps_the_mean(dtype: torch.dtype) -> None:
    x = torch.tensor([1.0003, -1.0003, 3e-7, 0.0, 1e-3, 777.3])
    noise = torch.rand(40_000, len(x))
    found = stochastic(x.expand(40_000, -1), dtype, noise)
    assert found.dtype == dtype
    wide = found.float()
    down, up = wide.amin(0), wide.amax(0)
    assert (down <= x).all() and (x <= up).all()
    # Two neighbours and nothing between or beyond.
    assert all(len(column.unique()) <= 2 for column in wide.unbind(1))
    assert ((wide.mean(0) - x).abs() <= 0.02 * (up - down)).all()
    assert len(wide[:, 0].unique()) == 2


def test_stochastic_rounding_saturates_and_hides_nothing() -> None:
    x = torch.tensor([1e9, -1e9, torch.nan, torch.inf])
    found = stochastic(x, torch.float16, torch.full((4,), 0.999)).tolist()
    assert found[:2] == [65504.0, -65504.0] and found[3] == torch.inf and found[2] != found[2]


def test_random_numbers_depend_on_their_seed_salt_and_place_alone() -> None:
    seeds = torch.tensor([3, 5, 3])
    found = hashed_uniform(seeds, (4, 100), salt=2)
    assert found.shape == (3, 4, 100) and torch.equal(found[0], found[2])
    assert torch.equal(found[1], hashed_uniform(torch.tensor([5]), (4, 100), salt=2)[0])
    for other in (hashed_uniform(seeds, (4, 100), salt=3), found.roll(1, 0)):
        assert (other[1] != found[1]).float().mean() > 0.99
    many = hashed_uniform(torch.arange(200), (500,))
    assert many.min() >= 0 and many.max() < 1
    assert many.mean() == pytest.approx(0.5, abs=0.005) and many.var() == pytest.approx(
        1 / 12, abs=0.002
    )
    # Neither neighbouring places nor neighbouring tokens resemble each other.
    centred = many - 0.5
    for shifted in (centred[1:] * centred[:-1], centred[:, 1:] * centred[:, :-1]):
        assert abs(float(shifted.mean())) < 0.002
