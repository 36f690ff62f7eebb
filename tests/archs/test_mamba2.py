"""`mamba2` equals transformers' Mamba-2, whole model: parallel, prefill and cached steps."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, Mamba2Config, Mamba2ForCausalLM

from archs.backbone import Model
from archs.errors import UserError
from archs.mamba2 import Mamba2Config as OurConfig
from archs.registry import ModelSpec
from archs.sizes import Scale
from tests.archs.hf import our_steps, pieces_of
from tests.archs.recurrent import assert_close, randomise

SHAPES = [
    pytest.param(16, {"n_heads": 4, "head_dim": 8, "state_dim": 6}, id="one-group"),
    pytest.param(24, {"n_heads": 6, "head_dim": 8, "state_dim": 16, "groups": 3}, id="groups"),
]


def pair(d: int, options: dict[str, int]) -> tuple[Model, Any]:
    scale = Scale(name="t", d_model=d, n_layers=2, head_dim=8, vocab_size=61, seq_len=64)
    ours = ModelSpec(arch="mamba2", scale=scale, hidden=0, overrides={"mamba2": options}).build()
    config = Mamba2Config(
        vocab_size=61, hidden_size=d, num_hidden_layers=2, num_heads=options["n_heads"],
        head_dim=options["head_dim"], state_size=options["state_dim"],
        n_groups=options.get("groups", 1), expand=options["n_heads"] * options["head_dim"] // d,
        chunk_size=16, tie_word_embeddings=True, layer_norm_epsilon=1e-5,
    )  # fmt: skip
    theirs = Mamba2ForCausalLM(config).eval()
    randomise(theirs, seed=d)
    copy_weights(ours, theirs)
    return ours, theirs


@torch.no_grad()
def copy_weights(ours: Model, theirs: Any) -> None:
    ours.embedding.weight.copy_(theirs.backbone.embeddings.weight)
    ours.norm.weight.copy_(theirs.backbone.norm_f.weight)
    for block, other in zip(ours.layers, theirs.backbone.layers, strict=True):
        block.norm_mixer.weight.copy_(other.norm.weight)
        mixer: Any = block.mixer
        mixer.z_x_b_c_dt.weight.copy_(other.mixer.in_proj.weight)
        mixer.conv_weight.copy_(other.mixer.conv1d.weight[:, 0])
        mixer.conv_bias.copy_(other.mixer.conv1d.bias)
        mixer.dt_bias.copy_(other.mixer.dt_bias)
        mixer.A_log.copy_(other.mixer.A_log)
        mixer.D.copy_(other.mixer.D)
        mixer.norm_weight.copy_(other.mixer.norm.weight)
        mixer.out.weight.copy_(other.mixer.out_proj.weight)


@pytest.mark.parametrize(("d", "options"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 63, 130])
@torch.inference_mode()
def test_model_equals_mamba2(d: int, options: dict[str, int], tokens: int) -> None:
    ours, theirs = pair(d, options)
    ids = torch.randint(61, (2, tokens))
    expected = theirs(ids, use_cache=False).logits
    assert_close(ours(ids), expected)
    assert_close(our_steps(ours, [ids]), expected)


@pytest.mark.parametrize(("d", "options"), SHAPES)
@torch.inference_mode()
def test_steps_equal_mamba2_with_its_cache(d: int, options: dict[str, int]) -> None:
    ours, theirs = pair(d, options)
    pieces = pieces_of(torch.randint(61, (3, 40)), [31])
    cache = DynamicCache(config=theirs.config)
    expected = torch.cat([theirs(p, cache_params=cache, use_cache=True).logits for p in pieces], 1)
    assert_close(our_steps(ours, pieces), expected)


def test_groups_must_divide_heads() -> None:
    with pytest.raises(UserError, match="n_heads=4 is not divisible by groups=3"):
        OurConfig(n_heads=4, head_dim=8, state_dim=8, groups=3)
