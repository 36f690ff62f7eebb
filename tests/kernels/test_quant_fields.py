"""Numbers of packed codes: plain Triton, and the PTX that says the same to NVIDIA GPUs."""

import re

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.quant import fields
from kernels.quant.torch import unpack
from tests.kernels.interpreter import interpreted

DTYPES = [torch.bfloat16, torch.float16]
BYTES = torch.arange(256).to(torch.uint8)
WORD = 0xFFFFFFFF


def expected(bits: int, dtype: torch.dtype) -> Tensor:
    """1 + c/BASE of every field of every byte: [256, 8 / bits]."""
    base = 2**bits if dtype == torch.bfloat16 else 2 ** (bits + 2)
    return (1 + unpack(BYTES[:, None], bits).double() / base).to(dtype)


@triton.jit
def planes_kernel(w, y, BITS: tl.constexpr, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, 256)
    found = fields.planes(tl.load(w + at), BITS, y.dtype.element_ty, PTX)
    for i in tl.static_range(8 // BITS):
        tl.store(y + at * (8 // BITS) + i, found[i])


@triton.jit
def number_kernel(w, y, FLOAT8: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, 256)
    tl.store(y + at, fields.number(tl.load(w + at), FLOAT8, y.dtype.element_ty))


def run(kernel: object, w: Tensor, y: Tensor, *constants: object) -> Tensor:
    with interpreted():
        triton.runtime.interpreter.InterpretedFunction(kernel.fn)[(1,)](w, y, *constants)  # type: ignore[attr-defined]
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 4])
def test_fields_of_every_byte(bits: int, dtype: torch.dtype) -> None:
    y = torch.empty(256, 8 // bits, dtype=dtype)
    assert torch.equal(run(planes_kernel, BYTES, y, bits, None), expected(bits, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 4])
def test_ptx_of_every_byte(bits: int, dtype: torch.dtype) -> None:
    count, wanted = 8 // bits, expected(bits, dtype)
    # Every byte in every place, beside others.
    for first in range(256):
        at = [first, 255 - first, (first * 7 + 3) % 256, (first * 13 + 5) % 256]
        word = sum(byte << 8 * i for i, byte in enumerate(at))
        results = execute(fields.ptx_planes(bits, dtype), {f"${2 * count}": word})
        for field in range(count):
            pair = [results[f"${2 * field}"], results[f"${2 * field + 1}"]]
            halves = [half for r in pair for half in (r & 0xFFFF, r >> 16)]
            assert halves == [int(wanted[b, field].view(torch.int16)) for b in at]


def execute(text: str, registers: dict[str, int]) -> dict[str, int]:
    """The instructions of PTX that are used, as its manual defines them. An operand is gone once a
    result is written, since they may share a register."""
    operands = set(registers)
    for name, arguments in re.findall(r"(shl|shr|lop3|prmt)\.b32 ([^;]+);", text):
        target, *sources = arguments.split(", ")
        a, b, *more = (registers[s] if s in registers else int(s, 0) for s in sources)
        if name == "shl":
            value = a << b & WORD
        elif name == "shr":
            value = a >> b
        elif name == "lop3":
            c, table = more
            minterms = [(i, table >> i & 1) for i in range(8)]
            value = 0
            for i, chosen in minterms:
                if chosen:
                    signs = [v if i & bit else ~v for v, bit in ((a, 4), (b, 2), (c, 1))]
                    value |= signs[0] & signs[1] & signs[2] & WORD
        else:
            both = (a | b << 32).to_bytes(8, "little")
            picked = [both[more[0] >> 4 * i & 7] for i in range(4)]
            value = int.from_bytes(bytes(picked), "little")
        if target.startswith("$"):
            registers = {k: v for k, v in registers.items() if k not in operands}
        registers[target] = value
    return registers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eight_bits_of_every_byte(dtype: torch.dtype) -> None:
    codes = BYTES.view(torch.int8)
    y = torch.empty(256, dtype=dtype)
    assert torch.equal(run(number_kernel, codes, y, False), codes.to(dtype))
    found = run(number_kernel, codes, torch.empty(256, dtype=dtype), True).double() * 256
    wanted = codes.view(torch.float8_e4m3fn).double()
    assert torch.equal(found[wanted.isfinite()], wanted[wanted.isfinite()])
    assert int(wanted.isfinite().sum()) == 254
