"""`gdn` equals Qwen3-Next's gated delta net, parallel and step by step with its cache."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from archs.errors import UserError
from archs.gdn import GatedDeltaConfig, GatedDeltaNet
from archs.mixer import Place
from tests.archs.recurrent import assert_close, mixer_steps, randomise

SHAPES = [
    pytest.param(24, 2, 2, 6, 10, id="equal-heads"),
    pytest.param(32, 2, 4, 8, 8, id="two-value-heads-per-key-head"),
    pytest.param(40, 1, 3, 12, 5, id="one-key-head"),
]


def pair(d: int, keys: int, values: int, n: int, p: int) -> tuple[GatedDeltaNet, Any]:
    config = Qwen3NextConfig(
        hidden_size=d, linear_num_key_heads=keys, linear_num_value_heads=values,
        linear_key_head_dim=n, linear_value_head_dim=p, linear_conv_kernel_dim=4,
        num_hidden_layers=1, layer_types=["linear_attention"], vocab_size=11, rms_norm_eps=1e-6,
    )  # fmt: skip
    theirs = Qwen3NextGatedDeltaNet(config, 0).eval()
    randomise(theirs, seed=d)
    ours = GatedDeltaNet(
        GatedDeltaConfig(key_heads=keys, value_heads=values, key_dim=n, value_dim=p),
        Place(d_model=d, n_layers=1, layer=0, siblings=(0,)),
    )
    copy_weights(ours, theirs)
    return ours, theirs


@torch.no_grad()
def copy_weights(ours: GatedDeltaNet, theirs: Any) -> None:
    """Their input projections interleave the parts of one key head; ours keep parts together."""
    c = ours.config
    share = c.value_heads // c.key_heads
    sizes = (c.key_dim, c.key_dim, share * c.value_dim, share * c.value_dim)
    qkvz = theirs.in_proj_qkvz.weight.unflatten(0, (c.key_heads, -1)).split(sizes, 1)
    ba = theirs.in_proj_ba.weight.unflatten(0, (c.key_heads, -1)).split((share, share), 1)
    ours.q_k_v_z_b_a.weight.copy_(torch.cat([part.flatten(0, 1) for part in (*qkvz, *ba)]))
    ours.conv_weight.copy_(theirs.conv1d.weight[:, 0])
    ours.A_log.copy_(theirs.A_log)
    ours.dt_bias.copy_(theirs.dt_bias)
    ours.norm_weight.copy_(theirs.norm.weight)
    ours.out.weight.copy_(theirs.out_proj.weight)


@pytest.mark.parametrize(("d", "keys", "values", "n", "p"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 63, 130])
@torch.inference_mode()
def test_gdn_equals_qwen3_next(d: int, keys: int, values: int, n: int, p: int, tokens: int) -> None:
    ours, theirs = pair(d, keys, values, n, p)
    x = torch.randn(2, tokens, d)
    expected = theirs(x)
    assert_close(ours(x), expected)
    assert_close(mixer_steps(ours, x, [tokens]), expected)


@pytest.mark.parametrize(("d", "keys", "values", "n", "p"), SHAPES)
@torch.inference_mode()
def test_gdn_steps_equal_qwen3_next_with_its_cache(
    d: int, keys: int, values: int, n: int, p: int
) -> None:
    ours, theirs = pair(d, keys, values, n, p)
    x = torch.randn(2, 78, d)
    cache = DynamicCache(config=theirs_config(theirs, d))
    sizes = [71, *[1] * 7]
    expected = torch.cat([theirs(piece, cache_params=cache) for piece in x.split(sizes, 1)], 1)
    assert_close(mixer_steps(ours, x, sizes), expected)


def theirs_config(theirs: Any, d: int) -> Qwen3NextConfig:
    return Qwen3NextConfig(
        hidden_size=d, num_hidden_layers=1, layer_types=["linear_attention"],
        linear_conv_kernel_dim=theirs.conv_kernel_size,
    )  # fmt: skip


def test_value_heads_must_be_a_multiple_of_key_heads() -> None:
    with pytest.raises(UserError, match="value_heads=3 is not divisible by key_heads=2"):
        GatedDeltaConfig(key_heads=2, value_heads=3, key_dim=4, value_dim=4)
