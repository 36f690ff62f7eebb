"""One row times a matrix: every configuration, odd sizes, refusals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.gemv as module
from archs.ops.product import product
from kernels.gemv import CONFIGS, gemv_ref, serves
from tests.kernels.interpreter import interpreted


@pytest.mark.parametrize(
    ("n", "k"), [(1, 8), (33, 200), (67, 488), (9, 2048), (5, 2056), (3, 5000)]
)
def test_equals_reference(n: int, k: int) -> None:
    x, weight = torch.randn(1, 1, k), torch.randn(n, k)
    with interpreted():
        y = module.gemv(x, weight)
    assert y.shape == (1, 1, n)
    torch.testing.assert_close(y.double(), gemv_ref(x, weight), rtol=1e-5, atol=1e-4)


def test_rows_of_a_wider_matrix_are_read_where_they_lie() -> None:
    wide = torch.full((10, 96), torch.nan)
    weight = wide[:, 32:64]
    weight.copy_(torch.randn(10, 32))
    x = torch.randn(32)
    with interpreted():
        y = module.gemv(x, weight)
    torch.testing.assert_close(y.double(), gemv_ref(x, weight), rtol=1e-5, atol=1e-4)


def test_every_configuration_is_reached() -> None:
    assert {module.config_of(k) for k in (64, 300, 2048, 14336)} == set(CONFIGS.values())


Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
REFUSALS: dict[str, tuple[str, Change]] = {
    "two rows": ("x=.*one row of 32", lambda x, w: (torch.zeros(2, 32), w)),
    "width": ("x=.*one row of 32", lambda x, w: (torch.zeros(1, 64), w)),
    "strides": ("x=.*contiguous", lambda x, w: (torch.zeros(64)[::2], w)),
    "dtype": ("x=.*float32, bfloat16 or float16", lambda x, w: (x.double(), w.double())),
    "unlike": ("weight=.*must be torch.float32", lambda x, w: (x, w.bfloat16())),
    "dims": (r"weight=.*\[N, K\]", lambda x, w: (x, w[None])),
    "turned": ("weight=.*rows", lambda x, w: (x, torch.zeros(32, 8).t())),
    "alignment": ("weight=.*16 bytes", lambda x, w: (x, torch.zeros(8, 33)[:, :32])),
    "start": ("weight=.*16 bytes", lambda x, w: (x, torch.zeros(8, 36)[:, 1:33])),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_arguments_are_refused_before_any_launch(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    message, change = REFUSALS[case]
    x, weight = change(torch.zeros(1, 32), torch.zeros(8, 32))
    assert not serves(x, weight) or case in ("width", "dims")
    with interpreted():
        monkeypatch.setattr(type(module.gemv_fwd_kernel), "run", _no_launch)
        with pytest.raises(ValueError, match=message):
            module.gemv(x, weight)


def _no_launch(*_: Any, **__: Any) -> None:
    raise AssertionError("launched")


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    with pytest.raises(ValueError, match="is on cpu, needs cuda"):
        module.gemv(torch.zeros(32), torch.zeros(8, 32))


def test_products_of_one_row_take_the_kernel_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(module, "gemv", lambda x, w: seen.append(x.numel()) or x @ w.t())
    one, two, weight = torch.randn(1, 32), torch.randn(2, 32), torch.randn(8, 32)
    with torch.inference_mode():
        for x in (one, two):
            torch.testing.assert_close(product(x, weight, backend="triton"), x @ weight.t())
        product(one, weight, backend="torch")
    product(one, weight, backend="triton")
    assert seen == [32], "with gradients, for two rows and on torch the library's product runs"
