"""`mamba1` equals transformers' Mamba, whole model: parallel, prefill and steps with its cache."""

from typing import Any

import pytest
import torch
from transformers import DynamicCache, MambaConfig, MambaForCausalLM

from archs.backbone import Model
from archs.registry import ModelSpec
from archs.sizes import Scale
from tests.archs.hf import our_steps, pieces_of
from tests.archs.recurrent import assert_close, randomise

SHAPES = [
    pytest.param(16, {"inner": 32, "dt_rank": 3, "state_dim": 5}, 4, id="small"),
    pytest.param(24, {"inner": 72, "dt_rank": 1, "state_dim": 16}, 3, id="expand-3"),
]


def pair(d: int, options: dict[str, int], width: int) -> tuple[Model, Any]:
    scale = Scale(name="t", d_model=d, n_layers=2, head_dim=8, vocab_size=61, seq_len=64)
    spec = ModelSpec(
        arch="mamba1", scale=scale, hidden=0, overrides={"mamba1": {**options, "conv_width": width}}
    )
    ours = spec.build()
    config = MambaConfig(
        vocab_size=61, hidden_size=d, intermediate_size=options["inner"], num_hidden_layers=2,
        state_size=options["state_dim"], time_step_rank=options["dt_rank"], conv_kernel=width,
        expand=options["inner"] // d, layer_norm_epsilon=1e-5, tie_word_embeddings=True,
    )  # fmt: skip
    theirs = MambaForCausalLM(config).eval()
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
        mixer.x_z.weight.copy_(other.mixer.in_proj.weight)
        mixer.conv_weight.copy_(other.mixer.conv1d.weight[:, 0])
        mixer.conv_bias.copy_(other.mixer.conv1d.bias)
        mixer.dt_b_c.weight.copy_(other.mixer.x_proj.weight)
        mixer.dt.weight.copy_(other.mixer.dt_proj.weight)
        mixer.dt_bias.copy_(other.mixer.dt_proj.bias)
        mixer.A_log.copy_(other.mixer.A_log)
        mixer.D.copy_(other.mixer.D)
        mixer.out.weight.copy_(other.mixer.out_proj.weight)


@pytest.mark.parametrize(("d", "options", "width"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 63, 101])
@torch.inference_mode()
def test_model_equals_mamba(d: int, options: dict[str, int], width: int, tokens: int) -> None:
    ours, theirs = pair(d, options, width)
    ids = torch.randint(61, (2, tokens))
    expected = theirs(ids, use_cache=False).logits
    assert_close(ours(ids), expected)
    assert_close(our_steps(ours, [ids]), expected)


@pytest.mark.parametrize(("d", "options", "width"), SHAPES)
@torch.inference_mode()
def test_steps_equal_mamba_with_its_cache(d: int, options: dict[str, int], width: int) -> None:
    ours, theirs = pair(d, options, width)
    pieces = pieces_of(torch.randint(61, (3, 40)), [31])
    cache = DynamicCache(config=theirs.config)
    expected = torch.cat([theirs(p, cache_params=cache, use_cache=True).logits for p in pieces], 1)
    assert_close(our_steps(ours, pieces), expected)
