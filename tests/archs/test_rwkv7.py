"""`rwkv7` equals RWKV-7's time mixing written out token by token and head by head in float64, with
and without the value residual, parallel and step by step.
"""

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from archs.backends import NoFormError
from archs.errors import UserError
from archs.mixer import Place, Shared
from archs.registry import ModelSpec
from archs.rwkv7 import BLENDS, Rwkv7, Rwkv7Config
from archs.sizes import get_scale
from eval.proof.conformance import Subject, judge
from infer.store import StateStore
from tests.archs.recurrent import assert_close, mixer_steps

LAYERS = 3
SHAPES = [
    pytest.param(24, 2, 6, 6, id="published-square"),
    pytest.param(40, 3, 8, 16, id="wide-values"),
    pytest.param(17, 1, 12, 5, id="one-head"),
    *(
        pytest.param(
            draw.randint(8, 48), draw.randint(1, 5), draw.randint(2, 20), draw.randint(2, 20),
            id=f"drawn-{seed}",
        )
        for seed in range(3)
        for draw in [random.Random(seed)]
    ),
]  # fmt: skip
#: Names of flash-linear-attention's layer, and ours.
NAMES = {
    "r_proj": "receptance.weight", "k_proj": "key.weight", "v_proj": "value.weight",
    "o_proj": "out.weight", "w1": "decay_down.weight", "w2": "decay_up.weight", "w0": "decay_bias",
    "a1": "rate_down.weight", "a2": "rate_up.weight", "a0": "rate_bias", "g1": "gate_down.weight",
    "g2": "gate_up.weight", "v1": "value_down.weight", "v2": "value_up.weight", "v0": "value_bias",
    "k_k": "removal_scale", "k_a": "rate_scale", "r_k": "bonus", "g_norm": "norm_weight",
    "g_bias": "norm_bias",
}  # fmt: skip


def made(d: int, heads: int, n: int, p: int, *, layer: int = 0, residual: bool = False) -> Rwkv7:
    config = Rwkv7Config(
        n_heads=heads, key_dim=n, value_dim=p, decay_rank=5, rate_rank=4, gate_rank=7,
        value_rank=3, value_residual=residual,
    )  # fmt: skip
    place = Place(d_model=d, n_layers=LAYERS, layer=layer, siblings=tuple(range(LAYERS)))
    mixer, generator = Rwkv7(config, place), torch.Generator().manual_seed(d + layer)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            if name == "blend":
                parameter.uniform_(0.0, 1.0, generator=generator)
            elif parameter.dim() < 2:
                parameter.normal_(0.3, 0.8, generator=generator)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    return mixer


def naive(mixer: Rwkv7, x: Tensor, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, D] and values [B, T, H·P] before any blend, by arXiv 2503.14456, section 4.

    The state of a head is [P, N], as in the paper.
    """
    held = {name: p.detach().double() for name, p in mixer.named_parameters()}
    w = {theirs: held[ours] for theirs, ours in NAMES.items() if ours in held}
    heads, n, p = mixer.config.n_heads, mixer.config.key_dim, mixer.config.value_dim
    x = x.double()
    before = F.pad(x, (0, 0, 1, -1))
    xr, xw, xk, xv, xa, xg = (x + (before - x) * mix for mix in held["blend"])
    r, k, v = xr @ w["r_proj"].T, xk @ w["k_proj"].T, xv @ w["v_proj"].T
    own = v
    if first is not None:
        v = v + (first - v) * (xv @ w["v1"].T @ w["v2"].T + w["v0"]).sigmoid()
    decay = (torch.tanh(xw @ w["w1"].T) @ w["w2"].T + w["w0"]).sigmoid()
    decay = (-torch.exp(torch.tensor(-0.5, dtype=torch.float64)) * decay).exp()
    a = (xa @ w["a1"].T @ w["a2"].T + w["a0"]).sigmoid()
    gate = (xg @ w["g1"].T).sigmoid() @ w["g2"].T
    kappa, k = k * w["k_k"], k * (1 + (a - 1) * w["k_a"])
    out = torch.zeros_like(v)
    for i in range(len(x)):
        for h in range(heads):
            at, to = slice(h * n, (h + 1) * n), slice(h * p, (h + 1) * p)
            state = x.new_zeros(p, n)
            for t in range(x.shape[1]):
                unit = kappa[i, t, at] / kappa[i, t, at].norm()
                moved = torch.diag(decay[i, t, at]) - torch.outer(unit, a[i, t, at] * unit)
                state = state @ moved + torch.outer(v[i, t, to], k[i, t, at])
                y = state @ r[i, t, at]
                y = (y - y.mean()) / (y.var(correction=0) + mixer.config.eps).sqrt()
                y = y * w["g_norm"][to] + w["g_bias"][to]
                bonus = (r[i, t, at] * k[i, t, at] * w["r_k"][at]).sum()
                out[i, t, to] = y + bonus * v[i, t, to]
    return (out * gate) @ w["o_proj"].T, own


@pytest.mark.parametrize(("d", "heads", "n", "p"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 63, 130])
@torch.inference_mode()
def test_rwkv7_equals_the_recurrence_written_out(
    d: int, heads: int, n: int, p: int, tokens: int
) -> None:
    mixer, x = made(d, heads, n, p), torch.randn(2, tokens, d)
    expected = naive(mixer, x)[0].float()
    assert_close(mixer(x), expected)
    assert_close(mixer_steps(mixer, x, [tokens]), expected)


@pytest.mark.parametrize(("d", "heads", "n", "p"), SHAPES)
@torch.inference_mode()
def test_pieces_and_single_tokens_equal_it_too(d: int, heads: int, n: int, p: int) -> None:
    mixer, x = made(d, heads, n, p), torch.randn(2, 78, d)
    expected = naive(mixer, x)[0].float()
    assert_close(mixer_steps(mixer, x, [71, *[1] * 7]), expected)
    assert_close(mixer_steps(mixer, x, [1, 33, 5, 30, 9]), expected)
    assert_close(mixer.double()(x.double()), naive(mixer, x)[0])


def team_steps(mixers: Sequence[Rwkv7], xs: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Outputs of all layers, each of its own input, piece by piece through one store."""
    batch, tokens = xs[0].shape[:2]
    specs = [mixer.state_spec() for mixer in mixers]
    store = StateStore(specs, max_sequences=batch, max_context=tokens, page_size=4)
    slots, found = [store.add() for _ in range(batch)], []
    for pieces in zip(*(x.split(sizes, 1) for x in xs), strict=True):
        with store.step(slots, pieces[0].shape[1]) as step:
            each = zip(mixers, pieces, step.layers, strict=True)
            found.append([mixer.extend(x, state) for mixer, x, state in each])
    return [torch.cat(outputs, 1) for outputs in zip(*found, strict=True)]


@pytest.mark.parametrize(("d", "heads", "n", "p"), SHAPES)
@torch.inference_mode()
def test_values_of_the_first_layer_reach_the_others(d: int, heads: int, n: int, p: int) -> None:
    mixers = [made(d, heads, n, p, layer=layer, residual=True) for layer in range(LAYERS)]
    xs, shared = torch.randn(LAYERS, 2, 43, d).unbind(), Shared()
    own, first = naive(mixers[0], xs[0])
    expected = [own, *(naive(m, x, first)[0] for m, x in zip(mixers[1:], xs[1:], strict=True))]
    found = [mixer(x, shared) for mixer, x in zip(mixers, xs, strict=True)]
    for sizes in ([43], [31, *[1] * 12], [1, 22, 5, 11, 4]):
        for got, stepped, wanted in zip(
            found, team_steps(mixers, xs, sizes), expected, strict=True
        ):
            assert_close(got, wanted.float())
            assert_close(stepped, wanted.float())
    with pytest.raises(ValueError, match="layer 2 reads the values of layer 0: run that layer fir"):
        mixers[2](xs[2], {})


@pytest.mark.parametrize(
    "law",
    [
        "declared state", "batch and padding invariance", "fork, then diverge", "rollback",
        "declared = allocated bytes", "declared = counted cost", "gradients",
    ],
)  # fmt: skip
def test_stored_values_obey_the_laws(law: str) -> None:
    verdict = judge(Subject("rwkv7(value_residual=true)"), law)
    assert verdict.passed, verdict.detail


@torch.no_grad()
def test_it_starts_as_published() -> None:
    spec = ModelSpec(arch="rwkv7(value_residual=true)", scale=get_scale("tiny"))
    first, *_, last = (block.mixer for block in spec.build(seed=1).layers)
    assert isinstance(first, Rwkv7) and isinstance(last, Rwkv7)
    keys, d = first.receptance.weight.shape
    # The paper's ramp from -6 to 0 with 0.5 added, and a swing of 2.5 within each head.
    ends = first.decay_bias[[0, keys - 1]].tolist()
    assert ends == pytest.approx([-6 + 0.5 - 2.5, 0.5 + 2.5])
    at, power = d // 2, dict(zip(BLENDS, first.blend, strict=True))
    assert float(power["decay"][at]) == pytest.approx(1 - 0.5**0.9)
    assert float(last.blend[0][at]) == pytest.approx(1 - 0.5 ** (0.2 / 4))
    assert float(first.norm_weight[0]) == pytest.approx(0.25**0.7)
    assert float(last.norm_weight[0]) == 1.0
    assert float(last.value_bias.mean()) == pytest.approx(0.73)
    assert not hasattr(first, "value_bias")


def test_its_state_is_as_large_as_gdn_s_and_a_row() -> None:
    scale = get_scale("base")
    ours, gdn = (ModelSpec(arch=a, scale=scale, hidden=0).outline() for a in ("rwkv7", "gdn"))
    for spec, other in zip(ours.state_specs(), gdn.state_specs(), strict=True):
        assert not spec.rows and [t.name for t in spec.fixed] == ["shift", "memory"]
        assert spec.fixed[0].nbytes == 4 * scale.d_model
        assert spec.fixed[1].shape == next(t.shape for t in other.fixed if t.name == "memory")


def test_a_backend_without_a_form_trains_and_refuses_to_decode() -> None:
    mixer, x = made(24, 2, 6, 6), torch.randn(1, 3, 24)
    expected = mixer(x)
    mixer.backend = "fla"
    assert torch.equal(mixer(x), expected)
    store = StateStore([mixer.state_spec()], max_sequences=1, max_context=4)
    with (
        pytest.raises(NoFormError, match="has no form for backend 'fla'; it has torch, triton"),
        store.step([store.add()], 3) as step,
    ):
        mixer.extend(x, step.layers[0])


def test_impossible_sizes_are_named() -> None:
    with pytest.raises(UserError, match="rate_rank=0 must be at least 1"):
        Rwkv7Config(
            n_heads=1, key_dim=4, value_dim=4, decay_rank=4, rate_rank=0, gate_rank=4, value_rank=4
        )
