"""The convolution step on slots: oracle, torch form, raggedness, snapshots, refusals, compilation.

`torch.empty` is NaN here and so is every padded input: reading or leaving either shows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.conv import step as op
from kernels.conv.torch import causal_conv, conv_tail
from tests.kernels.interpreter import interpreted
from tests.kernels.slots import in_place

SLOTS = (4, 1, 3)
B, POOL = len(SLOTS), 6
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


@dataclass(frozen=True, kw_only=True)
class Case:
    """K tokens, C channels, W taps; bias and SiLU; dtype of inputs and tail; valid tokens."""

    k: int
    c: int = 300
    w: int = 4
    bias: bool = True
    silu: bool = True
    dtype: torch.dtype = torch.float32
    new: tuple[int, ...] | None = None

    def __str__(self) -> str:
        kind = f"{self.dtype}".replace("torch.", "")
        flags = f"{'-bias' if self.bias else ''}{'-silu' if self.silu else ''}"
        return f"k{self.k}-c{self.c}-w{self.w}{flags}-{kind}-new{self.new}"


CASES = [
    Case(k=1),
    Case(k=1, c=100, w=2, silu=False),
    Case(k=2, bias=False, dtype=torch.bfloat16),
    Case(k=3, w=3, new=(0, 3, 1)),
    Case(k=4, w=5, silu=False, new=(4, 2, 0)),
    Case(k=8, c=64, bias=False, dtype=torch.bfloat16, new=(8, 1, 5)),
    Case(k=8),
]


@pytest.fixture
def interpreter() -> Iterator[None]:
    with interpreted():
        yield


def arguments(case: Case) -> dict[str, Any]:
    """x is a run of a projection's columns."""
    c = case
    return {
        "x": torch.randn(B, c.k, c.c + 3).to(c.dtype)[..., 3:],
        "weight": torch.randn(c.c, c.w).to(c.dtype),
        "bias": torch.randn(c.c).to(c.dtype) if c.bias else None,
    }


def pool_of(case: Case) -> Tensor:
    return torch.randn(POOL + B * case.k, case.w - 1, case.c).to(case.dtype)


def int32(values: tuple[int, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize("snapshots", [False, True], ids=["", "each"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle_and_the_torch_form(
    case: Case, snapshots: bool, interpreter: None
) -> None:
    args, pool = arguments(case), pool_of(case)
    before = pool.clone()
    at = in_place(SLOTS, case.k, case.new, POOL if snapshots else None)
    held = before[list(SLOTS)]
    expected, tails = op.conv_step_ref(**args, tail=held, silu=case.silu)
    counts = case.new or (case.k,) * B
    torch_y = causal_conv(args["x"], args["weight"], args["bias"], held, silu=case.silu)
    torch_tail = conv_tail(args["x"], held, case.w, new=torch.tensor(counts))
    for row, count in enumerate(counts):
        args["x"][row, count:] = torch.nan
    y = op.conv_step(
        **args,
        tail=pool,
        **at,
        silu=case.silu,
        new=None if case.new is None else int32(case.new),
    )
    assert y.dtype == case.dtype
    exact = TOLERANCE[case.dtype]
    for row, (slot, count) in enumerate(zip(SLOTS, counts, strict=True)):
        for wanted, factor in ((expected, 1), (torch_y, 4)):
            torch.testing.assert_close(
                y[row, :count].double(),
                wanted[row, :count].double(),
                rtol=factor * exact,
                atol=factor * exact,
            )
        assert (y[row, count:] == 0).all()
        # The tail is copied, never computed: bits are equal.
        assert torch.equal(pool[slot], torch_tail[row])
        assert torch.equal(pool[slot], tails[row, count - 1].to(case.dtype) if count else held[row])
        if snapshots:
            kept = pool[at["write"][row, :count]]
            assert torch.equal(kept.double(), tails[row, :count])
    used = {int(s) for row, count in zip(at["write"], counts, strict=True) for s in row[:count]}
    others = [slot for slot in range(len(pool)) if slot not in used]
    assert torch.equal(pool[others], before[others])


def test_many_tokens_equal_one_at_a_time(interpreter: None) -> None:
    case = Case(k=5)
    args, pool = arguments(case), pool_of(case)
    single, outputs = pool.clone(), []
    for t in range(case.k):
        token = args | {"x": args["x"][:, t : t + 1]}
        outputs.append(op.conv_step(**token, tail=single, **in_place(SLOTS, 1)))
    y = op.conv_step(**args, tail=pool, **in_place(SLOTS, case.k))
    assert torch.equal(y, torch.cat(outputs, 1))
    assert torch.equal(pool, single)


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "x dims": (lambda x: x.update(x=x["x"][0]), "x has shape .*3 dimensions"),
    "weight dims": (lambda x: x.update(weight=x["weight"][0]), "weight has shape .*2 dimensions"),
    "weight shape": (lambda x: x.update(weight=x["weight"][1:]), "weight has shape"),
    "weight taps": (lambda x: x.update(weight=x["weight"][:, :1]), "weight has 1 taps"),
    "weight strides": (
        lambda x: x.update(weight=torch.zeros(1, 4).expand(20, -1)),
        "weight has strides .*must be contiguous",
    ),
    "bias shape": (lambda x: x.update(bias=torch.zeros(1)), "bias has shape"),
    "tail shape": (lambda x: x.update(tail=x["tail"][:, 1:]), "tail has shape"),
    "tail dims": (lambda x: x.update(tail=x["tail"][0]), "tail has shape"),
    "tail dtype": (lambda x: x.update(tail=x["tail"].half()), "tail has dtype torch.float16"),
    "tail strides": (
        lambda x: x.update(tail=x["tail"].mT.contiguous().mT),
        "tail has strides .*each slot must be contiguous",
    ),
    "read shape": (lambda x: x.update(read=int32((0, 1))), "read has shape"),
    "read dtype": (lambda x: x.update(read=x["read"].long()), "read is torch.int64"),
    "new shape": (lambda x: x.update(new=int32((1,))), "new has shape"),
    "write shape": (lambda x: x.update(write=x["write"][:, :1]), "write has shape"),
    "write dtype": (lambda x: x.update(write=x["write"].long()), "write is torch.int64"),
    "x strides": (lambda x: x.update(x=x["x"].mT.contiguous().mT), "x has strides .*last must be"),
    "x spacing": (
        lambda x: x.update(x=torch.zeros(B, 5, 20)[:, :2]),
        "x has strides .*evenly spaced",
    ),
    "x dtype": (lambda x: x.update(x=x["x"].double()), "x has dtype torch.float64"),
    "bias device": (lambda x: x.update(bias=torch.zeros(20, device="meta")), "bias is on meta"),
}


def acceptable(tokens: int = 2) -> dict[str, Any]:
    case = Case(k=tokens, c=20)
    return arguments(case) | {"tail": pool_of(case), **in_place(SLOTS, tokens)}


@pytest.mark.parametrize("change", WRONG)
def test_what_does_not_fit_is_refused_before_any_launch(change: str, interpreter: None) -> None:
    args = acceptable()
    spoil, message = WRONG[change]
    spoil(args)
    before = args["tail"].clone()
    with pytest.raises(ValueError, match=message):
        op.conv_step(**args)
    assert torch.equal(args["tail"], before)


@pytest.mark.parametrize("tokens", [0, 9])
def test_token_counts_outside_1_to_8_are_refused(tokens: int, interpreter: None) -> None:
    with pytest.raises(ValueError, match=f"K={tokens} new tokens"):
        op.conv_step(**acceptable(tokens))


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    with pytest.raises(ValueError, match="tail=.*is on cpu, needs cuda"):
        op.conv_step(**acceptable())
