"""Numbers of packed codes, in registers.

A code c of b bits, 2 or 4, becomes 1 + c/BASE in bfloat16 or float16: a shift, a mask and a
constant, exact, with no conversion. BASE is 2^b in bfloat16 and 2^(b+2) in float16, because the
code is put at the top of the mantissa bits of the number's low byte. The high byte is then
constant, so NVIDIA GPUs shift and mask four bytes at once and widen them afterwards: one
instruction for each code, where the compiler takes three. Tests hold both forms to each other.
"""

import torch
import triton
import triton.language as tl

#: lop3's table of (a & b) | c.
_AND_OR = 0xF0 & 0xCC | 0xAA


@triton.jit
def planes(w, BITS: tl.constexpr, dtype: tl.constexpr, PTX: tl.constexpr):  # type: ignore[no-untyped-def]
    """The codes of bytes w, a tensor for each field, the lowest bits first.

    PTX: `ptx_planes`, or None for plain Triton.
    """
    if BITS == 4:
        if PTX is None:
            w0, w1 = _field(w, 0, BITS, dtype), _field(w, 1, BITS, dtype)
        else:
            w0, w1 = tl.inline_asm_elementwise(
                PTX, "=r,=r,=r,=r,r", [w], dtype=(tl.int16, tl.int16), is_pure=True, pack=4
            )
        return w0.to(dtype, bitcast=True), w1.to(dtype, bitcast=True)
    else:
        if PTX is None:
            w0, w1 = _field(w, 0, BITS, dtype), _field(w, 1, BITS, dtype)
            w2, w3 = _field(w, 2, BITS, dtype), _field(w, 3, BITS, dtype)
        else:
            w0, w1, w2, w3 = tl.inline_asm_elementwise(
                PTX, "=r,=r,=r,=r,=r,=r,=r,=r,r", [w],
                dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=4,
            )  # fmt: skip
        return (
            w0.to(dtype, bitcast=True), w1.to(dtype, bitcast=True),
            w2.to(dtype, bitcast=True), w3.to(dtype, bitcast=True),
        )  # fmt: skip


@triton.jit
def _field(w, AT: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Code AT of each byte as the bits of 1 + c/BASE, int16. bfloat16's low byte begins with the
    exponent's last bit, which 1 has set."""
    TOP: tl.constexpr = 7 if dtype == tl.bfloat16 else 8
    ONE: tl.constexpr = 0x3F80 if dtype == tl.bfloat16 else 0x3C00
    UP: tl.constexpr = TOP - BITS - BITS * AT
    word = w.to(tl.int16)
    moved = word << UP if UP >= 0 else word >> -UP
    return moved & ((1 << BITS) - 1 << TOP - BITS) | ONE


def ptx_planes(bits: int, dtype: torch.dtype) -> str:
    """`_field` for all codes of four bytes, in PTX.

    The last operand is the four bytes; $0 and $1 are their first codes, $2 and $3 their second ones
    and so on. It is read before any result is written, since these may share its register.
    """
    high, low, top = (0x3F, 0x80, 7) if dtype == torch.bfloat16 else (0x3C, 0x00, 8)
    four = 0x01010101
    mask = ((1 << bits) - 1 << top - bits) * four
    count = 8 // bits
    lines = [f".reg .b32 t<{count}>;"]
    for at in range(count):
        up = top - bits - bits * at
        lines += [
            f"{'shl' if up >= 0 else 'shr'}.b32 t{at}, ${2 * count}, {abs(up)};",
            f"lop3.b32 t{at}, t{at}, {mask}, {low * four}, {_AND_OR};",
        ]
    for at in range(count):
        lines += [
            f"prmt.b32 ${2 * at}, t{at}, {high * four}, {0x4140};",
            f"prmt.b32 ${2 * at + 1}, t{at}, {high * four}, {0x4342};",
        ]
    return "{" + " ".join(lines) + "}"


@triton.jit
def number(w, FLOAT8: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """int8 in dtype, or float8_e4m3fn / 256, given as int8 bits.

    With three zeros behind its mantissa and the exponent moved by one bit, a float8 is a float16 of
    a 256th: no GPU needs to know float8.
    """
    if FLOAT8:
        return (w.to(tl.int16) << 7 & -0x4080).to(tl.float16, bitcast=True).to(dtype)
    else:
        return w.to(dtype)
