"""The chunked decay scan: oracle, torch form, gradients, raggedness, splits, refusals, compilation.

`torch.empty` is NaN here and so is every padded input and gradient: reading or leaving one shows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.aot.ahead import compile_ahead
from kernels.decay import chunk as op
from kernels.decay import chunk_passes as passes
from kernels.decay.torch import decay_chunk as torch_form
from kernels.decay.torch import decay_ref
from tests.kernels.interpreter import interpreted

#: Largest error, relative to the largest expected element.
TOLERANCE = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
NAMES = ("q", "k", "v", "log_decay", "state")


@dataclass(frozen=True, kw_only=True)
class Case:
    """B, T, G, H, N, P; dtype; which dims of log_decay are broadcast; decay per token; padding."""

    t: int
    b: int = 1
    g: int = 1
    h: int = 2
    n: int = 16
    p: int = 16
    dtype: torch.dtype = torch.float32
    shared: str = ""
    rate: float = 0.3
    new: tuple[int, ...] | None = None
    state: bool = True

    def __str__(self) -> str:
        kind = str(self.dtype)[6:]
        options = f"{self.shared and f'-shared{self.shared}'}{'' if self.state else '-fresh'}"
        new = "" if self.new is None else f"-new{self.new}"
        return f"t{self.t}b{self.b}g{self.g}h{self.h}-{self.n}x{self.p}-{kind}-{self.rate}" + (
            options + new
        )


CASES = [
    Case(t=1, b=2),
    Case(t=32, n=48, g=2),
    Case(t=33, p=80, h=1, state=False),
    Case(t=100, h=1, rate=30.0),
    Case(t=65, shared="bt", h=3, rate=0.02),
    Case(t=40, b=3, shared="b", new=(40, 0, 33)),
    Case(t=63, b=2, shared="t", dtype=torch.float16),
    Case(t=64, h=1, n=128, p=64, dtype=torch.bfloat16),
    Case(t=65, b=3, n=80, p=48, dtype=torch.bfloat16, new=(3, 65, 64), h=1),
    Case(t=130, g=2, h=4, dtype=torch.bfloat16, rate=0.05),
    Case(t=66, b=2, h=1, dtype=torch.float16, new=(66, 1), state=False),
    Case(t=3, h=1, n=256, p=16, dtype=torch.bfloat16),
    Case(t=3, h=1, n=16, p=256, dtype=torch.bfloat16),
]


@pytest.fixture
def interpreter() -> Iterator[None]:
    with interpreted():
        yield


def arguments(case: Case) -> dict[str, Any]:
    """q, k and v are columns of one tensor, as a projection leaves them."""
    c = case
    sizes = (c.g * c.n, c.g * c.n, c.h * c.p)
    q, k, v = torch.randn(c.b, c.t, sum(sizes)).to(c.dtype).split(sizes, -1)
    rows, tokens = (1 if x in c.shared else size for x, size in (("b", c.b), ("t", c.t)))
    return {
        "q": q.unflatten(-1, (c.g, c.n)),
        "k": k.unflatten(-1, (c.g, c.n)),
        "v": v.unflatten(-1, (c.h, c.p)),
        "log_decay": torch.rand(rows, tokens, c.h) * -c.rate,
        "state": torch.randn(c.b, c.h, c.n, c.p) if c.state else None,
        "new": None if c.new is None else torch.tensor(c.new, dtype=torch.int32),
    }


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    error = (got.double() - expected.double()).abs().max()
    assert error <= tolerance * max(1.0, expected.abs().max().item())


def valid(case: Case) -> Tensor:
    """[B, T, 1]: which tokens are no padding."""
    counts = torch.tensor(case.new or (case.t,) * case.b)
    return (torch.arange(case.t) < counts[:, None])[..., None]


def oracle(case: Case, args: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """y, the last state and float64 leaves: padded tokens neither add nor decay."""
    leaves = {x: args[x].detach().double() for x in NAMES if args[x] is not None}
    leaves = {x: leaf.requires_grad_() for x, leaf in leaves.items()}
    inside = valid(case)
    given = leaves.get("state", torch.zeros(case.b, case.h, case.n, case.p))
    q, k = (leaves[x] * inside[..., None] for x in "qk")
    y, last = decay_ref(q, k, leaves["v"], leaves["log_decay"] * inside, given)
    return y, last, leaves


def poison(case: Case, *tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.shape[:2] == (case.b, case.t):
            tensor.masked_fill_(
                ~valid(case).view(case.b, case.t, *[1] * (tensor.dim() - 2)), torch.nan
            )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_equal_the_oracle(case: Case, interpreter: None) -> None:
    args, tolerance = arguments(case), TOLERANCE[case.dtype]
    expected_y, expected_last, leaves = oracle(case, args)
    dy = torch.randn(expected_y.shape).to(case.dtype)
    dlast = torch.randn(expected_last.shape)
    expected = torch.autograd.grad(
        (expected_y, expected_last), list(leaves.values()), (dy.double(), dlast.double())
    )
    poison(case, dy, *(args[x] for x in NAMES[:4]))
    before = None if args["state"] is None else args["state"].clone()
    for name in leaves:
        args[name].requires_grad_()
    y, last = op.decay_chunk(**args)
    assert y.dtype == case.dtype and last.dtype == torch.float32
    close(y, expected_y, tolerance)
    close(last, expected_last, tolerance)
    assert (y[~valid(case)[..., 0]] == 0).all()
    assert before is None or torch.equal(args["state"], before)
    got = torch.autograd.grad((y, last), [args[x] for x in leaves], (dy, dlast))
    for name, gradient, exact in zip(leaves, got, expected, strict=True):
        assert gradient.dtype == args[name].dtype and gradient.shape == args[name].shape
        close(gradient, exact, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_the_torch_form(dtype: torch.dtype, interpreter: None) -> None:
    case = Case(t=70, dtype=dtype)
    args = arguments(case)
    args.pop("new")
    for expected, got in zip(torch_form(**args), op.decay_chunk(**args), strict=True):
        assert got.dtype == expected.dtype
        close(got, expected, TOLERANCE[dtype])


def test_gradients_equal_the_torch_form_in_float64(interpreter: None) -> None:
    case = Case(t=70, g=2, h=4, shared="b")
    args = arguments(case)
    args.pop("new")
    leaves = {name: x.double().requires_grad_() for name, x in args.items()}
    outputs = torch_form(**leaves)
    down = [torch.randn(x.shape) for x in outputs]
    expected = torch.autograd.grad(outputs, list(leaves.values()), [x.double() for x in down])
    for x in args.values():
        x.requires_grad_()
    got = torch.autograd.grad(op.decay_chunk(**args), list(args.values()), down)
    for gradient, exact in zip(got, expected, strict=True):
        close(gradient, exact, TOLERANCE[torch.float32])


@pytest.mark.parametrize("cut", [1, 31, 32, 50, 69])
def test_a_sequence_may_be_split_anywhere(cut: int, interpreter: None) -> None:
    args = arguments(Case(t=70, h=1))
    y, last = op.decay_chunk(**args)
    parts = [
        {name: x[:, part] if name in NAMES[:4] else x for name, x in args.items()}
        for part in (slice(None, cut), slice(cut, None))
    ]
    first, between = op.decay_chunk(**parts[0])
    second, end = op.decay_chunk(**parts[1] | {"state": between})
    close(torch.cat((first, second), 1), y, TOLERANCE[torch.float32])
    close(end, last, TOLERANCE[torch.float32])


@pytest.mark.parametrize("which", [0, 1], ids=["only y", "only the last state"])
def test_one_output_may_be_unused_and_decays_fixed(which: int, interpreter: None) -> None:
    case = Case(t=40, shared="bt", h=1)
    args = arguments(case)
    *outputs, leaves = oracle(case, args)
    learned = ("q", "k", "v", "state")
    expected = torch.autograd.grad(
        outputs[which].sum(), [leaves[x] for x in learned], allow_unused=True
    )
    for name in learned:
        args[name].requires_grad_()
    got = torch.autograd.grad(op.decay_chunk(**args)[which].sum(), [args[x] for x in learned])
    for gradient, exact in zip(got, expected, strict=True):
        close(gradient, torch.zeros_like(gradient) if exact is None else exact, 5e-6)


def test_gradient_of_decays_survives_cancellation(interpreter: None) -> None:
    """Strong decays leave small gradients between large terms; bfloat16 must not drown them."""
    case = Case(t=128, h=1, n=32, p=32, dtype=torch.bfloat16, rate=12.0)
    args = arguments(case)
    y, _, leaves = oracle(case, args)
    (expected,) = torch.autograd.grad(y.sum(), [leaves["log_decay"]])
    args["log_decay"].requires_grad_()
    y, _ = op.decay_chunk(**args)
    (got,) = torch.autograd.grad(y.sum(), [args["log_decay"]])
    assert (got.double() - expected).norm() <= TOLERANCE[case.dtype] * expected.norm()


Change = Callable[[dict[str, Any]], dict[str, Any]]
REFUSALS: dict[str, tuple[str, Change]] = {
    "q rank": (r"q=.*\[B, T, G, N\]", lambda a: {"q": a["q"][0]}),
    "v rank": (r"v=.*\[B, T, H, P\]", lambda a: {"v": a["v"][0]}),
    "no tokens": ("q=.*T >= 1", lambda a: {x: a[x][:, :0] for x in "qkv"}),
    "no rows": ("q=.*B >= 1", lambda a: {x: a[x][:0] for x in "qkv"}),
    "k shape": ("k=.*q's shape", lambda a: {"k": a["k"][:, 1:]}),
    "v shape": ("v=.*must be", lambda a: {"v": a["v"][:, 1:]}),
    "heads": ("v=.*divisible by the 2", lambda a: {x: torch.zeros(2, 5, 2, 16) for x in "qk"}),
    "N": ("N=24 must be", lambda a: {x: torch.zeros(2, 5, 1, 24) for x in "qk"}),
    "P": ("P=272 must be", lambda a: {"v": torch.zeros(2, 5, 3, 272)}),
    "q dtype": ("q=float64", lambda a: {x: a[x].double() for x in "qkv"}),
    "v dtype": ("v=float16.*q's dtype", lambda a: {"v": a["v"].half()}),
    "log_decay shape": ("log_decay=.*1 or 5", lambda a: {"log_decay": torch.zeros(2, 4, 3)}),
    "log_decay rank": ("log_decay=", lambda a: {"log_decay": torch.zeros(3)}),
    "log_decay dtype": ("log_decay=float64", lambda a: {"log_decay": a["log_decay"].double()}),
    "state shape": ("state=.*float32", lambda a: {"state": a["state"][:1]}),
    "state dtype": ("state=bfloat16", lambda a: {"state": a["state"].bfloat16()}),
    "state strides": ("state=.*contiguous", lambda a: {"state": a["state"].mT}),
    "new shape": ("new=.*int32", lambda a: {"new": torch.ones(3, dtype=torch.int32)}),
    "new dtype": ("new=int64", lambda a: {"new": torch.ones(2, dtype=torch.int64)}),
    "device": ("log_decay=.*device of q", lambda a: {"log_decay": a["log_decay"].to("meta")}),
    "q spacing": ("q has strides .*evenly", lambda a: {"q": torch.zeros(2, 6, 1, 16)[:, :5]}),
    "v channels": ("v has strides", lambda a: {"v": torch.zeros(2, 5, 3, 32)[..., ::2]}),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_arguments_are_refused_before_any_launch(
    case: str, interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(Case(t=5, b=2, h=3))
    message, change = REFUSALS[case]
    monkeypatch.setattr(type(passes.decay_chunk_fwd_rows_kernel), "run", _no_launch)
    with pytest.raises(ValueError, match=message):
        op.decay_chunk(**(given | change(given)))


def _no_launch(*_: Any, **__: Any) -> None:
    raise AssertionError("launched")


def test_cpu_tensors_are_refused_outside_the_interpreter() -> None:
    with pytest.raises(ValueError, match="is on cpu, needs cuda"):
        op.decay_chunk(**arguments(Case(t=5)))


def test_a_single_token_compiles() -> None:
    """The launcher makes constants of sizes that are 1: no kernel may then ask more of them."""
    found = {v.kernel: v for v in op.variants() if "80x48" in v.name or v.name.endswith("dg")}
    for variant in found.values():
        ones = {name: 1 for name in ("tokens", "chunks")}
        types = {name: t for name, t in variant.signature.items() if name not in ones}
        single = replace(variant, signature=types, constexprs={**variant.constexprs, **ones})
        assert compile_ahead(single, "sm_90").spill_bytes == 0
