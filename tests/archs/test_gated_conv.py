"""`shortconv` equals transformers' LFM2 without attention: parallel, prefill and steps."""

from typing import Any

import pytest
import torch
from transformers import Lfm2Config, Lfm2ForCausalLM

from archs.backbone import Model
from archs.errors import UserError
from archs.gated_conv import GatedConvConfig
from archs.registry import ModelSpec
from archs.sizes import Scale
from tests.archs.hf import our_steps, pieces_of, random_model
from tests.archs.recurrent import assert_close

SHAPES = [pytest.param(16, 3, id="published"), pytest.param(24, 5, id="wider")]


def pair(d: int, width: int) -> tuple[Model, Any]:
    scale = Scale(name="t", d_model=d, n_layers=3, head_dim=8, vocab_size=61, seq_len=64)
    config = Lfm2Config(
        vocab_size=61, hidden_size=d, intermediate_size=40, num_hidden_layers=3, conv_L_cache=width,
        num_attention_heads=2, num_key_value_heads=1, layer_types=["conv"] * 3, norm_eps=1e-5,
        block_auto_adjust_ff_dim=False, tie_word_embeddings=True,
    )  # fmt: skip
    theirs = random_model(Lfm2ForCausalLM, config, seed=d)
    overrides = {"shortconv": {"channels": d, "conv_width": width}}
    ours = ModelSpec(arch="shortconv", scale=scale, hidden=40, overrides=overrides).build()
    copy_weights(ours, theirs)
    return ours, theirs


@torch.no_grad()
def copy_weights(ours: Model, theirs: Any) -> None:
    ours.embedding.weight.copy_(theirs.model.embed_tokens.weight)
    ours.norm.weight.copy_(theirs.model.embedding_norm.weight)
    for block, other in zip(ours.layers, theirs.model.layers, strict=True):
        assert block.mlp is not None and block.norm_mlp is not None
        block.norm_mixer.weight.copy_(other.operator_norm.weight)
        block.norm_mlp.weight.copy_(other.ffn_norm.weight)
        gate_up = torch.cat((other.feed_forward.w1.weight, other.feed_forward.w3.weight))
        block.mlp.gate_up.weight.copy_(gate_up)
        block.mlp.down.weight.copy_(other.feed_forward.w2.weight)
        mixer: Any = block.mixer
        mixer.b_c_x.weight.copy_(other.conv.in_proj.weight)
        mixer.conv_weight.copy_(other.conv.conv.weight[:, 0])
        mixer.out.weight.copy_(other.conv.out_proj.weight)


@pytest.mark.parametrize(("d", "width"), SHAPES)
@pytest.mark.parametrize("tokens", [1, 2, 63, 130])
@torch.inference_mode()
def test_model_equals_lfm2(d: int, width: int, tokens: int) -> None:
    ours, theirs = pair(d, width)
    ids = torch.randint(61, (2, tokens))
    expected = theirs(ids, use_cache=False).logits
    assert_close(ours(ids), expected)
    assert_close(our_steps(ours, [ids]), expected)


@pytest.mark.parametrize(("d", "width"), SHAPES)
@torch.inference_mode()
def test_steps_equal_lfm2_in_one_pass(d: int, width: int) -> None:
    # Its cache cannot be asked: transformers refuses one without any attention layer.
    ours, theirs = pair(d, width)
    ids = torch.randint(61, (3, 40))
    assert_close(our_steps(ours, pieces_of(ids, [31])), theirs(ids, use_cache=False).logits)
    assert_close(our_steps(ours, pieces_of(ids, [1])), theirs(ids, use_cache=False).logits)


def test_the_state_is_the_tail_alone_at_any_context() -> None:
    scale = Scale(name="t", d_model=16, n_layers=3, head_dim=8, vocab_size=61, seq_len=64)
    model = ModelSpec(arch="shortconv", scale=scale, hidden=0).outline()
    assert model.state_bytes(1) == model.state_bytes(100_000) == 3 * 2 * 16 * 4


def test_a_convolution_of_one_token_is_refused() -> None:
    with pytest.raises(UserError, match="conv_width"):
        GatedConvConfig(channels=8, conv_width=1)
