"""Norms, gates, rotary positions, page writes, convolution and sampling on a device."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from eval.proof.gpu.case import Case, Check, Op, Run
from eval.proof.gpu.ops import grouped
from eval.proof.gpu.ops.operands import PAGE, angles, binary, on_cpu, paged, random
from kernels.conv import chunk as conv_chunk
from kernels.latent import append as latent_append
from kernels.norm import rows as norm_triton
from kernels.pages import write as page_write
from kernels.rope import append as rope_append
from kernels.rope import rotate as rope_rotate
from kernels.sampling import sample

BF16_LIMIT = 8e-3
#: A number beside a half may get either code.
CODE_LIMIT = 2e-2
EPS = 1e-5
Pairs = Sequence[tuple[Tensor, Tensor]]


def _gradients(
    run: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: list[Tensor]
) -> Pairs:
    leaves = [t.detach().requires_grad_() for t in inputs]
    wide = [t.detach().cpu().double().requires_grad_() for t in inputs]
    y, expected = run(*leaves), reference(*wide)
    grad = torch.randn_like(y)
    got = torch.autograd.grad(y, leaves, grad)
    true = torch.autograd.grad(expected, wide, grad.cpu().double())
    return [(y, expected), *zip(got, true, strict=True)]


def check_norm(dim: int) -> Callable[[torch.device], Pairs]:
    """RMSNorm, with a residual, and gated in both orders; gradients of all but the residual's."""

    def run(device: torch.device) -> Pairs:
        x, gate = (random(7, 3, dim, device=device) for _ in range(2))
        weight = torch.rand(dim, device=device) + 0.5
        pairs = list(
            _gradients(
                lambda x, w: norm_triton.rms_norm(x, w, EPS),
                lambda x, w: norm_triton.norm_ref(x, w, EPS), [x, weight],
            )
        )  # fmt: skip
        for first in (True, False):
            pairs += _gradients(
                lambda x, z, w, first=first: norm_triton.gated_rms_norm(
                    x, z, w, EPS, gate_first=first
                ),
                lambda x, z, w, first=first: norm_triton.norm_ref(x, w, EPS, z, gate_first=first),
                [x, gate, weight],
            )
        normed, total = norm_triton.add_rms_norm(x, gate, weight, EPS)
        expected = x + gate
        pairs += [(total, expected), (normed, norm_triton.norm_ref(expected, weight, EPS))]
        return pairs

    return run


def check_swiglu(device: torch.device) -> Pairs:
    """Values and gradients."""
    x = random(5, 3, 2 * 1536, device=device)
    return _gradients(norm_triton.swiglu, norm_triton.swiglu_ref, [x])


def norm_case(rows: int, dim: int) -> Case:
    """RMSNorm of x + residual."""

    def build(device: torch.device) -> Mapping[str, Run]:
        x, residual = (random(rows, dim, device=device) for _ in range(2))
        weight = random(dim, device=device)

        def by_torch() -> tuple[Tensor, Tensor]:
            total = x + residual
            return F.rms_norm(total, (dim,), weight, EPS), total

        return {
            "triton": lambda: norm_triton.add_rms_norm(x, residual, weight, EPS),
            "torch": by_torch,
        }

    return Case(name=f"add, norm {rows} rows of {dim} bf16", order=3, moved_bytes=8 * rows * dim,
                flops=5 * rows * dim, build=build)  # fmt: skip


def swiglu_case(rows: int, hidden: int) -> Case:
    """The MLP's gate."""

    def build(device: torch.device) -> Mapping[str, Run]:
        x = random(rows, 2 * hidden, device=device)

        def by_torch() -> Tensor:
            gate, up = x.chunk(2, -1)
            return F.silu(gate) * up

        return {"triton": lambda: norm_triton.swiglu(x), "torch": by_torch}

    return Case(name=f"swiglu {rows} rows of {hidden} bf16", order=3,
                moved_bytes=6 * rows * hidden, flops=5 * rows * hidden, build=build)  # fmt: skip


def check_rope(device: torch.device) -> Pairs:
    """Queries and keys turned, keys and values in their pages."""
    past = [0, 70, 129]
    table, lengths, pages = paged([n + 3 for n in past], device)
    before = lengths - 3
    qkv, cos_sin = random(3, 3, 12, 64, device=device), angles(256, 64, device)
    k, v = torch.zeros(2, 2, pages * PAGE, 64, dtype=torch.bfloat16, device=device)
    expected = rope_append.rope_append_ref(
        *on_cpu(qkv, cos_sin, k, v, table, before), heads=8, kv_heads=2, page_size=PAGE
    )
    rope_append.rope_append(qkv, cos_sin, k, v, table, before, heads=8, kv_heads=2, page_size=PAGE)
    return list(zip((qkv, k, v), expected, strict=True))


def check_rotate(device: torch.device) -> Pairs:
    """Heads of a wider projection, turned in place."""
    x = random(3, 2, 9 * 64 + 16, device=device)[..., 8 : 8 + 9 * 64].unflatten(-1, (9, 64))
    cos_sin = angles(256, 64, device)
    past = torch.tensor([0, 70, 129], dtype=torch.int32, device=device)
    expected = rope_rotate.rope_rotate_ref(*on_cpu(x, cos_sin, past))
    return [(rope_rotate.rope_rotate(x, cos_sin, past), expected)]


def check_latent(heads: int, rank: int, rope: int) -> Callable[[torch.device], Pairs]:
    """Latents normed, keys and queries turned, rows in their pages."""

    def run(device: torch.device) -> Pairs:
        table, lengths, pages = paged([3, 73, 132], device)
        before, cos_sin = lengths - 3, angles(256, rope, device)
        q = random(3, 3, heads, rope, device=device)
        key, latent = random(3, 3, rope + rank, device=device).split((rope, rank), -1)
        weight = random(rank, device=device)
        pool = torch.zeros(pages * PAGE, rank + rope, dtype=torch.bfloat16, device=device)
        given = q, key, latent, weight, cos_sin, pool, table, before
        expected = latent_append.latent_append_ref(*on_cpu(*given), eps=EPS, page_size=PAGE)
        latent_append.latent_append(*given, eps=EPS, page_size=PAGE)
        return list(zip((q, pool), expected, strict=True))

    return run


def check_page_write(device: torch.device) -> Pairs:
    """Rows of an odd width into shuffled pages."""
    table, lengths, pages = paged([5, 70], device)
    rows, before = random(2, 4, 576, device=device), lengths - 4
    pool = torch.zeros(pages * PAGE, 576, dtype=torch.bfloat16, device=device)
    expected = page_write.page_write_ref(*on_cpu(rows, pool, table, before), page_size=PAGE)
    page_write.page_write(rows, pool, table, before, page_size=PAGE)
    return [(pool, expected)]


def check_code_write(dtype: torch.dtype) -> Callable[[torch.device], Pairs]:
    """Keys and values of 3 heads as 8-bit codes: what they stand for, and their scales."""

    def run(device: torch.device) -> Pairs:
        table, lengths, pages = paged([5, 70], device)
        rows, before = random(2, 4, 2, 3, 128, device=device), lengths - 4
        pool = torch.zeros(2, 3, pages * PAGE, 128, dtype=dtype, device=device)
        scales = torch.zeros(pool.shape[:-1], device=device)
        at = on_cpu(table, before)
        codes, by = page_write.coded_ref(rows.cpu(), dtype)
        held = page_write.page_write_ref(codes, pool.cpu(), *at, page_size=PAGE)
        kept = page_write.page_write_ref(by, scales.cpu()[..., None], *at, page_size=PAGE)
        page_write.page_write(rows, pool, table, before, page_size=PAGE, scales=scales)
        read = pool.float() * scales[..., None]
        return [(read, held.double() * kept.double()), (scales, kept[..., 0].double())]

    return run


def check_conv(device: torch.device) -> Pairs:
    """A long causal convolution and its gradients."""
    x, weight = random(2, 130, 160, device=device), random(160, 4, device=device)
    bias = random(160, device=device)
    return _gradients(
        conv_chunk.causal_conv, lambda x, w, b: conv_chunk.causal_conv_ref(x, w, b, None),
        [x, weight, bias],
    )  # fmt: skip


def check_sample(rows: int, vocab: int) -> Callable[[torch.device], Pairs]:
    """Greedy tokens and those of a nucleus, as numbers: equal or wrong."""

    def run(device: torch.device) -> Pairs:
        logits = random(rows, vocab, device=device, dtype=torch.float32, scale=3.0)
        uniform = torch.rand(rows, device=device)
        held, drawn = on_cpu(logits, uniform)
        options = {"temperature": 0.8, "top_p": 0.9}
        return [
            (sample.greedy(logits).double(), sample.greedy_ref(held).double()),
            (
                sample.top_p(logits, uniform, **options).double(),
                sample.top_p_ref(held, drawn, **options).double(),
            ),
        ]

    return run


def greedy_case(rows: int, vocab: int) -> Case:
    """The most likely token."""

    def build(device: torch.device) -> Mapping[str, Run]:
        logits = random(rows, vocab, device=device)
        # One winner: which of several equal ones is taken is nobody's contract.
        winner = torch.randint(vocab, (rows, 1), device=device)
        logits.scatter_(1, winner, 32.0)
        return {"triton": lambda: sample.greedy(logits), "torch": lambda: logits.argmax(-1)}

    return Case(name=f"greedy {rows} rows of {binary(vocab)} bf16", order=3,
                moved_bytes=2 * rows * vocab, flops=rows * vocab, build=build)  # fmt: skip


OPS = (
    Op(
        name="norm_triton",
        checks=[
            *(Check(name=f"norms of {d}", run=check_norm(d), limit=BF16_LIMIT)
              for d in (64, 1000, 4096)),
            Check(name="swiglu", run=check_swiglu, limit=BF16_LIMIT),
        ],
        cases=[norm_case(1, 4096), norm_case(4096, 4096), swiglu_case(4096, 14336)],
    ),
    Op(name="rope_append", checks=[Check(name="3 tokens", run=check_rope, limit=BF16_LIMIT)]),
    Op(name="rope_rotate", checks=[Check(name="2 tokens", run=check_rotate, limit=BF16_LIMIT)]),
    Op(name="latent_append",
       checks=[Check(name=f"{heads} heads {rank}+{rope}", limit=BF16_LIMIT,
                     run=check_latent(heads, rank, rope))
               for heads, rank, rope in ((8, 96, 16), (32, 256, 32), (128, 512, 64))]
       + grouped.APPENDED),
    Op(name="page_write", checks=[
        Check(name="4 tokens", run=check_page_write, limit=BF16_LIMIT),
        Check(name="4 tokens in int8", run=check_code_write(torch.int8), limit=CODE_LIMIT),
        Check(name="4 tokens in fp8", run=check_code_write(torch.float8_e4m3fn), limit=CODE_LIMIT),
    ]),
    Op(name="conv_chunk", checks=[Check(name="130 tokens", run=check_conv, limit=BF16_LIMIT)]),
    Op(name="sample",
       checks=[Check(name=f"{rows} rows of {vocab}", run=check_sample(rows, vocab), limit=0.0)
               for rows, vocab in ((9, 1000), (3, 128256))],
       cases=[greedy_case(64, 128256), greedy_case(1, 128256)]),
)  # fmt: skip
