"""Products of few rows with a packed matrix on a device, beside cuBLAS on what it stands for."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from eval.proof.gpu.case import Case, Check, Op, Run
from eval.proof.gpu.ops.operands import bytes_of, random
from kernels.quant.packed_rows import packed_rows
from kernels.quant.torch import SCALE_DTYPE, Rounded, dense, product_ref

BF16_LIMIT = 8e-3
Pairs = Sequence[tuple[Tensor, Tensor]]


class Format(NamedTuple):
    """Bits of a number, columns of a group (None: a scale for each row), dtype of the codes."""

    bits: int
    group: int | None = None
    dtype: torch.dtype = torch.uint8

    def __str__(self) -> str:
        if self.group is None:
            return "fp8" if self.dtype.is_floating_point else "int8"
        return f"int{self.bits} g{self.group}"


INT4 = Format(4, 64)
INT8 = Format(8, dtype=torch.int8)
FP8 = Format(8, dtype=torch.float8_e4m3fn)


def packed(n: int, k: int, form: Format, device: torch.device) -> Rounded:
    """A matrix [n, k] of random codes; its numbers are of size k^-0.5."""
    bits, group, dtype = form
    groups = -(-k // group) if group else 1
    size = groups * group * bits // 8 if group else k
    scale = torch.rand(n, groups, device=device).add_(0.5).mul_(k**-0.5 / 2 ** (bits - 2))
    if group:
        codes = torch.randint(0, 256, (n, size), dtype=torch.uint8, device=device)
        zero = random(n, groups, device=device, dtype=SCALE_DTYPE, scale=k**-0.5 / 4)
        return Rounded(codes, scale.to(SCALE_DTYPE), zero)
    codes = random(n, size, device=device, dtype=torch.float32, scale=32).clamp_(-127, 127)
    return Rounded(codes.to(dtype), scale.to(SCALE_DTYPE), None)


def check_packed_rows(
    m: int, n: int, k: int, form: Format, dtype: torch.dtype
) -> Callable[[torch.device], Pairs]:
    """Rows against all columns; the last of them once more, beside others."""

    def run(device: torch.device) -> Pairs:
        # Weights before x: they must not be written by the launch right before.
        rounded = packed(n, k, form, device)
        x = random(m, k, device=device, dtype=dtype)
        y = packed_rows(x, rounded, form.bits)
        others = torch.cat((-2 * x[:-1], x[-1:]))
        again = packed_rows(others, rounded, form.bits)[-1]
        codes, scale, zero = rounded
        there = Rounded(codes.cpu(), scale.cpu(), None if zero is None else zero.cpu())
        return [
            (y, product_ref(x.cpu(), there, form.bits)),
            # To the last bit, or infinitely far: the limit is for rounding.
            (torch.where(again == y[-1], again, torch.inf), y[-1]),
        ]

    return run


def packed_case(order: int, m: int, n: int, k: int, form: Format) -> Case:
    """W read once, packed; cuBLAS reads what it stands for, in bf16."""

    def build(device: torch.device) -> Mapping[str, Run]:
        rounded, x = packed(n, k, form, device), random(m, k, device=device)
        weight = dense(rounded, form.bits, k, x.dtype)
        return {
            "triton": lambda: packed_rows(x, rounded, form.bits),
            "cublas": lambda: F.linear(x, weight),
        }

    read = [t for t in packed(n, k, form, torch.device("meta")) if t is not None]
    return Case(name=f"{m} rows {n}x{k} {form}", order=order,
                moved_bytes=bytes_of(*read) + 2 * m * (n + k), flops=2 * m * n * k,
                build=build)  # fmt: skip


OPS = (
    Op(
        name="packed_rows",
        checks=[
            Check(name=f"{m} rows {n}x{k} {form} {str(dtype)[6:]}", limit=BF16_LIMIT,
                  run=check_packed_rows(m, n, k, form, dtype))
            for m, n, k, form, dtype in (
                (2, 129, 200, INT4, torch.bfloat16), (1, 1000, 2048, INT4, torch.bfloat16),
                (16, 515, 5504, INT4, torch.bfloat16), (64, 134, 2056, INT4, torch.bfloat16),
                (8, 3000, 520, INT4, torch.float16), (5, 67, 488, Format(4, 32), torch.bfloat16),
                (32, 300, 1096, Format(4, 128), torch.float16),
                (1, 515, 2056, Format(4, 128), torch.bfloat16),
                (3, 130, 1032, Format(2, 64), torch.bfloat16),
                (17, 67, 488, Format(2, 32), torch.float16),
                (8, 300, 2048, Format(2, 32), torch.bfloat16),
                (9, 129, 1032, Format(2, 128), torch.bfloat16),
                (1, 1000, 2048, INT8, torch.bfloat16), (40, 129, 1032, INT8, torch.float16),
                (1, 515, 2048, FP8, torch.bfloat16), (16, 130, 1032, FP8, torch.float16),
            )
        ],
        cases=[
            # The matrices of a 1b and of an 8b model.
            packed_case(order, m, n, k, form)
            for order, n, k in ((0, 11008, 2048), (1, 4096, 14336), (1, 128256, 2048))
            for form in (INT4, INT8)
            for m in (1, 8, 64)
        ],
    ),
)  # fmt: skip
