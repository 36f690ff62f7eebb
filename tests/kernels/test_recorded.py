"""What is compiled ahead is what a wrapper launches: types, constants, alignment, targets."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.aot.ahead import TARGETS, stages_for
from kernels.aot.recorded import Expected, both_ways, meta, tile_loads, variants_of
from kernels.device import gpu, require_gpu


@triton.jit(do_not_specialize=["count"])
def doubled_kernel(x, scale, y, count, stride, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    tl.store(y + at, 2.0 * tl.load(x + at * stride, mask=at < count), mask=at < count)


@triton.jit
def other_kernel(x, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(x + tl.arange(0, BLOCK), 0.0)


def doubled(x: Tensor, *, scale: Tensor | None = None) -> Tensor:
    require_gpu("x", x, doubled_kernel)
    where = gpu(x.device)
    if x.dtype == torch.float16 and not where.amd and where.capability < (9, 0):
        raise ValueError("x is float16, which needs a Hopper")
    y = torch.empty_like(x)
    doubled_kernel[(1,)](
        x, scale, y, len(x), x.stride(0), BLOCK=128 if where.amd else 64, num_warps=2,
        OVERLAP=True, launch_pdl=True,
    )  # fmt: skip
    other_kernel[(1,)](y, BLOCK=16)
    return y


LOADS = Expected(wide_loads=tile_loads("x", "BLOCK", least=1))


def test_a_launch_is_recorded_as_a_launcher_would_see_it() -> None:
    amd, nvidia = sorted(
        variants_of([("dense", partial(doubled, meta(48)))], {doubled_kernel: LOADS}),
        key=lambda v: len(v.targets),
    )
    assert amd.targets == ("gfx942",) and nvidia.targets == ("sm_90", "sm_80", "sm_100")
    assert (nvidia.name, nvidia.num_warps, nvidia.num_stages) == ("dense", 2, None)
    # A stride of 1 is a constant; a count of 48 is not specialized, as the kernel asks.
    assert nvidia.constexprs == {"scale": None, "stride": 1, "BLOCK": 64}
    assert dict(nvidia.signature) == {"x": "*bf16", "y": "*bf16", "count": "i32"}
    assert nvidia.divisible == {"x", "y"}
    assert amd.constexprs["BLOCK"] == 128
    assert [stages_for(nvidia, t) for t in TARGETS] == [3, 3, 3, 2]


@pytest.mark.parametrize(("stride", "aligned"), [(16, True), (24, False)])
def test_numbers_of_16_are_told_from_others(stride: int, aligned: bool) -> None:
    x = meta(3, stride)[:, 0]
    found = variants_of([("strided", partial(doubled, x, scale=meta(1)))], {doubled_kernel: LOADS})
    assert ("stride" in found[0].divisible) == aligned and "scale" in found[0].divisible


def test_equal_launches_are_one_and_refused_targets_are_left_out() -> None:
    calls = [(name, partial(doubled, meta(n))) for name, n in (("a", 3), ("b", 5))]
    # The second is AMD's.
    assert {v.name for v in variants_of(calls, {doubled_kernel: LOADS})} == {"a", "a 2"}
    half = partial(doubled, meta(3, dtype=torch.float16))
    found = variants_of([("half", half)], {doubled_kernel: LOADS})
    assert sorted(t for v in found for t in v.targets) == ["gfx942", "sm_100", "sm_90"]
    both = variants_of([("a", calls[0][1])], {other_kernel: Expected(), doubled_kernel: LOADS})
    assert [v.kernel for v in both] == [other_kernel, doubled_kernel, doubled_kernel]


def refuse() -> None:
    raise ValueError("x=5 must be 4")


@pytest.mark.parametrize(
    ("call", "message"),
    [(refuse, "'c' launches nothing: x=5 must be 4"), (torch.rand, "'c' launches nothing: none")],
)
def test_a_call_that_launches_nothing_is_an_error(call: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        variants_of([("c", partial(call, *([] if call is refuse else [1])))], {other_kernel: LOADS})


def test_operands_without_memory_are_refused_elsewhere() -> None:
    with pytest.raises(ValueError, match="is on meta, needs cuda"):
        doubled(meta(3))


def test_both_ways_asks_for_the_gradients_of_all_that_can_have_one() -> None:
    asked = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
            return x + y

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
            asked.append(ctx.needs_input_grad)
            return grad, grad

    name, call = both_ways(
        "a torch.bfloat16", lambda x, y, _: Watched.apply(x, y), meta(3), meta(3), None
    )
    call()
    assert name == "a bfloat16" and asked == [(True, True)]
