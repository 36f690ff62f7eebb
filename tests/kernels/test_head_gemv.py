"""One token's heads, each by its own matrix: both ways the weights lie, odd sizes, refusals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels.products.head_gemv as module
from archs.ops.dense import by_head
from kernels.products.head_gemv import head_gemv_ref, serves
from tests.kernels.interpreter import interpreted


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("heads", "dim", "width"), [(1, 16, 8), (3, 40, 200), (5, 600, 24)])
def test_equals_the_oracle(heads: int, dim: int, width: int, turned: bool) -> None:
    weight = torch.randn(heads, dim, width)
    if turned:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.randn(1, 1, heads, dim + 16)
    x = wide[..., :dim]
    with interpreted():
        y = module.head_gemv(x, weight)
    assert y.shape == (1, 1, heads, width)
    torch.testing.assert_close(y.double(), head_gemv_ref(x, weight), rtol=1e-5, atol=1e-4)


Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
REFUSALS: dict[str, tuple[str, Change]] = {
    "two tokens": (r"x=.*\[1, 1, 2, 16\]", lambda x, w: (torch.zeros(2, 1, 2, 16), w)),
    "heads": (r"x=.*\[1, 1, 2, 16\]", lambda x, w: (torch.zeros(1, 1, 3, 16), w)),
    "wide": (r"x=.*at most 1024", lambda x, w: (torch.zeros(1, 1, 1, 1025),
                                                torch.zeros(1, 1025, 8))),
    "strides": (r"x=.*contiguous", lambda x, w: (torch.zeros(1, 1, 2, 32)[..., ::2], w)),
    "dtype": (r"x=.*float32", lambda x, w: (x.double(), w.double())),
    "unlike": (r"weight=.*float32", lambda x, w: (x, w.half())),
    "dims": (r"weight=.*\[H, D, N\]", lambda x, w: (x, w[0])),
    "gaps": (r"weight=.*D or N contiguous", lambda x, w: (x, torch.zeros(2, 16, 16)[..., ::2])),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_arguments_are_refused_before_any_launch(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    message, change = REFUSALS[case]
    x, weight = change(torch.zeros(1, 1, 2, 16), torch.zeros(2, 16, 8))
    with interpreted():
        monkeypatch.setattr(type(module.head_gemv_fwd_kernel), "run", _no_launch)
        with pytest.raises(ValueError, match=message):
            module.head_gemv(x, weight)


@pytest.mark.parametrize(
    "out",
    [torch.zeros(1, 1, 2, 9), torch.zeros(1, 1, 4, 8)[:, :, ::2], torch.zeros(1, 1, 2, 8).half()],
    ids=["shape", "strides", "dtype"],
)
def test_an_unlike_result_is_refused(out: Tensor) -> None:
    with interpreted(), pytest.raises(ValueError, match=r"out=.*float32 \[1, 1, 2, 8\]"):
        module.head_gemv(torch.zeros(1, 1, 2, 16), torch.zeros(2, 16, 8), out=out)


def _no_launch(*_: Any, **__: Any) -> None:
    raise AssertionError("launched")


@pytest.mark.parametrize("batch", [1, 2])
def test_products_by_head_take_it_for_one_token(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = torch.randn(batch, 1, 3, 16), torch.randn(3, 16, 24)
    expected, seen = head_gemv_ref(x, weight), list[int]()
    real = module.head_gemv

    def watched(x: Tensor, weight: Tensor, *, out: Tensor) -> Tensor:
        seen.append(len(weight))
        return real(x, weight, out=out)

    monkeypatch.setattr(module, "head_gemv", watched)
    assert serves(x, weight) == (batch == 1)
    for heads in ([3], [1, 2]):
        for backend in ("triton", "torch"):
            seen.clear()
            with torch.inference_mode(), interpreted():
                found = by_head(x, *weight.split(heads), backend=backend)
            torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
            assert seen == (heads if batch == 1 and backend == "triton" else [])
