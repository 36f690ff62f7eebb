"""The long causal convolution: oracle, torch form, gradients, raggedness, tails, refusals.

`torch.empty` is NaN here and so is every padded input, every slot that is not named and what lies
around a view: reading or leaving any of them shows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.conv import chunk as op
from kernels.conv import chunk_bwd as conv_chunk_bwd
from kernels.conv.torch import causal_conv, conv_tail
from tests.kernels.interpreter import interpreted

SLOTS = (4, 1, 3)
B, POOL = len(SLOTS), 6
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
#: Relative to the largest value of the oracle (absolute below 1).
TOLERANCE = {FP32: 2e-6, BF16: 4e-3, FP16: 5e-4}


@dataclass(frozen=True, kw_only=True)
class Case:
    """T tokens, C channels, W taps; bias, SiLU, tail; dtypes of x and weight; valid tokens."""

    t: int
    c: int = 20
    w: int = 4
    bias: bool = True
    silu: bool = True
    tail: bool = True
    dtype: torch.dtype = FP32
    weight: torch.dtype = FP32
    new: tuple[int, ...] | None = None

    def __str__(self) -> str:
        flags = "".join(f"-{name}" for name in ("bias", "silu", "tail") if getattr(self, name))
        kind = f"{self.dtype}-{self.weight}".replace("torch.", "").replace("float", "f")
        return f"t{self.t}-c{self.c}-w{self.w}{flags}-{kind}-new{self.new}"


CASES = [
    Case(t=1),
    Case(t=2, w=5, tail=False),
    Case(t=17, c=100, bias=False),
    Case(t=63, tail=False, dtype=BF16),
    Case(t=64, silu=False, dtype=FP16, weight=FP16),
    Case(t=65, w=2, silu=False, bias=False, tail=False),
    Case(t=70, w=8, dtype=BF16, weight=BF16),
    Case(t=30, new=(30, 0, 7)),
    Case(t=100, w=3, tail=False, dtype=BF16, new=(1, 65, 100)),
    Case(t=40, silu=False, new=(33, 2, 1)),
]


@pytest.fixture
def interpreter() -> Iterator[None]:
    with interpreted():
        yield


def int32(values: tuple[int, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def arguments(case: Case) -> dict[str, Tensor | None]:
    """x is a run of a projection's columns and of a longer buffer's tokens."""
    c = case
    wide = torch.full((B, c.t + 2, c.c + 5), torch.nan, dtype=c.dtype)
    x = wide[:, 1:-1, 3:-2].copy_(torch.randn(B, c.t, c.c))
    return {
        "x": x,
        "weight": torch.randn(c.c, c.w).to(c.weight),
        "bias": torch.randn(c.c).to(c.weight) if c.bias else None,
        "tail": torch.randn(B, c.w - 1, c.c).to(c.dtype) if c.tail else None,
    }


def pool_of(tail: Tensor) -> Tensor:
    pool = torch.full((POOL, *tail.shape[1:]), torch.nan, dtype=tail.dtype)
    pool[list(SLOTS)] = tail
    return pool


def counts(case: Case) -> tuple[int, ...]:
    return case.new or (case.t,) * B


def spoil_padding(case: Case, x: Tensor) -> None:
    for row, count in enumerate(counts(case)):
        x[row, count:] = torch.nan


def close(got: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    tolerance = factor * TOLERANCE[dtype]
    bound = tolerance * max(1.0, expected.abs().max().item()) if expected.numel() else 0.0
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=bound)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle_and_the_torch_form(case: Case, interpreter: None) -> None:
    args = arguments(case)
    expected = op.causal_conv_ref(**args, silu=case.silu)
    torch_y = causal_conv(**args, silu=case.silu)
    spoil_padding(case, args["x"])
    options = {"silu": case.silu, "new": None if case.new is None else int32(case.new)}
    y = op.causal_conv(**args, **options)
    assert y.shape == args["x"].shape and y.dtype == case.dtype and y.is_contiguous()
    for row, count in enumerate(counts(case)):
        close(y[row, :count], expected[row, :count], case.dtype)
        # The torch form rounds between its steps.
        close(y[row, :count], torch_y[row, :count], case.dtype, 4)
        assert (y[row, count:] == 0).all()
    if case.tail:
        pool = pool_of(args.pop("tail"))
        before = pool.clone()
        again = op.causal_conv(**args, **options, tail=pool, tail_slots=int32(SLOTS))
        assert torch.equal(again, y)
        assert torch.equal(pool.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_equal_autograd_of_the_oracle(case: Case, interpreter: None) -> None:
    args = arguments(case)
    exact = {
        name: None if t is None else t.detach().double().requires_grad_()
        for name, t in args.items()
    }
    dy = torch.randn(args["x"].shape).to(case.dtype)
    valid = torch.arange(case.t) < torch.tensor(counts(case))[:, None]
    y = op.causal_conv_ref(**exact, silu=case.silu)
    given = {name: t for name, t in exact.items() if t is not None}
    expected = torch.autograd.grad(y, list(given.values()), dy.double() * valid[..., None])
    spoil_padding(case, args["x"])
    spoil_padding(case, dy)
    leaves = [args[name].requires_grad_() for name in given]
    new = None if case.new is None else int32(case.new)
    got = torch.autograd.grad(op.causal_conv(**args, silu=case.silu, new=new), leaves, dy)
    for name, leaf, ours, theirs in zip(given, leaves, got, expected, strict=True):
        assert ours.dtype == leaf.dtype, name
        # dz is rounded before it is summed over W taps.
        close(ours, theirs, case.dtype if name == "x" else leaf.dtype, 4)


def test_sums_over_several_blocks_repeat_exactly(interpreter: None, monkeypatch: Any) -> None:
    monkeypatch.setattr(conv_chunk_bwd, "MAX_TILES", 2)
    case = Case(t=150, tail=False)
    args = arguments(case)
    leaves = [args[name].requires_grad_() for name in ("x", "weight", "bias")]
    first, second = (
        torch.autograd.grad(op.causal_conv(**args).square().sum(), leaves) for _ in "ab"
    )
    exact = [t.detach().double().requires_grad_() for t in leaves]
    loss = op.causal_conv_ref(*exact, None).square().sum()
    for one, two, theirs in zip(first, second, torch.autograd.grad(loss, exact), strict=True):
        assert torch.equal(one, two)
        close(one, theirs, FP32, 4)


def test_a_tail_that_wants_no_gradient_gets_none(interpreter: None) -> None:
    args = arguments(Case(t=5))
    args["weight"].requires_grad_()
    op.causal_conv(**args).sum().backward()
    exact = args["weight"].detach().double().requires_grad_()
    op.causal_conv_ref(**args | {"weight": exact}).sum().backward()
    close(args["weight"].grad, exact.grad, FP32, 4)
    assert args["tail"].grad is None


@pytest.mark.parametrize(
    ("t", "w", "new"),
    [
        (1, 4, None),
        (2, 4, None),
        (3, 2, None),
        (65, 4, None),
        (9, 8, (0, 4, 9)),
        (4, 3, (1, 0, 4)),
        (40, 5, (33, 3, 4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_tails_move_up_in_place(
    t: int, w: int, new: tuple[int, ...] | None, dtype: torch.dtype, interpreter: None
) -> None:
    case = Case(t=t, c=300, w=w, dtype=dtype, new=new)
    args = arguments(case)
    x, tail = args["x"], args["tail"]
    expected = conv_tail(x, tail, w, new=torch.tensor(counts(case)))
    spoil_padding(case, x)
    pool = pool_of(tail)
    op.conv_tail_(x, pool, int32(SLOTS), int32(SLOTS), new=None if new is None else int32(new))
    assert torch.equal(pool[list(SLOTS)], expected)
    others = [slot for slot in range(POOL) if slot not in SLOTS]
    assert pool[others].isnan().all()


def test_a_tail_moves_to_another_slot_and_leaves_its_own(interpreter: None) -> None:
    args = arguments(Case(t=9, new=(9, 0, 4)))
    pool = pool_of(args["tail"])
    before, targets, new = pool.clone(), [0, 2, 5], int32((9, 0, 4))
    assert not set(targets) & set(SLOTS)
    op.conv_tail_(args["x"], pool, int32(SLOTS), int32(targets), new=new)
    expected = conv_tail(args["x"], args["tail"], 4, new=new)
    assert torch.equal(pool[[0, 5]], expected[[0, 2]])
    others = [1, *SLOTS, 2]
    assert torch.equal(pool[others].nan_to_num(), before[others].nan_to_num())


def test_steps_in_pieces_equal_one_step(interpreter: None) -> None:
    args = arguments(Case(t=40))
    pool = pool_of(args.pop("tail"))
    slots, x = int32(SLOTS), args.pop("x")
    whole = op.causal_conv(x, **args, tail=pool, tail_slots=slots)
    pieces = []
    for piece in x.split((17, 1, 22), 1):
        pieces.append(op.causal_conv(piece, **args, tail=pool, tail_slots=slots))
        op.conv_tail_(piece, pool, slots, slots)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-6, atol=1e-6)
    assert torch.equal(pool[list(SLOTS)], x[:, -3:])


def acceptable() -> dict[str, Any]:
    args = arguments(Case(t=5))
    return args | {"tail": pool_of(args["tail"]), "tail_slots": int32(SLOTS)}


Spoil = Callable[[dict[str, Any]], Any]
WRONG: dict[str, tuple[Spoil, str]] = {
    "x dims": (lambda a: a.update(x=a["x"][0]), r"x=.*\[B, T, C\]"),
    "x empty": (lambda a: a.update(x=a["x"][:, :0]), "x=.*not empty"),
    "x dtype": (lambda a: a.update(x=a["x"].double()), "x=float64.*one of"),
    "x strides": (lambda a: a.update(x=torch.zeros(B, 20, 5).mT), "x=.*last stride of 1"),
    "weight dims": (lambda a: a.update(weight=a["weight"][0]), "weight=.*must be"),
    "weight shape": (lambda a: a.update(weight=a["weight"][1:]), r"weight=.*\[20, 4\]"),
    "weight taps": (lambda a: a.update(weight=a["weight"][:, :1]), "weight=.*2 to 8"),
    "many taps": (lambda a: a.update(weight=torch.zeros(20, 9)), "weight=.*2 to 8"),
    "weight strides": (
        lambda a: a.update(weight=torch.zeros(1, 4).expand(20, -1)),
        "weight=.*contiguous",
    ),
    "weight dtype": (lambda a: a.update(weight=a["weight"].double()), "weight=float64"),
    "weight device": (lambda a: a.update(weight=a["weight"].to("meta")), "weight=.*on cpu"),
    "bias shape": (lambda a: a.update(bias=torch.zeros(1)), r"bias=.*\[20\]"),
    "tail shape": (lambda a: a.update(tail=a["tail"][:, 1:]), r"tail=.*\[6, 3, 20\]"),
    "tail rows": (lambda a: a.update(tail_slots=None), r"tail=.*\[3, 3, 20\]"),
    "tail dims": (lambda a: a.update(tail=a["tail"][0]), r"tail=.*\[slots, W-1, C\]"),
    "tail dtype": (lambda a: a.update(tail=a["tail"].double()), "tail=float64"),
    "tail strides": (
        lambda a: a.update(tail=torch.zeros(POOL, 20, 3).mT),
        "tail=.*contiguous slots",
    ),
    "tail device": (lambda a: a.update(tail=a["tail"].to("meta")), "tail=.*on cpu"),
    "no tail": (lambda a: a.update(tail=None), "tail_slots=.*needs a tail"),
    "slots dtype": (lambda a: a.update(tail_slots=a["tail_slots"].long()), "tail_slots=int64"),
    "slots shape": (lambda a: a.update(tail_slots=int32((0,))), r"tail_slots=.*\[3\]"),
    "new shape": (lambda a: a.update(new=int32((0,))), r"new=.*\[3\]"),
    "new dtype": (lambda a: a.update(new=torch.zeros(B)), "new=float32"),
    "gradient": (lambda a: a["weight"].requires_grad_(), "tail_slots=.*gradients are wanted"),
}
#: What `conv_tail_` takes, too.
SHARED = [name for name in WRONG if name.split()[0] in ("x", "slots", "new")]


@pytest.mark.parametrize("change", WRONG)
def test_what_does_not_fit_is_refused_before_any_launch(change: str, interpreter: None) -> None:
    args = acceptable()
    spoil, message = WRONG[change]
    spoil(args)
    with pytest.raises(ValueError, match=message):
        op.causal_conv(**args)


@pytest.mark.parametrize("change", SHARED)
def test_tails_are_refused_as_convolutions_are(change: str, interpreter: None) -> None:
    args = acceptable()
    spoil, message = WRONG[change]
    spoil(args)
    before = args["tail"].clone()
    with pytest.raises(ValueError, match=message.replace("tail_slots", "read")):
        op.conv_tail_(
            args["x"], args["tail"], args["tail_slots"], int32(SLOTS), new=args.get("new")
        )
    assert torch.equal(args["tail"].nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (torch.zeros(6, 8, 20), "tail_pool=.*2 to 8"),
        (torch.zeros(6, 3, 21), r"tail_pool=.*\[6, 3, 20\]"),
        (torch.zeros(6, 0, 20), r"tail_pool=.*\[slots, W-1, C\]"),
    ],
    ids=["width", "channels", "empty"],
)
def test_pools_that_do_not_fit_are_refused(pool: Tensor, message: str, interpreter: None) -> None:
    with pytest.raises(ValueError, match=message):
        op.conv_tail_(acceptable()["x"], pool, int32(SLOTS), int32(SLOTS))


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    args = acceptable()
    with pytest.raises(ValueError, match=r"x=.*is on cpu, needs cuda"):
        op.causal_conv(**args)
    with pytest.raises(ValueError, match=r"x=.*is on cpu, needs cuda"):
        op.conv_tail_(args["x"], args["tail"], args["tail_slots"], int32(SLOTS))
