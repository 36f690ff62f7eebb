"""Decay scan, gated delta rule by head and by channel, diagonal plus low rank, selective scan:
oracle, split law, padding, FLOPs, gradients.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from kernels.decay.torch import (
    decay_chunk,
    decay_chunk_matrix_flops,
    decay_ref,
    decay_step,
    decay_step_matrix_flops,
)
from kernels.dplr.torch import (
    dplr_answers,
    dplr_chunk,
    dplr_chunk_matrix_flops,
    dplr_ref,
    dplr_step,
    dplr_step_matrix_flops,
)
from kernels.gated_delta.torch import (
    gdn_answers,
    gdn_chunk,
    gdn_chunk_matrix_flops,
    gdn_ref,
    gdn_step,
    gdn_step_matrix_flops,
)
from kernels.selective import torch as s6

B, G, H, N, P = 2, 2, 4, 6, 5
LENGTHS = [1, 63, 64, 100, 130]
Op = Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Scan:
    """One operation's chunked form, step form, oracle, inputs by token, and the rest."""

    chunk: Op
    step: Callable[..., tuple[Tensor, Tensor | None]]
    ref: Op
    inputs: Callable[[int], list[Tensor]]
    constants: tuple[Tensor, ...]
    state: tuple[int, ...]
    chunk_flops: Callable[[int], int]
    step_flops: Callable[[int], int]

    def at(self, args: Sequence[Tensor], rows: slice) -> list[Tensor]:
        """Arguments of the tokens in `rows`, in call order."""
        cut = [a[:, rows] for a in args]
        return cut if not self.constants else [cut[0], cut[1], self.constants[0], *cut[2:],
                                               *self.constants[1:]]  # fmt: skip


def decay_inputs(tokens: int) -> list[Tensor]:
    q, k = torch.randn(2, B, tokens, G, N)
    return [q, k, torch.randn(B, tokens, H, P), -F.softplus(torch.randn(B, tokens, H))]


def delta_inputs(tokens: int) -> list[Tensor]:
    q, k, v, g = decay_inputs(tokens)
    return [F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, g, torch.rand(B, tokens, H)]


def channel_inputs(tokens: int) -> list[Tensor]:
    """Decays by channel, of every strength: from e^-0.001 to e^-3000 a token."""
    q, k, v, _, beta = delta_inputs(tokens)
    return [q, k, v, -(10 ** torch.empty(B, tokens, H, N).uniform_(-3, 3.5)), beta]


def dplr_inputs(tokens: int) -> list[Tensor]:
    """What is read is erased in part, channel by channel, beside decays of every strength."""
    q, k, v, g, _ = channel_inputs(tokens)
    a = F.normalize(torch.randn(B, tokens, H, N), dim=-1)
    q, k = (t.repeat_interleave(H // G, 2) for t in (q, k))
    return [q, k, v, g, a, -a * torch.rand(B, tokens, H, N)]


def erasing_inputs(tokens: int) -> list[Tensor]:
    """Strengths by channel, too."""
    return [*channel_inputs(tokens)[:4], torch.rand(B, tokens, H, N)]


def s6_inputs(tokens: int) -> list[Tensor]:
    x, dt = torch.randn(2, B, tokens, H)
    b, c = torch.randn(2, B, tokens, N)
    return [x, F.softplus(dt), b, c]


SCANS = {
    "decay": Scan(
        decay_chunk, decay_step, decay_ref, decay_inputs, (), (B, H, N, P),
        lambda t: decay_chunk_matrix_flops(B, t, H, G, N, P),
        lambda t: decay_step_matrix_flops(B, t, H, N, P),
    ),
    "gdn": Scan(
        gdn_chunk, gdn_step, gdn_ref, delta_inputs, (), (B, H, N, P),
        lambda t: gdn_chunk_matrix_flops(B, t, H, G, N, P),
        lambda t: gdn_step_matrix_flops(B, t, H, N, P),
    ),
    "kda": Scan(
        gdn_chunk, gdn_step, gdn_ref, channel_inputs, (), (B, H, N, P),
        lambda t: gdn_chunk_matrix_flops(B, t, H, G, N, P, by_channel=True),
        lambda t: gdn_step_matrix_flops(B, t, H, N, P),
    ),
    "dplr": Scan(
        dplr_chunk, dplr_step, dplr_ref, dplr_inputs, (), (B, H, N, P),
        lambda t: dplr_chunk_matrix_flops(B, t, H, N, P),
        lambda t: dplr_step_matrix_flops(B, t, H, N, P),
    ),
    "gdn2": Scan(
        gdn_chunk, gdn_step, gdn_ref, erasing_inputs, (), (B, H, N, P),
        lambda t: gdn_chunk_matrix_flops(B, t, H, G, N, P, by_channel=True),
        lambda t: gdn_step_matrix_flops(B, t, H, N, P),
    ),
    "selective": Scan(
        s6.selective_scan, s6.selective_step, s6.selective_scan_ref, s6_inputs,
        (-torch.linspace(0.1, 4, H * N).view(H, N), torch.linspace(-1, 1, H)), (B, H, N),
        lambda t: s6.selective_scan_matrix_flops(B, t, H, N),
        lambda t: s6.selective_step_matrix_flops(B, t, H, N),
    ),
}  # fmt: skip


@pytest.fixture(params=SCANS)
def scan(request: pytest.FixtureRequest) -> Scan:
    return SCANS[request.param]


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_both_forms_equal_the_oracle(scan: Scan, tokens: int) -> None:
    args = scan.at(scan.inputs(tokens), slice(None))
    state = torch.randn(scan.state)
    expected, final = scan.ref(*args, state)
    y, after = scan.chunk(*args, state)
    close(y, expected)
    close(after, final)
    held = state.clone()
    y, each = scan.step(*args, held, each=True)
    close(y, expected)
    close(held, final)
    assert each is not None
    close(each[:, -1], final)
    _, early = scan.ref(*scan.at(scan.inputs(1), slice(None)), state)
    assert each.shape[1] == tokens and early.shape == each[:, 0].shape


def test_no_state_means_zeros(scan: Scan) -> None:
    args = scan.at(scan.inputs(70), slice(None))
    y, final = scan.chunk(*args)
    expected, after = scan.ref(*args, torch.zeros(scan.state))
    close(y, expected)
    close(final, after)


@pytest.mark.parametrize("sizes", [(1, 3, 66), (5, 1, 1, 63), (69, 1), (33, 37)], ids=str)
def test_any_split_equals_one_call(scan: Scan, sizes: tuple[int, ...]) -> None:
    inputs = scan.inputs(70)
    state = torch.randn(scan.state)
    expected, final = scan.chunk(*scan.at(inputs, slice(None)), state)
    outputs, start = [], 0
    for size in sizes:
        args = scan.at(inputs, slice(start, start + size))
        if size <= 8:
            y, _ = scan.step(*args, state)
        else:
            y, state = scan.chunk(*args, state)
        outputs.append(y)
        start += size
    close(torch.cat(outputs, 1), expected)
    close(state, final)


def test_padding_leaves_the_state_alone(scan: Scan) -> None:
    inputs = scan.inputs(40)
    padded = [t.clone() for t in inputs]
    silent = (
        {4: (1, 3), 5: (3, 4), 6: (1, 3, 5)}[len(inputs)]
        if scan.ref is not s6.selective_scan_ref
        else (1,)
    )
    if scan.inputs is erasing_inputs:
        # No strength weighs what is written.
        silent += (2,)
    for index in silent:
        padded[index][:, 30:] = 0
    state = torch.randn(scan.state)
    _, final = scan.chunk(*scan.at(inputs, slice(0, 30)), state)
    _, after = scan.chunk(*scan.at(padded, slice(None)), state)
    close(after, final)


def test_step_updates_a_strided_state_in_place(scan: Scan) -> None:
    pool = torch.randn(5, *scan.state[1:])
    before = pool.clone()
    held = pool[2 : 2 + B]
    args = scan.at(scan.inputs(3), slice(None))
    scan.step(*args, held)
    _, final = scan.ref(*args, before[2 : 2 + B])
    close(pool[2 : 2 + B], final)
    assert torch.equal(pool[:2], before[:2]) and torch.equal(pool[4:], before[4:])


@pytest.mark.parametrize("tokens", [9, 64, 129])
def test_declared_flops_are_what_torch_counts(scan: Scan, tokens: int) -> None:
    args = scan.at(scan.inputs(tokens), slice(None))
    state = torch.randn(scan.state)
    with FlopCounterMode(display=False) as counter:
        scan.chunk(*args, state)
    assert counter.get_total_flops() == scan.chunk_flops(tokens)
    with FlopCounterMode(display=False) as counter:
        scan.step(*args, state)
    assert counter.get_total_flops() == scan.step_flops(tokens)


def test_gradients_equal_those_through_the_oracle(
    scan: Scan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s6, "PIECE_FLOATS", 200)
    args = [t.double().requires_grad_() for t in scan.at(scan.inputs(77), slice(None))]
    state = torch.randn(scan.state, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(B, 77, *((H, P) if len(scan.state) == 4 else (H,))).double()
    grads = []
    for op in (scan.chunk, scan.ref):
        y, final = op(*args, state)
        loss = (y * weight).sum() + final.square().sum()
        grads.append(torch.autograd.grad(loss, [*args, state]))
    for got, expected in zip(*grads, strict=True):
        close(got, expected, 1e-8)


def test_bfloat16_inputs_keep_a_float32_state(scan: Scan) -> None:
    inputs = scan.inputs(65)
    args = scan.at([t.bfloat16() for t in inputs], slice(None))
    y, final = scan.chunk(*args, torch.zeros(scan.state))
    expected, _ = scan.ref(*args, torch.zeros(scan.state))
    assert y.dtype == torch.bfloat16 and final.dtype == torch.float32
    assert (y.double() - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.parametrize("op", [decay_chunk, gdn_chunk], ids=["decay", "gdn"])
def test_heads_that_do_not_divide_are_refused(op: Op) -> None:
    q = torch.randn(1, 3, 2, 4)
    v, g = torch.randn(1, 3, 3, 4), torch.zeros(1, 3, 3)
    with pytest.raises(ValueError, match="not divisible"):
        op(q, q, v, g, *([g] if op is gdn_chunk else []))


def test_a_decay_fixed_per_head_broadcasts() -> None:
    q, k, v, _ = decay_inputs(70)
    g = -torch.rand(1, 1, H)
    y, final = decay_chunk(q, k, v, g)
    expected, after = decay_ref(q, k, v, g, torch.zeros(B, H, N, P))
    close(y, expected)
    close(final, after)


def test_decays_alike_in_all_channels_are_decays_by_head() -> None:
    q, k, v, g, beta = delta_inputs(100)
    state = torch.randn(B, H, N, P)
    wide = g[..., None].expand(-1, -1, -1, N)
    for op in (gdn_chunk, gdn_ref):
        by_channel, by_head = op(q, k, v, wide, beta, state), op(q, k, v, g, beta, state)
        for got, expected in zip(by_channel, by_head, strict=True):
            close(got, expected, 1e-5)


@pytest.mark.parametrize("chunk", [1, 8, 256])
@pytest.mark.parametrize("strength", [1e-4, 1.0, 1e4])
def test_chunks_by_channel_of_any_length_and_decay(chunk: int, strength: float) -> None:
    q, k, v, g, beta = channel_inputs(300)
    args, state = (q, k, v, g * strength, beta), torch.randn(B, H, N, P)
    expected, final = gdn_ref(*args, state)
    y, after = gdn_chunk(*args, state, chunk=chunk)
    close(y, expected, 1e-5)
    close(after, final, 1e-5)


def test_a_chunk_by_channel_that_cannot_be_halved_is_refused() -> None:
    with pytest.raises(ValueError, match="a chunk of 48 tokens is not halved to the end; pad it"):
        gdn_chunk(*channel_inputs(100), chunk=48)


@pytest.mark.parametrize("chunk", [1, 8, 256])
@pytest.mark.parametrize("strength", [1e-4, 1.0, 1e4])
def test_diagonals_plus_low_rank_of_any_chunk_and_decay(chunk: int, strength: float) -> None:
    q, k, v, g, a, b = dplr_inputs(300)
    args, state = (q, k, v, g * strength, a, b), torch.randn(B, H, N, P)
    expected, final = dplr_ref(*args, state)
    y, after = dplr_chunk(*args, state, chunk=chunk)
    close(y, expected, 1e-5)
    close(after, final, 1e-5)


def test_one_key_for_all_is_the_delta_rule() -> None:
    """Which erases what is left after the decay: `a` takes the decay in."""
    q, k, v, g, beta = channel_inputs(100)
    g = g.clamp(min=-3)
    q, k = (t.repeat_interleave(H // G, 2) for t in (q, k))
    state, strength = torch.randn(B, H, N, P), beta[..., None]
    expected = gdn_ref(q, k, v, g, beta, state)
    found = dplr_chunk(q, k * strength, v, g, g.exp() * k, -k * strength, state)
    for got, wanted in zip(found, expected, strict=True):
        close(got, wanted)


def test_a_chunk_that_cannot_be_halved_is_refused() -> None:
    with pytest.raises(ValueError, match="a chunk of 48 tokens is not halved to the end; take a"):
        dplr_chunk(*dplr_inputs(100), chunk=48)


ANSWERS = {
    "gdn": (gdn_answers, gdn_ref, delta_inputs),
    "kda": (gdn_answers, gdn_ref, channel_inputs),
    "gdn2": (gdn_answers, gdn_ref, erasing_inputs),
    "dplr": (dplr_answers, dplr_ref, dplr_inputs),
}


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize(("asked", "tokens"), [(1, 1), (1, 14), (3, 16), (9, 23)])
def test_answers_are_the_last_rows_of_all(name: str, asked: int, tokens: int) -> None:
    answers, reference, inputs = ANSWERS[name]
    q, *rest = inputs(tokens)
    state = torch.randn(B, H, N, P)
    expected, _ = reference(q, *rest, state)
    close(answers(q[:, -asked:], *rest, state), expected[:, -asked:])


def test_sequences_in_groups_of_two_and_one_are_those_of_one_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draw = torch.Generator().manual_seed(0)

    def of(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=draw, dtype=torch.float64).requires_grad_()

    e, n = 6, 5
    x, dt, a, b, c, d = of(3, 41, e), of(3, 41, e), of(e, n), of(3, 41, n), of(3, 41, n), of(e)
    args = x, dt, -a, b, c, d, of(3, e, n)
    found = []
    for floats in (s6.PIECE_FLOATS, 2 * s6.PIECE_TOKENS * e * n):
        monkeypatch.setattr(s6, "PIECE_FLOATS", floats)
        y, final = s6.selective_scan(*args)
        leaves = [x, dt, a, b, c, d, args[-1]]
        grads = torch.autograd.grad(y.square().sum() + final.square().sum(), leaves)
        found.append([y, final, *grads])
    for got, expected in zip(*found, strict=True):
        close(got, expected, 1e-12)
