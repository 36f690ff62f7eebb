"""The gated delta step on slots: oracle, torch form, raggedness, snapshots, refusals, compilation.

`torch.empty` is NaN here and so is every padded input: reading or leaving either shows.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.gated_delta import step as op
from kernels.gated_delta.torch import gdn_step as torch_step
from kernels.norm import rows as norm_triton
from kernels.norm.torch import l2_norm
from tests.kernels.interpreter import interpreted
from tests.kernels.output_norms import (
    WRONG_ARRIVALS,
    WRONG_NORMS,
    backwards,
    normed,
    output_norm,
)
from tests.kernels.slots import in_place

SLOTS = (4, 1, 3)
B, POOL = len(SLOTS), 6
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


@dataclass(frozen=True, kw_only=True)
class Case:
    """K tokens, G and H heads, N by P states; dtypes of inputs and state; valid tokens; norm."""

    k: int
    n: int = 16
    p: int = 32
    g: int = 1
    h: int = 2
    inputs: torch.dtype = torch.float32
    state: torch.dtype = torch.float32
    new: tuple[int, ...] | None = None
    norm: bool = False

    def __str__(self) -> str:
        kinds = f"{self.inputs}-{self.state}".replace("torch.", "").replace("bfloat", "bf")
        norm = "-norm" if self.norm else ""
        return f"k{self.k}-{self.n}x{self.p}-g{self.g}h{self.h}-{kinds}-new{self.new}{norm}"


CASES = [
    Case(k=1),
    Case(k=1, p=100, h=1),
    Case(k=1, n=128, p=8, inputs=torch.bfloat16),
    Case(k=2, p=20, g=2, h=4, state=torch.bfloat16),
    Case(k=4, n=64, p=12, new=(4, 0, 3)),
    Case(k=3, n=24, p=17, inputs=torch.bfloat16, state=torch.bfloat16, new=(0, 1, 3)),
    Case(k=8, n=16, p=12, h=1, new=(8, 5, 1)),
    Case(k=1, p=100, norm=True),
    Case(k=3, n=24, p=17, inputs=torch.bfloat16, state=torch.bfloat16, new=(0, 1, 3), norm=True),
    Case(k=8, n=16, p=256, h=1, new=(8, 5, 1), norm=True),
    Case(k=8, p=12, g=2, h=4, inputs=torch.bfloat16, norm=True),
]


@pytest.fixture
def interpreter() -> Iterator[None]:
    with interpreted():
        yield


def arguments(case: Case) -> dict[str, Any]:
    """q, k, v are columns of one tensor, a and b of another, as projections leave them."""
    c = case
    q, k, v = (
        torch.randn(B, c.k, 2 * c.g * c.n + c.h * c.p)
        .to(c.inputs)
        .split((c.g * c.n, c.g * c.n, c.h * c.p), -1)
    )
    a, b = torch.randn(B, c.k, 2 * c.h + 3).to(c.inputs)[..., : 2 * c.h].chunk(2, -1)
    return {
        "q": q.unflatten(-1, (c.g, c.n)),
        "k": k.unflatten(-1, (c.g, c.n)),
        "v": v.unflatten(-1, (c.h, c.p)),
        "a": a,
        "b": b,
        "a_log": torch.linspace(-3, 1, c.h),
        "dt_bias": torch.linspace(-6, 0.5, c.h),
        "norm": output_norm(c.k, c.h, c.p, c.inputs) if c.norm else None,
    }


def pool_of(case: Case) -> Tensor:
    return torch.randn(POOL + B * case.k, case.h, case.n, case.p).to(case.state)


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


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
    arrivals = torch.zeros(B * case.h, dtype=torch.int32)
    expected, states = op.gdn_step_ref(**args, state=before[list(SLOTS)])
    torch_y, torch_states = torch_form(args, before[list(SLOTS)].float())
    counts = case.new or (case.k,) * B
    for row, count in enumerate(counts):
        for name in "qkvab":
            args[name][row, count:] = torch.nan
        if case.norm:
            args["norm"].gate[row, count:] = torch.nan
    y = op.gdn_step(
        **args,
        state=pool,
        **at,
        new=None if case.new is None else int32(case.new),
        arrivals=arrivals,
    )
    assert y.dtype == case.inputs and pool.dtype == case.state and not arrivals.any()
    exact, rounded = TOLERANCE[case.inputs], TOLERANCE[case.state]
    # The torch form rounds q, k and β to the inputs' dtype.
    against_torch = 4 * TOLERANCE[case.inputs]
    for row, (slot, count) in enumerate(zip(SLOTS, counts, strict=True)):
        close(y[row, :count], expected[row, :count], exact)
        close(y[row, :count], torch_y[row, :count], against_torch)
        assert (y[row, count:] == 0).all()
        if count:
            close(pool[slot], states[row, count - 1], rounded)
            close(pool[slot], torch_states[row, count - 1], max(rounded, against_torch))
        else:
            assert torch.equal(pool[slot], before[slot])
        if snapshots:
            close(pool[at["write"][row, :count]], states[row, :count], rounded)
    used = {int(s) for row, count in zip(at["write"], counts, strict=True) for s in row[:count]}
    others = [slot for slot in range(len(pool)) if slot not in used]
    assert torch.equal(pool[others], before[others])


def torch_form(args: dict[str, Any], state: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.gated_delta.torch.gdn_step` with the glue of `archs.gdn` around it."""
    q, k = l2_norm(args["q"]), l2_norm(args["k"])
    decay = F.softplus(args["a"].float() + args["dt_bias"]) * -args["a_log"].exp()
    scaled = q * q.shape[-1] ** -0.5
    y, each = torch_step(scaled, k, args["v"], decay, args["b"].sigmoid(), state, each=True)
    assert each is not None
    return normed(y, args["norm"]), each


def test_many_tokens_equal_one_at_a_time(interpreter: None) -> None:
    case = Case(k=5, n=16, p=16)
    args, pool = arguments(case), pool_of(case)
    single, outputs = pool.clone(), []
    for t in range(case.k):
        token = args | {name: args[name][:, t : t + 1] for name in "qkvab"}
        outputs.append(op.gdn_step(**token, state=single, **in_place(SLOTS, 1)))
    y = op.gdn_step(**args, state=pool, **in_place(SLOTS, case.k))
    close(y, torch.cat(outputs, 1), 1e-6)
    close(pool, single, 1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_norm_within_equals_one_in_a_launch_of_its_own(
    dtype: torch.dtype, interpreter: None
) -> None:
    """Twice with the same counters, once from the grid's end: whoever comes last norms."""
    case = Case(k=3, n=16, p=48, inputs=dtype, norm=True)
    args, pool = arguments(case), pool_of(case)
    arrivals = torch.zeros(B * case.h, dtype=torch.int32)
    y = op.gdn_step(**args | {"norm": None}, state=pool.clone(), **in_place(SLOTS, case.k))
    expected = normed(y, args["norm"], norm_triton.gated_rms_norm)
    for order in (nullcontext(), backwards()):
        with order:
            y = op.gdn_step(
                **args, state=pool.clone(), **in_place(SLOTS, case.k), arrivals=arrivals
            )
        close(y, expected, TOLERANCE[dtype] / 10)
        assert not arrivals.any()


def test_slots_may_lie_apart(interpreter: None) -> None:
    case = Case(k=1, n=16, p=16)
    args, wide = arguments(case), torch.randn(POOL, 2, case.h, case.n, case.p)
    before = wide.clone()
    op.gdn_step(**args, state=wide[:, 1], **in_place(SLOTS, case.k))
    _, states = op.gdn_step_ref(**args, state=before[list(SLOTS), 1])
    close(wide[list(SLOTS), 1], states[:, -1], 2e-5)
    assert torch.equal(wide[:, 0], before[:, 0])


@pytest.mark.parametrize("x", [-80.0, -20.0, -7.0, -0.1, 0.0, 3.0, 19.9, 20.1, 300.0])
def test_step_sizes_of_any_size(x: float, interpreter: None) -> None:
    case = Case(k=1, n=16, p=8, h=1)
    args = arguments(case) | {"dt_bias": torch.zeros(1), "a_log": torch.zeros(1)}
    args["a"], args["b"] = torch.full((B, 1, 1), x), torch.full((B, 1, 1), -60.0)
    pool = torch.ones(POOL, 1, case.n, case.p)
    op.gdn_step(**args, state=pool, **in_place(SLOTS, case.k))
    decay = torch.exp(-F.softplus(torch.tensor(x, dtype=torch.float64)))
    assert pool[SLOTS[0], 0, 0, 0].double() == pytest.approx(decay.item(), rel=2e-6, abs=1e-20)


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "q dims": (lambda x: x.update(q=x["q"][0]), "q has shape .*4 dimensions"),
    "v dims": (lambda x: x.update(v=x["v"][0]), "v has shape .*4 dimensions"),
    "k shape": (lambda x: x.update(k=x["k"][..., 1:]), "k has shape"),
    "v batch": (lambda x: x.update(v=x["v"][1:]), "v has shape"),
    "a shape": (lambda x: x.update(a=x["a"][..., 1:]), "a has shape"),
    "b shape": (lambda x: x.update(b=x["b"][:, 1:]), "b has shape"),
    "a_log shape": (lambda x: x.update(a_log=torch.zeros(5)), "a_log has shape"),
    "dt_bias shape": (lambda x: x.update(dt_bias=torch.zeros(5)), "dt_bias has shape"),
    "heads": (
        lambda x: x.update(q=torch.zeros(B, 2, 3, 16), k=torch.zeros(B, 2, 3, 16)),
        "v has 2 heads, not divisible by 3",
    ),
    "state shape": (lambda x: x.update(state=x["state"][..., 1:]), "state has shape"),
    "state dims": (lambda x: x.update(state=x["state"][0]), "state has shape"),
    "state dtype": (lambda x: x.update(state=x["state"].half()), "state has dtype torch.float16"),
    "state strides": (
        lambda x: x.update(state=x["state"].mT.contiguous().mT),
        "state has strides .*each slot must be contiguous",
    ),
    "state overlap": (
        lambda x: x.update(state=x["state"][:1].expand(POOL, -1, -1, -1)),
        "state has strides",
    ),
    "read shape": (lambda x: x.update(read=int32((0, 1))), "read has shape"),
    "read dtype": (lambda x: x.update(read=x["read"].long()), "read is torch.int64"),
    "read stride": (lambda x: x.update(read=int32((0, 9, 1, 9, 2, 9))[::2]), "read is .*strid"),
    "new shape": (lambda x: x.update(new=int32((1,))), "new has shape"),
    "new dtype": (lambda x: x.update(new=torch.ones(B)), "new is torch.float32"),
    "write shape": (lambda x: x.update(write=x["write"][:, :1]), "write has shape"),
    "write dtype": (lambda x: x.update(write=x["write"].long()), "write is torch.int64"),
    "write device": (
        lambda x: x.update(write=x["write"].to("meta")),
        "write is .* on meta",
    ),
    "v strides": (lambda x: x.update(v=x["v"].mT.contiguous().mT), "v has strides .*last must be"),
    "v spacing": (
        lambda x: x.update(v=torch.zeros(B, 5, 2, 16)[:, :2]),
        "v has strides .*evenly spaced",
    ),
    "v inner": (lambda x: x.update(v=torch.zeros(B, 2, 2, 17)[..., :16]), "v has strides"),
    "q dtype": (lambda x: x.update(q=x["q"].double()), "q has dtype torch.float64"),
    "a_log device": (lambda x: x.update(a_log=torch.zeros(2, device="meta")), "a_log is on meta"),
}


def acceptable(tokens: int = 2) -> dict[str, Any]:
    case = Case(k=tokens, n=16, p=16)
    return arguments(case) | {"state": pool_of(case), **in_place(SLOTS, tokens)}


@pytest.mark.parametrize("change", WRONG)
def test_what_does_not_fit_is_refused_before_any_launch(change: str, interpreter: None) -> None:
    args = acceptable()
    spoil, message = WRONG[change]
    spoil(args)
    before = args["state"].clone()
    with pytest.raises(ValueError, match=message):
        op.gdn_step(**args)
    assert torch.equal(args["state"], before)


@pytest.mark.parametrize("change", WRONG_NORMS)
def test_a_norm_that_does_not_fit_is_refused(change: str, interpreter: None) -> None:
    args, (spoil, message) = acceptable(), WRONG_NORMS[change]
    norm = output_norm(2, 2, 16, torch.float32)
    with pytest.raises(ValueError, match=message):
        op.gdn_step(**args | {"norm": replace(norm, **spoil(norm))})


@pytest.mark.parametrize("wrong", WRONG_ARRIVALS)
def test_counters_that_do_not_fit_are_refused(wrong: str, interpreter: None) -> None:
    arrivals, message = WRONG_ARRIVALS[wrong]
    norm = output_norm(2, 2, 16, torch.float32)
    with pytest.raises(ValueError, match=message):
        op.gdn_step(**acceptable() | {"norm": norm, "arrivals": arrivals})


@pytest.mark.parametrize("tokens", [0, 9])
def test_token_counts_outside_1_to_8_are_refused(tokens: int, interpreter: None) -> None:
    with pytest.raises(ValueError, match=f"K={tokens} new tokens"):
        op.gdn_step(**acceptable(tokens))


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    with pytest.raises(ValueError, match="state=.*is on cpu, needs cuda"):
        op.gdn_step(**acceptable())
