"""Small models of every architecture, and units of theirs that do nothing, for tests of pruning."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from archs.axes import Axis
from archs.backbone import Model
from archs.narrow import axes_of, teams
from archs.registry import HYBRIDS, REGISTRY, ModelSpec
from archs.sizes import get_scale

SCALE = get_scale("tiny").with_options(
    {"d_model": 32, "head_dim": 8, "n_layers": 4, "vocab_size": 61, "seq_len": 24, "window": 6}
)


@dataclass(frozen=True)
class Case:
    """A spec at the small scale that tests go by."""

    name: str
    arch: str
    overrides: dict[str, dict[str, Any]] = field(default_factory=dict)
    short_conv: int = 0
    tied: bool = True

    @property
    def spec(self) -> ModelSpec:
        return ModelSpec(
            arch=self.arch, scale=SCALE, overrides=self.overrides, hidden=24,
            short_conv=self.short_conv, tied=self.tied,
        )  # fmt: skip


GQA_OPTIONS = {"qk_norm": True, "output_gate": True, "learned_sinks": True, "rope_dim": 4}
# Of a single KV head torch would round the float32 of rotations otherwise than of several.
CLA_OPTIONS = {
    "n_heads": 8, "kv_heads": 4, "tied_kv": True, "qk_norm": True, "output_gate": True,
}  # fmt: skip
#: Everything registered, and options that change the layout of weights.
CASES = (
    *(Case(name, name) for name in (*REGISTRY, *HYBRIDS)),
    Case("mla-query-latent", "mla", {"mla": {"q_rank": 16}}, tied=False),
    Case("dsa-query-latent", "dsa", {"dsa": {"q_rank": 16}}),
    Case("gdn-value-heads", "gdn", {"gdn": {"key_heads": 2}}),
    Case("gdn-products", "gdn", {"gdn": {"key_heads": 2, "products": 3}}),
    Case("kda-channel-gates", "kda", {"kda": {"channel_gates": True}}),
    Case("mamba2-groups", "mamba2", {"mamba2": {"groups": 2}}, short_conv=3),
    Case("mamba3-columns", "mamba3", {"mamba3": {"rank": 2, "groups": 2}}),
    Case("cla-short-conv", "cla", short_conv=4),
    Case("rwkv7-value-residual", "rwkv7:cla=1:1", {"rwkv7": {"value_residual": True}}),
    Case("gqa-options", "gqa", {"gqa": GQA_OPTIONS}),
    Case("cla-tied", "cla", {"cla": CLA_OPTIONS}),
    Case("linear-gqa", "linear:gqa=1:1", short_conv=2, tied=False),
)


def grown(spec: ModelSpec, seed: int = 0) -> Model:
    """A model in float64 whose norms and vectors are no longer what they start as."""
    model = spec.build(seed=seed).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                noise = torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += 0.5 * noise
    return model.eval()


def text(sequences: int = 6, tokens: int = 20, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SCALE.vocab_size, (sequences, tokens), generator=generator)


def axes_in(spec: ModelSpec) -> list[str]:
    """The names of all axes of a model's layers."""
    return sorted({name for block in spec.outline().layers for name in axes_of(block)})


def half_of(axis: Axis, seed: int) -> Tensor:
    """Half the units of each group, at random: bool [count]."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(axis.groups, axis.per_group, generator=generator).argsort(1)
    return (order < axis.per_group // 2).flatten()


def kill(model: Model, name: str) -> dict[int, Tensor]:
    """Zero all weights of half the units of an axis in every layer; alike where rows are shared.

    Returns which units live, by layer.
    """
    lead = {layer: team[0] for team in teams(model) for layer in team}
    alive = {}
    with torch.no_grad():
        for layer, block in enumerate(model.layers):
            axis = axes_of(block).get(name)
            if axis is None:
                continue
            lives = half_of(axis, lead[layer] if axis.kind == "state" else layer)
            alive[layer] = lives
            for part in axis.slices:
                dead = part.units[~lives].flatten()
                block.get_parameter(part.parameter).index_fill_(part.dim, dead, 0.0)
    return alive


def spec_of(arch: str) -> ModelSpec:
    return Case(arch, arch).spec


class Text:
    """The same sequences at every step."""

    def batch_at(self, step: int) -> tuple[Tensor, Tensor]:
        ids = text(2, 13, seed=step)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
