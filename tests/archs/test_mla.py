"""`mla` equals DeepSeek-V3's attention, and Kimi Linear's without positions; its absorbed and
expanded forms are the same function.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM

from archs.errors import UserError
from archs.mla import LatentAttention, LatentConfig
from archs.registry import ModelSpec
from archs.sizes import SCALES, Scale
from archs.state import Seen
from kernels.attention.torch import FLOP_FORMULAS
from tests.archs.hf import assert_equal, copy_backbone, copy_latent, random_model

SHAPES = [
    pytest.param(3, {"rank": 12, "nope_dim": 6, "rope_dim": 4, "v_dim": 6}, id="no-q-latent"),
    pytest.param(
        4, {"rank": 20, "nope_dim": 8, "rope_dim": 6, "v_dim": 5, "q_rank": 11}, id="q-latent"
    ),
    pytest.param(
        2, {"rank": 5, "nope_dim": 4, "rope_dim": 2, "v_dim": 9, "q_rank": 7}, id="wide-values"
    ),
    pytest.param(3, {"rank": 17, "nope_dim": 6, "rope_dim": 4, "v_dim": 6}, id="odd-rank"),
    pytest.param(3, {"rank": 13, "nope_dim": 5, "rope_dim": 4, "v_dim": 6}, id="odd-heads"),
]


def small_scale(heads: int) -> Scale:
    return Scale(name="test", d_model=heads * 8, n_layers=2, head_dim=8, vocab_size=101, seq_len=64)


@pytest.mark.parametrize(("heads", "options"), SHAPES)
@pytest.mark.parametrize("batch", [1, 3])
def test_model_equals_deepseek_v3(heads: int, options: dict[str, int], batch: int) -> None:
    scale = small_scale(heads)
    config = DeepseekV3Config(
        vocab_size=101, hidden_size=scale.d_model, intermediate_size=37, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=heads, first_k_dense_replace=2,
        kv_lora_rank=options["rank"], q_lora_rank=options.get("q_rank"),
        qk_nope_head_dim=options["nope_dim"], qk_rope_head_dim=options["rope_dim"],
        v_head_dim=options["v_dim"], rms_norm_eps=1e-5, tie_word_embeddings=True,
        num_mtp_layers=0, rope_interleave=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )  # fmt: skip
    theirs = random_model(DeepseekV3ForCausalLM, config, seed=heads)
    model = ModelSpec(arch="mla", scale=scale, overrides={"mla": options}, hidden=37).build()
    for mixer, other in copy_backbone(model, theirs):
        copy_latent(mixer, other)
    tokens = torch.randint(0, 101, (batch, 43))
    assert_equal(model, theirs, tokens, cuts=[9, 12, 13, 38])


@pytest.mark.parametrize(
    ("heads", "options"),
    [*SHAPES, pytest.param(2, {"rank": 9, "nope_dim": 7, "rope_dim": 3, "v_dim": 5}, id="odd-key")],
)
def test_without_positions_the_model_equals_kimi_linear(
    heads: int, options: dict[str, int]
) -> None:
    scale, options = small_scale(heads), options | {"positions": False}
    config = KimiLinearConfig(
        vocab_size=101, hidden_size=scale.d_model, intermediate_size=37, num_hidden_layers=2,
        num_attention_heads=heads, num_key_value_heads=heads,
        layer_types=["full_attention"] * 2, mlp_layer_types=["dense"] * 2,
        kv_lora_rank=options["rank"], q_lora_rank=options.get("q_rank"),
        qk_nope_head_dim=options["nope_dim"], qk_rope_head_dim=options["rope_dim"],
        v_head_dim=options["v_dim"], rms_norm_eps=1e-5, pad_token_id=None, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    theirs = random_model(KimiLinearForCausalLM, config, seed=heads)
    spec = ModelSpec(
        arch="mla", scale=scale, overrides={"mla": options}, hidden=37, tied=False
    )  # fmt: skip
    model = spec.build()
    for mixer, other in copy_backbone(model, theirs):
        copy_latent(mixer, other)
    assert_equal(model, theirs, torch.randint(0, 101, (2, 43)), cuts=[9, 12, 13, 38])


@pytest.mark.parametrize(("heads", "options"), SHAPES)
@pytest.mark.parametrize(("new", "past"), [(1, 30), (3, 17), (9, 1), (20, 33), (40, 2), (7, 0)])
def test_forms_agree_and_the_cheaper_one_is_taken(
    heads: int, options: dict[str, int], new: int, past: int
) -> None:
    spec = ModelSpec(arch="mla", scale=small_scale(heads), overrides={"mla": options}, hidden=8)
    mixer = spec.build(seed=5).layers[0].mixer
    assert isinstance(mixer, LatentAttention)
    c, rows = mixer.config, past + new
    generator = torch.Generator().manual_seed(new)
    q_nope = torch.randn(2, new, heads, c.nope_dim, generator=generator)
    q_rope = torch.randn(2, new, heads, c.rope_dim, generator=generator)
    held = torch.randn(2, rows, c.row_dim, generator=generator)
    mask = torch.ones(1, 1, new, rows, dtype=torch.bool).tril(past)
    seen = Seen(held, mask, False)
    outputs, flops = [], []
    for form in (mixer._absorbed, mixer._expanded):
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as count:
            outputs.append(form(q_nope, q_rope, seen))
        flops.append(count.get_total_flops())
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    assert c.absorbs(new, rows) is (new == 1 or flops[0] < flops[1])


def test_state_is_one_latent_row_for_all_heads() -> None:
    spec = ModelSpec(arch="mla", scale=SCALES["tiny"]).outline().state_specs()[0]
    assert [(t.name, t.shape) for t in spec.rows] == [("latent", (64 + 16,))]


def test_defaults_reach_deepseek_v3_ratios_at_8b() -> None:
    config = LatentConfig.at(SCALES["8b"], {})
    assert (config.rank, config.q_rank, config.nope_dim, config.rope_dim, config.v_dim) == (
        512, 1536, 128, 64, 128,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("option", "message"), [({"rope_dim": 3}, "rope_dim=3 is odd"), ({"rank": 0}, "rank=0 must")]
)
def test_impossible_shapes_are_named(option: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        LatentConfig.at(SCALES["tiny"], option)
