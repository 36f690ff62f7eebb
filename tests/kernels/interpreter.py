"""Running our Triton kernels on the CPU, in Triton's interpreter, for the length of a test.

`with interpreted():` takes in every kernel of `kernels/`, for a wrapper may launch those of other
files; helpers they call follow, Triton's own included. No environment variable counts, and
compiling works again afterwards.
Keep elementwise arithmetic in fp32: the interpreter adds and multiplies bf16 as raw bits; only
`tl.dot`, casts and 8-bit floats are mended here. Programs run one after another: no race can show.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pkgutil import walk_packages
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton.runtime import JITFunction
from triton.runtime.interpreter import (
    InterpretedFunction,
    InterpreterBuilder,
    TensorHandle,
    _patch_lang,
)

import kernels

#: Architectures with an operation that has a torch form alone: no kernels decode them.
TORCH_ALONE = ("hca", "csa")


@contextmanager
def interpreted() -> Iterator[None]:
    """Replace each JITFunction in `kernels` by its interpreted form, so that CPU tensors work.

    Look kernels up as attributes of their module: a name imported from it beforehand stays as is.
    """
    found = walk_packages(kernels.__path__, "kernels.")
    modules = [import_module(module.name) for module in found]
    with ExitStack() as stack:
        for form in (JITFunction, InterpretedFunction):
            stack.enter_context(patch.object(form, "__call__", _call_helper))
        stack.enter_context(patch.object(InterpreterBuilder, "create_dot", _dot))
        stack.enter_context(patch.object(InterpreterBuilder, "cast_impl", _cast))
        stack.enter_context(patch.object(InterpreterBuilder, "create_fp_to_fp", _convert))
        for module in modules:
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    stack.enter_context(patch.object(module, name, InterpretedFunction(value.fn)))
        yield


def _call_helper(helper: Any, *args: Any, **kwargs: Any) -> Any:
    # InterpretedFunction.__call__ does this too, but leaves triton.language patched.
    scope = _patch_lang(helper.fn)
    try:
        return InterpretedFunction(helper.fn).rewrite()(*args, **kwargs)
    finally:
        scope.restore()


_library_dot = InterpreterBuilder.create_dot
_library_cast = InterpreterBuilder.cast_impl
_library_convert = InterpreterBuilder.create_fp_to_fp


def _dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
    wide = (_widen(operand) for operand in (a, b))
    return _library_dot(self, *wide, d, precision, imprecise)


def _cast(self: Any, source: Any, target: Any) -> Any:
    source = _widen(source)
    if target.scalar != tl.bfloat16:
        return _library_cast(self, source, target)
    bits = source.data.astype(np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = np.where(np.isnan(bits.view(np.float32)), bits >> 16 | 0x40, rounded)
    return TensorHandle(rounded.astype(np.uint16), tl.bfloat16)


def _convert(self: Any, source: Any, target: Any, rounding: Any) -> Any:
    """The interpreter loses the carry of a rounded mantissa; GPUs round to even, as torch does."""
    if target.scalar != tl.float8e4nv or source.dtype.scalar != tl.float32:
        return _library_convert(self, source, target, rounding)
    rounded = torch.from_numpy(source.data).to(torch.float8_e4m3fn).view(torch.uint8)
    return TensorHandle(rounded.numpy(), tl.float8e4nv)


def _widen(handle: Any) -> Any:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    data: NDArray[Any] = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return TensorHandle(data, tl.float32)
