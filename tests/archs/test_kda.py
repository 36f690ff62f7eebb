"""`kda` equals Kimi Linear's delta attention, and with a latent attention without positions the
whole hybrid, parallel and step by step.
"""

import random
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

from archs.errors import UserError
from archs.kda import KimiDeltaAttention, KimiDeltaConfig
from archs.mixer import Place
from archs.registry import ModelSpec
from archs.sizes import Scale
from tests.archs.hf import assert_equal, copy_backbone, copy_latent, random_model
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


@pytest.mark.parametrize("cuts", [[9, 12, 13, 33], [1, 38]], ids=str)
def test_the_hybrid_with_latent_attention_equals_kimi_linear(cuts: list[int]) -> None:
    latent = {"n_heads": 3, "rank": 13, "nope_dim": 6, "rope_dim": 4, "v_dim": 5}
    # With less, heads that say almost nothing are normed to full size, float32's rounding included.
    eps = 1e-3
    scale = Scale(name="test", d_model=24, n_layers=8, head_dim=8, vocab_size=101, seq_len=64)
    config = config_of(
        24, 2, 10, 4, vocab_size=101, intermediate_size=37, num_hidden_layers=8,
        layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 2,
        mlp_layer_types=["dense"] * 8, num_attention_heads=3, num_key_value_heads=3,
        kv_lora_rank=13, q_lora_rank=None, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5,
        rms_norm_eps=eps,
    )  # fmt: skip
    theirs = random_model(KimiLinearForCausalLM, config, seed=3)
    delta = {"n_heads": 2, "key_dim": 10, "value_dim": 10, "decay_rank": 10, "gate_rank": 10}
    spec = ModelSpec(
        arch="kda:mla=3:1", scale=scale, hidden=37, tied=False, norm_eps=eps,
        overrides={"kda": delta | {"eps": eps}, "mla": latent | {"positions": False}},
    )  # fmt: skip
    model = spec.build()
    for mixer, other in copy_backbone(model, theirs):
        (copy_weights if isinstance(mixer, KimiDeltaAttention) else copy_latent)(mixer, other)
    assert_equal(model, theirs, torch.randint(0, 101, (2, 43)), cuts=cuts)


def test_impossible_sizes_are_named() -> None:
    with pytest.raises(UserError, match="decay_rank=0 must be at least 1"):
        KimiDeltaConfig(n_heads=1, key_dim=4, value_dim=4, decay_rank=0, gate_rank=4)
