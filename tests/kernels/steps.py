"""The recurrent step kernels as data: what `test_steps` calls, and what it holds them against.

A new step kernel is one more entry of `STEPS`. Its arguments are made for three sequences with
states in `SLOTS` of a pool; its sizes and options are keywords with defaults, which cases override.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.conv import shift as conv_shift
from kernels.conv import step as conv_step
from kernels.decay import linear_step, ssm_step
from kernels.dplr import step as dplr_step
from kernels.gated_delta import step as gdn_step
from kernels.selective import step as selective_step
from tests.kernels.slots import in_place
from tests.kernels.step_inputs import (
    BF16,
    F32,
    POOL,
    SLOTS,
    WKV_WEIGHTS,
    Args,
    B,
    Made,
    Norm,
    conv_arguments,
    conv_form,
    erasing_arguments,
    gdn_arguments,
    gdn_form,
    kda_arguments,
    linear_arguments,
    linear_form,
    product_arguments,
    selective_arguments,
    selective_form,
    shift_arguments,
    shift_form,
    shift_ref,
    ssm_arguments,
    ssm_form,
    wkv_arguments,
    wkv_form,
)

#: Name -> what to replace in arguments that fit, and the error's message.
Wrong = dict[str, tuple[Callable[[Args], Args], str]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """K tokens, valid ones of each sequence, dtypes; sizes and options that are not the default."""

    k: int
    inputs: torch.dtype
    state: torch.dtype
    new: tuple[int, ...] | None
    #: The kernel rounds to the inputs' dtype before the state takes them, as the torch form does.
    rounded: bool
    sizes: Args

    def __str__(self) -> str:
        new = self.new and ",".join(map(str, self.new))
        words = {"k": self.k, **self.sizes, "inputs": self.inputs, "state": self.state, "new": new}
        return "-".join(_word(*word) for word in words.items() if word[1] not in (None, F32))


def _word(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return name if value else f"no_{name}"
    return f"{name}{value}" if isinstance(value, int) else f"{name}_{value}".replace("torch.", "")


def case(
    k: int, *, inputs: torch.dtype = F32, state: torch.dtype = F32,
    new: tuple[int, ...] | None = None, rounded: bool = False, **sizes: Any,
) -> Case:  # fmt: skip
    return Case(k=k, inputs=inputs, state=state, new=new, rounded=rounded, sizes=sizes)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step kernel.

    arguments: (K, dtype of inputs, **sizes) -> `Made`. torch_form: (arguments, states in float32)
    -> y and the state after every token. tokens: names of inputs with a row for each token, the
    first of which defines B and K; fixed: names of the other tensors. leads: names of the inputs
    from which the wrapper reads sizes. state: the pool's name. norms: layouts of the output norm
    that the kernel supports. wrong: what only this kernel refuses.
    """

    op: Callable[..., Tensor]
    ref: Callable[..., tuple[Tensor, Tensor]]
    torch_form: Callable[[Args, Tensor], tuple[Tensor, Tensor]]
    arguments: Callable[..., Made]
    cases: tuple[Case, ...]
    tokens: tuple[str, ...]
    fixed: tuple[str, ...]
    leads: tuple[str, ...]
    state: str = "state"
    norms: tuple[Norm, ...] = ()
    wrong: Wrong
    tolerance: float = 2e-5
    #: The torch form rounds in between: it may be this many tolerances away.
    torch_factor: int = 4
    #: States are copies of inputs and y does not depend on K: both are compared bit by bit.
    bitwise: bool = False

    def made(self, c: Case) -> tuple[Args, Tensor]:
        """A case's arguments, and a pool with as many more slots as there are tokens."""
        args, shape = self.arguments(c.k, c.inputs, **c.sizes)
        return args, torch.randn(POOL + B * c.k, *shape).to(c.state)

    def fitting(self, tokens: int = 2, **sizes: Any) -> Args:
        """All arguments of a call that is accepted."""
        args, pool = self.made(case(tokens, **sizes))
        valid = torch.full((B,), tokens, dtype=torch.int32)
        return args | {self.state: pool, "new": valid, **in_place(SLOTS, tokens)}

    def rows(self, args: Args) -> dict[str, Tensor]:
        """Those of the arguments that have a row for each token."""
        return {name: args[name] for name in self.tokens if name in args}

    def run(self, args: Args, pool: Tensor, at: Args) -> Tensor:
        return self.op(**args, **{self.state: pool}, **at)

    def oracle(self, args: Args, states: Tensor) -> tuple[Tensor, Tensor]:
        return self.ref(**args, **{self.state: states})

    def y_tolerance(self, dtype: torch.dtype = F32) -> float:
        return self.tolerance if dtype == F32 else 1e-2

    def state_tolerance(self, dtype: torch.dtype = F32) -> float:
        return 0 if self.bitwise else self.y_tolerance(dtype)

    def refuses(self, args: Args, message: str) -> None:
        """Assert that the arguments raise ValueError before any launch."""
        before = args[self.state].clone()
        with pytest.raises(ValueError, match=message):
            self.op(**args)
        assert torch.equal(args[self.state], before)


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


def put(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Args], Args]:
    return lambda args: {name: change(args[name])}


def wrong_heads(value: str, *keys: str) -> Wrong:
    def groups(count: int) -> Callable[[Args], Args]:
        return lambda _: dict.fromkeys(keys, torch.zeros(B, 2, count, 16))

    return {
        "heads": (groups(3), f"^{value} has 2 heads, not divisible by 3"),
        "no heads": (groups(0), f"^{value} has 2 heads, not divisible by 0"),
        f"{value} inner": (
            put(value, lambda t: F.pad(t, (0, 1))[..., :-1]), f"^{value} has strides .*evenly"
        ),
    }  # fmt: skip


def shift_rows(**args: Any) -> Tensor:
    """The blends [B, K, W, D] of each token side by side."""
    return conv_shift.token_shift(**args).movedim(0, 2)


#: Cases of every step on a matrix for each head.
MATRIX_CASES = (
    case(1, p=32),
    case(1, p=100, h=1),
    case(1, n=128, p=8, inputs=BF16),
    case(2, p=20, g=2, h=4, state=BF16),
    case(4, n=64, p=12, new=(4, 0, 3)),
    case(3, n=24, p=17, inputs=BF16, state=BF16, new=(0, 1, 3)),
    case(9, p=12, h=1, new=(9, 5, 1)),
)

STEPS = {
    "gdn": Step(
        op=gdn_step.gdn_step, ref=gdn_step.gdn_step_ref, torch_form=gdn_form,
        arguments=gdn_arguments,
        cases=(
            *MATRIX_CASES,
            case(1, p=100, norm="heads"),
            case(3, n=24, p=17, inputs=BF16, state=BF16, new=(0, 1, 3), norm="heads"),
            case(9, p=256, h=1, new=(9, 5, 1), norm="heads"),
            case(9, p=12, g=2, h=4, inputs=BF16, norm="heads"),
            case(4, n=24, p=40, new=(4, 0, 3), norm="heads", beta_max=2.0),
        ),
        tokens=("q", "k", "v", "a", "b"), fixed=("a_log", "dt_bias"), leads=("q", "v"),
        norms=("heads",),
        wrong=wrong_heads("v", "q", "k"),
    ),
    "kda": Step(
        op=gdn_step.gdn_step, ref=gdn_step.gdn_step_ref, torch_form=gdn_form,
        arguments=kda_arguments,
        cases=(
            *MATRIX_CASES,
            case(1, p=100, norm="sigmoid"),
            case(3, n=24, p=17, inputs=BF16, state=BF16, new=(0, 1, 3), norm="sigmoid"),
            case(9, p=256, h=1, new=(9, 5, 1), norm="sigmoid"),
        ),
        tokens=("q", "k", "v", "a", "b"), fixed=("a_log", "dt_bias"), leads=("q", "v"),
        norms=("sigmoid",),
        wrong={
            "a by head": (put("a", lambda t: t[..., 0]), "^dt_bias has shape"),
            "a channels": (put("a", lambda t: t[..., 1:]), "^a has shape"),
            "dt_bias by head": (put("dt_bias", lambda t: t[:, 0]), "^dt_bias has shape"),
        },
    ),
    "gdn2": Step(
        op=gdn_step.gdn_step, ref=gdn_step.gdn_step_ref, torch_form=gdn_form,
        arguments=erasing_arguments,
        cases=(
            *MATRIX_CASES,
            case(1, p=100, norm="sigmoid"),
            case(3, n=24, p=17, g=2, h=4, inputs=BF16, new=(0, 1, 3), norm="sigmoid"),
        ),
        tokens=("q", "k", "v", "a", "b"), fixed=("a_log", "dt_bias"), leads=("q", "v"),
        norms=("sigmoid",),
        wrong={
            "b channels": (put("b", lambda t: t[..., 1:]), "^b has shape"),
            "a by head": (
                lambda args: {"a": args["a"][..., 0], "dt_bias": args["dt_bias"][:, 0]},
                "^b has shape",
            ),
        },
    ),
    "products": Step(
        op=gdn_step.gdn_step, ref=gdn_step.gdn_step_ref, torch_form=gdn_form,
        arguments=product_arguments,
        cases=(
            *MATRIX_CASES,
            case(1, p=100, norm="heads", products=1),
            case(3, n=24, p=17, g=2, h=4, inputs=BF16, new=(0, 1, 3), norm="heads", products=3),
            case(4, n=24, p=40, new=(4, 0, 3), norm="heads", beta_max=2.0),
        ),
        tokens=("q", "k", "v", "a", "b"), fixed=("a_log", "dt_bias"), leads=("q", "v"),
        norms=("heads",),
        wrong={
            "k of one": (put("k", lambda t: t[:, :, 0]), "^v has shape .*it needs 4 dimensions"),
            "v of one": (put("v", lambda t: t[:, :, :1]), "^v has shape"),
            "b of one": (put("b", lambda t: t[:, :, 0]), "^b has shape"),
            "a by channel": (
                lambda args: {"a": torch.zeros(B, 2, 2, 16), "dt_bias": torch.zeros(2, 16)},
                "^a has shape",
            ),
        },
    ),
    "ssm": Step(
        op=ssm_step.ssm_step, ref=ssm_step.ssm_step_ref, torch_form=ssm_form,
        arguments=ssm_arguments,
        cases=(
            *MATRIX_CASES,
            case(1, p=100, h=3, norm=1),
            case(1, p=600, h=4, n=2, g=2, norm=2),
            case(3, n=24, p=17, inputs=BF16, state=BF16, new=(0, 1, 3), norm=1),
            case(9, p=12, g=2, h=4, new=(9, 5, 1), norm=2),
            case(9, p=72, inputs=BF16, norm=1),
            case(2, p=20, h=4, state=BF16, norm=4),
        ),
        tokens=("x", "dt", "b", "c"), fixed=("a_log", "d", "dt_bias"), leads=("x", "b"),
        norms=("heads", 1, 2),
        wrong=wrong_heads("x", "b", "c"),
    ),
    "linear": Step(
        op=linear_step.linear_step, ref=linear_step.linear_step_ref, torch_form=linear_form,
        arguments=linear_arguments,
        cases=(
            *MATRIX_CASES,
            case(1, p=100, turn=True, norm="heads"),
            case(3, n=24, p=17, inputs=BF16, state=BF16, new=(0, 1, 3), norm="heads"),
            case(9, n=20, p=256, h=1, new=(9, 5, 1), turn=True, norm="heads"),
            case(8, p=12, g=2, h=4, inputs=BF16, turn=True, norm="heads", rounded=True),
            case(3, n=24, p=17, new=(3, 0, 2), turn=True),
        ),
        tokens=("q", "k", "v"), fixed=("log_decay",), leads=("q", "v"),
        norms=("heads",),
        wrong=wrong_heads("v", "q", "k"),
    ),
    "wkv": Step(
        op=dplr_step.wkv_step, ref=dplr_step.wkv_step_ref, torch_form=wkv_form,
        arguments=wkv_arguments,
        cases=(
            case(1, p=32),
            case(1, p=100, h=1),
            case(1, n=128, p=8, inputs=BF16),
            case(2, p=20, h=4, state=BF16),
            case(4, n=64, p=12, new=(4, 0, 3)),
            case(3, n=24, p=17, inputs=BF16, state=BF16, new=(0, 1, 3)),
            case(9, p=12, h=1, new=(9, 5, 1)),
        ),
        tokens=("r", "k", "v", "decay", "rate"), fixed=WKV_WEIGHTS, leads=("r", "v"),
        wrong={
            "bonus strides": (
                put("bonus", lambda t: t[:1].expand(t.shape)), "^bonus=.*must be contiguous"
            ),
            "tile": (
                lambda a: {
                    name: F.pad(a[name], (0, 1100)) for name in ("v", "state", *WKV_WEIGHTS[-2:])
                },
                "^N=16, P=1116 take a tile of 16x2048; at most 16384",
            ),
        },
    ),
    "selective": Step(
        op=selective_step.selective_step, ref=selective_step.selective_step_ref,
        torch_form=selective_form, torch_factor=1,
        arguments=selective_arguments,
        cases=(
            case(1),
            case(1, e=64, n=128, gate=False, inputs=BF16),
            case(2, n=10, gate=False, state=BF16),
            case(4, e=200, new=(4, 0, 3)),
            case(3, e=17, n=64, gate=False, inputs=BF16, state=BF16, new=(0, 1, 3)),
            case(9, e=65, new=(9, 5, 1)),
        ),
        tokens=("x", "dt", "b", "c", "z"), fixed=("a_log", "d", "dt_bias"), leads=("x", "b"),
        wrong={
            "a_log strides": (
                put("a_log", lambda t: t[:1].expand(t.shape)), "^a_log has .*must be contiguous"
            ),
        },
    ),
    "shift": Step(
        op=shift_rows, ref=shift_ref, torch_form=shift_form,
        arguments=shift_arguments, tolerance=2e-6,
        cases=(
            case(1),
            case(1, d=100, w=1, inputs=BF16, state=BF16),
            case(3, w=3, new=(0, 3, 1)),
            case(9, d=64, inputs=BF16, state=BF16, new=(9, 1, 5)),
        ),
        tokens=("x",), fixed=("blend",), leads=("x", "blend"), state="tail",
        wrong={
            "blend width": (put("blend", lambda t: t[:, 1:]), "^blend has shape"),
            "blend strides": (
                put("blend", lambda t: t[:1].expand(t.shape)), "^blend=.*must be contiguous"
            ),
        },
    ),
    "conv": Step(
        op=conv_step.conv_step, ref=conv_step.conv_step_ref, torch_form=conv_form, bitwise=True,
        arguments=conv_arguments, tolerance=2e-6,
        cases=(
            case(1),
            case(1, c=100, w=2, silu=False),
            case(2, bias=False, inputs=BF16, state=BF16),
            case(3, w=3, new=(0, 3, 1)),
            case(4, w=5, silu=False, new=(4, 2, 0)),
            case(9, c=64, bias=False, inputs=BF16, state=BF16, new=(9, 1, 5)),
            case(9),
        ),
        tokens=("x",), fixed=("weight", "bias"), leads=("x", "weight"),
        state="tail",
        wrong={
            "weight shape": (put("weight", lambda t: t[1:]), "^weight has shape"),
            "weight taps": (put("weight", lambda t: t[:, :1]), "^weight has 1 taps"),
            "weight strides": (
                put("weight", lambda t: t[:1].expand(t.shape)), "^weight has .*must be contiguous"
            ),
        },
    ),
}  # fmt: skip
