"""`kda` equals Kimi Linear's delta attention, parallel and step by step with its cache."""

import random
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.models.kimi_linear import KimiLinearConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

from archs.errors import UserError
from archs.kda import KimiDeltaAttention, KimiDeltaConfig
from archs.mixer import Place
from tests.archs.recurrent import assert_close, mixer_steps, randomise

SHAPES = [
    pytest.param(24, 2, 6, 4, id="two-heads"),
    pytest.param(40, 3, 16, 4, id="three-heads"),
    pytest.param(17, 1, 12, 3, id="one-head-short-conv"),
    *(
        pytest.param(
            draw.randint(8, 48), draw.randint(1, 5), draw.randint(2, 20), draw.randint(2, 6),
            id=f"drawn-{seed}",
        )
        for seed in range(3)
        for draw in [random.Random(seed)]
    ),
]  # fmt: skip


def config_of(d: int, heads: int, dim: int, width: int, **more: Any) -> KimiLinearConfig:
    return KimiLinearConfig(
        hidden_size=d, linear_num_heads=heads, linear_head_dim=dim, linear_conv_kernel_dim=width,
        **{"num_hidden_layers": 1, "layer_types": ["linear_attention"], "vocab_size": 11} | more,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


def pair(d: int, heads: int, dim: int, width: int) -> tuple[KimiDeltaAttention, Any]:
    theirs = KimiLinearDeltaAttention(config_of(d, heads, dim, width), 0).eval()
    randomise(theirs, seed=d)
    config = KimiDeltaConfig(
        n_heads=heads, key_dim=dim, value_dim=dim, decay_rank=dim, gate_rank=dim, conv_width=width
    )
    ours = KimiDeltaAttention(config, Place(d_model=d, n_layers=1, layer=0, siblings=(0,)))
    copy_weights(ours, theirs)
    return ours, theirs


@torch.no_grad()
def copy_weights(ours: KimiDeltaAttention, theirs: Any) -> None:
    gate = theirs.forget_gate
    projections = (
        theirs.q_proj, theirs.k_proj, theirs.v_proj, gate.f_a_proj, theirs.g_a_proj, theirs.b_proj
    )  # fmt: skip
    ours.q_k_v_f_z_b.weight.copy_(torch.cat([p.weight for p in projections]))
    ours.decay_up.weight.copy_(gate.f_b_proj.weight)
    ours.gate_up.weight.copy_(theirs.g_b_proj.weight)
    ours.conv_weight.copy_(theirs.conv1d.weight[:, 0])
    ours.A_log.copy_(gate.A_log.flatten())
    ours.dt_bias.copy_(gate.dt_bias)
    ours.norm_weight.copy_(theirs.o_norm.weight)
    ours.out.weight.copy_(theirs.o_proj.weight)


@pytest.mark.parametrize(("d", "heads", "dim", "width"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 63, 130])
@torch.inference_mode()
def test_kda_equals_kimi_linear(d: int, heads: int, dim: int, width: int, tokens: int) -> None:
    ours, theirs = pair(d, heads, dim, width)
    x = torch.randn(2, tokens, d)
    expected = theirs(x)
    assert_close(ours(x), expected)
    assert_close(mixer_steps(ours, x, [tokens]), expected)


@pytest.mark.parametrize(("d", "heads", "dim", "width"), SHAPES)
@torch.inference_mode()
def test_kda_steps_equal_kimi_linear_with_its_cache(
    d: int, heads: int, dim: int, width: int
) -> None:
    ours, theirs = pair(d, heads, dim, width)
    x = torch.randn(2, 78, d)
    cache = DynamicCache(config=config_of(d, heads, dim, width))
    sizes = [71, *[1] * 7]
    expected = torch.cat([theirs(piece, cache_params=cache) for piece in x.split(sizes, 1)], 1)
    assert_close(mixer_steps(ours, x, sizes), expected)
    assert_close(mixer_steps(ours, x, [1, 33, 5, 30, 9]), expected)


def test_impossible_sizes_are_named() -> None:
    with pytest.raises(UserError, match="decay_rank=0 must be at least 1"):
        KimiDeltaConfig(n_heads=1, key_dim=4, value_dim=4, decay_rank=0, gate_rank=4)
