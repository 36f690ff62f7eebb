"""Products with weights of a few bits, by backend: each packed byte is read once.

Our own kernel reads the codes of up to 64 rows as they are stored (`kernels.quant.packed_rows`). On
a CPU torch's packed products read them: int8 as it is stored, 4 bits in an order of its own
(`for_cpu`), both with bfloat16 rows. What no product reads packed (3 bits, on a CPU also 2 bits,
float8 and sizes that are no multiples of 16; rows of other dtypes; many rows) is made dense first.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from archs.backends import everywhere
from kernels.quant.torch import SCALE_DTYPE, Rounded, dense, int8_rows, unpack

#: Rows of the matrix that torch's 4-bit product takes at once, and groups that it knows.
CPU_ROWS = 16
CPU_GROUPS = (32, 64, 128, 256)
#: Columns that its int8 product takes at once: with others it reads past a row's end.
CPU_COLUMNS = 16
#: Rows that torch's int8 product of int8 rows takes at least on a GPU.
CUDA_ROWS = 17
#: Rows of x from which making an int8 matrix dense first is faster than torch's packed product: the
#: two take as long for 32 rows, the packed one 1.4 times as long for 64 (two threads, AVX-512).
MANY_ROWS = 48


def packed_product(x: Tensor, rounded: Rounded, bits: int, columns: int, *, backend: str) -> Tensor:
    """x Wᵀ of W as `Rounded` stores it. x: [..., K] of K `columns` -> [..., N], in x's dtype."""
    return _PACKED[backend](x, rounded, bits, columns)


def _packed_torch(x: Tensor, rounded: Rounded, bits: int, columns: int) -> Tensor:
    codes = rounded.codes
    if (
        codes.dtype == torch.int8 and x.dtype == SCALE_DTYPE and not x.is_cuda
        and columns % CPU_COLUMNS == 0 and x.numel() < MANY_ROWS * columns
    ):  # fmt: skip
        rows = x.reshape(-1, columns).contiguous()
        y = torch._weight_int8pack_mm(rows, codes, rounded.scale.view(-1))
        return y.view(*x.shape[:-1], -1)
    return F.linear(x, dense(rounded, bits, columns, x.dtype))


def _packed_triton(x: Tensor, rounded: Rounded, bits: int, columns: int) -> Tensor:
    from kernels.quant import packed_rows

    if packed_rows.serves(x, rounded, bits):
        return packed_rows.packed_rows(x, rounded, bits)
    return F.linear(x, dense(rounded, bits, columns, x.dtype))


_PACKED = everywhere("packed product", _packed_torch, _packed_triton)


def int8_product(x: Tensor, rounded: Rounded, *, backend: str) -> Tensor:
    """x Wᵀ with rows of x as int8, too, each by a scale of its own, and sums in int32.

    x: [..., K]; W: int8, by rows -> [..., N], in x's dtype. The same in every dtype but for the
    rounding of its result.
    """
    return _INT8[backend](x, rounded)


def _int8_torch(x: Tensor, rounded: Rounded) -> Tensor:
    codes, scale = int8_rows(x.reshape(-1, x.shape[-1]))
    sums = _int_sums(codes, rounded.codes).to(scale.dtype)
    return (sums * scale * rounded.scale.view(-1)).to(x.dtype).view(*x.shape[:-1], -1)


def _int_sums(codes: Tensor, weight: Tensor) -> Tensor:
    """int32 [M, N] of int8 [M, K] and [N, K]."""
    if not codes.is_cuda:
        return torch._int_mm(codes, weight.t())
    # The library's product on a GPU takes more than 16 rows, and multiples of 8 else.
    rows = F.pad(codes, (0, 0, 0, max(0, CUDA_ROWS - len(codes))))
    return torch._int_mm(rows, weight.t())[: len(codes)]


_INT8 = everywhere("int8 product", _int8_torch, _int8_torch)


def cpu_takes(rounded: Rounded, bits: int, dtype: torch.dtype) -> bool:
    """Whether torch's 4-bit product on a CPU takes this matrix, with rows of `dtype`."""
    codes, scale, _ = rounded
    group = 2 * codes.shape[1] // scale.shape[1] if bits == 4 else 0
    on_cpu = codes.device.type == "cpu" and dtype == SCALE_DTYPE
    return on_cpu and group in CPU_GROUPS and codes.shape[0] % CPU_ROWS == 0


def for_cpu(rounded: Rounded) -> tuple[Tensor, Tensor]:
    """Codes of 4 bits in the order of torch's product on this CPU, and its scales and zero points,
    [K' / group, N, 2]; as many bytes as before.
    """
    codes, scale, zero = rounded
    assert zero is not None
    ordered = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack(codes, 4).int(), 1)
    return ordered, torch.stack((scale.t(), zero.t()), -1).contiguous()


def cpu_product(x: Tensor, ordered: Tensor, scales: Tensor) -> Tensor:
    """x Wᵀ of what `for_cpu` gave. x: bfloat16 [..., K] -> [..., N], sums in float32."""
    group = 2 * ordered.shape[1] // scales.shape[0]
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    short = 2 * ordered.shape[1] - rows.shape[1]
    if short:
        rows = F.pad(rows, (0, short))
    y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, ordered, group, scales)
    return y.view(*x.shape[:-1], -1)


def from_cpu(ordered: Tensor, scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 to 15 [N, K'], scales and zero points [N, K' / group] of what `for_cpu` gave.

    The order of the codes is torch's secret: its product with the identity tells them.
    """
    scale, zero = scales.unbind(-1)
    exact = torch.stack((torch.ones_like(scale), torch.zeros_like(zero)), -1)
    columns = 2 * ordered.shape[1]
    identity = torch.eye(columns, dtype=SCALE_DTYPE)
    steps = cpu_product(identity, ordered, exact)
    return (steps.t() + 8).to(torch.uint8), scale.t(), zero.t()
