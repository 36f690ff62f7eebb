"""A few rows times a matrix: every configuration, odd sizes, rows on their own, refusals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.few_rows as module
from archs.ops.product import Unnormed, norm_swiglu, product
from kernels.few_rows import CONFIGS, GATED_CONFIGS, Config, few_rows_ref, serves
from tests.kernels.interpreter import interpreted


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("n", "k"), [(2, 8), (34, 200), (66, 520), (18, 2056)])
@pytest.mark.parametrize("rows", [2, 5, 16])
def test_equals_reference(rows: int, n: int, k: int, gated: bool) -> None:
    x, weight = torch.randn(rows, 1, k).half(), (torch.randn(n, k) * k**-0.5).half()
    with interpreted():
        y = module.few_rows(x, weight, gated=gated)
    assert y.shape == (rows, 1, n // 2 if gated else n)
    torch.testing.assert_close(y.double(), few_rows_ref(x, weight, gated=gated), rtol=2e-3,
                               atol=2e-3)  # fmt: skip


@pytest.mark.parametrize("config", {*CONFIGS.values(), *GATED_CONFIGS.values()}, ids=str)
def test_every_configuration(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(3, 300 * 8).half(), (torch.randn(70, 300 * 8) / 50).half()
    for gated, name in ((False, "CONFIGS"), (True, "GATED_CONFIGS")):
        monkeypatch.setattr(module, name, {1 << 31: config})
        with interpreted():
            y = module.few_rows(x, weight, gated=gated)
        torch.testing.assert_close(y.double(), few_rows_ref(x, weight, gated=gated), rtol=2e-3,
                                   atol=2e-3)  # fmt: skip


def test_a_row_is_what_it_is_beside_any_others() -> None:
    x, weight = torch.randn(16, 96).half(), torch.randn(40, 96).half()
    with interpreted():
        together = module.few_rows(x, weight)
        for rows in (slice(0, 2), slice(3, 8), slice(14, 16)):
            others = x[rows].clone()
            others[1:] = 100.0
            assert torch.equal(module.few_rows(others, weight)[0], together[rows.start])


def test_many_rows_of_y_take_higher_tiles() -> None:
    for table, gated in ((CONFIGS, False), (GATED_CONFIGS, True)):
        found = [module.config_of(n, gated=gated, amd=False) for n in (2048, 128256)]
        assert found == list(table.values())


Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
REFUSALS: dict[str, tuple[str, Change]] = {
    "one row": ("x=.*2 to 16 rows of 32", lambda x, w: (x[:1], w)),
    "many rows": ("x=.*2 to 16 rows of 32", lambda x, w: (torch.zeros(17, 32).half(), w)),
    "width": ("x=.*2 to 16 rows of 32", lambda x, w: (torch.zeros(2, 64).half(), w)),
    "strides": ("x=.*contiguous", lambda x, w: (torch.zeros(2, 64).half()[:, ::2], w)),
    "dtype": ("x=.*bfloat16 or float16", lambda x, w: (x.float(), w.float())),
    "unlike": ("weight=.*must be torch.float16", lambda x, w: (x, w.bfloat16())),
    "dims": (r"weight=.*\[N, K\]", lambda x, w: (x, w[None])),
    "turned": ("weight=.*whole 16 bytes", lambda x, w: (x, torch.zeros(32, 8).half().t())),
    "odd": ("weight=.*whole 16 bytes", lambda x, w: (torch.zeros(2, 36).half(),
                                                     torch.zeros(8, 36).half())),
    "start": ("weight=.*16 bytes", lambda x, w: (x, torch.zeros(8, 40).half()[:, 1:33])),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_arguments_are_refused_before_any_launch(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    message, change = REFUSALS[case]
    x, weight = change(torch.zeros(2, 32).half(), torch.zeros(8, 32).half())
    assert case == "dims" or not serves(x, weight)
    with interpreted():
        monkeypatch.setattr(type(module.few_rows_fwd_kernel), "run", _no_launch)
        with pytest.raises(ValueError, match=message):
            module.few_rows(x, weight)


def _no_launch(*_: Any, **__: Any) -> None:
    raise AssertionError("launched")


def test_an_odd_number_of_rows_has_no_gate() -> None:
    with interpreted(), pytest.raises(ValueError, match=r"weight=.*\[2F, K\]"):
        module.few_rows(torch.zeros(2, 32).half(), torch.zeros(7, 32).half(), gated=True)


def test_products_of_few_rows_take_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, bool]] = []
    real = module.few_rows

    def watched(x: Tensor, weight: Tensor, *, gated: bool = False) -> Tensor:
        seen.append((x.shape[0], gated))
        return real(x, weight, gated=gated)

    monkeypatch.setattr(module, "few_rows", watched)
    weight = (torch.randn(48, 32) / 6).half()
    with torch.inference_mode(), interpreted():
        for rows in (2, 16, 17):
            x = torch.randn(rows, 1, 32).half()
            found = product(x, weight, backend="triton")
            torch.testing.assert_close(found.float(), x.float() @ weight.float().t(), rtol=5e-3,
                                       atol=5e-3)  # fmt: skip
        before = Unnormed(torch.randn(3, 1, 32).half(), None, torch.ones(32).half(), 1e-5)
        assert norm_swiglu(before, weight, backend="triton").shape == (3, 1, 24)
    assert seen == [(2, False), (16, False), (3, True)]
