"""`kda` with gates by channel: Gated DeltaNet-2's recurrence written out, and the kit's laws."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from archs.kda import KimiDeltaAttention, KimiDeltaConfig
from archs.mixer import Place
from eval.proof.conformance import LAWS, Subject, judge
from kernels.gated_delta.torch import gdn_chunk
from tests.archs.recurrent import assert_close, mixer_steps, randomise

#: Model width, heads, N, P, ranks.
SHAPES = [
    pytest.param((24, 2, 6, 10, 5), id="two-heads"),
    pytest.param((40, 3, 16, 8, 7), id="three-heads"),
    pytest.param((17, 1, 12, 3, 4), id="one-head"),
]


def mixer_of(d: int, heads: int, n: int, p: int, rank: int, **more: Any) -> KimiDeltaAttention:
    config = KimiDeltaConfig(
        n_heads=heads, key_dim=n, value_dim=p, decay_rank=rank, gate_rank=rank, **more
    )
    mixer = KimiDeltaAttention(config, Place(d_model=d, n_layers=1, layer=0, siblings=(0,)))
    randomise(mixer, seed=d)
    return mixer


def written_out(mixer: KimiDeltaAttention, x: Tensor) -> Tensor:
    """In float64, one head and one token at a time: S becomes Diag(e^g) S, then
    (I - k (b ∘ k)ᵀ) S + k (w ∘ v)ᵀ, and y = Sᵀ q / √N (arXiv 2605.22791).
    """
    c, w = mixer.config, {name: p.double() for name, p in mixer.named_parameters()}
    heads, n, p = c.n_heads, c.key_dim, c.value_dim
    keys, values = heads * n, heads * p
    projected = x.double() @ w["q_k_v_f_z_b.weight"].T
    sizes = (2 * keys + values, c.decay_rank, c.gate_rank, keys, values)
    mixed, f, z, erase, write = projected.split(sizes, -1)
    padded = F.pad(mixed.mT, (c.conv_width - 1, 0))
    mixed = F.silu(F.conv1d(padded, w["conv_weight"][:, None], groups=len(w["conv_weight"])).mT)
    q, k, v = (t.unflatten(-1, (heads, -1)) for t in mixed.split((keys, keys, values), -1))
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    a = F.softplus(f @ w["decay_up.weight"].T + w["dt_bias"]).unflatten(-1, (heads, n))
    decay = torch.exp(-w["A_log"].exp()[:, None] * a)
    erase, write = (torch.sigmoid(t).unflatten(-1, (heads, -1)) for t in (erase, write))
    y = torch.zeros(*x.shape[:2], heads, p, dtype=torch.float64)
    for row in range(len(x)):
        for head in range(heads):
            state = torch.zeros(n, p, dtype=torch.float64)
            for t in range(x.shape[1]):
                at = row, t, head
                turn = torch.eye(n, dtype=torch.float64) - torch.outer(k[at], erase[at] * k[at])
                state = turn @ torch.diag(decay[at]) @ state
                state = state + torch.outer(k[at], write[at] * v[at])
                y[at] = state.T @ q[at] * n**-0.5
    gate = torch.sigmoid(z @ w["gate_up.weight"].T).unflatten(-1, (heads, p))
    normed = y * (y.square().mean(-1, keepdim=True) + c.eps).rsqrt() * w["norm_weight"]
    return ((normed * gate).flatten(2) @ w["out.weight"].T).float()


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_it_equals_the_recurrence_written_out(shape: tuple[int, ...]) -> None:
    mixer = mixer_of(*shape, channel_gates=True)
    x = torch.randn(2, 47, shape[0])
    expected = written_out(mixer, x)
    assert_close(mixer(x), expected)
    for sizes in ([47], [40, *[1] * 7], [3, 9, 10, 1, 24]):
        assert_close(mixer_steps(mixer, x, sizes), expected)


@torch.inference_mode()
def test_with_every_gate_alike_it_is_kda() -> None:
    d, heads, n, p, rank = 24, 2, 6, 10, 5
    plain, gated = (
        mixer_of(d, heads, n, p, rank),
        mixer_of(d, heads, n, p, rank, channel_gates=True),
    )
    for name, parameter in gated.named_parameters():
        given = plain.get_parameter(name)
        if parameter.shape != given.shape:
            shared, strengths = given[:-heads], given[-heads:]
            each = [strengths.repeat_interleave(channels, 0) for channels in (n, p)]
            given = torch.cat((shared, *each))
        parameter.copy_(given)
    x = torch.randn(2, 40, d)
    assert_close(gated(x), plain(x))


@pytest.mark.parametrize("law", [law for law in LAWS if law != "triton equals torch"])
def test_it_obeys_every_law(law: str) -> None:
    verdict = judge(Subject("kda(channel_gates=true)"), law)
    assert verdict.passed, verdict.detail


def test_decays_must_be_by_channel_where_strengths_are() -> None:
    k, v = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 3)
    with pytest.raises(ValueError, match="beta is by channel and log_decay by head"):
        gdn_chunk(k, k, v, k[..., 0], k)
