"""1 to 64 rows times a packed matrix: every configuration and format, odd sizes, odd groups, rows
apart, refusals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.quant.packed_rows as module
from kernels.quant.packed_rows import CONFIGS, config_of, serves
from kernels.quant.torch import Rounded, product_ref, round_fp8, round_int8, round_narrow
from tests.kernels.interpreter import interpreted

TOLERANCES = {
    torch.float16: {"rtol": 2e-3, "atol": 1e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 8e-3},
}
FORMATS: dict[str, tuple[int, Callable[[Tensor], Rounded]]] = {
    **{
        f"int{bits} g{group}": (bits, lambda w, b=bits, g=group: round_narrow(w, b, g))
        for bits in (4, 2)
        for group in (32, 64, 128)
    },
    "int8": (8, round_int8),
    "fp8": (8, round_fp8),
}
TILES = {
    f"{family} {padded} rows": (padded, config)
    for family, configs in CONFIGS.items()
    for padded, config in configs.items()
}


def operands(m: int, n: int, k: int, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor]:
    return torch.randn(m, k).to(dtype), torch.randn(n, k) / k**0.5


def assert_equals_the_oracle(x: Tensor, weight: Tensor, name: str) -> Tensor:
    bits, rounding = FORMATS[name]
    rounded = rounding(weight)
    assert serves(x, rounded, bits)
    with interpreted():
        y = module.packed_rows(x, rounded, bits)
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], len(weight))
    expected = product_ref(x, rounded, bits)
    torch.testing.assert_close(y.double(), expected, **TOLERANCES[x.dtype])
    return y


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("tile", TILES)
def test_every_configuration_equals_the_oracle(
    tile: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    padded, config = TILES[tile]
    monkeypatch.setattr(module, "CONFIGS", {"nvidia": {padded: config}})
    # A program and one that is cut short; two tiles of columns and eight more; a block of x's rows
    # and a short one.
    x, weight = operands(min(padded + 3, 64), config.rows + 7, 2 * config.columns + 8)
    assert_equals_the_oracle(x, weight, name)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 1, 8), (2, 33, 200), (9, 2, 1000), (16, 35, 96), (17, 3, 488), (64, 37, 136)],
)
def test_odd_sizes(m: int, n: int, k: int, name: str, dtype: torch.dtype) -> None:
    x, weight = operands(m, n, k, dtype)
    assert_equals_the_oracle(x.view(1, m, k), weight, name)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_odd_weights(name: str, dtype: torch.dtype) -> None:
    """A row of zeros, one of equal numbers, a group of equal numbers and one of zeros, outliers."""
    x, weight = operands(3, 7, 264, dtype)
    x += 1
    weight[0] = 0
    weight[1] = 0.25
    weight[2, 128:] = -0.5
    weight[3, :128] = 0
    weight[4, 130] = 40
    weight[5] *= 1e-4
    y = assert_equals_the_oracle(x, weight, name)
    assert torch.equal(y[:, 0], torch.zeros(3, dtype=dtype))
    bits, rounding = FORMATS[name]
    if bits < 8:
        assert rounding(weight).scale[1].eq(0).all()


@pytest.mark.parametrize("name", ["int4 g64", "int2 g32", "int8"])
def test_far_from_zero_x_costs_no_digits(name: str) -> None:
    """The sums of x, which zero points are multiplied by, dwarf the rest here."""
    x, weight = operands(2, 9, 512)
    x = x / 8 + 4
    bits, rounding = FORMATS[name]
    rounded = rounding(weight - weight.mean(-1, keepdim=True))
    with interpreted():
        y = module.packed_rows(x, rounded, bits)
    expected = product_ref(x, rounded, bits)
    assert float((y - expected).abs().max()) <= 2**-11 * float(expected.abs().max()) + 1e-4


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", FORMATS)
def test_a_row_does_not_depend_on_the_others(name: str) -> None:
    bits, rounding = FORMATS[name]
    x, weight = operands(16, 35, 600)
    x[2] = torch.nan
    x[7] = torch.inf
    rounded = rounding(weight)
    with interpreted():
        together = module.packed_rows(x, rounded, bits)
        for row in (0, 6, 15):
            others = torch.full((9, 600), torch.nan).half()
            others[4] = x[row]
            assert torch.equal(module.packed_rows(others, rounded, bits)[4], together[row])
        alone = module.packed_rows(x[:1], rounded, bits)
        assert torch.equal(module.packed_rows(x[:8], rounded, bits)[:1], alone)
        # Blocks of rows, too.
        many = module.packed_rows(torch.cat((x, x, x, x)), rounded, bits)
    assert torch.equal(many[[0, 6, 15]], many[[48, 54, 63]])
    assert together[[0, 1, 3, 15]].isfinite().all() and together[2].isnan().all()
    assert not together[7].isfinite().any()


def test_rows_are_padded_to_the_least_that_holds_them() -> None:
    assert [config_of(m)[0] for m in (1, 8, 9, 16, 17, 32, 33, 64)] == [
        8, 8, 16, 16, 32, 32, 32, 32,
    ]  # fmt: skip
    assert [config_of(m, amd=True)[0] for m in (1, 16, 17, 64)] == [16, 16, 32, 32]


def test_every_warp_has_a_group() -> None:
    for padded, config in TILES.values():
        assert min(config.groups, config.columns // max(module.GROUPS)) >= config.warps
        assert padded >= 8 and config.rows % 16 == 0


def test_no_rows_of_weights() -> None:
    none = Rounded(torch.empty(0, 32, dtype=torch.uint8), *torch.empty(2, 0, 1).bfloat16())
    with interpreted():
        assert module.packed_rows(torch.ones(2, 64).half(), none, 4).shape == (2, 0)


Operands = tuple[Tensor, Rounded, int]
X = torch.zeros(2, 64).half()
NARROW = round_narrow(torch.randn(8, 64), 4, 32)
WIDE = round_int8(torch.randn(8, 64))


def codes(of: Tensor) -> Operands:
    return X, NARROW._replace(codes=of), 4


REFUSALS: dict[str, tuple[str, Operands]] = {
    "3 bits": ("bits=3 must be 2, 4 or 8", (X, round_narrow(torch.randn(8, 64), 3, 32), 3)),
    "no rows": ("x=.*1 to 64 rows", (X[:0], NARROW, 4)),
    "65 rows": ("x=.*1 to 64 rows", (torch.zeros(65, 64).half(), NARROW, 4)),
    "columns": ("x=.*multiple of 8", (torch.zeros(2, 60).half(), NARROW, 4)),
    "nothing": ("x=.*multiple of 8", (torch.zeros(2, 0).half(), NARROW, 4)),
    "scalar": ("x=.*multiple of 8", (torch.zeros(()).half(), NARROW, 4)),
    "strides": ("x=.*contiguous", (torch.zeros(2, 128).half()[:, ::2], NARROW, 4)),
    "x's start": ("x=.*contiguous", (torch.zeros(136).half()[1:129].view(2, 64), NARROW, 4)),
    "x's dtype": ("x=.*bfloat16 or float16", (X.float(), NARROW, 4)),
    "int8 as 4 bits": (r"rounded.codes=.*uint8 \[N", (X, WIDE, 4)),
    "4 bits as int8": ("rounded.codes=.*int8 or float8_e4m3fn", (X, NARROW, 8)),
    "float8_e5m2": (
        "rounded.codes=.*int8 or float8_e4m3fn",
        (X, round_fp8(torch.randn(8, 64), torch.float8_e5m2), 8),
    ),
    "dims": (r"rounded.codes=.*uint8 \[N", codes(NARROW.codes[None])),
    "turned": ("rounded.codes=.*contiguous", codes(torch.zeros(32, 8, dtype=torch.uint8).t())),
    "start": (
        "rounded.codes=.*16 bytes",
        codes(torch.zeros(264, dtype=torch.uint8)[8:].view(8, 32)),
    ),
    "too wide": ("rounded.codes=.*of 32 columns", (torch.zeros(2, 32).half(), NARROW, 4)),
    "too narrow": ("rounded.codes=.*of 72 columns", (torch.zeros(2, 72).half(), NARROW, 4)),
    "int8's columns": ("rounded.codes=.*of 72 columns", (torch.zeros(2, 72).half(), WIDE, 8)),
    "scale's dtype": (
        "rounded.scale=.*torch.bfloat16",
        (X, NARROW._replace(scale=NARROW.scale.half()), 4),
    ),
    "scale's rows": ("rounded.scale=.*8, groups", (X, NARROW._replace(scale=NARROW.scale[:4]), 4)),
    "zero's shape": ("rounded.zero=.*scale", (X, NARROW._replace(zero=WIDE.scale), 4)),
    "zero's dtype": (
        "rounded.zero=.*torch.bfloat16",
        (X, NARROW._replace(zero=NARROW.scale.half()), 4),
    ),
    "no zero": ("rounded.zero=None", (X, NARROW._replace(zero=None), 4)),
    "int8's zero": ("rounded.zero=.*None of 8 bits", (X, WIDE._replace(zero=WIDE.scale), 8)),
    "int8 in groups": (
        r"rounded.scale=.*\[8, 1\]",
        (X, WIDE._replace(scale=NARROW.scale), 8),
    ),
    "group of 16": (
        "rounded.scale=.*32, 64 or 128",
        (X, round_narrow(torch.randn(8, 64), 4, 16), 4),
    ),
    "parts of groups": (
        "rounded.scale=.*32, 64 or 128",
        (X, NARROW._replace(scale=torch.zeros(8, 3).bfloat16(), zero=torch.zeros(8, 3).bfloat16()),
         4),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_arguments_are_refused_before_any_launch(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    message, (x, rounded, bits) = REFUSALS[case]
    assert not serves(x, rounded, bits)
    with interpreted():
        monkeypatch.setattr(type(module.packed_rows_fwd_kernel), "run", _no_launch)
        with pytest.raises(ValueError, match=message):
            module.packed_rows(x, rounded, bits)


def _no_launch(*_: Any, **__: Any) -> None:
    raise AssertionError("launched")


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    assert serves(X, NARROW, 4) and serves(X, WIDE, 8)
    with pytest.raises(ValueError, match="is on cpu, needs cuda"):
        module.packed_rows(X, NARROW, 4)
