"""The linear step on slots: oracle, torch form, raggedness, snapshots, refusals, compilation.

`torch.empty` is NaN here and so is every padded input: reading or leaving either shows.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.decay import linear_step as op
from kernels.decay.torch import decay_step
from kernels.norm import rows as norm_triton
from kernels.rope import rotate as rope_rotate
from kernels.rope.torch import apply_rope
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
#: Tokens before the step; the longest sequence ends with the table.
PAST, POSITIONS = (7, 0, 12), 20
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


@dataclass(frozen=True, kw_only=True)
class Case:
    """K tokens, G and H heads, N by P states; dtypes of inputs and state; valid tokens; whether q
    and k are turned and y normed.
    """

    k: int
    n: int = 16
    p: int = 32
    g: int = 1
    h: int = 2
    inputs: torch.dtype = torch.float32
    state: torch.dtype = torch.float32
    new: tuple[int, ...] | None = None
    turn: bool = False
    norm: bool = False

    def __str__(self) -> str:
        kinds = f"{self.inputs}-{self.state}".replace("torch.", "").replace("bfloat", "bf")
        more = f"{'-turn' * self.turn}{'-norm' * self.norm}"
        return f"k{self.k}-{self.n}x{self.p}-g{self.g}h{self.h}-{kinds}-new{self.new}{more}"


CASES = [
    Case(k=1),
    Case(k=1, p=100, h=1),
    Case(k=1, n=128, p=8, inputs=torch.bfloat16),
    Case(k=2, p=20, g=2, h=4, state=torch.bfloat16),
    Case(k=4, n=64, p=12, new=(4, 0, 3)),
    Case(k=3, n=24, p=17, inputs=torch.bfloat16, state=torch.bfloat16, new=(0, 1, 3)),
    Case(k=8, n=16, p=12, h=1, new=(8, 5, 1)),
    Case(k=1, p=100, turn=True, norm=True),
    Case(k=3, n=24, p=17, inputs=torch.bfloat16, state=torch.bfloat16, new=(0, 1, 3), norm=True),
    Case(k=8, n=20, p=256, h=1, new=(8, 5, 1), turn=True, norm=True),
    Case(k=8, p=12, g=2, h=4, inputs=torch.bfloat16, turn=True, norm=True),
    Case(k=3, n=24, p=17, new=(3, 0, 2), turn=True),
]


@pytest.fixture
def interpreter() -> Iterator[None]:
    with interpreted():
        yield


def arguments(case: Case) -> dict[str, Any]:
    """q, k, v are columns of one tensor, as a projection leaves them."""
    c = case
    sizes = (c.g * c.n, c.g * c.n, c.h * c.p)
    q, k, v, _ = torch.randn(B, c.k, sum(sizes) + 3).to(c.inputs).split((*sizes, 3), -1)
    turn = {"cos_sin": angles(POSITIONS, c.n), "past": int32(PAST)} if c.turn else {}
    return turn | {
        "q": q.unflatten(-1, (c.g, c.n)),
        "k": k.unflatten(-1, (c.g, c.n)),
        "v": v.unflatten(-1, (c.h, c.p)),
        "log_decay": torch.linspace(-0.5, -0.001, c.h),
        "scale": c.n**-0.5,
        "norm": output_norm(c.k, c.h, c.p, c.inputs) if c.norm else None,
    }


def angles(positions: int, n: int) -> Tensor:
    """Cosines and sines of a fresh angle for each position and pair."""
    found = torch.rand(positions, n // 2) * 6.3
    return torch.stack((found.cos(), found.sin()), -1)


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
    expected, states = op.linear_step_ref(**args, state=before[list(SLOTS)])
    torch_y, torch_states = torch_form(args, before[list(SLOTS)].float())
    counts = case.new or (case.k,) * B
    for row, count in enumerate(counts):
        for name in "qkv":
            args[name][row, count:] = torch.nan
        if case.norm:
            args["norm"].gate[row, count:] = torch.nan
    y = op.linear_step(
        **args,
        state=pool,
        **at,
        new=None if case.new is None else int32(case.new),
        arrivals=arrivals,
    )
    assert y.dtype == case.inputs and pool.dtype == case.state and not arrivals.any()
    exact, rounded = TOLERANCE[case.inputs], TOLERANCE[case.state]
    # The torch form rounds its y to the inputs' dtype before it is scaled here.
    against_torch = 4 * TOLERANCE[case.inputs]
    if case.turn and case.inputs == torch.bfloat16:
        # What is turned is rounded to the inputs' dtype before the state takes it.
        exact = rounded = against_torch
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
    """`kernels.decay.torch.decay_step` with the glue of `archs.ops.decay` around it."""
    decay, q, k = args["log_decay"][None, None], args["q"], args["k"]
    if "past" in args:
        at = args["past"].long()[:, None] + torch.arange(q.shape[1])
        turn = torch.view_as_complex(args["cos_sin"])[at][:, :, None]
        q, k = (apply_rope(t.contiguous(), turn) for t in (q, k))
    y, each = decay_step(q, k, args["v"], decay, state, each=True)
    assert each is not None
    return normed(y * args["scale"], args["norm"]), each


def test_many_tokens_equal_one_at_a_time(interpreter: None) -> None:
    case = Case(k=5, n=16, p=16)
    args, pool = arguments(case), pool_of(case)
    single, outputs = pool.clone(), []
    for t in range(case.k):
        token = args | {name: args[name][:, t : t + 1] for name in "qkv"}
        outputs.append(op.linear_step(**token, state=single, **in_place(SLOTS, 1)))
    y = op.linear_step(**args, state=pool, **in_place(SLOTS, case.k))
    close(y, torch.cat(outputs, 1), 1e-6)
    close(pool, single, 1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_rotation_and_norm_within_equal_launches_of_their_own(
    dtype: torch.dtype, interpreter: None
) -> None:
    """Twice with the same counters, once from the grid's end: whoever comes last norms."""
    case = Case(k=3, n=16, p=48, inputs=dtype, turn=True, norm=True)
    args, pool = arguments(case), pool_of(case)
    arrivals = torch.zeros(B * case.h, dtype=torch.int32)
    plain, apart = dict(args), pool.clone()
    norm, at = plain.pop("norm"), (plain.pop("cos_sin"), plain.pop("past"))
    for name in "qk":
        plain[name] = rope_rotate.rope_rotate(args[name].clone(), *at)
    y = op.linear_step(**plain, state=apart, **in_place(SLOTS, case.k))
    expected = normed(y, norm, norm_triton.gated_rms_norm)
    for order in (nullcontext(), backwards()):
        within = pool.clone()
        with order:
            y = op.linear_step(**args, state=within, **in_place(SLOTS, case.k), arrivals=arrivals)
        close(y, expected, TOLERANCE[dtype] / 10)
        close(within, apart, 1e-6)
        assert not arrivals.any()


def test_positions_past_the_table_turn_by_nothing(interpreter: None) -> None:
    case = Case(k=2, turn=True)
    args, pool = arguments(case), pool_of(case)
    plain = {name: x for name, x in args.items() if name not in ("cos_sin", "past")}
    past = int32((POSITIONS, POSITIONS + 3, POSITIONS + 90))
    y = op.linear_step(**args | {"past": past}, state=pool.clone(), **in_place(SLOTS, case.k))
    close(y, op.linear_step(**plain, state=pool.clone(), **in_place(SLOTS, case.k)), 1e-6)


def test_slots_may_lie_apart(interpreter: None) -> None:
    case = Case(k=1, n=16, p=16)
    args, wide = arguments(case), torch.randn(POOL, 2, case.h, case.n, case.p)
    before = wide.clone()
    op.linear_step(**args, state=wide[:, 1], **in_place(SLOTS, case.k))
    _, states = op.linear_step_ref(**args, state=before[list(SLOTS), 1])
    close(wide[list(SLOTS), 1], states[:, -1], 2e-5)
    assert torch.equal(wide[:, 0], before[:, 0])


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "q dims": (lambda x: x.update(q=x["q"][0]), "q has shape .*4 dimensions"),
    "v dims": (lambda x: x.update(v=x["v"][0]), "v has shape .*4 dimensions"),
    "k shape": (lambda x: x.update(k=x["k"][..., 1:]), "k has shape"),
    "v batch": (lambda x: x.update(v=x["v"][1:]), "v has shape"),
    "log_decay shape": (lambda x: x.update(log_decay=torch.zeros(1)), "log_decay has shape"),
    "heads": (
        lambda x: x.update(q=torch.zeros(B, 2, 3, 16), k=torch.zeros(B, 2, 3, 16)),
        "v has 2 heads, not divisible by 3",
    ),
    "no heads": (
        lambda x: x.update(q=torch.zeros(B, 2, 0, 16), k=torch.zeros(B, 2, 0, 16)),
        "v has 2 heads, not divisible by 0",
    ),
    "state shape": (lambda x: x.update(state=x["state"][..., 1:]), "state has shape"),
    "state dims": (lambda x: x.update(state=x["state"][0]), "state has shape"),
    "state dtype": (lambda x: x.update(state=x["state"].half()), "state has dtype torch.float16"),
    "state strides": (
        lambda x: x.update(state=x["state"].mT.contiguous().mT),
        "state has strides .*each slot must be contiguous",
    ),
    "read shape": (lambda x: x.update(read=int32((0, 1))), "read has shape"),
    "read dtype": (lambda x: x.update(read=x["read"].long()), "read is torch.int64"),
    "new shape": (lambda x: x.update(new=int32((1,))), "new has shape"),
    "new dtype": (lambda x: x.update(new=torch.ones(B)), "new is torch.float32"),
    "write shape": (lambda x: x.update(write=x["write"][:, :1]), "write has shape"),
    "write dtype": (lambda x: x.update(write=x["write"].long()), "write is torch.int64"),
    "v strides": (lambda x: x.update(v=x["v"].mT.contiguous().mT), "v has strides .*last must be"),
    "q spacing": (
        lambda x: x.update(q=torch.zeros(B, 5, 1, 16)[:, :2]),
        "q has strides .*evenly spaced",
    ),
    "v inner": (lambda x: x.update(v=torch.zeros(B, 2, 2, 17)[..., :16]), "v has strides"),
    "k dtype": (lambda x: x.update(k=x["k"].double()), "k has dtype torch.float64"),
    "cos_sin alone": (lambda x: x.update(past=None), "past is None; a rotation needs both"),
    "past alone": (lambda x: x.update(cos_sin=None), "cos_sin and past is None"),
    "odd N": (
        lambda x: x.update({n: x[n][..., :15] for n in "qk"}, state=torch.zeros(POOL, 2, 15, 16)),
        "N=15 is odd",
    ),
    "cos_sin shape": (lambda x: x.update(cos_sin=angles(9, 8)), "cos_sin has shape"),
    "cos_sin dims": (lambda x: x.update(cos_sin=torch.zeros(9, 16)), "cos_sin has shape"),
    "cos_sin dtype": (lambda x: x.update(cos_sin=angles(9, 16).double()), "cos_sin=float64"),
    "cos_sin strides": (lambda x: x.update(cos_sin=angles(9, 16)[::2]), "cos_sin=.*contiguous"),
    "past shape": (lambda x: x.update(past=int32((1,))), "past has shape"),
    "past dtype": (lambda x: x.update(past=torch.zeros(B)), "past=float32"),
    "past device": (lambda x: x.update(past=x["past"].to("meta")), "past=.*on meta"),
    "k device": (lambda x: x.update(k=torch.zeros(B, 2, 1, 16, device="meta")), "k is on meta"),
}


def acceptable(tokens: int = 2) -> dict[str, Any]:
    case = Case(k=tokens, n=16, p=16, turn=True)
    return arguments(case) | {"state": pool_of(case), **in_place(SLOTS, tokens)}


@pytest.mark.parametrize("change", WRONG)
def test_what_does_not_fit_is_refused_before_any_launch(change: str, interpreter: None) -> None:
    args = acceptable()
    spoil, message = WRONG[change]
    spoil(args)
    before = args["state"].clone()
    with pytest.raises(ValueError, match=message):
        op.linear_step(**args)
    assert torch.equal(args["state"], before)


@pytest.mark.parametrize("change", WRONG_NORMS)
def test_a_norm_that_does_not_fit_is_refused(change: str, interpreter: None) -> None:
    args, (spoil, message) = acceptable(), WRONG_NORMS[change]
    norm = output_norm(2, 2, 16, torch.float32)
    with pytest.raises(ValueError, match=message):
        op.linear_step(**args | {"norm": replace(norm, **spoil(norm))})


@pytest.mark.parametrize("wrong", WRONG_ARRIVALS)
def test_counters_that_do_not_fit_are_refused(wrong: str, interpreter: None) -> None:
    arrivals, message = WRONG_ARRIVALS[wrong]
    norm = output_norm(2, 2, 16, torch.float32)
    with pytest.raises(ValueError, match=message):
        op.linear_step(**acceptable() | {"norm": norm, "arrivals": arrivals})


@pytest.mark.parametrize("tokens", [0, 9])
def test_token_counts_outside_1_to_8_are_refused(tokens: int, interpreter: None) -> None:
    with pytest.raises(ValueError, match=f"K={tokens} new tokens"):
        op.linear_step(**acceptable(tokens))


def test_an_empty_batch_is_refused(interpreter: None) -> None:
    args = acceptable() | in_place((), 2)
    with pytest.raises(ValueError, match="B=0, K=2 new tokens"):
        op.linear_step(**args | {name: args[name][:0] for name in "qkv"})


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    with pytest.raises(ValueError, match="state=.*is on cpu, needs cuda"):
        op.linear_step(**acceptable())
