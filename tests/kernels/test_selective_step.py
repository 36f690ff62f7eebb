"""Mamba's step on slots: oracle, torch form, raggedness, snapshots, refusals, compilation.

`torch.empty` is NaN here and so is every padded input: reading or leaving either shows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.selective import step as op
from kernels.selective.torch import selective_step as torch_step
from tests.kernels.interpreter import interpreted
from tests.kernels.slots import in_place

SLOTS = (4, 1, 3)
B, POOL = len(SLOTS), 6
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


@dataclass(frozen=True, kw_only=True)
class Case:
    """K tokens, E channels of N states; gate z; dtypes of inputs and state; valid tokens."""

    k: int
    e: int = 100
    n: int = 16
    gate: bool = False
    inputs: torch.dtype = torch.float32
    state: torch.dtype = torch.float32
    new: tuple[int, ...] | None = None

    def __str__(self) -> str:
        kinds = f"{self.inputs}-{self.state}".replace("torch.", "").replace("bfloat", "bf")
        gate = "-gate" if self.gate else ""
        return f"k{self.k}-{self.e}x{self.n}{gate}-{kinds}-new{self.new}"


CASES = [
    Case(k=1, gate=True),
    Case(k=1, e=64, n=128, inputs=torch.bfloat16),
    Case(k=2, n=10, state=torch.bfloat16),
    Case(k=4, e=200, gate=True, new=(4, 0, 3)),
    Case(k=3, e=17, n=64, inputs=torch.bfloat16, state=torch.bfloat16, new=(0, 1, 3)),
    Case(k=8, e=65, gate=True, new=(8, 5, 1)),
]


@pytest.fixture
def interpreter() -> Iterator[None]:
    with interpreted():
        yield


def arguments(case: Case) -> dict[str, Tensor]:
    """x and z are halves of one tensor, b and c columns of another, as projections leave them."""
    c = case
    x, z = torch.randn(B, c.k, 2 * c.e).to(c.inputs).chunk(2, -1)
    _, b, out = torch.randn(B, c.k, 2 * c.n + 3).to(c.inputs).split((3, c.n, c.n), -1)
    args = {
        "x": x,
        "dt": torch.randn(B, c.k, c.e).to(c.inputs),
        "b": b,
        "c": out,
        "a_log": torch.arange(1, c.n + 1).float().log().expand(c.e, -1).contiguous(),
        "d": torch.linspace(-1, 1, c.e),
        "dt_bias": torch.linspace(-6, 0.5, c.e),
    }
    return args | {"z": z} if c.gate else args


def pool_of(case: Case) -> Tensor:
    return torch.randn(POOL + B * case.k, case.e, case.n).to(case.state)


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
    expected, states = op.selective_step_ref(**args, state=before[list(SLOTS)])
    torch_y, torch_states = torch_form(args, before[list(SLOTS)].float())
    counts = case.new or (case.k,) * B
    for row, count in enumerate(counts):
        for name in {"x", "dt", "b", "c", "z"} & args.keys():
            args[name][row, count:] = torch.nan
    y = op.selective_step(
        **args,
        state=pool,
        **at,
        new=None if case.new is None else int32(case.new),
    )
    assert y.dtype == case.inputs and pool.dtype == case.state
    exact, rounded = TOLERANCE[case.inputs], TOLERANCE[case.state]
    for row, (slot, count) in enumerate(zip(SLOTS, counts, strict=True)):
        close(y[row, :count], expected[row, :count], exact)
        close(y[row, :count], torch_y[row, :count], exact)
        assert (y[row, count:] == 0).all()
        if count:
            close(pool[slot], states[row, count - 1], rounded)
            close(pool[slot], torch_states[row, count - 1], max(rounded, exact))
        else:
            assert torch.equal(pool[slot], before[slot])
        if snapshots:
            close(pool[at["write"][row, :count]], states[row, :count], rounded)
    used = {int(s) for row, count in zip(at["write"], counts, strict=True) for s in row[:count]}
    others = [slot for slot in range(len(pool)) if slot not in used]
    assert torch.equal(pool[others], before[others])


def torch_form(args: dict[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """`kernels.selective.torch.selective_step` with the glue of `archs.mamba1` around it."""
    dt, a = F.softplus(args["dt"].float() + args["dt_bias"]), -args["a_log"].exp()
    y, each = torch_step(args["x"], dt, a, args["b"], args["c"], args["d"], state, each=True)
    assert each is not None
    return y * F.silu(args["z"]) if "z" in args else y, each


def test_many_tokens_equal_one_at_a_time(interpreter: None) -> None:
    case = Case(k=5, gate=True)
    args, pool = arguments(case), pool_of(case)
    single, outputs = pool.clone(), []
    for t in range(case.k):
        token = {name: x[:, t : t + 1] if x.dim() > 2 else x for name, x in args.items()}
        outputs.append(op.selective_step(**token, state=single, **in_place(SLOTS, 1)))
    y = op.selective_step(**args, state=pool, **in_place(SLOTS, case.k))
    close(y, torch.cat(outputs, 1), 1e-6)
    close(pool, single, 1e-6)


def test_slots_may_lie_apart(interpreter: None) -> None:
    case = Case(k=1)
    args, wide = arguments(case), torch.randn(POOL, 2, case.e, case.n)
    before = wide.clone()
    op.selective_step(**args, state=wide[:, 1], **in_place(SLOTS, case.k))
    _, states = op.selective_step_ref(**args, state=before[list(SLOTS), 1])
    close(wide[list(SLOTS), 1], states[:, -1], 2e-5)
    assert torch.equal(wide[:, 0], before[:, 0])


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "x dims": (lambda x: x.update(x=x["x"][0]), "x has shape .*3 dimensions"),
    "b dims": (lambda x: x.update(b=x["b"][0]), "b has shape .*3 dimensions"),
    "dt shape": (lambda x: x.update(dt=x["dt"][..., 1:]), "dt has shape"),
    "b batch": (lambda x: x.update(b=x["b"][1:]), "b has shape"),
    "c shape": (lambda x: x.update(c=x["c"][..., 1:]), "c has shape"),
    "z shape": (lambda x: x.update(z=x["z"][..., 1:]), "z has shape"),
    "a_log shape": (lambda x: x.update(a_log=torch.zeros(20)), "a_log has shape"),
    "a_log strides": (
        lambda x: x.update(a_log=torch.zeros(1, 16).expand(20, -1)),
        "a_log has strides .*must be contiguous",
    ),
    "d shape": (lambda x: x.update(d=torch.zeros(20, 16)), "d has shape"),
    "dt_bias shape": (lambda x: x.update(dt_bias=torch.zeros(5)), "dt_bias has shape"),
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
    "x strides": (lambda x: x.update(x=x["x"].mT.contiguous().mT), "x has strides .*last must be"),
    "z spacing": (
        lambda x: x.update(z=torch.zeros(B, 5, 20)[:, :2]),
        "z has strides .*evenly spaced",
    ),
    "x dtype": (lambda x: x.update(x=x["x"].double()), "x has dtype torch.float64"),
    "d device": (lambda x: x.update(d=torch.zeros(20, device="meta")), "d is on meta"),
}


def acceptable(tokens: int = 2) -> dict[str, Any]:
    case = Case(k=tokens, e=20, gate=True)
    return arguments(case) | {"state": pool_of(case), **in_place(SLOTS, tokens)}


@pytest.mark.parametrize("change", WRONG)
def test_what_does_not_fit_is_refused_before_any_launch(change: str, interpreter: None) -> None:
    args = acceptable()
    spoil, message = WRONG[change]
    spoil(args)
    before = args["state"].clone()
    with pytest.raises(ValueError, match=message):
        op.selective_step(**args)
    assert torch.equal(args["state"], before)


@pytest.mark.parametrize("tokens", [0, 9])
def test_token_counts_outside_1_to_8_are_refused(tokens: int, interpreter: None) -> None:
    with pytest.raises(ValueError, match=f"K={tokens} new tokens"):
        op.selective_step(**acceptable(tokens))


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    with pytest.raises(ValueError, match="state=.*is on cpu, needs cuda"):
        op.selective_step(**acceptable())
