"""The chunked gated delta rule, by head and by channel: oracle, torch form, gradients, raggedness,
splits, refusals, compilation.

`torch.empty` is NaN here and so is every padded input: reading or leaving either shows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.gated_delta import channel_chunk as by_channel
from kernels.gated_delta import channel_passes
from kernels.gated_delta import chunk as op
from kernels.gated_delta import chunk_passes as gdn_chunk_passes
from kernels.gated_delta.torch import gdn_chunk as torch_chunk
from kernels.gated_delta.torch import gdn_ref
from tests.kernels.interpreter import interpreted

NAMES = ("q", "k", "v", "log_decay", "beta", "state")
#: Largest error, as a share of the largest value of the tensor.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}


@dataclass(frozen=True, kw_only=True)
class Case:
    """T tokens, G and H heads, N by P states; valid tokens; whether a first state is given, decays
    are by channel, and strengths, too.
    """

    t: int
    n: int = 16
    p: int = 16
    g: int = 1
    h: int = 1
    dtype: torch.dtype = torch.float32
    new: tuple[int, ...] | None = None
    given: bool = True
    batch: int = 1
    channels: bool = False
    erases: bool = False

    @property
    def op(self) -> Callable[..., tuple[Tensor, Tensor]]:
        return by_channel.kda_chunk if self.channels else op.gdn_chunk

    def __str__(self) -> str:
        kind = str(self.dtype)[6:].replace("bfloat", "bf")
        first = "" if self.given else "-zeros"
        kind += "-channels" * self.channels + "-erases" * self.erases
        return f"t{self.t}-{self.n}x{self.p}-g{self.g}h{self.h}-{kind}{first}-new{self.new}"


BF16, FP16 = torch.bfloat16, torch.float16
CASES = [
    Case(t=1),
    Case(t=16, h=2, given=False),
    Case(t=63, dtype=FP16),
    Case(t=65, h=2, dtype=BF16, given=False),
    Case(t=100, n=48, p=80, dtype=BF16),
    Case(t=40, n=128, p=48, dtype=BF16),
    Case(t=20, n=48, p=32),
    Case(t=34, g=2, h=4, dtype=BF16),
    Case(t=70, dtype=FP16, batch=4, new=(70, 0, 33, 64)),
    Case(t=18, h=2, batch=3, new=(17, 18, 0), given=False),
    Case(t=1, channels=True),
    Case(t=63, dtype=FP16, channels=True),
    Case(t=33, n=48, p=80, dtype=BF16, given=False, channels=True),
    Case(t=20, n=48, p=32, g=2, h=4, channels=True),
    Case(t=18, h=2, batch=3, new=(17, 18, 0), given=False, channels=True),
    Case(t=34, dtype=BF16, batch=2, new=(34, 9), channels=True),
    Case(t=130, n=32, p=16, dtype=FP16, batch=2, new=(61, 130), channels=True),
    Case(t=1, channels=True, erases=True),
    Case(t=33, n=48, p=80, dtype=BF16, given=False, channels=True, erases=True),
    Case(t=20, n=48, p=32, g=2, h=4, channels=True, erases=True),
    Case(t=18, h=2, batch=3, new=(17, 18, 0), given=False, channels=True, erases=True),
    Case(t=70, h=2, dtype=FP16, batch=2, new=(34, 69), channels=True, erases=True),
]


@pytest.fixture
def interpreter() -> Iterator[None]:
    with interpreted():
        yield


def arguments(case: Case) -> dict[str, Any]:
    """q, k, v are columns of one tensor, as projections leave them; keys resemble each other.

    beta is float32 where no first state is given.
    """
    c = case
    q, k, v = torch.randn(c.batch, c.t, 2 * c.g * c.n + c.h * c.p).split(
        (c.g * c.n, c.g * c.n, c.h * c.p), -1
    )
    q = F.normalize(q.unflatten(-1, (c.g, c.n)), dim=-1) * c.n**-0.5
    k = F.normalize(k.unflatten(-1, (c.g, c.n)) + 0.5, dim=-1)
    packed = torch.cat((q.flatten(2), k.flatten(2), v), -1).to(c.dtype)
    q, k, v = packed.split((c.g * c.n, c.g * c.n, c.h * c.p), -1)
    return {
        "q": q.unflatten(-1, (c.g, c.n)),
        "k": k.unflatten(-1, (c.g, c.n)),
        "v": v.unflatten(-1, (c.h, c.p)),
        "log_decay": -(torch.rand(c.batch, c.t, c.h, *[c.n] * c.channels) ** 3),
        "beta": strengths(c).to(c.dtype if c.given else torch.float32),
        "state": torch.randn(c.batch, c.h, c.n, c.p) if c.given else None,
        "new": None if c.new is None else torch.tensor(c.new, dtype=torch.int32),
    }


def strengths(c: Case) -> Tensor:
    """Columns of a wider tensor."""
    columns = c.h * (c.n if c.erases else 1)
    beta = torch.rand(c.batch, c.t, 2 * columns)[..., :columns]
    return beta.unflatten(-1, (c.h, c.n)) if c.erases else beta


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = max(expected.abs().max().item(), 1.0) if expected.numel() else 1.0
    torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=tolerance * scale)


def spoil(args: dict[str, Any], case: Case) -> None:
    """Padded inputs become NaN."""
    for row, count in enumerate(case.new or ()):
        for name in NAMES[:5]:
            args[name][row, count:] = torch.nan


def zeros(case: Case) -> Tensor:
    return torch.zeros(case.batch, case.h, case.n, case.p)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle_and_the_torch_form(case: Case, interpreter: None) -> None:
    args = arguments(case)
    first = zeros(case) if args["state"] is None else args["state"]
    held, expected = first.clone(), []
    for row, count in enumerate(case.new or (case.t,) * case.batch):
        one = [args[n][row : row + 1, :count].clone() for n in NAMES[:5]]
        before = held[row : row + 1]
        y, last = gdn_ref(*one, before) if count else (one[2].double(), before.double())
        expected.append((y, last, *(torch_chunk(*one, before) if count else (y, last))))
    spoil(args, case)
    y, last = case.op(**args)
    assert y.dtype == case.dtype and last.dtype == torch.float32
    assert y.shape == args["v"].shape and last.shape == first.shape
    assert args["state"] is None or torch.equal(args["state"], held)
    tolerance = TOLERANCE[case.dtype]
    for row, (right, state, torch_y, torch_state) in enumerate(expected):
        count = right.shape[1]
        close(y[row : row + 1, :count], right, tolerance)
        close(last[row : row + 1], state, tolerance)
        close(y[row : row + 1, :count], torch_y, 2 * tolerance)
        close(last[row : row + 1], torch_state, 2 * tolerance)
        assert (y[row, count:] == 0).all()
        if not count:
            assert torch.equal(last[row], held[row])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_equal_those_of_the_oracle(case: Case, interpreter: None) -> None:
    args = arguments(case)
    grad_y = torch.randn(args["v"].shape).to(case.dtype)
    grad_last = torch.randn(zeros(case).shape)
    inputs = {n: args[n] for n in NAMES if args[n] is not None}
    expected = {n: torch.zeros(x.shape, dtype=torch.float64) for n, x in inputs.items()}
    for row, count in enumerate(case.new or (case.t,) * case.batch):
        one = {
            n: (x[row : row + 1, :count] if n != "state" else x[row : row + 1])
            .detach().double().requires_grad_()
            for n, x in inputs.items()
        }  # fmt: skip
        if not count:
            if case.given:
                expected["state"][row] = grad_last[row]
            continue
        state = one.get("state", torch.zeros(1, case.h, case.n, case.p))
        outputs = gdn_ref(*(one[n] for n in NAMES[:5]), state)
        given = (grad_y[row : row + 1, :count].double(), grad_last[row : row + 1].double())
        grads = torch.autograd.grad(outputs, list(one.values()), given)
        for name, grad in zip(one, grads, strict=True):
            target = expected[name][row]
            (target if name == "state" else target[:count]).copy_(grad[0])
    spoil(args, case)
    for row, count in enumerate(case.new or ()):
        grad_y[row, count:] = torch.nan
    for x in inputs.values():
        x.requires_grad_()
    grads = torch.autograd.grad(case.op(**args), list(inputs.values()), (grad_y, grad_last))
    for (name, x), grad in zip(inputs.items(), grads, strict=True):
        assert grad.dtype == x.dtype and grad.shape == x.shape
        close(grad, expected[name], TOLERANCE[case.dtype])


#: Which gates are by channel.
GATES: dict[str, dict[str, bool]] = {
    "heads": {}, "channels": {"channels": True}, "erases": {"channels": True, "erases": True},
}  # fmt: skip
EACH = pytest.mark.parametrize("gates", GATES.values(), ids=GATES)


@EACH
@pytest.mark.parametrize("which", [0, 1], ids=["y", "last"])
def test_gradients_of_one_output_alone(
    which: int, gates: dict[str, bool], interpreter: None
) -> None:
    case = Case(t=20, h=2, **gates)
    args = arguments(case)
    inputs = [args[n].detach().requires_grad_() for n in NAMES]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    out, right = case.op(*inputs)[which], gdn_ref(*wide)[which]
    # The last state knows nothing of q; the oracle has no gradient then.
    expected = torch.autograd.grad(right.square().sum(), wide, allow_unused=True)
    for grad, exact in zip(torch.autograd.grad(out.square().sum(), inputs), expected, strict=True):
        close(grad, torch.zeros(()).expand_as(grad) if exact is None else exact, 1e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_solve_holds_where_all_keys_are_equal(dtype: torch.dtype, interpreter: None) -> None:
    """The worst case of powers of A, which would grow as binomials: no decay, full strength."""
    keys = F.normalize(torch.randn(16), dim=0).to(dtype).expand(1, 64, 1, 16).contiguous()
    decay, beta = torch.zeros(1, 64, 1), torch.ones(1, 64, 1)
    sizes = gdn_chunk_passes.sizes_of(keys, keys, gdn_chunk_passes.FORWARD)
    _, inverse = gdn_chunk_passes.solve(sizes, keys, decay, beta, None)
    chunk = keys[0, : sizes.chunk, 0].double()
    a = (chunk @ chunk.T).tril(-1)
    expected = torch.linalg.inv(torch.eye(len(a)).double() + a).expand_as(inverse)
    close(inverse, expected, torch.finfo(dtype).eps)


@EACH
@pytest.mark.parametrize("decay", [-1e-6, -30.0, -1e4])
def test_decays_of_any_size(decay: float, gates: dict[str, bool], interpreter: None) -> None:
    case = Case(t=35, **gates)
    args = arguments(case)
    args["log_decay"] = torch.full_like(args["log_decay"], decay)
    inputs = [args[n].detach().requires_grad_() for n in NAMES]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    outputs, right = case.op(*inputs), gdn_ref(*wide)
    grads = torch.autograd.grad(sum(o.sum() for o in outputs), inputs)
    exact = torch.autograd.grad(sum(o.sum() for o in right), wide)
    for got, expected in zip((*outputs, *grads), (*right, *exact), strict=True):
        close(got, expected, 1e-5)


@EACH
@pytest.mark.parametrize("at", [1, 16, 30, 39])
def test_any_split_equals_one_call(at: int, gates: dict[str, bool], interpreter: None) -> None:
    case = Case(t=40, h=2, **gates)
    args = arguments(case)
    y, last = case.op(*(args[n] for n in NAMES))
    first, state = case.op(*(args[n][:, :at] for n in NAMES[:5]), args["state"])
    second, state = case.op(*(args[n][:, at:] for n in NAMES[:5]), state)
    close(torch.cat((first, second), 1), y, 1e-6)
    close(state, last, 1e-6)


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "q dims": (lambda x: x.update(q=x["q"][0]), r"q=.*must be \[B, T, G, N\]"),
    "v dims": (lambda x: x.update(v=x["v"][0]), r"v=.*must be \[B, T, H, P\]"),
    "no tokens": (
        lambda x: x.update({n: x[n][:, :0] for n in NAMES[:5]}),
        "q=.*must have B >= 1 and T >= 1",
    ),
    "k shape": (lambda x: x.update(k=x["k"][..., :16]), "k=.*must have q's shape"),
    "v batch": (lambda x: x.update(v=x["v"][1:]), "v=.*must be"),
    "heads": (
        lambda x: x.update(v=torch.zeros(2, 3, 3, 32)),
        "v=.*heads divisible by the 2 groups",
    ),
    "N": (lambda x: x.update(q=x["q"][..., :24], k=x["k"][..., :24]), "N=24 must be a multiple"),
    "N large": (
        lambda x: x.update(q=torch.zeros(2, 3, 2, 144), k=torch.zeros(2, 3, 2, 144)),
        "N=144 must be .* up to 128",
    ),
    "P large": (lambda x: x.update(v=torch.zeros(2, 3, 4, 272)), "P=272 must be .* up to 256"),
    "q dtype": (lambda x: x.update(q=x["q"].double()), "q=.*must be float32, bfloat16 or"),
    "k dtype": (lambda x: x.update(k=x["k"].half()), "k=.*must have q's dtype"),
    "v dtype": (lambda x: x.update(v=x["v"].half()), "v=.*must have q's dtype"),
    "log_decay shape": (lambda x: x.update(log_decay=torch.zeros(2, 3, 2)), "log_decay=.*must be"),
    "log_decay dtype": (
        lambda x: x.update(log_decay=x["log_decay"].half()),
        "log_decay=.*must be of .*float32",
    ),
    "beta shape": (lambda x: x.update(beta=torch.zeros(2, 4)), "beta=.*must be"),
    "beta dtype": (lambda x: x.update(beta=x["beta"].double()), "beta=.*must be of"),
    "state shape": (lambda x: x.update(state=x["state"][..., 1:]), "state=.*must be contiguous"),
    "state dtype": (lambda x: x.update(state=x["state"].half()), "state=.*must be contiguous"),
    "state strides": (
        lambda x: x.update(state=x["state"].mT.contiguous().mT),
        "state=.*must be contiguous",
    ),
    "new shape": (lambda x: x.update(new=torch.ones(3, dtype=torch.int32)), "new=.*must be cont"),
    "new dtype": (lambda x: x.update(new=torch.ones(2)), "new=.*must be contiguous torch.int32"),
    "k device": (lambda x: x.update(k=x["k"].to("meta")), "k=.*must be on the device of q"),
    "new device": (
        lambda x: x.update(new=torch.ones(2, dtype=torch.int32, device="meta")),
        "new=.*must be on the device of q",
    ),
    "v strides": (
        lambda x: x.update(v=x["v"].mT.contiguous().mT),
        "v has strides .*channels contiguous",
    ),
    "q spacing": (
        lambda x: x.update(q=torch.zeros(2, 5, 2, 32)[:, :3]),
        "q has strides .*evenly spaced",
    ),
    "beta spacing": (
        lambda x: x.update(beta=torch.zeros(2, 4, 3).mT),
        "beta has strides .*channels contiguous",
    ),
}


def acceptable(**gates: bool) -> Case:
    return Case(t=3, n=32, p=32, g=2, h=4, batch=2, **gates)


@EACH
@pytest.mark.parametrize("change", WRONG)
def test_what_does_not_fit_is_refused_before_any_launch(
    change: str, gates: dict[str, bool], interpreter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = acceptable(**gates)
    args = arguments(case)
    spoil_one, message = WRONG[change]
    spoil_one(args)
    monkeypatch.setattr(gdn_chunk_passes, "solve", None)
    monkeypatch.setattr(channel_passes, "pairs", None)
    with pytest.raises(ValueError, match=message):
        case.op(**args)


@EACH
def test_cpu_tensors_are_refused_outside_the_interpreter(gates: dict[str, bool]) -> None:
    case = acceptable(**gates)
    with pytest.raises(ValueError, match=r"q=.*is on cpu, needs cuda"):
        case.op(**arguments(case))
