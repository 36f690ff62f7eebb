"""Products of one row, and of a few, with a matrix on a device, beside cuBLAS."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from eval.proof.gpu.case import Case, Check, Op, Run
from eval.proof.gpu.ops.operands import PAGE, angles, on_cpu, paged, random
from kernels.products.few_rows import few_rows, few_rows_ref
from kernels.products.gemv import gemv, gemv_ref, norm_gemv, norm_gemv_ref
from kernels.products.head_gemv import head_gemv, head_gemv_ref
from kernels.products.project_append import project_append, project_append_ref
from kernels.rope.torch import rotate

BF16_LIMIT = 8e-3
EPS = 1e-5
Pairs = Sequence[tuple[Tensor, Tensor]]


def check_gemv(n: int, k: int, dtype: torch.dtype) -> Callable[[torch.device], Pairs]:
    """One row against all columns."""

    def run(device: torch.device) -> Pairs:
        # Weights before x: they must not be written by the launch right before.
        weight = random(n, k, device=device, dtype=dtype)
        x = random(1, 1, k, device=device, dtype=dtype)
        return [(gemv(x, weight), gemv_ref(*on_cpu(x, weight)))]

    return run


def check_norm_gemv(n: int, k: int, *, gated: bool) -> Callable[[torch.device], Pairs]:
    """The sum of two rows, normed, against all columns; the sum alone, too."""

    def run(device: torch.device) -> Pairs:
        scale, weight = random(k, device=device), random(n, k, device=device, scale=k**-0.5)
        x, residual = (random(1, 1, k, device=device) for _ in range(2))
        there = on_cpu(x, residual, scale, weight)
        got = norm_gemv(x, residual, scale, weight, eps=EPS, gated=gated)
        pairs = list(zip(got, norm_gemv_ref(*there, eps=EPS, gated=gated), strict=True))
        got = norm_gemv(x, None, scale, weight, eps=EPS, gated=gated)
        expected = norm_gemv_ref(there[0], None, *there[2:], eps=EPS, gated=gated)
        return [*pairs, *zip(got, expected, strict=True)]

    return run


def check_project_append(
    heads: int, groups: int, dim: int, k: int
) -> Callable[[torch.device], Pairs]:
    """One token behind 130 others: its queries, the sum, and both pools."""

    def run(device: torch.device) -> Pairs:
        given = _token(heads, groups, dim, k, 130, device)
        expected = project_append_ref(*on_cpu(*given), eps=EPS, page_size=PAGE)
        found = project_append(*given, eps=EPS, page_size=PAGE)
        return list(zip((*found, *given[5:7]), expected, strict=True))

    return run


def _token(
    heads: int, groups: int, dim: int, k: int, past: int, device: torch.device
) -> tuple[Tensor, ...]:
    """Operands of `project_append`."""
    table, lengths, pages = paged([past + 1], device)
    x, residual = (random(1, 1, k, device=device) for _ in range(2))
    weight = random((heads + 2 * groups) * dim, k, device=device, scale=k**-0.5)
    pools = torch.zeros(2, groups, pages * PAGE, dim, dtype=x.dtype, device=device)
    turns = angles(past + 64, dim, device)
    return x, residual, random(k, device=device), weight, turns, *pools, table, lengths - 1


def normed_case(order: int, hidden: int, k: int) -> Case:
    """The way into an MLP: sum, norm, gate and up projections, SwiGLU."""

    def build(device: torch.device) -> Mapping[str, Run]:
        x, residual, scale = (random(1, k, device=device) for _ in range(3))
        weight, norm = random(2 * hidden, k, device=device, scale=k**-0.5), scale[0]

        def by_cublas() -> Tensor:
            gate, up = F.linear(F.rms_norm(x + residual, (k,), norm, EPS), weight).chunk(2, -1)
            return F.silu(gate) * up

        return {
            "triton": lambda: norm_gemv(x, residual, norm, weight, eps=EPS, gated=True)[0],
            "cublas": by_cublas,
        }

    return Case(name=f"{2 * hidden}x{k} bf16 normed gated", order=order,
                moved_bytes=2 * (2 * hidden * k + hidden + 4 * k),
                flops=4 * hidden * k, build=build)  # fmt: skip


def project_case(order: int, heads: int, groups: int, dim: int, k: int) -> Case:
    """The way into attention: sum, norm, projection, rotation, paged write."""

    def build(device: torch.device) -> Mapping[str, Run]:
        given = _token(heads, groups, dim, k, 4000, device)
        x, residual, norm, weight, turns, k_pool, v_pool, table, past = given
        row = table[0, past.long() // PAGE] * PAGE + past % PAGE
        turn = torch.view_as_complex(turns)[past.long()][:, None]

        def by_cublas() -> Tensor:
            qkv = F.linear(F.rms_norm(x + residual, (k,), norm, EPS), weight).view(1, 1, -1, dim)
            rotate(qkv[..., : heads + groups, :], turn)
            for pool, first in ((k_pool, heads), (v_pool, heads + groups)):
                pool.index_copy_(1, row.long(), qkv[0, :, first : first + groups].transpose(0, 1))
            return qkv[..., :heads, :]

        def ours() -> Tensor:
            return project_append(*given, eps=EPS, page_size=PAGE)[0]

        return {"triton": ours, "cublas": by_cublas}

    rows = (heads + 2 * groups) * dim
    return Case(name=f"{heads}/{groups} heads d {dim} of {k} bf16", order=order,
                moved_bytes=2 * (rows * k + rows + 4 * k), flops=2 * rows * k,
                build=build)  # fmt: skip


def check_head_gemv(
    heads: int, dim: int, width: int, *, turned: bool
) -> Callable[[torch.device], Pairs]:
    """Every head by its matrix, whichever way that lies."""

    def run(device: torch.device) -> Pairs:
        weight = random(heads, dim, width, device=device, scale=dim**-0.5)
        if turned:
            weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
        x = random(1, 1, heads, dim, device=device)
        return [(head_gemv(x, weight), head_gemv_ref(*on_cpu(x, weight)))]

    return run


def head_gemv_case(order: int, heads: int, dim: int, width: int, *, turned: bool) -> Case:
    """Queries into the latent space, or results out of it."""

    def build(device: torch.device) -> Mapping[str, Run]:
        weight = random(heads, dim, width, device=device, scale=dim**-0.5)
        if turned:
            weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
        x = random(1, 1, heads, dim, device=device)

        def by_cublas() -> Tensor:
            return torch.bmm(x[0].transpose(0, 1), weight).transpose(0, 1)[None]

        return {"triton": lambda: head_gemv(x, weight), "cublas": by_cublas}

    size = heads * (dim * width + dim + width)
    return Case(name=f"{heads} heads {dim} to {width} bf16", order=order, moved_bytes=2 * size,
                flops=2 * heads * dim * width, build=build)  # fmt: skip


def gemv_case(order: int, n: int, k: int) -> Case:
    """W read once, in bf16."""

    def build(device: torch.device) -> Mapping[str, Run]:
        x, weight = random(1, k, device=device), random(n, k, device=device, scale=k**-0.5)
        return {"triton": lambda: gemv(x, weight), "cublas": lambda: F.linear(x, weight)}

    return Case(name=f"{n}x{k} bf16", order=order, moved_bytes=2 * (n * k + n + k),
                flops=2 * n * k, build=build)  # fmt: skip


def check_few_rows(
    m: int, n: int, k: int, dtype: torch.dtype, gated: bool
) -> Callable[[torch.device], Pairs]:
    """Rows against all columns; the last of them once more, alone beside another."""

    def run(device: torch.device) -> Pairs:
        x = random(m, k, device=device, dtype=dtype)
        weight = random(n, k, device=device, dtype=dtype, scale=k**-0.5)
        y = few_rows(x, weight, gated=gated)
        again = few_rows(torch.stack((-2 * x[-1], x[-1])), weight, gated=gated)[1]
        return [
            (y, few_rows_ref(*on_cpu(x, weight), gated=gated)),
            # To the last bit, or infinitely far: the limit is for rounding.
            (torch.where(again == y[-1], again, torch.inf), y[-1]),
        ]

    return run


def few_rows_case(order: int, m: int, n: int, k: int, *, gated: bool = False) -> Case:
    """W read once, in bf16; gated: cuBLAS, then silu(gate) · up."""
    width = n // 2 if gated else n

    def build(device: torch.device) -> Mapping[str, Run]:
        x, weight = random(m, k, device=device), random(n, k, device=device, scale=k**-0.5)

        def cublas() -> Tensor:
            y = F.linear(x, weight)
            return F.silu(y[:, :width]) * y[:, width:] if gated else y

        return {"triton": lambda: few_rows(x, weight, gated=gated), "cublas": cublas}

    return Case(name=f"{m} rows {n}x{k} bf16" + (" gated" if gated else ""), order=order,
                moved_bytes=2 * (n * k + m * width + m * k), flops=2 * m * n * k,
                build=build)  # fmt: skip


OPS = (
    Op(
        name="gemv",
        checks=[
            Check(name=f"{n}x{k} {str(dtype)[6:]}", limit=BF16_LIMIT, run=check_gemv(n, k, dtype))
            for n, k, dtype in (
                (129, 200, torch.bfloat16), (67, 488, torch.float16), (1000, 2048, torch.bfloat16),
                (515, 5504, torch.bfloat16), (64, 1024, torch.float32),
            )
        ] + [
            Check(name=f"{n}x{k} normed{' gated' * gated}", limit=BF16_LIMIT,
                  run=check_norm_gemv(n, k, gated=gated))
            for n, k, gated in ((70, 200, True), (96, 2048, True), (33, 4096, False))
        ],
        cases=[
            *(normed_case(0, *size) for size in ((5504, 2048), (14336, 4096))),
            # The matrices of a 1b and of an 8b model.
            *(gemv_case(0, n, k) for n, k in ((11008, 2048), (128256, 2048))),
            *(gemv_case(1, n, k) for n, k in (
                (3072, 2048), (2048, 2048), (2048, 5504), (6144, 4096), (4096, 4096),
                (28672, 4096), (4096, 14336))),
        ],
    ),
    Op(
        name="head_gemv",
        checks=[
            Check(name=f"{heads} heads {dim} to {width}{' turned' * turned}", limit=BF16_LIMIT,
                  run=check_head_gemv(heads, dim, width, turned=turned))
            for heads, dim, width, turned in (
                (3, 40, 200, False), (32, 64, 256, False), (32, 256, 64, True), (5, 600, 24, True))
        ],
        cases=[
            head_gemv_case(1, 32, 64, 256, turned=False),
            head_gemv_case(1, 32, 256, 64, turned=True),
        ],
    ),
    Op(
        name="project_append",
        checks=[
            Check(name="{}/{} heads d {} of {}".format(*size), limit=BF16_LIMIT,
                  run=check_project_append(*size))
            for size in ((4, 2, 32, 200), (32, 8, 64, 2048), (32, 1, 64, 2048), (32, 8, 128, 4096))
        ],
        cases=[project_case(0, 32, 8, 64, 2048), project_case(1, 32, 8, 128, 4096)],
    ),
    Op(
        name="few_rows",
        checks=[
            Check(name=f"{m} rows {n}x{k} {str(dtype)[6:]}" + (" gated" if gated else ""),
                  limit=BF16_LIMIT, run=check_few_rows(m, n, k, dtype, gated))
            for m, n, k, dtype, gated in (
                (2, 129, 200, torch.bfloat16, False), (5, 67, 488, torch.float16, False),
                (8, 3000, 2056, torch.bfloat16, False), (16, 515, 5504, torch.bfloat16, False),
                (3, 4100, 1032, torch.bfloat16, False), (8, 16500, 520, torch.float16, False),
                (16, 134, 520, torch.bfloat16, True), (5, 4102, 1032, torch.bfloat16, True),
                (8, 11008, 264, torch.float16, True), (2, 16486, 264, torch.bfloat16, True),
            )
        ],
        cases=[
            # The matrices of a 1b and of an 8b model.
            *(few_rows_case(0, 8, n, k) for n, k in ((11008, 2048), (2048, 2048))),
            few_rows_case(0, 8, 11008, 2048, gated=True),
            *(few_rows_case(1, 8, n, k) for n, k in (
                (3072, 2048), (2048, 5504), (128256, 2048), (6144, 4096), (4096, 4096),
                (28672, 4096), (4096, 14336))),
            few_rows_case(1, 8, 28672, 4096, gated=True),
            *(few_rows_case(1, 16, n, k) for n, k in ((11008, 2048), (4096, 4096))),
        ],
    ),
)  # fmt: skip
