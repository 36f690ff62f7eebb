"""Ways to choose codes: less output error than the nearest, exact where nothing is to be gained."""

import pytest
import torch
from torch import Tensor

from archs.packed import nearest
from archs.weights import Number
from kernels.quant.torch import dense, round_narrow
from train.rounding import WAYS, Inputs, awq, clipped, gptq, output_error


def inputs_of(x: Tensor) -> Inputs:
    seen = Inputs.none(x.shape[1], x.device)
    # In two parts, as they come.
    seen.add(x[: len(x) // 2].view(2, -1, x.shape[1]))
    seen.add(x[len(x) // 2 :])
    return seen


def correlated(rows: int, columns: int) -> Tensor:
    """Inputs of a few directions, some channels of which are large, as activations have them."""
    x = torch.randn(rows, columns // 4) @ torch.randn(columns // 4, columns)
    x += 0.3 * torch.randn(rows, columns)
    x[:, ::17] *= 12
    return x


def values(chosen: tuple[object, Tensor | None], bits: int, columns: int) -> Tensor:
    rounded, inverse = chosen
    found = dense(rounded, bits, columns, torch.float32)  # type: ignore[arg-type]
    return found if inverse is None else found * inverse.bfloat16().float()


@pytest.mark.parametrize("columns", [128, 200])
@pytest.mark.parametrize("name", ["int4-g64", "int3-g32", "int2-g128"])
@pytest.mark.parametrize("way", WAYS)
def test_outputs_are_nearer_than_those_of_the_nearest_codes(
    way: str, name: str, columns: int
) -> None:
    number = Number.named(name)
    weight, seen = torch.randn(48, columns), inputs_of(correlated(600, columns))
    plain = dense(nearest(weight, number), number.bits, columns, torch.float32)
    found = values(WAYS[way](weight, number, seen), number.bits, columns)
    assert output_error(weight, found, seen) < 0.8 * output_error(weight, plain, seen)


def test_the_error_is_that_of_the_outputs() -> None:
    weight, other, x = torch.randn(5, 16), torch.randn(5, 16), torch.randn(40, 16)
    expected = ((x @ (weight - other).t()) ** 2).sum() / 40
    assert output_error(weight, other, inputs_of(x)) == pytest.approx(float(expected), rel=1e-4)


def test_inputs_that_are_alike_leave_the_nearest_codes() -> None:
    """Nothing to make up for: columns whose inputs do not go together."""
    weight, number = torch.randn(20, 96), Number.named("int4-g32")
    seen = Inputs(torch.eye(96) * 50, torch.full((96,), 40.0), 50)
    rounded, inverse = gptq(weight, number, seen)
    plain = round_narrow(weight, 4, 32)
    assert inverse is None and torch.equal(rounded.scale, plain.scale)
    assert torch.equal(rounded.codes, plain.codes)
    assert torch.equal(awq(weight, number, seen)[1], torch.ones(96))


def test_a_clipped_grid_is_never_worse_for_its_group() -> None:
    weight, seen = torch.randn(30, 64), inputs_of(torch.randn(300, 64))
    for bits in (2, 3, 4):
        plain = dense(round_narrow(weight, bits, 64), bits, 64, torch.float32)
        cut = dense(clipped(weight, bits, 64, seen.moments), bits, 64, torch.float32)
        before, after = (output_error(weight, w, seen) for w in (plain, cut))
        assert after < before * (1 - 0.02 * (bits < 4)) + 1e-6


@pytest.mark.parametrize("way", WAYS)
def test_channels_without_inputs_and_rows_of_zeros_are_no_trouble(way: str) -> None:
    number = Number.named("int3-g32")
    weight, x = torch.randn(8, 64), torch.randn(200, 64)
    weight[0], x[:, 3:7] = 0, 0
    found = values(WAYS[way](weight, number, inputs_of(x)), 3, 64)
    assert found.isfinite().all() and not found[0].any()
    nothing = values(WAYS[way](weight, number, Inputs.none(64, weight.device)), 3, 64)
    assert nothing.isfinite().all()


def test_formats_of_one_scale_a_row_are_rounded_to_nearest() -> None:
    weight, number = torch.randn(8, 64), Number.named("int8")
    for way in WAYS.values():
        rounded, inverse = way(weight, number, inputs_of(torch.randn(100, 64)))
        assert inverse is None and torch.equal(rounded.codes, nearest(weight, number).codes)
