"""Products of one row with a matrix on a device, beside cuBLAS."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from eval.gpu.case import Case, Check, Op, Run
from eval.gpu.ops.operands import on_cpu, random
from kernels.gemv import gemv, gemv_ref

BF16_LIMIT = 8e-3
Pairs = Sequence[tuple[Tensor, Tensor]]


def check_gemv(n: int, k: int, dtype: torch.dtype) -> Callable[[torch.device], Pairs]:
    """One row against all columns."""

    def run(device: torch.device) -> Pairs:
        x = random(1, 1, k, device=device, dtype=dtype)
        weight = random(n, k, device=device, dtype=dtype)
        return [(gemv(x, weight), gemv_ref(*on_cpu(x, weight)))]

    return run


def gemv_case(order: int, n: int, k: int) -> Case:
    """W read once, in bf16."""

    def build(device: torch.device) -> Mapping[str, Run]:
        x, weight = random(1, k, device=device), random(n, k, device=device, scale=k**-0.5)
        return {"triton": lambda: gemv(x, weight), "cublas": lambda: F.linear(x, weight)}

    return Case(name=f"{n}x{k} bf16", order=order, moved_bytes=2 * (n * k + n + k),
                flops=2 * n * k, build=build)  # fmt: skip


OPS = (
    Op(
        name="gemv",
        checks=[
            Check(name=f"{n}x{k} {str(dtype)[6:]}", limit=BF16_LIMIT, run=check_gemv(n, k, dtype))
            for n, k, dtype in (
                (129, 200, torch.bfloat16), (67, 488, torch.float16), (1000, 2048, torch.bfloat16),
                (515, 5504, torch.bfloat16), (64, 1024, torch.float32),
            )
        ],
        cases=[
            # The matrices of a 1b and of an 8b model.
            *(gemv_case(0, n, k) for n, k in ((11008, 2048), (128256, 2048))),
            *(gemv_case(1, n, k) for n, k in (
                (3072, 2048), (2048, 2048), (2048, 5504), (6144, 4096), (4096, 4096),
                (28672, 4096), (4096, 14336))),
        ],
    ),
)  # fmt: skip
