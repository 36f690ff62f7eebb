"""Which kernels begin before the one before them has ended, and that they wait for it then."""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton

from kernels import overlap
from kernels.attention.decode import SPLIT_ROWS
from kernels.overlap import overlapped
from kernels.products.gemv import variants
from tests.kernels.interpreter import interpreted

CUDA = torch.device("cuda", 0)


@pytest.fixture
def capable(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Sets the compute capability that the device is said to have."""

    def say(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: (major, minor))
        monkeypatch.setattr(overlap, "overlapped", functools.cache(overlapped.__wrapped__))

    return say


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 9), {"OVERLAP": False}), ((9, 0), {"OVERLAP": True, "launch_pdl": True}),
     ((12, 0), {"OVERLAP": True, "launch_pdl": True})],
)  # fmt: skip
def test_only_devices_that_can_are_asked(
    capable: Callable[[int, int], None], capability: tuple[int, int], expected: dict[str, bool]
) -> None:
    capable(*capability)
    assert overlap.overlapped(CUDA) == expected
    assert overlap.overlapped(torch.device("cpu")) == {"OVERLAP": False}


def test_a_kernel_that_does_not_begin_early_lets_the_next_one(
    capable: Callable[[int, int], None],
) -> None:
    capable(9, 0)
    assert overlap.overlapped(CUDA, early=False) == {"OVERLAP": True}


@pytest.mark.parametrize(("context", "early"), [(4096, True), (131072, False)])
def test_long_splits_of_attention_are_spread_evenly(
    context: int, early: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sequence of eight heads has 33 splits: 128 rows each of 4k tokens, 3,972 of 128k."""
    import kernels.attention.decode as module

    asked: list[bool] = []

    def watched(device: torch.device, *, early: bool = True) -> dict[str, bool]:
        asked.append(early)
        return {"OVERLAP": False}

    monkeypatch.setattr(module, "overlapped", watched)
    monkeypatch.setattr(module, "split_combine", lambda *_, **__: None)
    q = torch.zeros(1, 1, 32, 64, dtype=torch.float16)
    pool = torch.zeros(8, 64, 64, dtype=torch.float16)
    table = torch.zeros(1, context // 64, dtype=torch.int32)
    with interpreted():
        monkeypatch.setattr(type(module.attention_decode_fwd_kernel), "run", lambda *_, **__: None)
        module.attention_decode(q, pool, pool, table, torch.ones(1, dtype=torch.int32),
                                page_size=64)  # fmt: skip
    assert asked == [early]
    assert (triton.cdiv(context, 33) <= SPLIT_ROWS) == early


@pytest.mark.parametrize(("target", "there"), [("sm_80", False), ("sm_90", True)])
def test_weights_are_asked_for_before_the_wait(target: str, there: bool) -> None:
    """Machine code of the product: the tile's loads stand above the wait, the row's below it."""
    ptx = _ptx(variants()[0], target)
    assert ("griddepcontrol.wait" in ptx) == there
    if there:
        before, after = ptx.split("griddepcontrol.wait")
        assert "griddepcontrol.launch_dependents" in before
        # Two tiles, of gate and up, and the norm's weight; then x and the residual.
        assert before.count("ld.global") > after.count("ld.global") > 0


def _ptx(variant: Any, target: str) -> str:
    found = []
    compiled = triton.compile

    def watched(*given: Any, **options: Any) -> Any:
        found.append(compiled(*given, **options))
        return found[-1]

    from kernels.aot import ahead

    original = ahead.triton
    ahead.triton = SimpleNamespace(compile=watched)  # type: ignore[assignment]
    try:
        ahead.compile_ahead(variant, target)
    finally:
        ahead.triton = original
    return str(found[0].asm["ptx"])
