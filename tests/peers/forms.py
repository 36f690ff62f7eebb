"""Our forms of each recurrence under one signature, so that a peer is compared with all at once.

A `Form` is the torch code, or a Triton kernel run in the interpreter: adding one is one entry.
B sequences, T tokens, H heads, G groups, N states or key channels, P value channels, E channels.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.attention import decode as attention_decode
from kernels.attention import prefill as attention_prefill
from kernels.conv import chunk as conv_chunk
from kernels.conv import step as conv_step
from kernels.conv import torch as causal_conv
from kernels.decay import chunk as decay_chunk
from kernels.decay import linear_step, ssm_step
from kernels.decay import torch as decay_scan
from kernels.dplr import torch as dplr
from kernels.gated_delta import channel_chunk as kda_chunk
from kernels.gated_delta import chunk as gdn_chunk
from kernels.gated_delta import step as gdn_step
from kernels.gated_delta import torch as gdn
from kernels.latent import decode as mla_decode
from kernels.norm import rows as norm_triton
from kernels.norm import torch as norm
from kernels.norm.torch import l2_norm
from kernels.selective import chunk as selective_chunk
from kernels.selective import step as selective_step
from kernels.selective import torch as selective_scan
from tests.kernels.interpreter import interpreted
from tests.kernels.slots import in_place

MAX_TOKENS = 9
#: Tokens that step kernels are given at most: each launch interprets every program anew.
FEW = 11
BOTH = (torch.float32, torch.float64)
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


@dataclass(frozen=True, kw_only=True)
class Form:
    """One of our forms: `run(**inputs, state=...)` returns y and the state after the last token.

    triton: whether it launches kernels, which the interpreter runs (no: plain torch, any dtype).
    chunked: whether it takes all tokens at once and hands gradients back.
    """

    name: str
    run: Callable[..., tuple[Tensor, Tensor]]
    triton: bool = False
    chunked: bool = False

    def __call__(self, **inputs: Any) -> tuple[Tensor, Tensor]:
        with interpreted():
            return self.run(**inputs)

    def __str__(self) -> str:
        return self.name


def close(got: Tensor, expected: Tensor) -> None:
    """Equal in shape and dtype, and in value as that dtype allows."""
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def compare(form: Form, peer: Callable[..., Any], inputs: dict[str, Tensor]) -> None:
    """Outputs, final states too, of a form and a peer on the same inputs."""
    got = form(**{name: t.clone() for name, t in inputs.items()})
    for ours, theirs in zip(got, peer(**inputs), strict=True):
        close(ours, theirs)


def compare_gradients(form: Form, peer: Callable[..., Any], inputs: dict[str, Tensor]) -> None:
    """Gradients of every input, from random weights on every output, the final state too."""
    weights: list[Tensor] = []
    grads = []
    for run in (peer, form.run):
        leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
        with interpreted():
            outputs = run(**leaves)
            weights = weights or [torch.randn_like(t) for t in outputs]
            torch.autograd.backward(outputs, weights)
        grads.append([leaf.grad for leaf in leaves.values()])
    for name, theirs, ours in zip(inputs, *grads, strict=True):
        assert theirs is not None and ours is not None and theirs.isfinite().all(), name
        scale = theirs.abs().max().clamp(min=1)
        close(ours / scale, theirs / scale)


def by_steps(
    step: Callable[..., Any], tokens: dict[str, Tensor], constants: dict[str, Any], size: int
) -> Tensor:
    """What `step` answers to successive runs of `size` tokens, put together."""
    given = list(tokens.items())
    pieces = [
        {n: t if t.shape[1] == 1 else t[:, first : first + size].contiguous() for n, t in given}
        for first in range(0, max(t.shape[1] for _, t in given), size)
    ]
    answers = [step(**piece, **constants) for piece in pieces]
    return torch.cat([a if isinstance(a, Tensor) else a[0] for a in answers], 1)


def torch_steps(step: Callable[..., Any], fixed: tuple[str, ...] = ()) -> Callable[..., Any]:
    """A torch step form over all tokens, three at a time; `fixed` names what has no tokens."""

    def run(state: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        constants = {name: inputs.pop(name) for name in fixed}
        return by_steps(step, inputs, {**constants, "state": state}, 3), state

    return run


def slotted(
    step: Callable[..., Tensor], fixed: tuple[str, ...], state_name: str = "state"
) -> Callable[..., Any]:
    """A Triton step over all tokens, on states in shuffled slots of a pool of NaN."""

    def run(state: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        batch = state.shape[0]
        pool = state.new_full((batch + 2, *state.shape[1:]), torch.nan)
        slots = torch.arange(batch, 0, -1)
        pool[slots] = state
        constants: dict[str, Any] = {key: inputs.pop(key) for key in fixed}

        def placed(**given: Any) -> Tensor:
            tokens = max(given[name].shape[1] for name in inputs)
            return step(**given, **in_place(slots.tolist(), tokens))

        y = by_steps(placed, inputs, constants | {state_name: pool}, MAX_TOKENS)
        return y, pool[slots]

    return run


def fixed_decay(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor) -> Any:
    """`linear_step` takes the decay of a head, not of its tokens."""
    run = slotted(linear_step.linear_step, ("log_decay",))
    return run(q=q, k=k, v=v, log_decay=log_decay[0, 0].contiguous(), state=state)


def gated_ssm(z: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
    """`ssm_step` gates within its norm only."""
    y, last = slotted(ssm_step.ssm_step, ("a_log", "d", "dt_bias"))(**inputs)
    return y * F.silu(z), last


def conv(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The torch convolution with its tail as the state."""
    y = causal_conv.causal_conv(x, weight, bias, state)
    return y, causal_conv.conv_tail(x, state, weight.shape[1])


def conv_kernels(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The convolution's kernels on many tokens: outputs first, then the tail in its slot."""
    y = conv_chunk.causal_conv(x, weight, bias, state)
    tail = state.detach().clone()
    slots = torch.arange(len(tail)).int()
    conv_chunk.conv_tail_(x.detach(), tail, slots, slots)
    return y, tail


def ssm(scan: Callable[..., Any]) -> Callable[..., Any]:
    """Mamba-2's inner part from a decay scan: step sizes, skip and gate around it."""

    def run(
        x: Tensor, dt: Tensor, b: Tensor, c: Tensor, a_log: Tensor, d: Tensor, dt_bias: Tensor,
        z: Tensor, state: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        step = F.softplus(dt + dt_bias)
        log_decay = -step * a_log.exp()
        y, last = scan(q=c, k=b, v=step[..., None] * x, log_decay=log_decay, state=state)
        return (y + d[:, None] * x) * F.silu(z), last

    return run


def gated(scan: Callable[..., Any]) -> Callable[..., Any]:
    """Mamba's inner part from a selective scan: step sizes and gate around it."""

    def run(
        dt: Tensor, a_log: Tensor, dt_bias: Tensor, z: Tensor, **inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        y, last = scan(dt=F.softplus(dt + dt_bias), a=-a_log.exp(), **inputs)
        return y * F.silu(z), last

    return run


def delta(scan: Callable[..., Any]) -> Callable[..., Any]:
    """The inner part of Gated DeltaNet, or of Kimi Delta Attention with a by channel, from a delta
    rule: norms and gates before it.
    """

    def run(
        q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, a_log: Tensor, dt_bias: Tensor,
        state: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        rate = -a_log.exp().view(-1, *[1] * (a.dim() - 3))
        log_decay = rate * F.softplus(a + dt_bias)
        q = l2_norm(q) * q.shape[-1] ** -0.5
        return scan(
            q=q, k=l2_norm(k), v=v, log_decay=log_decay, beta=b.sigmoid(), state=state
        )  # fmt: skip

    return run


#: S_t = e^{g_t} S_{t-1} + k_t v_tᵀ: q, k, v, log_decay, state.
DECAY = [
    Form(name="torch chunk", run=decay_scan.decay_chunk, chunked=True),
    Form(name="torch step", run=torch_steps(decay_scan.decay_step)),
    Form(
        name="triton chunk",
        run=decay_chunk.decay_chunk,
        triton=True,
        chunked=True,
    ),
]
#: The same with one decay per head.
FIXED_DECAY = [*DECAY, Form(name="triton step", run=fixed_decay, triton=True)]

#: Mamba-2: x, dt, b, c, a_log, d, dt_bias, z, state.
SSM = [
    *(replace(form, run=ssm(form.run)) for form in DECAY),
    Form(name="triton step", run=gated_ssm, triton=True),
]

#: Mamba: x, dt, b, c, a_log, d, dt_bias, z, state.
SELECTIVE = [
    Form(name="torch scan", run=gated(selective_scan.selective_scan), chunked=True),
    Form(
        name="triton chunk",
        run=gated(selective_chunk.selective_scan),
        triton=True,
        chunked=True,
    ),
    Form(name="torch step", run=gated(torch_steps(selective_scan.selective_step, ("a", "d")))),
    Form(
        name="triton step",
        run=slotted(selective_step.selective_step, ("a_log", "d", "dt_bias")),
        triton=True,
    ),
]

#: Gated RMSNorm and RMSNorm, by module.
NORMS = [
    Form(name="torch", run=norm.gated_rms_norm, chunked=True),
    Form(name="triton", run=norm_triton.gated_rms_norm, triton=True, chunked=True),
]
PLAIN_NORMS = [
    replace(form, run=module.rms_norm)
    for form, module in zip(NORMS, (norm, norm_triton), strict=True)
]

#: Short convolution: x, weight, bias, state (the tail).
CONV = [
    Form(name="torch", run=conv, chunked=True),
    Form(name="triton chunk", run=conv_kernels, triton=True, chunked=True),
    Form(
        name="triton step",
        run=slotted(conv_step.conv_step, ("weight", "bias"), "tail"),
        triton=True,
    ),
]

#: Gated delta rule: q, k, v, a, b, a_log, dt_bias, state.
DELTA = [
    Form(name="torch chunk", run=delta(gdn.gdn_chunk), chunked=True),
    Form(name="torch step", run=delta(torch_steps(gdn.gdn_step))),
    Form(
        name="triton chunk",
        run=delta(gdn_chunk.gdn_chunk),
        triton=True,
        chunked=True,
    ),
    Form(
        name="triton step",
        run=slotted(gdn_step.gdn_step, ("a_log", "dt_bias")),
        triton=True,
    ),
]

#: The same with decays by channel: a [B, T, H, N], dt_bias [H, N].
BY_CHANNEL = [
    replace(form, run=delta(kda_chunk.kda_chunk)) if form.name == "triton chunk" else form
    for form in DELTA
]

#: A transition that is diagonal plus a product of two vectors: q, k, v, log_decay, a, b, state.
LOW_RANK = [
    Form(name="torch chunk", run=dplr.dplr_chunk, chunked=True),
    Form(name="torch step", run=torch_steps(dplr.dplr_step)),
]


def cases(
    forms: list[Form], lengths: Iterable[int], dtypes: tuple[torch.dtype, ...] = (torch.float32,)
) -> list[Any]:
    """(form, dtype, tokens) to try: kernels in float32 alone, step kernels on few tokens."""
    return [
        pytest.param(form, dtype, tokens, id=f"{form}-{str(dtype)[6:]}-{tokens}")
        for form in forms
        for dtype in dtypes
        for tokens in lengths
        if not form.triton or (dtype == torch.float32 and (form.chunked or tokens <= FEW))
    ]


def paged(
    lengths: list[int], heads: tuple[int, int], new: int = 1, dim: int = 32
) -> tuple[Tensor, tuple[list[Tensor], list[Tensor]], dict[str, Any]]:
    """q [B, K, H, d], each sequence's k and v [G, length, d], and both laid out in pages of 16.

    Pages are shuffled and what belongs to no sequence is NaN.
    """
    page, (h, g) = 16, heads
    most = max(1, -(-max(lengths) // page))
    table = torch.randperm(len(lengths) * most).view(len(lengths), most)
    rows = [[torch.randn(g, length, dim) for length in lengths] for _ in range(2)]
    pools = torch.full((2, g, table.numel() * page, dim), torch.nan)
    for pool, sequences in zip(pools, rows, strict=True):
        for pages, sequence in zip(table, sequences, strict=True):
            at = torch.arange(sequence.shape[1])
            pool[:, pages[at // page] * page + at % page] = sequence
    inputs = {
        "k_pool": pools[0],
        "v_pool": pools[1],
        "page_table": table.int(),
        "lengths": torch.tensor(lengths, dtype=torch.int32),
        "page_size": page,
    }
    return torch.randn(len(lengths), new, h, dim), (rows[0], rows[1]), inputs


#: Softmax attention over pages: what `paged` makes, window, sinks.
PAGED = [
    Form(
        name="triton decode",
        run=attention_decode.attention_decode,
        triton=True,
    ),
    Form(
        name="triton prefill",
        run=attention_prefill.attention_prefill,
        triton=True,
        chunked=True,
    ),
]
#: The same over latent rows, whose first columns are the values.
LATENT = [Form(name="triton decode", run=mla_decode.mla_decode, triton=True)]
