"""2 to 16 rows times a matrix: every configuration, odd sizes, gated, rows apart, refusals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.products.few_rows as module
from archs.ops.dense import Unnormed, norm_swiglu, product
from kernels.products.few_rows import CONFIGS, few_rows_ref, serves
from tests.kernels.interpreter import interpreted

TOLERANCES = {
    torch.float16: {"rtol": 2e-3, "atol": 1e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 8e-3},
}
TILES = {
    f"{family} {c.rows}x{c.columns} {c.warps} warps {c.stages} stages": (family, c)
    for family, configs in CONFIGS.items()
    for c in configs
}


def operands(m: int, n: int, k: int, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor]:
    return torch.randn(m, k).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype)


def assert_equals_the_oracle(x: Tensor, weight: Tensor, *, gated: bool) -> None:
    with interpreted():
        y = module.few_rows(x, weight, gated=gated)
    assert y.dtype == x.dtype and y.shape[:-1] == x.shape[:-1]
    expected = few_rows_ref(x, weight, gated=gated)
    torch.testing.assert_close(y.double(), expected, **TOLERANCES[x.dtype])


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("tile", TILES)
def test_every_configuration_equals_the_reference(
    tile: str, gated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TILES[tile][1]
    monkeypatch.setattr(module, "CONFIGS", {"nvidia": (config, config)})
    # Two programs and a third that is cut short; one whole tile of columns and eight more.
    x, weight = operands(5, 2 * config.rows + 6, config.columns + 8)
    assert_equals_the_oracle(x, weight, gated=gated)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k"), [(2, 1, 8), (3, 33, 200), (16, 2, 1000), (8, 67, 488), (9, 18, 2056)]
)
def test_odd_sizes(m: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, weight = operands(m, n, k, dtype)
    assert_equals_the_oracle(x, weight, gated=False)
    if n % 2 == 0:
        assert_equals_the_oracle(x.view(1, m, k), weight, gated=True)


def test_rows_of_a_wider_matrix_are_read_where_they_lie() -> None:
    wide = torch.full((10, 96), torch.nan, dtype=torch.float16)
    weight = wide[:, 32:64]
    weight.copy_(torch.randn(10, 32))
    for gated in (False, True):
        assert_equals_the_oracle(torch.randn(2, 32).half(), weight, gated=gated)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_a_row_does_not_depend_on_the_others(gated: bool) -> None:
    x, weight = operands(16, 38, 600)
    x[2] = torch.nan
    x[7] = torch.inf
    with interpreted():
        together = module.few_rows(x, weight, gated=gated)
        for row in (0, 6, 15):
            pair = torch.stack((torch.full_like(x[row], torch.nan), x[row]))
            assert torch.equal(module.few_rows(pair, weight, gated=gated)[1], together[row])
    assert together[[0, 1, 3, 15]].isfinite().all() and together[2].isnan().all()


def test_shut_and_open_gates_stay_finite() -> None:
    x = torch.ones(2, 8).half()
    weight = torch.tensor([[-2000.0], [2000.0], [1.0], [0.125]]).half().expand(4, 8).contiguous()
    with interpreted():
        y = module.few_rows(x, weight, gated=True)
    assert torch.equal(y, torch.tensor([[0.0, 16000.0]] * 2).half())


def test_halves_of_a_gated_tile_and_shares_of_warps_are_whole() -> None:
    for _, config in TILES.values():
        assert config.rows % 16 == 0
        assert config.columns // config.warps >= 16 and config.columns % 64 == 0


Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
REFUSALS: dict[str, tuple[str, Change]] = {
    "one row": ("x=.*2 to 16 rows of 32", lambda x, w: (x[:1], w)),
    "17 rows": ("x=.*2 to 16 rows of 32", lambda x, w: (torch.zeros(17, 32).half(), w)),
    "width": ("x=.*2 to 16 rows of 32", lambda x, w: (torch.zeros(2, 64).half(), w)),
    "strides": ("x=.*contiguous", lambda x, w: (torch.zeros(2, 64).half()[:, ::2], w)),
    "x's start": ("x=.*contiguous", lambda x, w: (torch.zeros(72).half()[1:65].view(2, 32), w)),
    "dtype": ("x=.*bfloat16 or float16", lambda x, w: (x.float(), w.float())),
    "unlike": ("weight=.*must be torch.float16", lambda x, w: (x, w.bfloat16())),
    "dims": (r"weight=.*\[N, K\]", lambda x, w: (x, w[None])),
    "columns": ("weight=.*multiple of 8", lambda x, w: (x[:, :28].contiguous(), w[:, :28])),
    "turned": ("weight=.*rows", lambda x, w: (x, torch.zeros(32, 8).half().t())),
    "alignment": ("weight=.*16 bytes", lambda x, w: (x, torch.zeros(8, 36).half()[:, :32])),
    "start": ("weight=.*16 bytes", lambda x, w: (x, torch.zeros(8, 40).half()[:, 1:33])),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_arguments_are_refused_before_any_launch(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    message, change = REFUSALS[case]
    x, weight = change(torch.zeros(2, 32).half(), torch.zeros(8, 32).half())
    assert case == "dims" or not serves(x, weight)
    assert_refused(message, x, weight, monkeypatch)


def test_an_odd_gated_matrix_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.zeros(2, 32).half(), torch.zeros(7, 32).half()
    assert serves(x, weight)
    assert_refused("weight=.*N even where gated", x, weight, monkeypatch, gated=True)


def assert_refused(
    message: str, x: Tensor, weight: Tensor, monkeypatch: pytest.MonkeyPatch, **how: bool
) -> None:
    with interpreted():
        monkeypatch.setattr(type(module.few_rows_fwd_kernel), "run", _no_launch)
        with pytest.raises(ValueError, match=message):
            module.few_rows(x, weight, **how)


def _no_launch(*_: Any, **__: Any) -> None:
    raise AssertionError("launched")


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    with pytest.raises(ValueError, match="is on cpu, needs cuda"):
        module.few_rows(torch.zeros(2, 32).half(), torch.zeros(8, 32).half())


def test_products_of_few_rows_take_the_kernel_and_no_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    ours = few_rows_ref
    monkeypatch.setattr(module, "few_rows", lambda x, w: seen.append(len(x)) or ours(x, w).half())
    _, weight = operands(2, 8, 32)
    with torch.inference_mode():
        for m in (2, 16, 17):
            x, _ = operands(m, 8, 32)
            expected = few_rows_ref(x, weight).half()
            torch.testing.assert_close(product(x, weight, backend="triton"), expected)
        product(x[:2], weight, backend="torch")
        product(x[:2].float(), weight.float(), backend="triton")
    product(x[:2], weight, backend="triton")
    assert seen == [2, 16], "with gradients, in float32, for more rows and on torch the library's"


def test_swiglu_of_few_rows_is_one_launch_after_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def ours(x: Tensor, weight: Tensor, *, gated: bool) -> Tensor:
        assert gated
        seen.append(len(x))
        return few_rows_ref(x, weight, gated=True).half()

    monkeypatch.setattr(module, "few_rows", ours)
    _, weight = operands(2, 8, 32)
    norm = torch.rand(32).half()
    with torch.inference_mode(), interpreted():
        for m in (2, 16, 17):
            x, residual = operands(m, m, 32)
            pair = Unnormed(x, residual, norm, 1e-5), Unnormed(x, residual, norm, 1e-5)
            y = norm_swiglu(pair[0], weight, backend="triton")
            torch.testing.assert_close(y, norm_swiglu(pair[1], weight, backend="torch"),
                                       rtol=4e-3, atol=4e-3)  # fmt: skip
            assert torch.equal(pair[0].read(), x + residual)
    assert seen == [2, 16]
