"""Packed matrices against a float64 product: every format, layouts, odd shapes, extreme rows."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from archs.errors import UserError
from archs.ops.dense import product
from archs.packed import Packed, Stacked, as_rounded, nearest
from archs.weights import BY_ROW, INT8_INPUTS, NARROW_NAMES, Number
from kernels.quant import packed_rows
from kernels.quant.torch import Rounded, dense, product_ref
from tests.kernels.interpreter import interpreted

#: Relative to the largest result: products of bfloat16 are rounded once, dense ones in their dtype.
LIMITS = {torch.bfloat16: 8e-3, torch.float32: 2e-6, torch.float64: 1e-14}
FORMATS = (*BY_ROW, *NARROW_NAMES)
SHAPES = [(48, 160), (33, 136), (16, 128)]


def matrix(rows: int, columns: int) -> Tensor:
    """Rows of zeros, of one value, with an outlier, with a group of zeros, tiny ones."""
    weight = torch.randn(rows, columns)
    weight[0] = 0
    weight[1] = 0.37
    weight[2, 5] = 300.0
    weight[3, :32] = 0
    weight[4] *= 1e-30
    return weight


def packed(name: str, weight: Tensor, dtype: torch.dtype = torch.bfloat16) -> Packed:
    number = Number.named(name)
    return Packed(nearest(weight, number), number, weight.shape[1], dtype)


def inputs(columns: int) -> Iterator[Tensor]:
    for rows in ((1,), (2, 3), (17,), (130,)):
        yield torch.randn(*rows, columns)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [name for name in FORMATS if name != INT8_INPUTS])
def test_products_are_those_of_the_numbers_that_are_stored(
    name: str, shape: tuple[int, int]
) -> None:
    held = packed(name, matrix(*shape))
    rounded, bits = held.rounded, held.number.bits
    for laid_out in (False, True):
        if laid_out:
            held.lay_out()
        for dtype, limit in LIMITS.items():
            for x in inputs(shape[1]):
                y = held.product(x.to(dtype), backend="torch")
                expected = product_ref(x.to(dtype), rounded, bits)
                assert y.dtype == dtype and y.shape == (*x.shape[:-1], shape[0])
                error = (y.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
                assert error.max() < limit, (laid_out, dtype, x.shape)


@pytest.mark.parametrize("name", FORMATS)
def test_a_layout_changes_no_number_and_no_size(name: str) -> None:
    held = packed(name, matrix(48, 160))
    dense, size, state = held.dense(torch.float64), held.nbytes, held.state_dict()
    assert size == held.declared_bytes == held.number.nbytes(48, 160)
    state = {key: value.clone() for key, value in state.items()}
    for _ in range(2):
        held.lay_out()
        assert torch.equal(held.dense(torch.float64), dense) and held.nbytes == size
    again = held.state_dict()
    assert again.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(again[key].view(torch.uint8), value.view(torch.uint8)), key


def test_four_bits_are_read_packed_on_a_cpu() -> None:
    held = packed("int4-g32", matrix(48, 160))
    before = held.codes.data_ptr()
    held.lay_out()
    assert held.zero is None and held.codes.data_ptr() != before
    # Rows that torch's product does not take stay as files have them, as many bytes as declared.
    odd = packed("int4-g32", matrix(33, 160))
    odd.lay_out()
    assert odd.zero is not None and odd.nbytes == odd.declared_bytes


def test_factors_multiply_the_inputs() -> None:
    weight, factors = torch.randn(32, 64), torch.rand(64) + 0.5
    factors = factors.bfloat16().float()
    number = Number.named("int4-g32")
    held = Packed(nearest(weight / factors, number), number, 64, torch.float64, factors)
    plain = Packed(nearest(weight / factors, number), number, 64, torch.float64)
    x = torch.randn(3, 64, dtype=torch.float64)
    expected = plain.product(x * factors, backend="torch")
    torch.testing.assert_close(held.product(x, backend="torch"), expected)
    torch.testing.assert_close(x @ held.dense(torch.float64).t(), expected)
    assert held.nbytes == held.declared_bytes == plain.nbytes + 2 * 64


@pytest.mark.parametrize("name", [*BY_ROW])
def test_rows_are_looked_up_by_number(name: str) -> None:
    held = packed(name, matrix(40, 24), torch.float32)
    index = torch.tensor([[3, 0], [39, 3]])
    assert torch.equal(held.rows(index), held.dense(torch.float32)[index])
    assert held.rows(index, torch.float64).dtype == torch.float64
    with pytest.raises(ValueError, match="rows of int4-g32 cannot be read by number"):
        packed("int4-g32", matrix(40, 32)).rows(index)


def test_blocks_of_several_formats_are_one_matrix() -> None:
    weight = matrix(48, 64)
    parts = [packed("int4-g32", weight[:32]), weight[32:40].bfloat16(), packed("int8", weight[40:])]
    held = Stacked(parts)
    assert held.shape == (48, 64) and held.dtype == torch.bfloat16 and held.storage == "int4-g32"
    assert held.declared_bytes == held.nbytes == sum(part.nbytes for part in parts)
    held.lay_out()
    x = torch.randn(2, 64).bfloat16()
    expected = x.double() @ held.dense(torch.float64).t()
    y = held.product(x, backend="torch")
    assert (y.double() - expected).norm() / expected.norm() < LIMITS[torch.bfloat16]


def test_groups_wider_than_a_row_are_refused() -> None:
    with pytest.raises(UserError, match=r"groups of 128 columns, wider than .* \[8, 64\]; take"):
        packed("int4-g128", torch.randn(8, 64))


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_inputs_of_eight_bits_are_rounded_row_by_row(dtype: torch.dtype) -> None:
    held = packed("w8a8", matrix(33, 71), dtype)
    for x in inputs(71):
        x = x.to(dtype)
        x[..., 3] = 40
        x[0] = 0
        y = held.product(x, backend="torch")
        step = x.double().abs().amax(-1, keepdim=True) / 127
        rounded = torch.where(step == 0, 0, x.double() / step).round() * step
        expected = rounded @ held.dense(torch.float64).t()
        assert y.dtype == dtype
        # A number halfway between two codes may go either way.
        half = step * held.dense(torch.float64).abs().max()
        assert ((y.double() - expected).abs() <= half * 1.1 + 8e-3 * expected.abs()).all()
        assert torch.equal(y[0], torch.zeros_like(y[0]))


def test_as_rounded_is_what_is_stored() -> None:
    weight = matrix(24, 136)
    for name in FORMATS:
        number = Number.named(name)
        stored = dense(nearest(weight, number), number.bits, 136, torch.float32)
        assert torch.equal(as_rounded(weight, number), stored), name


@pytest.mark.parametrize("name", ["int4-g32", "int2-g64", "int8", "fp8", "int3-g32"])
def test_few_rows_take_our_own_kernel_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    ours = packed_rows.packed_rows

    def watch(x: Tensor, rounded: Rounded, bits: int) -> Tensor:
        seen.append(len(x))
        return ours(x, rounded, bits)

    monkeypatch.setattr(packed_rows, "packed_rows", watch)
    held = packed(name, matrix(33, 136))
    for rows in (1, 3, 70):
        x = torch.randn(rows, 136).bfloat16()
        with interpreted():
            y = product(x, held, backend="triton")
        expected = product_ref(x, held.rounded, held.number.bits)
        error = (y.double() - expected).norm(dim=-1) / expected.norm(dim=-1)
        assert error.max() < LIMITS[torch.bfloat16]
    # No kernel reads three bits, or more rows.
    assert seen == ([] if name == "int3-g32" else [1, 3])
