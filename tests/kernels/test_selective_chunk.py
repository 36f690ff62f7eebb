"""Mamba's scan by chunks: oracle, torch form, split law, padding, gradients, refusals, compilation.

`torch.empty` is NaN here and so is every padded input: reading or leaving either shows. Chunks of
16 tokens, tiles of 128 and blocks of 4 keep most cases small; one runs with what ships.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.selective import chunk as op
from kernels.selective import chunk_bwd as backward
from kernels.selective import chunk_passes as passes
from kernels.selective.torch import selective_scan as torch_scan
from kernels.selective.torch import selective_scan_ref
from tests.kernels.interpreter import interpreted

#: What a result's own dtype costs, relative to its largest element and to each element.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
NAMES = ("x", "dt", "a", "b", "c", "d", "state")


@dataclass(frozen=True, kw_only=True)
class Case:
    """T tokens, E channels of N states; dtype of x, b, c; a state given; valid tokens by row."""

    t: int
    e: int = 20
    n: int = 16
    dtype: torch.dtype = torch.float32
    state: bool = True
    new: tuple[int, ...] | None = None
    rows: int = 1

    def __str__(self) -> str:
        kind = str(self.dtype)[6:].replace("bfloat", "bf").replace("float", "fp")
        state = "" if self.state else "-fresh"
        return f"t{self.t}-{self.e}x{self.n}-{kind}{state}-new{self.new}"

    @property
    def batch(self) -> int:
        return len(self.new) if self.new else self.rows

    @property
    def counts(self) -> tuple[int, ...]:
        return self.new or (self.t,) * self.rows


CASES = [
    Case(t=1),
    Case(t=1, e=3, n=1, state=False, rows=2),
    Case(t=16, e=9, n=5, dtype=torch.float16),
    Case(t=17, n=64, e=5),
    Case(t=63, e=7, dtype=torch.bfloat16, state=False),
    Case(t=19, e=9, new=(19, 0, 16)),
    Case(t=18, e=8, n=10, dtype=torch.bfloat16, new=(1, 17)),
]


@pytest.fixture
def small_tiles() -> Iterator[None]:
    with (
        interpreted(),
        patch.object(passes, "CHUNK", 16),
        patch.object(passes, "TILE", 128),
        patch.object(backward, "CHUNK", 16),
        patch.object(backward, "SUB", 4),
    ):
        yield


def arguments(case: Case) -> dict[str, Tensor]:
    """x is a half of one tensor, b and c columns of another, as projections leave them."""
    k = case
    x, _ = torch.randn(k.batch, k.t, 2 * k.e).to(k.dtype).chunk(2, -1)
    _, b, c = torch.randn(k.batch, k.t, 2 * k.n + 3).to(k.dtype).split((3, k.n, k.n), -1)
    args = {
        "x": x,
        "dt": F.softplus(torch.randn(k.batch, k.t, k.e) - 2),
        "a": -torch.linspace(0.1, 16, k.e * k.n)[torch.randperm(k.e * k.n)].view(k.e, k.n),
        "b": b,
        "c": c,
        "d": torch.linspace(-1, 1, k.e),
    }
    return args | {"state": torch.randn(k.batch, k.e, k.n)} if k.state else args


def poisoned(case: Case, args: dict[str, Tensor]) -> dict[str, Tensor]:
    """Padded tokens are NaN; views stay views."""
    for row, count in enumerate(case.counts):
        for name in ("x", "dt", "b", "c"):
            args[name][row, count:] = torch.nan
    return args


def counts_of(case: Case) -> Tensor | None:
    return None if case.new is None else torch.tensor(case.new, dtype=torch.int32)


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(
        got.double(), expected.double(), rtol=tolerance, atol=tolerance * scale
    )


def oracle(args: dict[str, Tensor], counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Row by row, each over its valid tokens; y is 0 at the others."""
    outputs, states = [], []
    state = args.get("state")
    if state is None:
        state = torch.zeros(len(counts), *args["a"].shape)
    for row, count in enumerate(counts):
        own = {k: args[k] if k in "ad" else args[k][row : row + 1, :count] for k in NAMES[:-1]}
        if count:
            y, last = selective_scan_ref(**own, state=state[row : row + 1])
        else:
            y, last = own["x"].double(), state[row : row + 1].double()
        outputs.append(F.pad(y, (0, 0, 0, args["x"].shape[1] - count)))
        states.append(last)
    return torch.cat(outputs), torch.cat(states)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle_and_the_torch_form(case: Case, small_tiles: None) -> None:
    args = arguments(case)
    expected, last = oracle(args, case.counts)
    before = args["state"].clone() if case.state else None
    torch_y, torch_last = torch_scan(**args)
    y, state = op.selective_scan(**poisoned(case, args), new=counts_of(case))
    assert y.dtype == case.dtype and state.dtype == torch.float32
    close(y, expected, TOLERANCE[case.dtype])
    close(state, last, TOLERANCE[torch.float32])
    for row, count in enumerate(case.counts):
        assert (y[row, count:] == 0).all()
        close(y[row, :count], torch_y[row, :count].detach(), TOLERANCE[case.dtype])
        if count == case.t:
            close(state[row], torch_last[row], TOLERANCE[torch.float32])
        if not count and before is not None:
            assert torch.equal(state[row], before[row])
    if before is not None:
        assert torch.equal(args["state"], before)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_equal_float64_autograd(case: Case, small_tiles: None) -> None:
    args = arguments(case)
    wide = {name: t.detach().double().requires_grad_() for name, t in args.items()}
    y, last = oracle(wide, case.counts)
    dy, dlast = torch.randn(y.shape).to(case.dtype), torch.randn(last.shape)
    expected = torch.autograd.grad((y, last), list(wide.values()), (dy.double(), dlast.double()))
    for row, count in enumerate(case.counts):
        dy[row, count:] = torch.nan
    leaves = [t.requires_grad_() for t in poisoned(case, args).values()]
    given = dict(zip(args, leaves, strict=True))
    got = torch.autograd.grad(op.selective_scan(**given, new=counts_of(case)), leaves, (dy, dlast))
    for name, mine, theirs in zip(args, got, expected, strict=True):
        assert mine.dtype == args[name].dtype and mine.shape == args[name].shape, name
        close(mine, theirs, TOLERANCE[args[name].dtype])


@pytest.mark.parametrize("which", [0, 1], ids=["y alone", "state alone"])
def test_gradients_from_one_output(which: int, small_tiles: None) -> None:
    case = Case(t=18, e=6, n=3)
    args = arguments(case)
    leaves = [t.detach().requires_grad_() for t in args.values()]
    wide = [t.detach().double().requires_grad_() for t in args.values()]
    got = op.selective_scan(*leaves)[which].sum()
    expected = selective_scan_ref(*wide)[which].sum()
    pairs = zip(
        args,
        torch.autograd.grad(got, leaves),
        torch.autograd.grad(expected, wide, allow_unused=True, materialize_grads=True),
        strict=True,
    )
    for _, mine, theirs in pairs:
        close(mine, theirs, TOLERANCE[torch.float32])


def test_gradients_equal_the_torch_form_with_the_tiles_that_ship() -> None:
    args = list(arguments(Case(t=65, e=20)).values())
    dy, dlast = torch.randn(1, 65, 20), torch.randn(1, 20, 16)
    leaves = [t.detach().requires_grad_() for t in args]
    expected = torch.autograd.grad(torch_scan(*leaves), leaves, (dy, dlast))
    with interpreted():
        got = torch.autograd.grad(op.selective_scan(*leaves), leaves, (dy, dlast))
    for mine, theirs in zip(got, expected, strict=True):
        close(mine, theirs, TOLERANCE[torch.float32])


@pytest.mark.parametrize("first", [1, 16, 17])
def test_two_calls_equal_one(first: int, small_tiles: None) -> None:
    args = arguments(Case(t=19, e=10))
    y, last = op.selective_scan(**args)
    parts, state = [], args["state"]
    for tokens in (slice(first), slice(first, None)):
        cut = {k: args[k][:, tokens] for k in ("x", "dt", "b", "c")}
        part, state = op.selective_scan(**args | cut | {"state": state})
        parts.append(part)
    close(torch.cat(parts, 1), y, TOLERANCE[torch.float32])
    close(state, last, TOLERANCE[torch.float32])


def test_dtypes_may_differ(small_tiles: None) -> None:
    args = arguments(Case(t=5, e=6))
    args["x"], args["c"], args["d"] = args["x"].half(), args["c"].bfloat16(), args["d"].half()
    y, last = op.selective_scan(**args)
    expected, after = selective_scan_ref(**args)
    close(y, expected, TOLERANCE[torch.float16])
    close(last, after, TOLERANCE[torch.float32])


def test_decay_to_nothing_and_none_at_all(small_tiles: None) -> None:
    args = arguments(Case(t=20, e=6))
    args["dt"][:, 3], args["dt"][:, 7], args["a"][2] = 1e4, 0.0, -1e6
    leaves = [t.detach().requires_grad_() for t in args.values()]
    wide = [t.detach().double().requires_grad_() for t in args.values()]
    got, expected = op.selective_scan(*leaves), selective_scan_ref(*wide)
    for mine, theirs in zip(got, expected, strict=True):
        close(mine, theirs, TOLERANCE[torch.float32])
    ones = [torch.ones_like(t) for t in got]
    grads = torch.autograd.grad(got, leaves, ones)
    references = torch.autograd.grad(expected, wide, [t.double() for t in ones])
    for mine, theirs in zip(grads, references, strict=True):
        close(mine, theirs, TOLERANCE[torch.float32])


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "x dims": (lambda x: x.update(x=x["x"][0]), r"x=.* must be \[B, T, E\]"),
    "x empty": (lambda x: x.update(x=x["x"][:, :0]), "x=.* must have B >= 1, T >= 1"),
    "x dtype": (lambda x: x.update(x=x["x"].double()), "x=float64.* must be of float32, bfloat16"),
    "x strides": (lambda x: x.update(x=x["x"].mT.contiguous().mT), "x has strides"),
    "x spacing": (lambda x: x.update(x=torch.zeros(2, 9, 20)[:, :4]), "x has strides .*evenly"),
    "dt shape": (lambda x: x.update(dt=x["dt"][..., 1:]), r"dt=.* must have shape \[2, 4, 20\]"),
    "dt dtype": (lambda x: x.update(dt=x["dt"].half()), "dt=float16.* must be of float32"),
    "a dims": (lambda x: x.update(a=x["a"][0]), r"a=.* must be \[E, N\]"),
    "a shape": (lambda x: x.update(a=x["a"][1:]), "a=.* must have shape"),
    "a dtype": (lambda x: x.update(a=x["a"].bfloat16()), "a=bfloat16.* must be of float32"),
    "a strides": (lambda x: x.update(a=x["a"].mT.contiguous().mT), "a=.* must be contiguous"),
    "N too many": (lambda x: x.update(a=torch.zeros(20, 65)), "N=65 must be 1 to 64"),
    "N none": (lambda x: x.update(a=torch.zeros(20, 0)), "N=0 must be 1 to 64"),
    "b shape": (lambda x: x.update(b=x["b"][:1]), "b=.* must have shape"),
    "b dims": (lambda x: x.update(b=x["b"][0]), "b=.* must have shape"),
    "c shape": (lambda x: x.update(c=x["c"][..., 1:]), "c=.* must have shape"),
    "c spacing": (lambda x: x.update(c=torch.zeros(2, 9, 16)[:, :4]), "c has strides .*evenly"),
    "d shape": (lambda x: x.update(d=torch.zeros(20, 16)), "d=.* must have shape"),
    "d strides": (lambda x: x.update(d=torch.zeros(1).expand(20)), "d=.* must be contiguous"),
    "d device": (lambda x: x.update(d=torch.zeros(20, device="meta")), "d=.* the device of x"),
    "state shape": (lambda x: x.update(state=x["state"][1:]), "state=.* must have shape"),
    "state dtype": (lambda x: x.update(state=x["state"].half()), "state=.* must be of float32"),
    "state strides": (
        lambda x: x.update(state=x["state"].mT.contiguous().mT),
        "state=.* must be contiguous",
    ),
    "new shape": (lambda x: x.update(new=torch.ones(3).int()), "new=.* must have shape"),
    "new dtype": (lambda x: x.update(new=torch.ones(2).long()), "new=int64.* must be of int32"),
}


@pytest.mark.parametrize("change", WRONG)
def test_what_does_not_fit_is_refused_before_any_launch(change: str, small_tiles: None) -> None:
    args: dict[str, Any] = arguments(Case(t=4, rows=2))
    spoil, message = WRONG[change]
    spoil(args)
    launches = patch.object(passes, "states", side_effect=AssertionError("launched"))
    with launches, pytest.raises(ValueError, match=message):
        op.selective_scan(**args)


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    with pytest.raises(ValueError, match=r"x=.* is on cpu, needs cuda"):
        op.selective_scan(**arguments(Case(t=4)))
