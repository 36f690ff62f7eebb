"""Comparison with `transformers`: weights copied over, then parallel and stepwise logits."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, set_seed

from archs.backbone import Model
from archs.gqa import Attention
from archs.mla import LatentAttention
from infer.engine import Engine

TOLERANCE = 1e-4


def random_model(model_class: Callable[[Any], Any], config: Any, seed: int) -> Any:
    """Their model with every parameter random, those that start as constants included."""
    set_seed(seed)
    config._attn_implementation = "eager"
    theirs = model_class(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.dim() < 2:
                parameter.normal_(1.0, 0.2)
            else:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
    return theirs


def interleaved(weight: Tensor, head_dim: int) -> Tensor:
    """Rows [h·d, D] of rotary heads from half-split order (i, i + d/2) to pairs (2i, 2i + 1)."""
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


@torch.no_grad()
def copy_backbone(
    model: Model, theirs: Any, norm_mlp: str = "post_attention_layernorm"
) -> Iterator[tuple[Any, Any]]:
    """Copy everything but the mixers; yields (our mixer, their attention) by layer."""
    model.embedding.weight.copy_(theirs.model.embed_tokens.weight)
    if model.head is not None:
        model.head.weight.copy_(theirs.lm_head.weight)
    model.norm.weight.copy_(theirs.model.norm.weight)
    for ours, other in zip(model.layers, theirs.model.layers, strict=True):
        assert ours.norm_mlp is not None and ours.mlp is not None
        ours.norm_mixer.weight.copy_(other.input_layernorm.weight)
        ours.norm_mlp.weight.copy_(getattr(other, norm_mlp).weight)
        gate_up = torch.cat((other.mlp.gate_proj.weight, other.mlp.up_proj.weight))
        ours.mlp.gate_up.weight.copy_(gate_up)
        ours.mlp.down.weight.copy_(other.mlp.down_proj.weight)
        yield ours.mixer, other.self_attn


@torch.no_grad()
def copy_attention(mixer: Attention, theirs: Any) -> None:
    """Copy a Llama-like attention."""
    dim = mixer.config.head_dim
    q, k = (interleaved(p.weight, dim) for p in (theirs.q_proj, theirs.k_proj))
    mixer.qkv.weight.copy_(torch.cat((q, k, theirs.v_proj.weight)))
    mixer.out.weight.copy_(theirs.o_proj.weight)


@torch.no_grad()
def copy_latent(mixer: LatentAttention, theirs: Any) -> None:
    """Their projections interleave a head's parts; ours keep each part of all heads together."""
    c = mixer.config
    q_last = theirs.q_proj if c.q_rank is None else theirs.q_b_proj
    per_head = q_last.weight.unflatten(0, (c.n_heads, -1)).split((c.nope_dim, c.rope_dim), 1)
    query = [part.flatten(0, 1) for part in per_head]
    latent, k_rope = theirs.kv_a_proj_with_mqa.weight.split((c.rank, c.rope_dim))
    if mixer.q_up is None or mixer.q_norm is None:
        mixer.down.weight.copy_(torch.cat((*query, k_rope, latent)))
    else:
        mixer.down.weight.copy_(torch.cat((theirs.q_a_proj.weight, k_rope, latent)))
        mixer.q_norm.weight.copy_(theirs.q_a_layernorm.weight)
        mixer.q_up.weight.copy_(torch.cat(query))
    mixer.kv_norm.weight.copy_(theirs.kv_a_layernorm.weight)
    up = theirs.kv_b_proj.weight.unflatten(0, (c.n_heads, -1)).split((c.nope_dim, c.v_dim), 1)
    mixer.kv_up.weight.copy_(torch.cat([part.flatten(0, 1) for part in up]))
    mixer.out.weight.copy_(theirs.o_proj.weight)


def pieces_of(tokens: Tensor, cuts: Sequence[int]) -> list[Tensor]:
    """Tokens [B, T] cut at the given positions, then one by one to the end."""
    length = tokens.shape[1]
    edges = [0, *cuts, *range((cuts[-1] if cuts else 0) + 1, length + 1)]
    return [tokens[:, a:b] for a, b in pairwise(edges)]


def our_steps(model: Model, pieces: Sequence[Tensor], *, page_size: int = 16) -> Tensor:
    """Logits [B, T, V], piece after piece through the engine and its store."""
    batch = pieces[0].shape[0]
    context = sum(p.shape[1] for p in pieces)
    engine = Engine(model, max_sequences=batch, max_context=context, page_size=page_size)
    slots = [engine.store.add() for _ in range(batch)]
    return torch.cat([engine.extend(slots, piece) for piece in pieces], 1)


@torch.inference_mode()
def assert_equal(model: Model, theirs: Any, tokens: Tensor, cuts: Sequence[int]) -> None:
    """Parallel logits agree, and so do stepwise ones, ours in our store, theirs in their cache."""
    expected = theirs(tokens, use_cache=False).logits
    torch.testing.assert_close(model(tokens), expected, rtol=TOLERANCE, atol=TOLERANCE)
    pieces = pieces_of(tokens, cuts)
    cache = DynamicCache(config=theirs.config)
    stepwise = torch.cat([theirs(p, past_key_values=cache).logits for p in pieces], 1)
    ours = our_steps(model, pieces)
    torch.testing.assert_close(ours, stepwise, rtol=TOLERANCE, atol=TOLERANCE)
