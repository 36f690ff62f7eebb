"""Cross-layer attention (arXiv 2405.12981): several layers read one layer's keys and values.

Among the layers of this kind, each `group` of neighbours shares the KV of its lowest member; or, as
in Gemma 4, the last `shared_layers` share that of the layer before them. That one owns the state;
the others hold query and output projections only and neither compute nor store keys. Slope of the
state: 1/group of `gqa`. Equals `gqa` at group=1.

With `tied_kv` one projection makes keys and values, and the state holds it once (Gemma 4's
`attention_k_eq_v`): a row is a head's value, and becomes a key when it is read, by the weight of
the keys' norm and a rotation by the row's position. Equals the attention of `transformers`' Gemma 4
but for its factor on scores, which the weight of the queries' norm takes in.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from archs.checks import at_least
from archs.cost import OpCost, Step
from archs.errors import UserError
from archs.gqa import Attention, AttentionConfig, GroupedConfig
from archs.layers import RMSNorm
from archs.mixer import Place, Shared, takes_unnormed
from archs.ops.attention import attend_turned
from archs.ops.dense import Input
from archs.ops.rotary import rotate_new
from archs.spec import StateSpec
from archs.state import LayerState, Rows


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossLayerConfig(GroupedConfig):
    """`gqa` whose KV serves `group` neighbouring layers.

    shared_layers: so many of the last layers read the KV of the layer before them, of which there
    is one at least, and all others have their own; then `group` says nothing (0: groups).
    tied_kv: keys and values are one projection, and a row of the state. With `qk_norm` both are
    normed, and each layer that reads the rows weighs the channels of their keys itself.
    """

    group: int = 2
    shared_layers: int = 0
    tied_kv: bool = False

    def __post_init__(self) -> None:
        AttentionConfig.__post_init__(self)
        at_least(self, 1, "group")
        at_least(self, 0, "shared_layers")
        if self.tied_kv and self.window is not None:
            raise UserError(
                f"tied_kv with window={self.window}: rows that are rotated when they are read must "
                "be those of all tokens; leave the window or tied_kv out"
            )

    def owner(self, place: Place) -> int | None:
        """The layer whose KV the layer at `place` reads; None: its own."""
        rank = place.siblings.index(place.layer)
        if self.shared_layers:
            last = max(0, len(place.siblings) - self.shared_layers - 1)
            owner = place.siblings[min(rank, last)]
        else:
            owner = place.siblings[rank - rank % self.group]
        return None if owner == place.layer else owner


class CrossLayerAttention(Attention):
    """Attention over its own keys and values, or over those of the layer `owner`."""

    Config = CrossLayerConfig
    #: Several layers ask for the same rows.
    evictable = frozenset()
    config: CrossLayerConfig

    def __init__(self, config: CrossLayerConfig, place: Place) -> None:
        owner = config.owner(place)
        own = 1 if config.tied_kv else 2
        super().__init__(config, place, kv_parts=own if owner is None else 0)
        self.layer, self.owner = place.layer, owner
        if config.tied_kv and config.qk_norm:
            self.k_norm = RMSNorm(config.head_dim, eps=config.qk_eps)

    def _normed(self, heads: Tensor) -> Tensor:
        c = self.config
        if self.q_norm is None or not c.tied_kv:
            return super()._normed(heads)
        q, kv = heads.tensor_split((c.n_heads,), 2)
        return torch.cat((self.q_norm(q), F.rms_norm(kv, kv.shape[-1:], eps=c.qk_eps)), 2)

    def forward(self, x: Tensor, shared: Shared | None = None) -> Tensor:
        """x: [B, T, D] -> [B, T, D]. Owners leave their rows in `shared` for the others."""
        heads, gate = self._heads(x)
        if self.kv_parts == 2:
            q, kv = self._rotated(heads)
        else:
            q, kv = heads.tensor_split((self.config.n_heads,), 2)
            q = self._turned(q)
        if self.owner is None:
            seen: Rows = self._all(kv)
            if shared is not None:
                shared[self.layer] = seen
        elif shared is None or self.owner not in shared:
            raise ValueError(
                f"layer {self.layer} reads the KV of layer {self.owner}: run that layer "
                "first, with the same `shared`"
            )
        else:
            seen = shared[self.owner]
        if self.config.tied_kv:
            return self._attend_tied(q, seen, self._angles(x).squeeze(1), gate)
        return self._attend(q, seen, gate)

    @takes_unnormed
    def extend(self, x: Input, state: LayerState) -> Tensor:
        """x: [B, K, D] -> [B, K, D]."""
        if self.kv_parts == 2:
            return super().extend(x, state)
        c = self.config
        heads, gate = self._heads(x)
        q, kv = heads.tensor_split((c.n_heads,), 2)
        q = rotate_new(q, state, theta=c.rope_theta, rope_dim=c.rope_dim, backend=self.backend)
        seen = state.append("kv", kv) if self.owner is None else state.seen("kv")
        if not c.tied_kv:
            return self._attend(q, seen, gate)
        angles = state.rotary(c.head_dim, c.rope_theta, c.rope_dim)
        return self._attend_tied(q, seen, angles, gate)

    def _attend_tied(self, q: Tensor, seen: Rows, angles: Tensor, gate: Tensor | None) -> Tensor:
        weight = None if self.k_norm is None else self.k_norm.weight
        y = attend_turned(q, seen, weight, angles, self.sink_logits, backend=self.backend)
        return self._output(y, gate)

    def state_spec(self) -> StateSpec:
        """K and V as in `gqa`, or one row for both, owned by the layer that makes them."""
        (kv,) = super().state_spec().rows
        if self.config.tied_kv:
            kv = replace(kv, shape=kv.shape[1:])
        return StateSpec(rows=(replace(kv, owner=self.owner),))

    def _cost_before(self, step: Step) -> list[OpCost]:
        c, found = self.config, super()._cost_before(step)
        if c.tied_kv:
            rows = self.state_spec().rows[0].visible_rows(step.context, step.new_tokens)
            each = 3 * c.turned + c.qk_norm * c.head_dim
            flops = step.batch * rows * c.kv_heads * each
            found.append(OpCost(name="keys of rows", vector_flops=flops))
        return found
