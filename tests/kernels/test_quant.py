"""Numbers of a few bits: packing, the error of rounding, odd widths, refusals."""

import pytest
import torch
from torch import Tensor

from kernels.quant.torch import (
    NARROW,
    Rounded,
    dense,
    grid,
    int8_rows,
    nearest,
    on_grid,
    pack,
    product_ref,
    round_fp8,
    round_int8,
    round_narrow,
    round_on,
    unpack,
)

#: bfloat16 keeps eight bits: what rounding to it changes, of a number's size.
TO_BF16 = 2**-8


@pytest.mark.parametrize("bits", NARROW)
def test_packing_is_undone(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 5, 40), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (3, 5, 5 * bits)
    assert torch.equal(unpack(packed, bits), codes)
    assert torch.equal(pack(codes.long(), bits), packed)
    every = torch.arange(2**bits).repeat(8)
    assert torch.equal(unpack(pack(every, bits), bits), every.to(torch.uint8))


def test_first_codes_lie_in_the_lowest_bits() -> None:
    assert pack(torch.tensor([1, 2, 3, 4, 5, 6, 7, 8]), 4).tolist() == [0x21, 0x43, 0x65, 0x87]
    assert pack(torch.tensor([3, 0, 1, 2, 0, 0, 0, 1]), 2).tolist() == [
        0b10_01_00_11,
        0b01_00_00_00,
    ]
    three = pack(torch.tensor([7, 0, 0, 0, 0, 0, 0, 5]), 3)
    assert three.tolist() == [7, 0, 0b101_00000]


@pytest.mark.parametrize("bits", [0, 1, 5, 8])
def test_other_bits_are_refused(bits: int) -> None:
    codes = torch.zeros(8, dtype=torch.uint8)
    for call in (pack, unpack):
        with pytest.raises(ValueError, match=rf"bits={bits} must be one of 2, 3, 4"):
            call(codes, bits)
    with pytest.raises(ValueError, match=rf"bits={bits} must"):
        round_narrow(torch.zeros(1, 8), bits, 8)


def test_codes_and_groups_that_are_no_whole_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="codes of 12 columns must come in multiples of 8"):
        pack(torch.zeros(2, 12, dtype=torch.uint8), 4)
    for group in (0, 4, 20, -8):
        with pytest.raises(ValueError, match=f"group={group} must be a multiple of 8"):
            round_narrow(torch.zeros(2, 40), 4, group)


def weights(n: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, k).add_(torch.randn(n, 1)).to(dtype)


def by_code(rounded: Rounded, k: int, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of every number, in float64: its scale, the ends of its range, and what its code gives."""
    codes, scale, zero = rounded
    assert zero is not None
    group = codes.shape[1] * 8 // bits // scale.shape[1]
    s, z = (t.double().repeat_interleave(group, 1)[:, :k] for t in (scale, zero))
    low = z - s * 2 ** (bits - 1)
    return s, low, low + s * (2**bits - 1), low + s * unpack(codes, bits)[:, :k]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("k", "group"), [(96, 32), (40, 64), (200, 64), (8, 128), (136, 8)])
@pytest.mark.parametrize("bits", NARROW)
def test_narrow_numbers_are_half_a_step_away_at_most(
    bits: int, k: int, group: int, dtype: torch.dtype
) -> None:
    weight = weights(5, k, dtype)
    rounded = round_narrow(weight, bits, group)
    runs = -(-k // group)
    assert rounded.codes.shape == (5, runs * group * bits // 8)
    assert rounded.scale.shape == (5, runs) and rounded.scale.dtype == torch.bfloat16
    found = dense(rounded, bits, k, torch.float64)
    step, low, high, expected = by_code(rounded, k, bits)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=1e-14)
    error = (found - weight.double()).abs()
    inside = (weight >= low) & (weight <= high)
    # Which side of the middle a number is on is computed in the weight's own dtype.
    slack = 4 * torch.finfo(dtype).eps * (weight.double().abs() + step * 2**bits)
    assert (error <= step / 2 + slack)[inside].all()
    ends = TO_BF16 * (low.abs() + high.abs() + step * 2**bits)
    assert (error <= step / 2 + slack + ends).all()


@pytest.mark.parametrize("bits", NARROW)
def test_no_other_code_is_nearer(bits: int) -> None:
    weight = weights(4, 64).double()
    scale, zero = grid(weight[:, None], bits)
    codes = nearest(weight[:, None], scale, zero, bits)[:, 0]
    every = (torch.arange(2**bits) - 2 ** (bits - 1)) * scale.double() + zero.double()
    error = (weight[..., None] - every[:, None]).abs()
    chosen = error.gather(-1, codes.long()[..., None])[..., 0]
    assert torch.equal(chosen, error.amin(-1))


@pytest.mark.parametrize("bits", NARROW)
def test_zeros_and_equal_numbers(bits: int) -> None:
    weight = torch.zeros(3, 72)
    weight[1] = -0.75
    weight[2, :32] = 0.1
    rounded = round_narrow(weight, bits, 32)
    assert rounded.scale[:2].eq(0).all() and rounded.scale[2, 0] == 0
    found = dense(rounded, bits, 72, torch.float32)
    assert torch.equal(found[:2], weight[:2])
    assert torch.equal(found[2, :32], weight[2, :32].bfloat16().float())
    assert found[2, 64:].eq(0).all()


@pytest.mark.parametrize("bits", NARROW)
def test_an_outlier_coarsens_its_own_group_alone(bits: int) -> None:
    weight = weights(2, 128)
    before = dense(round_narrow(weight, bits, 64), bits, 128, torch.float64)
    weight[1, 70] = 1000
    after = dense(round_narrow(weight, bits, 64), bits, 128, torch.float64)
    assert torch.equal(after[0], before[0]) and torch.equal(after[1, :64], before[1, :64])
    assert abs(float(after[1, 70]) - 1000) <= 1000 * 2 * TO_BF16


@pytest.mark.parametrize("bits", NARROW)
def test_a_short_last_group_is_as_if_it_were_whole(bits: int) -> None:
    weight = weights(3, 40)
    filled = torch.cat((weight, weight[:, -1:].expand(3, 24)), 1)
    for short, whole in zip(
        round_narrow(weight, bits, 64), round_narrow(filled, bits, 64), strict=True
    ):
        assert short is not None and whole is not None and torch.equal(short, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", NARROW)
def test_numbers_on_the_grid_are_those_that_packing_gives(bits: int, dtype: torch.dtype) -> None:
    weight = weights(3, 72, dtype)
    wanted = dense(round_narrow(weight, bits, 32), bits, 72, dtype)
    assert torch.equal(on_grid(weight, bits, 32), wanted)


@pytest.mark.parametrize("bits", NARROW)
def test_given_scales_are_kept_and_what_lies_outside_goes_to_the_ends(bits: int) -> None:
    weight = weights(2, 40)
    scale, zero = torch.full((2, 5), 0.25).bfloat16(), torch.full((2, 5), 0.5).bfloat16()
    codes, *kept = round_on(weight, scale, zero, bits, 8)
    assert kept[0] is scale and kept[1] is zero
    half = 2 ** (bits - 1)
    wanted = ((weight - 0.5) / 0.25).round().clamp(-half, half - 1) + half
    assert torch.equal(unpack(codes, bits).float(), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_rows_of_inputs_have_a_scale_each(dtype: torch.dtype) -> None:
    x = weights(4, 40, dtype)
    x[1] = 0
    codes, scale = int8_rows(x)
    assert codes.dtype == torch.int8 and scale.shape == (4, 1)
    assert scale.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert codes[[0, 2, 3]].abs().amax(1).eq(127).all() and codes[1].eq(0).all()
    error = (codes.double() * scale.double() - x.double()).abs()
    assert (error <= scale.double() / 2 * (1 + 1e-5)).all()


def test_int8_is_half_a_step_away_at_most() -> None:
    weight = weights(6, 200)
    weight[1] = 0
    weight[2] = 0.3
    weight[3, 7] = 500
    rounded = round_int8(weight)
    assert rounded.codes.dtype == torch.int8 and rounded.scale.shape == (6, 1)
    assert rounded.zero is None and rounded.codes.abs().max() == 127
    found, step = dense(rounded, 8, 200, torch.float64), rounded.scale.double()
    outside = weight.abs().amax(1, keepdim=True).double() - 127 * step
    error = (found - weight.double()).abs()
    assert (error <= step / 2 * (1 + 1e-5) + outside.clamp(min=0)).all()
    assert (outside.clamp(min=0) <= 127 * step * TO_BF16).all() and found[1].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8_keeps_its_digits_and_its_greatest_number(dtype: torch.dtype) -> None:
    weight = weights(6, 200)
    weight[1] = 0
    weight[3, 7] = 500
    rounded = round_fp8(weight, dtype)
    assert rounded.codes.dtype == dtype and rounded.codes.float().isfinite().all()
    found, most = dense(rounded, 8, 200, torch.float64), torch.finfo(dtype)
    error = (found - weight.double()).abs()
    # Below the least normal number steps are all alike.
    least = rounded.scale.double() * most.smallest_normal * most.eps
    assert (error <= weight.double().abs() * (most.eps / 2 + TO_BF16) + least).all()
    assert found[1].eq(0).all()


@pytest.mark.parametrize("name", ["2", "3", "4", "int8"])
def test_the_product_is_that_of_the_numbers_in_float64(name: str) -> None:
    weight, x = weights(7, 104), torch.randn(2, 3, 104).bfloat16()
    bits = 8 if name == "int8" else int(name)
    rounded = round_int8(weight) if bits == 8 else round_narrow(weight, bits, 32)
    if bits == 8:
        wanted = rounded.codes.double() * rounded.scale.double()
    else:
        wanted = by_code(rounded, 104, bits)[3]
    y = product_ref(x, rounded, bits)
    assert y.dtype == torch.float64 and y.shape == (2, 3, 7)
    torch.testing.assert_close(
        y, torch.einsum("...k,nk->...n", x.double(), wanted), rtol=1e-12, atol=1e-12
    )
