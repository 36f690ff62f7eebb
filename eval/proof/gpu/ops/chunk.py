"""Chunked scans on a device, forward and backward, beside fla and mamba-ssm."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from eval.proof.gpu.case import Case, Check, Op, Run, installed, lazily
from eval.proof.gpu.ops.operands import binary, bytes_of, random
from kernels.decay import torch as decay_scan
from kernels.decay.chunk import decay_chunk
from kernels.gated_delta import torch as gdn
from kernels.gated_delta.channel_chunk import kda_chunk
from kernels.gated_delta.chunk import gdn_chunk
from kernels.selective import torch as selective_scan
from kernels.selective.chunk import selective_scan as selective_chunk

#: bf16 inputs with float32 sums; gradients pass through two such products.
LIMITS = {"forward": 8e-3, "backward": 2e-2}
CHUNK = 64
Pairs = Sequence[tuple[Tensor, Tensor]]
Scan = Callable[..., tuple[Tensor, Tensor]]
Make = Callable[[int, int, tuple[int, ...], torch.device], list[Tensor]]
#: The forward pass from our inputs, and the tensors whose gradients are taken, in our order
#: where they are the same.
Pass = tuple[Callable[[], Tensor], list[Tensor]]
Library = Callable[[list[Tensor]], Pass]


def decay_inputs(b: int, t: int, sizes: tuple[int, ...], device: torch.device) -> list[Tensor]:
    """q, k, v, log decay: sizes are G, H, N, P."""
    g, h, n, p = sizes
    return [
        random(b, t, g, n, device=device, scale=n**-0.5), random(b, t, g, n, device=device),
        random(b, t, h, p, device=device), -torch.rand(b, t, h, device=device) / 8,
    ]  # fmt: skip


def gdn_inputs(b: int, t: int, sizes: tuple[int, ...], device: torch.device) -> list[Tensor]:
    """Normalised q and k, v, log decay, strength: sizes are G, H, N, P."""
    g, h, n, p = sizes
    q, k = (F.normalize(random(b, t, g, n, device=device).float(), dim=-1) for _ in range(2))
    return [
        (q * n**-0.5).bfloat16(), k.bfloat16(), random(b, t, h, p, device=device),
        -torch.rand(b, t, h, device=device) / 8, torch.rand(b, t, h, device=device).bfloat16(),
    ]  # fmt: skip


def kda_inputs(b: int, t: int, sizes: tuple[int, ...], device: torch.device) -> list[Tensor]:
    """As `gdn_inputs`, decays by key channel."""
    q, k, v, _, beta = gdn_inputs(b, t, sizes, device)
    return [q, k, v, -torch.rand(b, t, *sizes[1:3], device=device) / 8, beta]


def gdn2_inputs(b: int, t: int, sizes: tuple[int, ...], device: torch.device) -> list[Tensor]:
    """As `kda_inputs`, strengths by channel, too."""
    *inputs, _ = kda_inputs(b, t, sizes, device)
    return [*inputs, torch.rand(b, t, *sizes[1:3], device=device).bfloat16()]


def selective_inputs(b: int, t: int, sizes: tuple[int, ...], device: torch.device) -> list[Tensor]:
    """x, step, A, B, C, D: sizes are E, N."""
    width, n = sizes
    a = -torch.arange(1.0, n + 1, device=device).expand(width, n).contiguous()
    return [
        random(b, t, width, device=device), torch.rand(b, t, width, device=device) / 8, a,
        random(b, t, n, device=device), random(b, t, n, device=device),
        torch.ones(width, device=device),
    ]  # fmt: skip


def check_scan(
    scan: Scan, reference: Scan, make: Make, sizes: tuple[int, ...],
    state: tuple[int, ...], tokens: int,
) -> Callable[[torch.device], Pairs]:  # fmt: skip
    """Outputs and final state from an initial one, and all gradients."""

    def run(device: torch.device) -> Pairs:
        inputs = make(2, tokens, sizes, device)
        inputs.append(random(2, *state, device=device, dtype=torch.float32))
        leaves = [t.detach().requires_grad_() for t in inputs]
        wide = [t.detach().cpu().double().requires_grad_() for t in inputs]
        y, last = scan(*leaves)
        expected, expected_last = reference(*wide)
        grad_y, grad_last = torch.randn_like(y), torch.randn_like(last)
        grads = torch.autograd.grad((y, last), leaves, (grad_y, grad_last))
        expected_grads = torch.autograd.grad(
            (expected, expected_last), wide, (grad_y.cpu().double(), grad_last.cpu().double())
        )
        return [(y, expected), (last, expected_last), *zip(grads, expected_grads, strict=True)]

    return run


def scan_case(
    order: int, scan: Scan, make: Make, sizes: tuple[int, ...], batch: int, tokens: int,
    flops: int, libraries: Mapping[str, Library], *, backward: bool,
) -> Case:  # fmt: skip
    """flops: of the forward pass, per token of a sequence; the backward pass has twice as many.

    libraries: timed in this order; torch, of 10,000 launches and more a pass, comes last.
    Forward reads the inputs and writes y; backward reads the inputs and y's gradient and writes
    the inputs' gradients.
    """

    def build(device: torch.device) -> Mapping[str, Run]:
        inputs = make(batch, tokens, sizes, device)
        grad = torch.randn_like(values_of(inputs))
        passes: dict[str, Library] = {"triton": _of(scan), **libraries}
        return {
            name: lazily(lambda start=start: _run(start, inputs, grad if backward else None))  # type: ignore[misc]
            for name, start in passes.items()
            if installed_or_ours(name)
        }

    def values_of(inputs: list[Tensor]) -> Tensor:
        """x or v: y is as large."""
        return inputs[0 if len(sizes) == 2 else 2]

    inputs = make(batch, tokens, sizes, torch.device("meta"))
    read, made = bytes_of(*inputs), values_of(inputs).nbytes
    passes = "forward and backward" if backward else "forward"
    shape = "x".join(map(str, sizes))
    return Case(
        name=f"{shape} bf16 batch {batch} tokens {binary(tokens)} {passes}", order=order,
        moved_bytes=3 * read + 2 * made if backward else read + made,
        flops=(3 if backward else 1) * batch * tokens * flops, build=build,
        late=tuple(name for name in libraries if installed(name)),
    )  # fmt: skip


def installed_or_ours(name: str) -> bool:
    """Whether a run by that name can be made."""
    return name == "triton" or installed(name)


def _of(scan: Scan) -> Library:
    return lambda inputs: (lambda: scan(*inputs)[0], inputs)


def _run(start: Library, inputs: list[Tensor], grad: Tensor | None) -> Run:
    """The forward pass, or with y's gradient both, on leaves of its own."""
    leaves = [t.detach().requires_grad_(grad is not None) for t in inputs]
    run, wanted = start(leaves)
    if grad is None:
        return run
    return lambda: torch.autograd.grad(run(), wanted, grad)


def _leaf(t: Tensor, like: Tensor) -> Tensor:
    """What a library wants to be given, as an input of its own: making it is not timed."""
    return t.detach().requires_grad_(like.requires_grad)


def _per_head(t: Tensor, heads: int) -> Tensor:
    return _leaf(t.detach().repeat_interleave(heads // t.shape[2], 2), t)


def _fla_decay(inputs: list[Tensor]) -> Pass:
    from fla.ops.simple_gla import chunk_simple_gla

    q, k, v, g = inputs
    q, k = (_per_head(t, v.shape[2]) for t in (q, k))
    return lambda: chunk_simple_gla(q, k, v, g=g, scale=1.0)[0], [q, k, v, g]


def _mamba_decay(inputs: list[Tensor]) -> Pass:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    q, k, v, g = inputs
    # The library multiplies x and A by dt itself: dt carries the decay, A is -1, x is over dt.
    dt = _leaf(-g.detach(), g)
    x = _leaf((v.detach() / dt.detach()[..., None]).to(v.dtype), v)
    rate = -torch.ones(v.shape[2], device=v.device)
    return lambda: mamba_chunk_scan_combined(x, dt, rate, k, q, chunk_size=256), [q, k, dt, x]


def _fla_gdn(inputs: list[Tensor]) -> Pass:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    q, k, v, g, beta = inputs
    q, k = (_per_head(t, v.shape[2]) for t in (q, k))
    leaves = [q, k, v, g, beta]
    return lambda: chunk_gated_delta_rule(q, k, v, g=g, beta=beta, scale=1.0)[0], leaves


def _fla_kda(inputs: list[Tensor]) -> Pass:
    from fla.ops.kda import chunk_kda

    q, k, v, g, beta = inputs
    q, k = (_per_head(t, v.shape[2]) for t in (q, k))
    leaves = [q, k, v, g, beta]
    return lambda: chunk_kda(q, k, v, g=g, beta=beta, scale=1.0)[0], leaves


def _cases(
    scan: Scan, make: Make, shapes: Sequence[tuple[tuple[int, ...], int, int]],
    work: Callable[..., int], libraries: Mapping[str, Library],
) -> list[Case]:  # fmt: skip
    return [
        scan_case(1 if i == 0 else 2, scan, make, sizes, batch, tokens, work(sizes), libraries,
                  backward=backward)
        for i, (sizes, batch, tokens) in enumerate(shapes)
        for backward in (False, True)
    ]  # fmt: skip


def _per_token(count: Callable[..., int]) -> Callable[..., int]:
    """Matrix FLOPs of a token in whole chunks of 64; sizes are G, H, N, P."""

    def work(sizes: tuple[int, ...]) -> int:
        g, h, n, p = sizes
        return count(1, CHUNK, h, g, n, p, CHUNK) // CHUNK

    return work


def selective_work(sizes: tuple[int, ...]) -> int:
    """FLOPs of a token: decay, update and read-out of each element of the state."""
    width, n = sizes
    return 7 * width * n


decay_work = _per_token(decay_scan.decay_chunk_matrix_flops)
gdn_work = _per_token(gdn.gdn_chunk_matrix_flops)
kda_work = _per_token(partial(gdn.gdn_chunk_matrix_flops, by_channel=True))

OPS = (
    Op(
        name="decay_chunk",
        checks=[
            Check(name=f"{'x'.join(map(str, sizes))} tokens {tokens}", limit=LIMITS["backward"],
                  run=check_scan(decay_chunk, decay_scan.decay_ref, decay_inputs, sizes,
                                 (sizes[1], *sizes[2:]), tokens))
            for sizes in ((1, 4, 128, 64), (2, 2, 64, 128), (2, 2, 16, 32), (1, 1, 128, 256))
            for tokens in (1, 65, 150)
        ],
        cases=_cases(
            decay_chunk, decay_inputs,
            [((1, 64, 128, 64), 8, 4096), ((96, 96, 128, 128), 1, 8192)], decay_work,
            {"fla": _fla_decay, "mamba-ssm": _mamba_decay, "torch": _of(decay_scan.decay_chunk)},
        ),
    ),
    Op(
        name="gdn_chunk",
        checks=[
            Check(name=f"{'x'.join(map(str, sizes))} tokens {tokens}", limit=LIMITS["backward"],
                  run=check_scan(gdn_chunk, gdn.gdn_ref, gdn_inputs, sizes, (sizes[1], *sizes[2:]),
                                 tokens))
            for sizes in ((2, 4, 128, 128), (2, 2, 64, 128), (2, 2, 16, 32))
            for tokens in (1, 65, 150)
        ],
        cases=_cases(
            gdn_chunk, gdn_inputs, [((96, 96, 128, 128), 1, 8192), ((16, 16, 128, 128), 8, 4096)],
            gdn_work, {"fla": _fla_gdn, "torch": _of(gdn.gdn_chunk)},
        ),
    ),
    Op(
        name="kda_chunk",
        checks=[
            Check(name=f"{'x'.join(map(str, sizes))} tokens {tokens}", limit=LIMITS["backward"],
                  run=check_scan(kda_chunk, gdn.gdn_ref, kda_inputs, sizes, (sizes[1], *sizes[2:]),
                                 tokens))
            for sizes in ((4, 4, 128, 128), (2, 4, 64, 128), (2, 2, 16, 32))
            for tokens in (1, 65, 150)
        ],
        cases=_cases(
            kda_chunk, kda_inputs, [((96, 96, 128, 128), 1, 8192), ((16, 16, 128, 128), 8, 4096)],
            kda_work, {"fla": _fla_kda, "torch": _of(gdn.gdn_chunk)},
        ),
    ),
    Op(
        name="gdn2_chunk",
        checks=[
            Check(name=f"{'x'.join(map(str, sizes))} tokens {tokens}", limit=LIMITS["backward"],
                  run=check_scan(kda_chunk, gdn.gdn_ref, gdn2_inputs, sizes,
                                 (sizes[1], *sizes[2:]), tokens))
            for sizes in ((4, 4, 128, 128), (2, 4, 64, 128), (2, 2, 16, 32))
            for tokens in (1, 65, 150)
        ],
        cases=_cases(
            kda_chunk, gdn2_inputs, [((16, 16, 128, 128), 8, 4096)], kda_work,
            {"torch": _of(gdn.gdn_chunk)},
        ),
    ),
    Op(
        name="selective_chunk",
        checks=[
            Check(name=f"80x16 tokens {tokens}", limit=LIMITS["backward"],
                  run=check_scan(selective_chunk, selective_scan.selective_scan_ref,
                                 selective_inputs, (80, 16), (80, 16), tokens))
            for tokens in (1, 65, 150)
        ],
        cases=_cases(
            selective_chunk, selective_inputs, [((4096, 16), 8, 2048)], selective_work,
            {"torch": _of(selective_scan.selective_scan)},
        ),
    ),
)  # fmt: skip
