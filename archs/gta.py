"""Grouped-tied attention (GTA, arXiv 2505.21487): one state is key and value of a group.

A projection gives each KV head one row per token. All of it is the value; its first half, without
positions, is half of the key. The key's other half is one rotary head that all KV heads share. So a
token has G·d + d/2 values of state where grouped-query attention has 2·G·d, and a step reads a row
once for keys and values.

Equals the published code but for two details: its projection to the rotary key has a bias, here
nothing has; rotary pairs are interleaved here and half-split there (`kernels.rope.torch`), the same
after each head's rotary channels are permuted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from archs.axes import Axis, columns, read_by, rows, spans
from archs.checks import at_least, positive
from archs.cost import Cost, OpCost, Step, attention_cost, linear_cost
from archs.errors import UserError
from archs.formats import Format
from archs.gqa import GroupedConfig
from archs.layers import Projection
from archs.mixer import Mixer, MixerConfig, Place, Shared, require_divisible, takes_unnormed
from archs.ops.attention import DECODE_LIMIT, attend_expanded, attend_tied
from archs.ops.dense import Input
from archs.ops.rotary import append_tied, queries_and_key
from archs.spec import RowSpec, StateSpec
from archs.state import LayerState, Rows, Seen
from kernels.rope.torch import rope_table, rotate

if TYPE_CHECKING:
    from archs.sizes import Scale


@dataclass(frozen=True, kw_only=True, slots=True)
class TiedConfig(MixerConfig):
    """n_heads query heads over kv_heads tied KV heads; half of head_dim has positions."""

    n_heads: int
    head_dim: int
    kv_heads: int
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        at_least(self, 1, "n_heads", "head_dim", "kv_heads")
        positive(self, "rope_theta")
        require_divisible("n_heads", self.n_heads, "kv_heads", self.kv_heads)
        if self.head_dim % 4:
            raise UserError(
                f"head_dim={self.head_dim} is not divisible by 4: half of it are rotary pairs; "
                "choose a multiple of 4"
            )

    @classmethod
    def defaults(cls, scale: "Scale") -> dict[str, Any]:
        """The heads of `gqa`."""
        return GroupedConfig.defaults(scale)

    @classmethod
    def following(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """KV heads follow the query heads as those of `gqa`."""
        return GroupedConfig.following(given)

    @property
    def half(self) -> int:
        """Channels of a key without positions, and as many with them."""
        return self.head_dim // 2


class TiedAttention(Mixer):
    """Grouped attention whose keys are halves of its values, beside one rotary key for all."""

    Config: ClassVar[type[MixerConfig]] = TiedConfig

    def __init__(self, config: TiedConfig, place: Place) -> None:
        super().__init__()
        self.config = c = config
        # The rotary key stands right after the rotary queries: one slab, one rotation.
        halves, tied = c.n_heads * c.half, c.kv_heads * c.head_dim
        self.qkv = Projection(place.d_model, halves, halves, c.half, tied)
        self.out = Projection(c.n_heads * c.head_dim, place.d_model, residual=True)

    def _split(self, x: Input) -> tuple[Tensor, Tensor, Tensor]:
        """[B, K, D] -> queries without positions [B, K, H, d/2]; those with them and, as one more
        head, the rotary key, not yet rotated, [B, K, H + 1, d/2]; tied rows [B, K, G, d].
        """
        c = self.config
        plain, turning, key, held = self.qkv.sizes
        q, slab, tied = self.qkv(x).split((plain, turning + key, held), -1)
        q, slab = (part.unflatten(-1, (-1, c.half)) for part in (q, slab))
        return q, slab, tied.unflatten(-1, (c.kv_heads, c.head_dim))

    def forward(self, x: Tensor, shared: Shared | None = None) -> Tensor:
        """x: [B, T, D] -> [B, T, D]."""
        c, tokens = self.config, x.shape[1]
        q, slab, tied = self._split(x)
        angles = rope_table(tokens, c.half, c.rope_theta, x.device)[:tokens]
        q_rotary, key = queries_and_key([rotate(slab, angles)])
        return self._side_by_side(q, q_rotary, Seen(tied.transpose(1, 2), None, True), key)

    @takes_unnormed
    def extend(self, x: Input, state: LayerState) -> Tensor:
        """x: [B, K, D] -> [B, K, D]."""
        c = self.config
        q, slab, tied = self._split(x)
        q_rotary, seen, keys = append_tied(
            [slab], tied, None, state, "tied", "key", theta=c.rope_theta, backend=self.backend
        )
        if x.shape[1] > DECODE_LIMIT:
            return self._side_by_side(q, q_rotary, seen, keys.rows)
        out = attend_tied(q, q_rotary, seen, keys, scale=c.head_dim**-0.5, backend=self.backend)
        return self.out(out.flatten(2))

    def _side_by_side(self, q: Tensor, q_rotary: Tensor, seen: Rows, key: Tensor) -> Tensor:
        """Attention over whole keys, which are a copy; key: [B, S, d/2]. For many queries."""
        c = self.config
        half = seen.rows[..., : c.half]
        k = torch.cat((half, key[:, None].expand_as(half)), -1)
        q = torch.cat((q, q_rotary), -1)
        out = attend_expanded(q, k, seen.rows, seen, backend=self.backend)
        return self.out(out.flatten(2))

    def state_spec(self) -> StateSpec:
        """G·d tied values of every token, which GPUs can hold apart, and d/2 of the key, which each
        needs.
        """
        c, stored = self.config, Format.of(self.out.weight.dtype)
        tied = RowSpec(
            name="tied", shape=(c.kv_heads, c.head_dim), format=stored, shards=c.kv_heads
        )
        return StateSpec(rows=(tied, RowSpec(name="key", shape=(c.half,), format=stored)))

    def axes(self) -> tuple[Axis, ...]:
        """KV heads with their query heads, and query heads within groups. Halves of heads stay."""
        c = self.config
        heads, groups = c.n_heads, c.kv_heads
        share = heads // groups
        after = heads * c.half
        first = sum(self.qkv.sizes[:3])

        def queries(count: int) -> tuple[Tensor, Tensor, Tensor]:
            """Both halves of the queries of `count` units, and their columns of the output."""
            wide = heads // count * c.half
            return spans(0, count, wide), spans(after, count, wide), spans(0, count, 2 * wide)

        *made, shared = queries(groups)
        together = Axis(
            name="kv_heads" if share > 1 else "heads",
            kind="state",
            slices=(
                rows("qkv.weight", *made, spans(first, groups, c.head_dim)),
                columns("out.weight", shared),
            ),
            signals=(read_by("out", shared),),
            fields={"n_heads": share, "kv_heads": 1},
        )
        if share == 1:
            return (together,)
        *made, alone = queries(heads)
        apart = Axis(
            name="heads",
            kind="width",
            groups=groups,
            slices=(rows("qkv.weight", *made), columns("out.weight", alone)),
            signals=(read_by("out", alone),),
            fields={"n_heads": groups},
        )
        return together, apart

    def cost(self, step: Step) -> Cost:
        """FLOPs and bytes of one step: both forms of attention take as many."""
        c, dim = self.config, self.config.head_dim
        return Cost.of(
            linear_cost("q, k, v", self.qkv, step.tokens),
            OpCost(name="rope", vector_flops=3 * step.tokens * (c.n_heads + 1) * c.half),
            attention_cost(
                self.state_spec().rows[0],
                step,
                heads=c.n_heads,
                qk_dim=dim,
                v_dim=dim,
                kept=self.kept_spec(),
            ),
            linear_cost("attention out", self.out, step.tokens),
        )
