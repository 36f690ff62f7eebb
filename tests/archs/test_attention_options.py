"""Options of softmax attention: each equals a published model, in one pass and step by step."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from archs.backbone import Model
from archs.cla import CrossLayerAttention
from archs.errors import UserError
from archs.gqa import Attention
from archs.layer import LayerSpec
from archs.layers import RMSNorm
from archs.registry import ModelSpec
from archs.sizes import Scale
from eval.proof.conformance import CHECK_SCALE, LAWS, Subject, judge
from kernels.rope.torch import half_to_interleaved
from tests.archs.hf import assert_equal, copy_backbone, random_model

HIDDEN, VOCABULARY = 37, 101
Options = Mapping[str, Any]


def scale_of(heads: int, head_dim: int, n_layers: int = 2) -> Scale:
    return Scale(
        name="test", d_model=heads * head_dim, n_layers=n_layers, head_dim=head_dim,
        vocab_size=VOCABULARY, seq_len=64,
    )  # fmt: skip


def model_of(scale: Scale, layers: list[tuple[str, Options]], eps: float) -> Model:
    specs = tuple(LayerSpec(mixer=m, options=dict(o), hidden=HIDDEN) for m, o in layers)
    return ModelSpec(arch=layers[0][0], scale=scale, layers=specs, norm_eps=eps).build()


def shape_of(heads: int, kv_heads: int, head_dim: int, n_layers: int = 2) -> dict[str, Any]:
    """What their configurations call the same."""
    return {
        "vocab_size": VOCABULARY, "hidden_size": heads * head_dim, "intermediate_size": HIDDEN,
        "num_hidden_layers": n_layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "tie_word_embeddings": True,
        "pad_token_id": None,
    }  # fmt: skip


def rope(theta: float, **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta, **more}


def channels(head_dim: int, halves: int) -> Tensor:
    """Their channel for each of ours, where they rotate the first `halves` by halves."""
    return torch.cat((half_to_interleaved(halves), torch.arange(halves, head_dim)))


def in_order(weight: Tensor, order: Tensor) -> Tensor:
    """Rows [h·d, D] with every head's channels in another order."""
    return weight.unflatten(0, (-1, len(order)))[:, order].flatten(0, 1)


@torch.no_grad()
def copy_heads(
    mixer: Attention, theirs: Any, order: Tensor, q_weight: Tensor | None = None
) -> None:
    """Copy projections, and norms where there are any; q_weight: where theirs makes more."""
    q = theirs.q_proj.weight if q_weight is None else q_weight
    kept = [in_order(q, order), in_order(theirs.k_proj.weight, order), theirs.v_proj.weight]
    mixer.qkv.weight[: sum(mixer.qkv.sizes[:3])] = torch.cat(kept)
    mixer.out.weight.copy_(theirs.o_proj.weight)
    if mixer.q_norm is not None and mixer.k_norm is not None:
        mixer.q_norm.weight.copy_(theirs.q_norm.weight[order])
        mixer.k_norm.weight.copy_(theirs.k_norm.weight[order])


def random_tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, VOCABULARY, (batch, length))


SHAPES = pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(4, 2, 8), (3, 3, 10), (5, 1, 6)]
)


@SHAPES
def test_norms_of_queries_and_keys_equal_qwen3(heads: int, kv_heads: int, head_dim: int) -> None:
    config = Qwen3Config(
        **shape_of(heads, kv_heads, head_dim), rms_norm_eps=1e-3, rope_parameters=rope(5e5)
    )
    theirs = random_model(Qwen3ForCausalLM, config, seed=heads)
    options = {"kv_heads": kv_heads, "qk_norm": True, "qk_eps": 1e-3, "rope_theta": 5e5}
    model = model_of(scale_of(heads, head_dim), [("gqa", options)] * 2, 1e-3)
    for mixer, other in copy_backbone(model, theirs):
        copy_heads(mixer, other, channels(head_dim, head_dim))
    assert_equal(model, theirs, random_tokens(2, 41), cuts=[13, 14, 17, 36])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rope_dim"), [(4, 2, 16, 4), (3, 1, 8, 4), (2, 2, 10, 2)]
)
def test_gates_and_partial_rotation_equal_qwen3_next(
    heads: int, kv_heads: int, head_dim: int, rope_dim: int
) -> None:
    config = Qwen3NextConfig(
        **shape_of(heads, kv_heads, head_dim), rms_norm_eps=1e-6, num_experts=0,
        layer_types=["full_attention"] * 2,
        rope_parameters=rope(1e4, partial_rotary_factor=rope_dim / head_dim),
    )  # fmt: skip
    theirs = random_model(Qwen3NextForCausalLM, config, seed=heads)
    options = {"kv_heads": kv_heads, "qk_norm": True, "output_gate": True, "rope_dim": rope_dim}
    model = model_of(scale_of(heads, head_dim), [("gqa", options)] * 2, 1e-6)
    with torch.no_grad():
        for mixer, other in copy_backbone(model, theirs):
            q, gate = other.q_proj.weight.unflatten(0, (heads, 2, head_dim)).unbind(1)
            copy_heads(mixer, other, channels(head_dim, rope_dim), q.flatten(0, 1))
            mixer.qkv.weight[-heads * head_dim :] = gate.flatten(0, 1)
        for module in model.modules():
            if isinstance(module, RMSNorm):
                # Theirs multiply by 1 + weight.
                module.weight += 1
    assert_equal(model, theirs, random_tokens(2, 41), cuts=[13, 14, 17, 36])


class _Dense(Qwen3MLP):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return super().forward(x), None


class _DenseGptOss(GptOssForCausalLM):
    """Theirs with our MLP in place of the mixture of experts."""

    def __init__(self, config: GptOssConfig) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = _Dense(config)


@SHAPES
def test_learned_sinks_equal_gpt_oss(heads: int, kv_heads: int, head_dim: int) -> None:
    config = GptOssConfig(
        **shape_of(heads, kv_heads, head_dim), attention_bias=False, sliding_window=7,
        layer_types=["sliding_attention", "full_attention"], rope_parameters=rope(1.5e5),
        num_local_experts=1, num_experts_per_tok=1,
    )  # fmt: skip
    theirs = random_model(_DenseGptOss, config, seed=heads)
    options = {"kv_heads": kv_heads, "learned_sinks": True, "rope_theta": 1.5e5}
    layers: list[tuple[str, Options]] = [("swa", {**options, "window": 7}), ("gqa", options)]
    model = model_of(scale_of(heads, head_dim), layers, 1e-5)
    for mixer, other in copy_backbone(model, theirs):
        copy_heads(mixer, other, channels(head_dim, head_dim))
        mixer.sink_logits.data.copy_(other.sinks)
    assert_equal(model, theirs, random_tokens(2, 41), cuts=[13, 14, 17, 36])


@SHAPES
def test_layers_without_rotation_equal_smollm3(heads: int, kv_heads: int, head_dim: int) -> None:
    config = SmolLM3Config(
        **shape_of(heads, kv_heads, head_dim), rms_norm_eps=1e-6, rope_parameters=rope(2e6),
        no_rope_layers=[1, 0],
    )  # fmt: skip
    theirs = random_model(SmolLM3ForCausalLM, config, seed=heads)
    options = {"kv_heads": kv_heads, "rope_theta": 2e6}
    layers: list[tuple[str, Options]] = [("gqa", options), ("gqa", {**options, "rope_dim": 0})]
    model = model_of(scale_of(heads, head_dim), layers, 1e-6)
    for layer, (mixer, other) in enumerate(copy_backbone(model, theirs)):
        copy_heads(mixer, other, channels(head_dim, 0 if layer else head_dim))
    assert_equal(model, theirs, random_tokens(2, 41), cuts=[13, 14, 17, 36])


class _PlainGemma4(Gemma4ForCausalLM):
    """Theirs with our backbone: no norms behind attention and MLP, no factor on embeddings."""

    def __init__(self, config: Gemma4TextConfig) -> None:
        super().__init__(config)
        # Otherwise they cut inputs of sharing layers that are there with embeddings a layer alone.
        self.config.output_hidden_states = True
        self.model.embed_tokens.embed_scale.fill_(1.0)
        for layer in self.model.layers:
            layer.post_attention_layernorm = nn.Identity()
            layer.post_feedforward_layernorm = nn.Identity()


@torch.no_grad()
def copy_gemma(mixer: CrossLayerAttention, theirs: Any, owner: Any, order: Tensor) -> None:
    """Values have the order of keys; a layer that shares has its owner's weight of keys."""
    parts = [theirs.q_proj] + ([] if theirs.is_kv_shared_layer else [theirs.k_proj])
    mixer.qkv.weight.copy_(torch.cat([in_order(p.weight, order) for p in parts]))
    out = theirs.o_proj.weight.unflatten(1, (-1, len(order)))
    mixer.out.weight.copy_(out[..., order].flatten(1))
    assert mixer.q_norm is not None and mixer.k_norm is not None
    # Their scores have no factor of d^-0.5.
    mixer.q_norm.weight.copy_(theirs.q_norm.weight[order] * len(order) ** 0.5)
    mixer.k_norm.weight.copy_(owner.k_norm.weight[order])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "turned", "shared"),
    [(4, 2, 8, 8, 2), (3, 1, 16, 4, 1), (2, 2, 8, 4, 3), (4, 1, 8, 2, 0)],
)
def test_one_projection_for_keys_and_values_and_shared_layers_equal_gemma4(
    heads: int, kv_heads: int, head_dim: int, turned: int, shared: int
) -> None:
    part = turned / head_dim
    rotation = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": part}
    config = Gemma4TextConfig(
        **shape_of(heads, kv_heads, head_dim, 4), global_head_dim=head_dim,
        hidden_activation="silu", hidden_size_per_layer_input=0, attention_k_eq_v=True,
        num_kv_shared_layers=shared, layer_types=["full_attention"] * 4, rms_norm_eps=1e-6,
        rope_parameters={"full_attention": rotation},
    )  # fmt: skip
    theirs = random_model(_PlainGemma4, config, seed=heads)
    options = {
        "kv_heads": kv_heads, "tied_kv": True, "qk_norm": True, "rope_dim": turned,
        # Their frequencies are those of a whole head, of which the first are taken.
        "rope_theta": 1e6**part, **({"shared_layers": shared} if shared else {"group": 1}),
    }  # fmt: skip
    model = model_of(scale_of(heads, head_dim, 4), [("cla", options)] * 4, 1e-6)
    order, owner = half_to_interleaved(head_dim), None
    for mixer, other in copy_backbone(model, theirs, "pre_feedforward_layernorm"):
        owner = owner if other.is_kv_shared_layer else other
        copy_gemma(mixer, other, owner, order)
    assert_equal(model, theirs, random_tokens(2, 41), cuts=[13, 14, 17, 36])
    own = [spec.owned for spec in model.state_specs()]
    assert [len(rows) for rows in own] == [1] * (4 - shared) + [0] * shared
    assert own[0][0].shape == (kv_heads, head_dim)


KIT = {
    "norms-gate": ("gqa", {"qk_norm": True, "output_gate": True}),
    "sinks-in-a-window": ("swa", {"learned_sinks": True, "rope_dim": 16, "sinks": 2}),
    "no-rotation": ("mqa", {"rope_dim": 0}),
    "all": (
        "gqa", {"qk_norm": True, "output_gate": True, "learned_sinks": True, "rope_dim": 16},
    ),
    "tied": ("cla", {"tied_kv": True}),
    "tied-all": (
        "cla",
        {
            "tied_kv": True, "shared_layers": 1, "qk_norm": True, "output_gate": True,
            "learned_sinks": True, "rope_dim": 16,
        },
    ),
    "shared": ("cla", {"shared_layers": 1, "qk_norm": True, "output_gate": True}),
}  # fmt: skip


@pytest.fixture(scope="module", params=KIT, ids=str)
def subject(request: pytest.FixtureRequest) -> Subject:
    arch, options = KIT[request.param]
    subject = Subject(arch)
    subject.spec = ModelSpec(arch=arch, scale=CHECK_SCALE, overrides={arch: options})
    subject.model = subject.spec.build()
    with torch.no_grad():
        for name, parameter in subject.model.named_parameters():
            if name.endswith(("_norm.weight", "sink_logits")):
                parameter.normal_(1.0, 0.3)
    return subject


@pytest.mark.parametrize("law", [law for law in LAWS if law != "triton equals torch"])
def test_options_obey_all_laws(subject: Subject, law: str) -> None:
    verdict = judge(subject, law)
    assert verdict.passed, f"{verdict.name}: {verdict.detail}"


def test_one_projection_for_keys_and_values_halves_the_state() -> None:
    def held(**options: Any) -> int:
        spec = ModelSpec(arch="cla", scale=CHECK_SCALE, overrides={"cla": options})
        return spec.outline().state_bytes(100)

    assert 2 * held(tied_kv=True) == held()
    assert 2 * held(tied_kv=True, shared_layers=1) == held(shared_layers=1)


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("gqa", {"rope_dim": 7}, "rope_dim=7 is odd; rotary pairs need an even one"),
        ("gqa", {"rope_dim": 34}, "rope_dim=34 is more than head_dim=32; rotate at most all"),
        ("swa", {"rope_dim": -2}, "rope_dim=-2 must be at least 0"),
        ("mha", {"qk_eps": 0.0}, "qk_eps=0.0 must be positive and finite"),
        ("mqa", {"qk_norm": 1}, "qk_norm must be of type bool, not 1"),
        ("gqa", {"output_gates": True}, "option 'output_gates'.*output_gate"),
        ("nsa", {"learned_sinks": True}, "learned_sinks=True: nsa's three attentions have no such"),
        ("nsa", {"rope_dim": 0}, "rope_dim=0: nsa's three attentions have no such form"),
        ("cla", {"tied_kv": True, "window": 5}, "tied_kv with window=5: rows that are rotated"),
        ("cla", {"shared_layers": -1}, "shared_layers=-1 must be at least 0"),
        ("gqa", {"tied_kv": True}, "option 'tied_kv'"),
    ],
)
def test_options_that_do_not_fit_are_named(arch: str, options: Options, message: str) -> None:
    spec = ModelSpec(arch=arch, scale=replace(CHECK_SCALE, head_dim=32), overrides={arch: options})
    with pytest.raises(UserError, match=message):
        spec.outline()
