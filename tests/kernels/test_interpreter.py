"""The interpreter as tests run it: what it spares is no check, and the language comes back."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import InterpretedFunction

from tests.kernels.interpreter import interpreted


@triton.jit
def _arithmetic_kernel(x_ptr, y_ptr, out_ptr, OPERATION: tl.constexpr):
    x, y = tl.load(x_ptr + tl.arange(0, 2)), tl.load(y_ptr + tl.arange(0, 2))
    if OPERATION == "add":
        out = x + y
    elif OPERATION == "sub":
        out = x - y
    else:
        out = x * y
    tl.store(out_ptr + tl.arange(0, 2), out)


def run(operation: str, x: int, y: int, dtype: torch.dtype) -> int:
    """The sum, difference or product of two integers, in a kernel."""
    given, other = (torch.tensor([value, 1], dtype=dtype) for value in (x, y))
    out = torch.empty_like(given)
    with interpreted():
        InterpretedFunction(_arithmetic_kernel.fn)[(1,)](given, other, out, operation)
    return int(out[0])


@pytest.mark.parametrize(
    ("operation", "x", "y", "exact"),
    [
        ("add", 2**31 - 2, 1, 2**31 - 1),
        ("add", 2**31 - 1, 1, 2**31),
        ("sub", -(2**31) + 1, 1, -(2**31)),
        ("sub", -(2**31), 1, -(2**31) - 1),
        ("mul", 2**15, -(2**16), -(2**31)),
        ("mul", 2**15, 2**16, 2**31),
    ],
)
def test_integers_that_overflow_are_refused(operation: str, x: int, y: int, exact: int) -> None:
    assert run(operation, x, y, torch.int64) == exact
    if -(2**31) <= exact < 2**31:
        assert run(operation, x, y, torch.int32) == exact
    else:
        with pytest.raises(InterpreterError, match=f"int32 overflow detected .* {operation}"):
            run(operation, x, y, torch.int32)


def test_the_language_is_as_before_afterwards() -> None:
    before = {name: getattr(tl, name) for name in dir(tl)}
    made = vars(tl.tensor).copy()
    with interpreted():
        assert tl.load is not before["load"]
    assert {name: getattr(tl, name) for name in dir(tl)} == before
    assert all(made[name] is value for name, value in vars(tl.tensor).items() if name != "__doc__")
