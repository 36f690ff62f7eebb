"""What the tests of step kernels share about the output norm: its operands, and who comes last."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from kernels.norm.torch import OutputNorm, gated_rms_norm

B = 3


def output_norm(
    tokens: int, heads: int, p: int, dtype: torch.dtype, groups: int | None = None,
    opened: str = "silu",
) -> OutputNorm:  # fmt: skip
    """Per head, gated after; with groups, over groups of heads, gated before. The gate is columns
    of a wider tensor, as a projection leaves it.
    """
    gate = torch.randn(B, tokens, heads * p + 5).to(dtype)[..., : heads * p]
    if groups is None:
        return OutputNorm(
            gate=gate.unflatten(-1, (heads, p)), weight=torch.randn(p), eps=1e-5, gate_first=False,
            opened=opened,
        )  # fmt: skip
    weight, group = torch.randn(heads * p), heads * p // groups
    return OutputNorm(gate=gate, weight=weight, eps=1e-5, gate_first=True, group=group)


def normed(y: Tensor, norm: OutputNorm | None, form: Callable[..., Tensor] = gated_rms_norm) -> Any:
    """y [B, K, H, P] after a gated norm of its own, in its shape."""
    if norm is None:
        return y
    rows = y.reshape(norm.gate.shape)
    options = {"gate_first": norm.gate_first, "group": norm.group, "opened": norm.opened}
    return form(rows, norm.gate, norm.weight, norm.eps, **options).reshape(y.shape)


@contextmanager
def backwards() -> Iterator[None]:
    """The programs of a grid run from its end: who arrives last is the first of them."""
    forwards = InterpreterBuilder.set_grid_idx

    def mirrored(builder: Any, *at: int) -> None:
        forwards(builder, *(n - 1 - i for n, i in zip(builder.grid_dim, at, strict=True)))

    with patch.object(InterpreterBuilder, "set_grid_idx", mirrored):
        yield


def _gate(change: Callable[[Tensor], Tensor]) -> Callable[[OutputNorm], dict[str, Any]]:
    return lambda n: {"gate": change(n.gate)}


#: Changes of a norm of two heads of 16 that every step refuses, and how.
WRONG_NORMS: dict[str, tuple[Callable[[OutputNorm], dict[str, Any]], str]] = {
    "gate shape": (_gate(lambda t: t[..., 1:]), "gate has shape .*needs .3, 2, 2, 16. or"),
    "gate tokens": (_gate(lambda t: t[:, 1:]), "gate has shape"),
    "gate dtype": (_gate(Tensor.double), "gate has dtype torch.float64"),
    "gate device": (_gate(lambda t: t.to("meta")), "gate is on meta"),
    "gate spacing": (_gate(lambda t: torch.cat((t, t), 1)[:, :2]), "gate has strides .*evenly"),
    "weight shape": (lambda n: {"weight": n.weight[1:]}, "weight has shape"),
    "weight strides": (
        lambda n: {"weight": n.weight.repeat(2).sort()[0][::2]}, "weight has strides .*last must"
    ),
    "opened": (lambda n: {"opened": "relu"}, "opened=relu must be one of silu, sigmoid"),
    "group": (lambda n: {"group": 8}, "group=8 must be a multiple of P=16 and divide"),
    "group zero": (lambda n: {"group": 0}, "group=0 must be"),
    "group beyond": (lambda n: {"group": 64}, "group=64 must be"),
}  # fmt: skip
#: Counters for two norm rows of each of three sequences that every step refuses.
WRONG_ARRIVALS = {
    "few": (torch.zeros(2, dtype=torch.int32), r"arrivals=.*int32 \[>= "),
    "dtype": (torch.zeros(9), "arrivals=float32"),
    "strides": (torch.zeros(18, dtype=torch.int32)[::2], "arrivals=.*contiguous"),
    "device": (torch.zeros(9, dtype=torch.int32, device="meta"), "arrivals=.*on meta"),
}
