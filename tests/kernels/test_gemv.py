"""One row times a matrix: every configuration, odd sizes, refusals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.products.gemv as module
from archs.ops.dense import Unnormed, norm_swiglu, product
from kernels.products.gemv import CONFIGS, WHOLE_CONFIGS, gemv_ref, norm_gemv_ref, serves
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


def test_a_row_wider_than_a_tile_is_read_in_several() -> None:
    x, weight = torch.randn(1, 5000), torch.randn(6, 5000) / 64
    for gated in (False, True):
        with interpreted():
            y = module.gemv(x, weight, gated=gated)
        expected = gemv_ref(x, weight, gated=gated)
        torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize(("n", "k"), [(2, 8), (34, 200), (10, 2056)])
def test_sum_norm_and_gate_around_the_product(n: int, k: int, added: bool, gated: bool) -> None:
    x, scale = torch.randn(1, 1, k), torch.randn(k)
    residual = torch.randn(1, 1, k) if added else None
    weight = torch.randn(n, k) * k**-0.5
    with interpreted():
        y, total = module.norm_gemv(x, residual, scale, weight, eps=1e-3, gated=gated)
    expected, summed = norm_gemv_ref(x, residual, scale, weight, eps=1e-3, gated=gated)
    assert y.shape == (1, 1, n // 2 if gated else n)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(total, summed)


def test_the_norm_is_that_of_the_sum_as_it_is_stored() -> None:
    """A float16 sum drops what float32 would keep: the norm must not see more than the stream."""
    x, residual = torch.full((1, 16), 1e-3).half(), torch.full((1, 16), 8.0).half()
    weight, ones = torch.eye(16).half(), torch.ones(16).half()
    with interpreted():
        y, total = module.norm_gemv(x, residual, ones, weight, eps=0.0)
    assert torch.equal(total, torch.full((1, 16), 8.0).half())
    assert torch.equal(y, torch.ones(1, 16).half())


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("added", [False, True])
def test_what_is_not_normed_yet_is_in_every_product(batch: int, added: bool) -> None:
    x, scale, weight = torch.randn(batch, 1, 32), torch.randn(32), torch.randn(48, 32)
    residual = torch.randn(batch, 1, 32) if added else None
    for form in (product, norm_swiglu):
        by_torch, by_kernel = (Unnormed(x, residual, scale, 1e-5) for _ in range(2))
        with pytest.raises(ValueError, match="once a product"):
            by_torch.read()
        expected = form(by_torch, weight, backend="torch")
        with torch.inference_mode(), interpreted():
            found = form(by_kernel, weight, backend="triton")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        total = x if residual is None else x + residual
        assert torch.equal(by_torch.read(), total) and torch.equal(by_kernel.read(), total)


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
    for k, config in WHOLE_CONFIGS.items():
        assert module.config_of(k, whole=True) == config
        assert config.columns == k, "a row that is normed lies in one tile"


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


def test_what_stands_around_must_fit() -> None:
    x, weight = torch.zeros(1, 32), torch.zeros(7, 32)
    with interpreted():
        with pytest.raises(ValueError, match=r"weight=.*\[2F, K\]"):
            module.gemv(x, weight, gated=True)
        with pytest.raises(ValueError, match=r"residual=.*32 contiguous"):
            module.norm_gemv(x, torch.zeros(1, 16), torch.zeros(32), weight, eps=1e-5)
        with pytest.raises(ValueError, match=r"norm_weight=.*32 contiguous"):
            module.norm_gemv(x, None, torch.zeros(32).half(), weight, eps=1e-5)


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
