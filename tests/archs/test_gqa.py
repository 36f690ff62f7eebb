"""`mha`, `gqa` and `mqa` equal the attention of Llama, in a whole model with a tied head."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from archs.errors import UserError
from archs.registry import ModelSpec
from archs.sizes import Scale, get_scale
from tests.archs.hf import assert_equal, copy_attention, copy_backbone, random_model


@pytest.mark.parametrize(
    ("arch", "heads", "kv_heads", "head_dim", "theta"),
    [
        ("mha", 3, 3, 10, 10_000.0),
        ("gqa", 6, 2, 8, 500_000.0),
        ("gqa", 4, 2, 16, 10_000.0),
        ("mqa", 5, 1, 6, 10_000.0),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_model_equals_llama(
    arch: str, heads: int, kv_heads: int, head_dim: int, theta: float, batch: int
) -> None:
    scale = Scale(
        name="test", d_model=heads * head_dim, n_layers=2, head_dim=head_dim, vocab_size=101,
        seq_len=64,
    )  # fmt: skip
    config = LlamaConfig(
        vocab_size=101, hidden_size=scale.d_model, intermediate_size=37, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
        rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )  # fmt: skip
    theirs = random_model(LlamaForCausalLM, config, seed=heads)
    options = {"kv_heads": kv_heads, "rope_theta": theta}
    model = ModelSpec(arch=arch, scale=scale, overrides={arch: options}, hidden=37).build()
    for mixer, other in copy_backbone(model, theirs):
        copy_attention(mixer, other)
    tokens = torch.randint(0, 101, (batch, 41))
    assert_equal(model, theirs, tokens, cuts=[13, 14, 17, 36])


def test_head_counts_that_do_not_divide_are_named() -> None:
    scale = Scale(
        name="test", d_model=48, n_layers=1, head_dim=8, vocab_size=8, seq_len=8
    )  # fmt: skip
    spec = ModelSpec(arch="gqa", scale=scale, overrides={"gqa": {"kv_heads": 4}})
    with pytest.raises(UserError, match="n_heads=6 is not divisible by kv_heads=4"):
        spec.build()


def test_odd_head_dim_is_refused() -> None:
    scale = Scale(name="test", d_model=21, n_layers=1, head_dim=7, vocab_size=8, seq_len=8)
    with pytest.raises(UserError, match="head_dim=7 is odd"):
        ModelSpec(arch="mha", scale=scale).build()


@pytest.mark.parametrize(
    ("arch", "heads", "kv_heads"),
    [("mha", 8, 8), ("mqa", 8, 1), ("gqa", 8, 2), ("gqa", 2, 1), ("swa", 8, 8), ("cla", 16, 4),
     ("nsa", 16, 4), ("gta", 16, 4)],
)  # fmt: skip
def test_kv_heads_follow_query_heads_that_are_given(arch: str, heads: int, kv_heads: int) -> None:
    model = ModelSpec(arch=f"{arch}(n_heads={heads},head_dim=16)", scale=get_scale("tiny"))
    config = model.outline().layers[0].mixer.config
    assert (config.n_heads, config.kv_heads) == (heads, kv_heads)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mha(kv_heads=2)", "kv_heads=2 with n_heads=4 is not mha, which has 4; leave kv_heads"),
        ("mqa(kv_heads=2)", "kv_heads=2 with n_heads=4 is not mqa, which has 1"),
    ],
)
def test_a_name_means_its_kv_heads(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        ModelSpec(arch=name, scale=get_scale("tiny")).outline()
