"""Norms and gates: float64 oracle and autograd, torch forms, packed views, refusals, compilation.

`torch.empty` is NaN here and so is what lies between the rows of a packed view: reading or
leaving either shows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.norm import rows as op
from kernels.norm import rows_bwd as norm_triton_bwd
from kernels.norm import torch as norm
from tests.kernels.interpreter import interpreted

EPS = 1e-5
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
#: Relative to the largest value of the oracle (absolute below 1): one rounding, sums in float32.
TOLERANCE = {FP32: 2e-6, BF16: 4e-3, FP16: 5e-4}


@pytest.fixture
def interpreter() -> Iterator[None]:
    with interpreted():
        yield


@dataclass(frozen=True, kw_only=True)
class Case:
    """x of a shape; gate_first: None without a gate; weight's dtype; x and gate packed or not."""

    shape: tuple[int, ...]
    gate_first: bool | None = None
    group: int | None = None
    dtype: torch.dtype = FP32
    weight: torch.dtype = FP32
    packed: bool = False
    opened: str = "silu"

    def __str__(self) -> str:
        gate = {None: "", True: "-first", False: "-after"}[self.gate_first]
        kind = f"{self.dtype}-{self.weight}".replace("torch.", "").replace("float", "f")
        group = f"g{self.group}" if self.group else ""
        more = "-packed" * self.packed + "-sigmoid" * (self.opened == "sigmoid")
        return f"{'x'.join(map(str, self.shape))}{group}{gate}-{kind}{more}"


CASES = [
    Case(shape=(1,)),
    Case(shape=(3, 63)),
    Case(shape=(2, 5, 65), dtype=BF16),
    Case(shape=(1, 2, 1000), dtype=FP16, weight=FP16),
    Case(shape=(2, 3, 2, 64), packed=True),
    Case(shape=(3, 4500), dtype=BF16),
    Case(shape=(2, 16384)),
    Case(shape=(2, 3, 100), gate_first=True),
    Case(shape=(2, 3, 96), gate_first=True, group=24, packed=True),
    Case(shape=(2, 3, 4, 48), gate_first=True, group=16, packed=True),
    Case(shape=(5, 64), gate_first=True, group=16, dtype=BF16, weight=BF16),
    Case(shape=(2, 4200), gate_first=True, dtype=FP16, packed=True),
    Case(shape=(1, 1, 2, 128), gate_first=False, dtype=BF16, packed=True),
    Case(shape=(2, 3, 5, 40), gate_first=False, packed=True),
    Case(shape=(3, 65), gate_first=False, group=13, dtype=FP16),
    Case(shape=(1, 9000), gate_first=False),
    Case(shape=(2, 9000), gate_first=True, group=4500, packed=True),
    Case(shape=(2, 3, 5, 40), gate_first=False, packed=True, opened="sigmoid"),
    Case(shape=(1, 1, 2, 128), gate_first=False, dtype=BF16, opened="sigmoid"),
    Case(shape=(3, 65), gate_first=True, group=13, dtype=FP16, opened="sigmoid"),
    Case(shape=(1, 9000), gate_first=True, opened="sigmoid"),
]


def packed(value: Tensor, *, heads: bool = False) -> Tensor:
    """The same values as a run of columns of a wider tensor, NaN around them.

    The run is a token's [B, K, ...] or, with heads, a run in every head's last dimension.
    """
    rows = value if heads or value.dim() < 3 else value.flatten(2)
    wide = torch.full((*rows.shape[:-1], rows.shape[-1] + 6), torch.nan, dtype=value.dtype)
    run = wide[..., 3:-3].copy_(rows)
    return run if rows is value else run.unflatten(-1, value.shape[2:])


def arguments(case: Case) -> dict[str, Tensor]:
    dim = case.shape[-1]
    args = {"x": torch.randn(case.shape).to(case.dtype)}
    if case.gate_first is not None:
        args["gate"] = 3 * torch.randn(case.shape).to(case.dtype)
    if case.packed:
        args = {
            name: packed(t, heads=name == "gate" and not case.group) for name, t in args.items()
        }
    return args | {"weight": torch.randn(dim).to(case.weight)}


def apply(module: Any, case: Case, args: dict[str, Tensor]) -> Tensor:
    if case.gate_first is None:
        y: Tensor = module.rms_norm(args["x"], args["weight"], EPS)
        return y
    gated: Tensor = module.gated_rms_norm(
        **args, eps=EPS, gate_first=case.gate_first, group=case.group, opened=case.opened
    )
    return gated


def oracle(case: Case, args: dict[str, Tensor]) -> Tensor:
    first = bool(case.gate_first)
    return op.norm_ref(**args, eps=EPS, gate_first=first, group=case.group, opened=case.opened)


def close(got: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    tolerance = factor * TOLERANCE[dtype]
    bound = tolerance * max(1.0, expected.abs().max().item())
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=bound)


def leaves(args: dict[str, Tensor]) -> dict[str, Tensor]:
    """Float64 copies that want gradients."""
    return {name: t.detach().double().requires_grad_() for name, t in args.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_norms_equal_the_oracle_and_the_torch_form(case: Case, interpreter: None) -> None:
    args = arguments(case)
    y = apply(op, case, args)
    assert y.shape == args["x"].shape and y.dtype == case.dtype and y.is_contiguous()
    close(y, oracle(case, args), case.dtype)
    # The torch form rounds between its steps.
    close(y, apply(norm, case, args), case.dtype, 6)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_norms_equal_autograd_of_the_oracle(case: Case, interpreter: None) -> None:
    args = {name: t.requires_grad_() for name, t in arguments(case).items()}
    dy = torch.randn(case.shape).to(case.dtype)
    y = apply(op, case, args)
    got = torch.autograd.grad(y, list(args.values()), dy)
    exact = leaves(args)
    expected = torch.autograd.grad(oracle(case, exact), list(exact.values()), dy.double())
    for (name, t), ours, theirs in zip(args.items(), got, expected, strict=True):
        assert ours.dtype == t.dtype, name
        close(ours, theirs, t.dtype, 2)


@pytest.mark.parametrize("rows", [1, 5, 100])
def test_weight_gradients_over_many_blocks_of_rows(
    rows: int, monkeypatch: Any, interpreter: None
) -> None:
    monkeypatch.setattr(norm_triton_bwd, "MAX_PARTIALS", 3)
    case = Case(shape=(rows, 24), gate_first=False)
    args = {name: t.requires_grad_() for name, t in arguments(case).items()}
    dy = torch.randn(case.shape)
    twice = [torch.autograd.grad(apply(op, case, args), list(args.values()), dy) for _ in "ab"]
    exact = leaves(args)
    expected = torch.autograd.grad(oracle(case, exact), list(exact.values()), dy.double())
    for first, second, theirs in zip(*twice, expected, strict=True):
        assert torch.equal(first, second)
        close(first, theirs, FP32, 4)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(1, 65), (2, 3, 100)], ids=str)
def test_add_then_norm_equals_the_two_steps(
    shape: tuple[int, ...], dtype: torch.dtype, interpreter: None
) -> None:
    args = [torch.randn(shape).to(dtype) for _ in "xr"]
    weight = torch.randn(shape[-1]).to(dtype)
    normed, summed = op.add_rms_norm(packed(args[0]), args[1], weight, EPS)
    assert torch.equal(summed, args[0] + args[1])
    assert torch.equal(normed, op.rms_norm(summed, weight, EPS))
    close(normed, op.norm_ref(summed, weight, EPS), dtype)


@pytest.mark.parametrize("dim", [65, 4500])
def test_gradients_of_add_then_norm(dim: int, interpreter: None) -> None:
    args = {name: torch.randn(3, dim).requires_grad_() for name in ("x", "residual")}
    args["weight"] = torch.randn(dim).requires_grad_()
    grads = [torch.randn(3, dim) for _ in "ns"]
    got = torch.autograd.grad(op.add_rms_norm(**args, eps=EPS), list(args.values()), grads)
    exact = leaves(args)
    total = exact["x"] + exact["residual"]
    pair = (op.norm_ref(total, exact["weight"], EPS), total)
    doubles = [g.double() for g in grads]
    expected = torch.autograd.grad(pair, list(exact.values()), doubles)
    for ours, theirs in zip(got, expected, strict=True):
        close(ours, theirs, FP32, 2)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", [(2,), (3, 126), (2, 3, 200), (1, 2, 4100)], ids=str)
def test_swiglu_and_its_gradient(
    shape: tuple[int, ...], dtype: torch.dtype, interpreter: None
) -> None:
    x = packed(3 * torch.randn(shape).to(dtype))
    y = op.swiglu(x)
    assert y.dtype == dtype and y.is_contiguous()
    close(y, op.swiglu_ref(x), dtype)
    close(y, norm.swiglu(x), dtype, 6)
    dy = torch.randn(y.shape).to(dtype)
    x.requires_grad_()
    (got,) = torch.autograd.grad(op.swiglu(x), x, dy)
    exact = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(op.swiglu_ref(exact), exact, dy.double())
    close(got, expected, dtype)


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_rows_of_zeros_and_huge_gates_stay_finite(interpreter: None) -> None:
    zeros, gate = torch.zeros(2, 20), torch.tensor([-200.0, 200.0])[:, None].repeat(1, 20)
    for first in (False, True):
        y = op.gated_rms_norm(zeros, gate, torch.ones(20), EPS, gate_first=first)
        assert (y == 0).all()


def test_gradients_that_are_views_are_taken(interpreter: None) -> None:
    x, weight = torch.randn(3, 20).requires_grad_(), torch.randn(20)
    op.rms_norm(x, weight, EPS).sum().backward()
    exact = x.detach().double().requires_grad_()
    op.norm_ref(exact, weight, EPS).sum().backward()
    assert x.grad is not None and exact.grad is not None
    close(x.grad, exact.grad, FP32, 2)


def acceptable(which: str) -> dict[str, Any]:
    x, weight = torch.randn(2, 3, 20), torch.randn(20)
    if which == "swiglu":
        return {"gate_up": x}
    args: dict[str, Any] = {"x": x, "weight": weight, "eps": EPS}
    if which == "add_rms_norm":
        args["residual"] = torch.randn(2, 3, 20)
    if which == "gated_rms_norm":
        args |= {"gate": torch.randn(2, 3, 20), "gate_first": True, "group": 5}
    return args


Spoil = Callable[[dict[str, Any]], Any]
WRONG: dict[str, tuple[str, Spoil, str]] = {
    "x dtype": ("rms_norm", lambda a: a.update(x=a["x"].double()), "x=float64.*one of"),
    "x dims": ("rms_norm", lambda a: a.update(x=torch.tensor(1.0)), r"x=.*must be \[..., D\]"),
    "x empty": ("rms_norm", lambda a: a.update(x=a["x"][:0]), "x=.*not empty"),
    "x strides": ("rms_norm", lambda a: a.update(x=torch.zeros(2, 20, 3).mT), "x=.*last stride"),
    "x levels": (
        "rms_norm",
        lambda a: a.update(x=torch.zeros(4, 4, 4, 40)[::2, ::2, ::2, :20]),
        "x=.*two levels",
    ),
    "x size": (
        "rms_norm",
        lambda a: a.update(x=torch.zeros(2, 16385), weight=torch.zeros(16385)),
        "D=16385 .*at most 16384",
    ),
    "weight shape": ("rms_norm", lambda a: a.update(weight=torch.ones(1)), r"weight=.*\[20\]"),
    "weight dtype": ("rms_norm", lambda a: a.update(weight=a["weight"].double()), "weight=float64"),
    "weight strides": (
        "rms_norm",
        lambda a: a.update(weight=torch.zeros(1).expand(20)),
        "weight=.*contiguous",
    ),
    "weight device": (
        "rms_norm",
        lambda a: a.update(weight=a["weight"].to("meta")),
        "weight=.*must be on cpu",
    ),
    "residual dtype": (
        "add_rms_norm",
        lambda a: a.update(residual=a["residual"].half()),
        "residual=float16.*x's dtype",
    ),
    "residual shape": (
        "add_rms_norm",
        lambda a: a.update(residual=a["residual"][0]),
        r"residual=.*shape \[2, 3, 20\]",
    ),
    "gate shape": ("gated_rms_norm", lambda a: a.update(gate=a["gate"][..., :1]), "gate=.*shape"),
    "gate device": (
        "gated_rms_norm",
        lambda a: a.update(gate=a["gate"].to("meta")),
        "gate=.*must be on cpu",
    ),
    "group": ("gated_rms_norm", lambda a: a.update(group=6), "group=6 must divide D=20"),
    "opened": (
        "gated_rms_norm",
        lambda a: a.update(opened="tanh"),
        "opened=tanh must be one of silu",
    ),
    "group zero": ("gated_rms_norm", lambda a: a.update(group=0), "group=0 must divide D=20"),
    "swiglu odd": (
        "swiglu",
        lambda a: a.update(gate_up=a["gate_up"][..., :7]),
        r"gate_up=.*\[..., 2F\]",
    ),
    "swiglu dtype": ("swiglu", lambda a: a.update(gate_up=a["gate_up"].int()), "gate_up=int32"),
}


@pytest.mark.parametrize("change", WRONG)
def test_what_does_not_fit_is_refused_before_any_launch(
    change: str, monkeypatch: Any, interpreter: None
) -> None:
    which, spoil, message = WRONG[change]
    args = acceptable(which)
    spoil(args)
    for kernel in ("norm_fwd_kernel", "swiglu_fwd_kernel"):
        monkeypatch.setattr(type(getattr(op, kernel)), "run", None)
    with pytest.raises(ValueError, match=message):
        getattr(op, which)(**args)


@pytest.mark.parametrize("which", ["rms_norm", "add_rms_norm", "gated_rms_norm", "swiglu"])
def test_cpu_tensors_are_refused_outside_the_interpreter(which: str) -> None:
    with pytest.raises(ValueError, match=r"is on cpu, needs cuda"):
        getattr(op, which)(**acceptable(which))
