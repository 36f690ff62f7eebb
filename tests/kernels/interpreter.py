"""Running our Triton kernels on the CPU, in Triton's interpreter, for the length of a test.

`with interpreted():` takes in every kernel of `kernels/`, for a wrapper may launch those of other
files; helpers they call follow, Triton's own included. No environment variable counts, and
compiling works again afterwards.
Keep elementwise arithmetic in fp32: the interpreter adds and multiplies bf16 as raw bits; only
`tl.dot`, casts and 8-bit floats are mended here. Programs run one after another: no race can show.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib import import_module
from math import prod
from pkgutil import walk_packages
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
from numpy.typing import NDArray
from triton.language.semantic import TritonSemantic
from triton.runtime import JITFunction, interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle

import kernels
from kernels.device import Gpu

#: One of each family that tiles are chosen for.
GPUS = {gpu.family: gpu for gpu in (Gpu(), Gpu(capability=(8, 0)), Gpu(amd=True))}


@contextmanager
def interpreted() -> Iterator[None]:
    """Replace each JITFunction in `kernels` by its interpreted form, so that CPU tensors work.

    Look kernels up as attributes of their module: a name imported from it beforehand stays as is.
    """
    with ExitStack() as stack:
        for form in (JITFunction, InterpretedFunction):
            stack.enter_context(patch.object(form, "__call__", _call_helper))
        stack.enter_context(patch.object(InterpreterBuilder, "create_dot", _dot))
        stack.enter_context(patch.object(InterpreterBuilder, "cast_impl", _cast))
        stack.enter_context(patch.object(InterpreterBuilder, "create_fp_to_fp", _convert))
        # What follows changes no result: it spares work that takes longer than small kernels do.
        # The interpreter patches the language at every launch and every call of a helper.
        language = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
        stack.callback(interpreter._patch_lang(language).restore)
        nothing = interpreter._LangPatchScope()
        stack.enter_context(patch.object(interpreter, "_patch_lang", lambda _: nothing))
        stack.enter_context(patch.object(interpreter, "_get_np_dtype", _np_dtype))
        stack.enter_context(patch.object(tl.tensor, "__init__", _make_tensor))
        stack.enter_context(
            patch.object(TritonSemantic, "binary_op_sanitize_overflow_impl", _refuse_overflow)
        )
        for module, name, form in _forms():
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, form)
        yield


@cache
def _forms() -> list[tuple[ModuleType, str, InterpretedFunction]]:
    """Every name of a JITFunction in `kernels`, and what replaces it."""
    found = [import_module(m.name) for m in walk_packages(kernels.__path__, "kernels.")]
    return [
        (module, name, InterpretedFunction(value.fn))
        for module in found
        for name, value in vars(module).items()
        if isinstance(value, JITFunction)
    ]


def _call_helper(helper: Any, *args: Any, **kwargs: Any) -> Any:
    # InterpretedFunction.__call__ hides an error's type and place.
    return _rewritten(helper.fn)(*args, **kwargs)


@cache
def _rewritten(function: Callable[..., Any]) -> Callable[..., Any]:
    rewritten: Callable[..., Any] = InterpretedFunction(function).rewrite()
    return rewritten


_scalar_dtype = cache(interpreter._get_np_dtype)


def _np_dtype(kind: Any) -> np.dtype[Any]:
    return np.dtype(np.uint64) if kind.scalar.is_ptr() else _scalar_dtype(kind.scalar)


def _make_tensor(self: Any, handle: Any, type: Any) -> None:  # noqa: A002
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = _shape(*type.shape) if type.is_block() else _shape()


@cache
def _shape(*sizes: int) -> tuple[Any, Any]:
    return tl.tuple([tl.constexpr(n) for n in sizes]), tl.constexpr(prod(sizes))


def _refuse_overflow(self: Any, a: Any, b: Any, operation: Any) -> None:
    """The interpreter's check of sums, differences and products of narrow integers, by numpy."""
    kind, name = a.type.scalar, operation.__name__
    if kind.int_bitwidth < 64:
        wide = (operand.handle.data.astype(np.int64) for operand in (a, b))
        exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[name](*wide)
        fits = (kind.get_int_min_value() <= exact) & (exact <= kind.get_int_max_value())
        assert fits.all(), f"int{kind.int_bitwidth} overflow detected for operation {name}"


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
