"""Softmax attention with rotary positions: `mha`, `gqa` and `mqa` are one class.

The number of KV heads is the difference: all of them (arXiv 1706.03762), one per group of query
heads (GQA, arXiv 2305.13245), or a single one (MQA, arXiv 1911.02150). Equals the attention of
`transformers`' Llama up to the channel order of the rotary pairs (`kernels.rope.torch`).
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from archs.axes import Axis, columns, read_by, rows, spans
from archs.checks import at_least, positive
from archs.cost import Cost, OpCost, Step, attention_cost, linear_cost
from archs.errors import UserError
from archs.formats import Format
from archs.layers import Projection
from archs.mixer import Mixer, MixerConfig, Place, Shared, require_divisible, takes_unnormed
from archs.ops.attention import attend
from archs.ops.dense import Input
from archs.ops.rotary import project_append
from archs.spec import RowSpec, StateSpec
from archs.state import LayerState, Rows, Seen
from kernels.attention.torch import window_mask
from kernels.rope.torch import rope_table, rotate

if TYPE_CHECKING:
    from archs.sizes import Scale


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig(MixerConfig):
    """n_heads query heads over kv_heads KV heads of head_dim channels.

    group: query heads per KV head wanted when kv_heads is not given; None: all of them (MQA).
    window, sinks: rows that stay visible (None: all).
    """

    n_heads: int
    head_dim: int
    kv_heads: int
    rope_theta: float = 10_000.0
    window: int | None = None
    sinks: int = 0

    def __post_init__(self) -> None:
        at_least(self, 1, "n_heads", "head_dim", "kv_heads", "window")
        at_least(self, 0, "sinks")
        positive(self, "rope_theta")
        require_divisible("n_heads", self.n_heads, "kv_heads", self.kv_heads)
        if self.head_dim % 2:
            raise UserError(f"head_dim={self.head_dim} is odd; rotary pairs need an even one")

    @classmethod
    def defaults(cls, scale: "Scale") -> dict[str, Any]:
        """Full multi-head attention."""
        heads = scale.n_heads
        return {"n_heads": heads, "kv_heads": heads, "head_dim": scale.head_dim}


class GroupedConfig(AttentionConfig):
    """Four query heads to a KV head; of fewer than eight heads, down to two."""

    @classmethod
    def defaults(cls, scale: "Scale") -> dict[str, Any]:
        """KV heads: a quarter of the query heads; of few heads half, so that it is not MHA."""
        heads = scale.n_heads
        kv_heads = max(heads // 4, min(2, heads // 2), 1)
        return {**AttentionConfig.defaults(scale), "kv_heads": kv_heads}


class MultiQueryConfig(AttentionConfig):
    """One KV head for all query heads."""

    @classmethod
    def defaults(cls, scale: "Scale") -> dict[str, Any]:
        """A single KV head."""
        return {**AttentionConfig.defaults(scale), "kv_heads": 1}


class Attention(Mixer):
    """Causal softmax attention, full or windowed, with any number of KV heads."""

    Config: ClassVar[type[MixerConfig]] = AttentionConfig
    coded_rows = evictable = frozenset({"kv"})

    def __init__(self, config: AttentionConfig, place: Place) -> None:
        super().__init__()
        self.config = config
        heads, groups, dim = config.n_heads, config.kv_heads, config.head_dim
        self.qkv = Projection(place.d_model, heads * dim, groups * dim, groups * dim)
        self.out = Projection(heads * dim, place.d_model, residual=True)

    def _split(self, x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, D] -> rotated queries [B, T, H, d], rotated keys and values [B, T, 2, G, d]."""
        c = self.config
        qkv = self.qkv(x).view(*x.shape[:2], -1, c.head_dim)
        turned = c.n_heads + c.kv_heads
        q_k = rotate(qkv[..., :turned, :], angles)
        if q_k.requires_grad:
            q, k = q_k.split((c.n_heads, c.kv_heads), 2)
            return q, torch.stack((k, qkv[..., turned:, :]), 2)
        return qkv[..., : c.n_heads, :], qkv[..., c.n_heads :, :].unflatten(2, (2, c.kv_heads))

    def _angles(self, x: Tensor) -> Tensor:
        """Rotary angles of positions 0..T, complex64 [T, 1, d/2]."""
        c, tokens = self.config, x.shape[1]
        return rope_table(tokens, c.head_dim, c.rope_theta, x.device)[:tokens]

    def _all(self, kv: Tensor) -> Seen:
        """A whole sequence's own rows [B, T, 2, G, d] as its tokens may see them."""
        c, tokens, rows = self.config, kv.shape[1], kv.movedim(1, -2)
        if c.window is None or tokens <= c.window:
            return Seen(rows, None, True)
        return Seen(rows, window_mask(tokens, c.window, c.sinks, kv.device), False)

    def forward(self, x: Tensor, shared: Shared | None = None) -> Tensor:
        """x: [B, T, D] -> [B, T, D]."""
        q, kv = self._split(x, self._angles(x))
        return self._attend(q, self._all(kv))

    @takes_unnormed
    def extend(self, x: Input, state: LayerState) -> Tensor:
        """x: [B, K, D] -> [B, K, D]."""
        c = self.config
        q, seen = project_append(
            x, self.qkv.stored, state, "kv", kv_heads=c.kv_heads, head_dim=c.head_dim,
            theta=c.rope_theta, backend=self.backend,
        )  # fmt: skip
        return self._attend(q, seen)

    def _attend(self, q: Tensor, seen: Rows) -> Tensor:
        return self.out(attend(q, seen, backend=self.backend).flatten(2))

    def state_spec(self) -> StateSpec:
        """K and V of every token, 2·G·d values, within the window."""
        c = self.config
        kv = RowSpec(
            name="kv", shape=(2, c.kv_heads, c.head_dim), format=Format.of(self.qkv.weight.dtype),
            shards=c.kv_heads, window=c.window, sinks=c.sinks,
        )  # fmt: skip
        return StateSpec(rows=(kv,))

    def axes(self) -> tuple[Axis, ...]:
        """KV heads with their query heads, and query heads within groups. Rotary channels stay."""
        c = self.config
        heads, groups, dim = c.n_heads, c.kv_heads, c.head_dim
        share = heads // groups
        queries, shared = spans(0, heads, dim), spans(0, groups, share * dim)
        keys_values = [spans(start, groups, dim) for start in accumulate(self.qkv.sizes[:-1])]
        together = Axis(
            name="kv_heads" if share > 1 else "heads",
            kind="state",
            slices=(rows("qkv.weight", shared, *keys_values), columns("out.weight", shared)),
            signals=(read_by("out", shared),),
            fields={"n_heads": share, "kv_heads": 1},
        )
        if share == 1:
            return (together,)
        apart = Axis(
            name="heads",
            kind="width",
            groups=groups,
            slices=(rows("qkv.weight", queries), columns("out.weight", queries)),
            signals=(read_by("out", queries),),
            fields={"n_heads": groups},
        )
        return together, apart

    def cost(self, step: Step) -> Cost:
        """FLOPs and bytes of one step."""
        c, (kv,) = self.config, self.state_spec().rows
        return Cost.of(
            linear_cost("q, k, v", self.qkv, step.tokens),
            OpCost(name="rope", vector_flops=3 * step.tokens * sum(self.qkv.sizes[:2])),
            attention_cost(
                kv,
                step,
                heads=c.n_heads,
                qk_dim=c.head_dim,
                v_dim=c.head_dim,
                kept=self.kept_spec(),
            ),
            linear_cost("attention out", self.out, step.tokens),
        )
