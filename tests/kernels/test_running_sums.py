"""Decays between tokens stay exact whatever precedes both: torch forms and kernels, both ways."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.decay.chunk import decay_chunk as decay_kernel
from kernels.decay.running_sums import chunk_decays
from kernels.decay.torch import decay_chunk, decay_ref
from kernels.gated_delta.channel_chunk import kda_chunk as kda_kernel
from kernels.gated_delta.chunk import gdn_chunk as gdn_kernel
from kernels.gated_delta.torch import gdn_chunk, gdn_ref
from tests.kernels.interpreter import interpreted

TOKENS = 40
Scan = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    with interpreted():
        yield


def inputs(delta: bool, jump: float, channels: int = 0, tokens: int = TOKENS) -> list[Tensor]:
    """q, k, v, g, the delta rule's β, state: after tokens 3 and 9 nothing is left of the past; g by
    head, or by so many channels.
    """
    q, k = F.normalize(torch.randn(2, 1, tokens, 1, 16), dim=-1)
    g = -0.05 * torch.rand(1, tokens, 2, *([channels] if channels else []))
    g[:, 3] = jump
    g[:, 9] = jump / 7
    beta = [torch.rand(1, tokens, 2)] if delta else []
    return [q, k, torch.randn(1, tokens, 2, 16), g, *beta, torch.randn(1, 2, 16, 16)]


@pytest.mark.parametrize("jump", [-3e2, -3e4, -1e30, -torch.inf], ids=str)
@pytest.mark.parametrize(
    ("chunk", "ref", "channels"),
    [(decay_chunk, decay_ref, 0), (decay_kernel, decay_ref, 0),
     (gdn_chunk, gdn_ref, 0), (gdn_kernel, gdn_ref, 0),
     (gdn_chunk, gdn_ref, 16), (kda_kernel, gdn_ref, 16)],
    ids=["decay torch", "decay triton", "gdn torch", "gdn triton", "kda torch", "kda triton"],
)  # fmt: skip
def test_a_token_that_forgets_all_does_not_blur_those_after_it(
    chunk: Scan, ref: Scan, channels: int, jump: float
) -> None:
    args = [t.requires_grad_() for t in inputs("gdn" in ref.__name__, jump, channels)]
    exact = [t.detach().double().requires_grad_() for t in args]
    got, expected = chunk(*args), ref(*exact)
    weights = [torch.randn_like(t) for t in got]
    torch.autograd.backward(got, weights)
    torch.autograd.backward(expected, [w.double() for w in weights])
    for ours, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=0, atol=5e-6)
    for ours, truth in zip(args, exact, strict=True):
        assert ours.grad is not None and truth.grad is not None
        torch.testing.assert_close(ours.grad.double(), truth.grad, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_each_decay_is_that_of_its_own_tokens(dtype: torch.dtype) -> None:
    g = -torch.rand(2, 64, dtype=dtype)
    g[:, 20] = -777.0
    between, since, until = chunk_decays(g)
    exact = g.double()
    for t in (0, 19, 20, 21, 63):
        for s in (0, 20, 40):
            true = exact[:, s + 1 : t + 1].sum(-1).exp() if s <= t else torch.zeros(2).double()
            torch.testing.assert_close(between[:, t, s].double(), true, rtol=1e-6, atol=0)
    torch.testing.assert_close(since, exact.cumsum(-1).exp().to(dtype), rtol=1e-5, atol=0)
    torch.testing.assert_close(
        until[:, 30], exact[:, 31:].sum(-1).exp().to(dtype), rtol=1e-6, atol=0
    )
