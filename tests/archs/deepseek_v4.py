"""The attention of `transformers`' DeepSeek-V4 beside one of our mixers: weights, passes, steps."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV4Config, DynamicCache
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4Attention,
    DeepseekV4RotaryEmbedding,
)

from archs.hca import HeavilyCompressedAttention, HeavilyCompressedConfig
from archs.mixer import Mixer
from infer.store import StateStore
from tests.archs.hf import random_model

KINDS = ("heavily_compressed_attention", "compressed_sparse_attention")


class Theirs:
    """One attention with random weights."""

    def __init__(
        self, kind: str, d_model: int, c: HeavilyCompressedConfig, seed: int, **options: Any
    ) -> None:
        self.window = c.window
        self.config = DeepseekV4Config(
            vocab_size=11, hidden_size=d_model, num_hidden_layers=1, layer_types=[kind],
            num_attention_heads=c.n_heads, head_dim=c.dim, q_lora_rank=c.q_rank,
            partial_rotary_factor=c.rope_dim / c.dim, compress_rope_theta=c.rope_theta,
            compress_rates=dict.fromkeys(KINDS, c.every), sliding_window=c.window,
            o_groups=c.out_groups, o_lora_rank=c.out_rank, rms_norm_eps=c.eps, **options,
        )  # fmt: skip
        self.attention = random_model(partial(DeepseekV4Attention, layer_idx=0), self.config, seed)
        self.rotary = DeepseekV4RotaryEmbedding(self.config)

    @torch.inference_mode()
    def __call__(self, x: Tensor, pieces: Sequence[int] = ()) -> Tensor:
        """x: [B, T, D]; in one pass, or in pieces by their cache."""
        cache = DynamicCache(config=self.config) if pieces else None
        out, past = [], 0
        for part in x.split(list(pieces) or x.shape[1], 1):
            at = torch.arange(past, past + part.shape[1])[None].expand(len(x), -1)
            # Their cache keeps one row less than the window.
            first = 0 if cache is None else max(0, past - self.window + 1)
            rows = torch.arange(first, past + part.shape[1])
            seen = (rows <= at[..., None]) & (rows > at[..., None] - self.window)
            mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)[:, None]
            angles = self.rotary(x, at, layer_type="compress")
            y, _ = self.attention(part, {"compress": angles}, at, mask, past_key_values=cache)
            out.append(y)
            past += part.shape[1]
        return torch.cat(out, 1)


def series_first(t: Tensor, series: int) -> Tensor:
    """Their columns for the next group's row come before those for a group's own; ours after."""
    return torch.cat(t.chunk(series, -1)[::-1], -1)


@torch.no_grad()
def copy_compressed(mixer: HeavilyCompressedAttention, theirs: DeepseekV4Attention) -> None:
    """Copy all but an indexer."""
    pool, series = theirs.compressor, mixer.series
    values, gates = (series_first(p.weight.T, series).T for p in (pool.kv_proj, pool.gate_proj))
    mixer.down.weight.copy_(
        torch.cat((theirs.q_a_proj.weight, theirs.kv_proj.weight, values, gates))
    )
    mixer.q_norm.weight.copy_(theirs.q_a_norm.weight)
    mixer.q_up.weight.copy_(theirs.q_b_proj.weight)
    mixer.row_norm.weight.copy_(theirs.kv_norm.weight)
    mixer.pool_norm.weight.copy_(pool.kv_norm.weight)
    mixer.pool_bias.copy_(series_first(pool.position_bias, series))
    mixer.sinks.copy_(theirs.sinks)
    mixer.out_down.weight.copy_(theirs.o_a_proj.weight)
    mixer.out.weight.copy_(theirs.o_b_proj.weight)


@torch.inference_mode()
def our_pieces(mixer: Mixer, x: Tensor, pieces: Sequence[int]) -> Tensor:
    """x [B, T, D], piece after piece over the state of a store."""
    store = StateStore(
        [mixer.state_spec()], max_sequences=len(x), max_context=x.shape[1], page_size=16
    )
    slots, out = [store.add() for _ in x], []
    for part in x.split(list(pieces), 1):
        with store.step(slots, part.shape[1]) as step:
            out.append(mixer.extend(part, step.layers[0]))
    return torch.cat(out, 1)
