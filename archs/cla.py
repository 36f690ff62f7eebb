"""Cross-layer attention (arXiv 2405.12981): neighbouring layers read one layer's keys and values.

Among the layers of this kind, each `group` of neighbours shares the KV of its lowest member.
That one owns the state; the others hold query and output projections only and neither compute
nor store keys. Slope of the state: 1/group of `gqa`. Equals `gqa` at group=1.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from archs.checks import at_least
from archs.gqa import Attention, AttentionConfig, GroupedConfig
from archs.layers import Projection
from archs.mixer import Place, Shared, takes_unnormed
from archs.ops.dense import Input
from archs.ops.rotary import rotate_new
from archs.spec import StateSpec
from archs.state import LayerState
from kernels.rope.torch import rotate


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossLayerConfig(GroupedConfig):
    """`gqa` whose KV serves `group` neighbouring layers."""

    group: int = 2

    def __post_init__(self) -> None:
        AttentionConfig.__post_init__(self)
        at_least(self, 1, "group")


class CrossLayerAttention(Attention):
    """Attention over its own keys and values, or over those of the layer `owner`."""

    Config = CrossLayerConfig

    def __init__(self, config: CrossLayerConfig, place: Place) -> None:
        super().__init__(config, place)
        rank = place.siblings.index(place.layer)
        owner = place.siblings[rank - rank % config.group]
        self.layer = place.layer
        self.owner = None if owner == place.layer else owner
        if self.owner is not None:
            self.qkv = Projection(place.d_model, config.n_heads * config.head_dim)

    def forward(self, x: Tensor, shared: Shared | None = None) -> Tensor:
        """x: [B, T, D] -> [B, T, D]. Owners leave their rows in `shared` for the others."""
        angles = self._angles(x)
        if self.owner is not None:
            if shared is None or self.owner not in shared:
                raise ValueError(
                    f"layer {self.layer} reads the KV of layer {self.owner}: run that layer "
                    "first, with the same `shared`"
                )
            return self._attend(rotate(self._queries(x), angles), shared[self.owner])
        q, kv = self._split(x, angles)
        seen = self._all(kv)
        if shared is not None:
            shared[self.layer] = seen
        return self._attend(q, seen)

    @takes_unnormed
    def extend(self, x: Input, state: LayerState) -> Tensor:
        """x: [B, K, D] -> [B, K, D]."""
        if self.owner is None:
            return super().extend(x, state)
        q = rotate_new(self._queries(x), state, theta=self.config.rope_theta, backend=self.backend)
        return self._attend(q, state.seen("kv"))

    def _queries(self, x: Input) -> Tensor:
        """[B, K, D] -> queries [B, K, H, d] of a layer without its own KV, not yet rotated."""
        return self.qkv(x).unflatten(-1, (-1, self.config.head_dim))

    def state_spec(self) -> StateSpec:
        """K and V as in `gqa`, owned by the lowest layer of the group."""
        (kv,) = super().state_spec().rows
        return StateSpec(rows=(replace(kv, owner=self.owner),))
