"""`gdn` with strengths up to 2 and with several products a token: the recurrence of the papers
written out, every law of the conformance kit, and what is refused.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from archs.backends import NoFormError
from archs.errors import UserError
from archs.gdn import GatedDeltaConfig, GatedDeltaNet
from archs.mixer import Place
from archs.ops.gated_delta import gated_delta
from archs.registry import ModelSpec
from archs.sizes import get_scale
from eval.proof.conformance import LAWS, Subject, judge
from kernels.norm.torch import OutputNorm
from tests.archs.recurrent import assert_close, mixer_steps, randomise

#: Model width, key heads, value heads, N, P, β_max, products.
SHAPES = [
    pytest.param((24, 2, 2, 6, 10, 2.0, 1), id="negative"),
    pytest.param((40, 1, 3, 12, 5, 1.5, 1), id="up-to-1.5"),
    pytest.param((24, 2, 2, 6, 10, 1.0, 2), id="two-products"),
    pytest.param((32, 2, 4, 8, 8, 2.0, 2), id="two-negative-products-grouped"),
    pytest.param((17, 1, 2, 5, 3, 2.0, 3), id="three-negative-products"),
]


def mixer_of(
    d: int, key_heads: int, value_heads: int, n: int, p: int, beta_max: float, products: int
) -> GatedDeltaNet:
    config = GatedDeltaConfig(
        key_heads=key_heads, value_heads=value_heads, key_dim=n, value_dim=p, beta_max=beta_max,
        products=products,
    )  # fmt: skip
    mixer = GatedDeltaNet(config, Place(d_model=d, n_layers=1, layer=0, siblings=(0,)))
    randomise(mixer, seed=d)
    return mixer


def written_out(mixer: GatedDeltaNet, x: Tensor) -> Tensor:
    """In float64, one head and one token at a time: S becomes e^g S, then for each product
    (I - β k kᵀ) S + β k vᵀ, then y = Sᵀ q / √N (arXiv 2411.12537, eq. 2; 2502.10297, section 3).
    """
    c, w = mixer.config, {name: p.double() for name, p in mixer.named_parameters()}
    heads, groups, n, p, products = (
        c.value_heads, c.key_heads, c.key_dim, c.value_dim, c.products
    )  # fmt: skip
    projected = x.double() @ w["q_k_v_z_b_a.weight"].T
    channels = (groups * n, products * groups * n, products * heads * p)
    mixed, z, b, a = projected.split((sum(channels), heads * p, products * heads, heads), -1)
    padded = F.pad(mixed.mT, (c.conv_width - 1, 0))
    mixed = F.silu(F.conv1d(padded, w["conv_weight"][:, None], groups=sum(channels)).mT)
    q, k, v = mixed.split(channels, -1)
    q, k = q.unflatten(-1, (groups, n)), k.unflatten(-1, (products, groups, n))
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    v, z = v.unflatten(-1, (products, heads, p)), z.unflatten(-1, (heads, p))
    beta = c.beta_max * torch.sigmoid(b).unflatten(-1, (products, heads))
    decay = torch.exp(-w["A_log"].exp() * F.softplus(a + w["dt_bias"]))
    y = torch.zeros(*x.shape[:2], heads, p, dtype=torch.float64)
    for row in range(len(x)):
        for head in range(heads):
            group = head // (heads // groups)
            state = torch.zeros(n, p, dtype=torch.float64)
            for t in range(x.shape[1]):
                state = decay[row, t, head] * state
                for i in range(products):
                    key, strength = k[row, t, i, group], beta[row, t, i, head]
                    turn = torch.eye(n, dtype=torch.float64) - strength * torch.outer(key, key)
                    state = turn @ state + strength * torch.outer(key, v[row, t, i, head])
                y[row, t, head] = state.T @ q[row, t, group] * n**-0.5
    normed = y * (y.square().mean(-1, keepdim=True) + c.eps).rsqrt() * w["norm_weight"]
    return ((normed * F.silu(z)).flatten(2) @ w["out.weight"].T).float()


@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_it_equals_the_recurrence_written_out(shape: tuple[Any, ...]) -> None:
    mixer = mixer_of(*shape)
    x = torch.randn(2, 47, shape[0])
    expected = written_out(mixer, x)
    assert_close(mixer(x), expected)
    for sizes in ([47], [40, *[1] * 7], [3, 9, 10, 1, 24]):
        assert_close(mixer_steps(mixer, x, sizes), expected)


NEGATIVE = ("gdn(beta_max=2)", "gdn(beta_max=2,products=2)")
ANYWHERE = [law for law in LAWS if law != "triton equals torch"]


@pytest.mark.parametrize("law", ANYWHERE)
@pytest.mark.parametrize("arch", NEGATIVE)
def test_variants_obey_every_law(arch: str, law: str) -> None:
    verdict = judge(Subject(arch), law)
    assert verdict.passed, verdict.detail


@pytest.mark.parametrize("law", ANYWHERE)
def test_three_products_of_shared_keys_obey_every_law(law: str) -> None:
    subject = Subject("gdn")
    subject.spec = replace(subject.spec, overrides={"gdn": {"products": 3, "key_heads": 1}})
    subject.model = subject.spec.build()
    verdict = judge(subject, law)
    assert verdict.passed, verdict.detail


@pytest.mark.parametrize("scale", ["nano", "tiny", "base", "70m"])
@pytest.mark.parametrize("arch", NEGATIVE)
def test_variants_have_as_many_parameters_as_others(arch: str, scale: str) -> None:
    model = ModelSpec(arch=arch, scale=get_scale(scale)).outline()
    ratio = model.non_embedding_parameters() / get_scale(scale).parameter_budget
    assert ratio == pytest.approx(1, abs=0.01)


def test_a_library_has_no_form_of_several_products() -> None:
    k, v, b = torch.zeros(1, 1, 2, 1, 4), torch.zeros(1, 1, 2, 1, 3), torch.zeros(1, 1, 2, 1)
    norm = OutputNorm(gate=v[:, :, 0], weight=torch.ones(3), eps=1e-6, gate_first=False)
    with pytest.raises(NoFormError, match="several products a token has no form for"):
        gated_delta(
            k[:, :, 0], k, v, b[:, :, 0], b, torch.zeros(1), torch.zeros(1), norm, backend="fla"
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_max": 2.5}, "beta_max=2.5 is above 2"),
        ({"beta_max": 0.0}, "beta_max=0.0 must be positive"),
        ({"products": 0}, "products=0 must be at least 1"),
    ],
)
def test_impossible_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GatedDeltaConfig(key_heads=1, value_heads=1, key_dim=4, value_dim=4, **options)
