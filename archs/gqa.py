"""Softmax attention with rotary positions: `mha`, `gqa` and `mqa` are one class.

The number of KV heads is the difference: all of them (arXiv 1706.03762), one per group of query
heads (GQA, arXiv 2305.13245), or a single one (MQA, arXiv 1911.02150). Equals the attention of
`transformers`' Llama up to the channel order of the rotary pairs (`kernels.rope.torch`).

Options, each that of a published model: norms of queries and keys (Qwen3, arXiv 2505.09388), a gate
on the output (Qwen3-Next, arXiv 2505.06708), a learned sink in each head's softmax (gpt-oss, arXiv
2508.10925), rotation of a part of the channels (Qwen3-Next) or of none (NoPE, arXiv 2305.19466, as
in some layers of SmolLM3).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from archs.axes import Axis, columns, read_by, rows, spans
from archs.checks import at_least, positive
from archs.cost import Cost, OpCost, Step, attention_cost, linear_cost
from archs.errors import UserError
from archs.formats import Format
from archs.layers import Projection, RMSNorm
from archs.mixer import Mixer, MixerConfig, Place, Shared, require_divisible, takes_unnormed
from archs.ops.attention import attend
from archs.ops.dense import Input
from archs.ops.rotary import project_append, rotate_append
from archs.spec import RowSpec, StateSpec
from archs.state import LayerState, Rows, Seen
from kernels.attention.torch import window_mask
from kernels.rope.torch import rope_table, rotate

if TYPE_CHECKING:
    from archs.sizes import Scale


#: What `AttentionConfig` may add to plain attention; off where False or None.
OPTIONS = ("qk_norm", "output_gate", "learned_sinks", "rope_dim")


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig(MixerConfig):
    """n_heads query heads over kv_heads KV heads of head_dim channels.

    group: query heads per KV head wanted when kv_heads is not given; None: all of them (MQA).
    window, sinks: rows that stay visible (None: all).
    qk_norm: RMSNorm of each head's query and of its key before they rotate, with one weight for all
    query heads and one for all KV heads; qk_eps: of these norms.
    output_gate: sigmoid of a projection of the input, over every channel of attention's output.
    learned_sinks: a logit a query head in the softmax's denominator, beside those of the rows.
    rope_dim: channels of a head that rotate, the first (None: all of them; 0: none).
    """

    n_heads: int
    head_dim: int
    kv_heads: int
    rope_theta: float = 10_000.0
    window: int | None = None
    sinks: int = 0
    qk_norm: bool = False
    qk_eps: float = 1e-6
    output_gate: bool = False
    learned_sinks: bool = False
    rope_dim: int | None = None

    def __post_init__(self) -> None:
        at_least(self, 1, "n_heads", "head_dim", "kv_heads", "window")
        at_least(self, 0, "sinks", "rope_dim")
        positive(self, "rope_theta", "qk_eps")
        require_divisible("n_heads", self.n_heads, "kv_heads", self.kv_heads)
        for name in ("head_dim", "rope_dim"):
            value = getattr(self, name)
            if value is not None and value % 2:
                raise UserError(f"{name}={value} is odd; rotary pairs need an even one")
        if self.turned > self.head_dim:
            raise UserError(
                f"rope_dim={self.rope_dim} is more than head_dim={self.head_dim}; rotate at most "
                "all channels of a head"
            )

    @property
    def turned(self) -> int:
        """Channels of a head that rotate."""
        return self.head_dim if self.rope_dim is None else self.rope_dim

    @classmethod
    def kv_heads_of(cls, heads: int) -> int:
        """KV heads of so many query heads where none are given: all."""
        return heads

    @classmethod
    def defaults(cls, scale: "Scale") -> dict[str, Any]:
        """Heads of the scale, and the KV heads of so many."""
        kv_heads = cls.kv_heads_of(scale.n_heads)
        return {"n_heads": scale.n_heads, "kv_heads": kv_heads, "head_dim": scale.head_dim}

    @classmethod
    def following(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """KV heads follow the query heads."""
        return {"kv_heads": cls.kv_heads_of(given["n_heads"])} if "n_heads" in given else {}

    def require_kv_heads(self, name: str, wanted: int) -> None:
        """Raise UserError unless they are as many as the name `name` says."""
        if self.kv_heads != wanted:
            raise UserError(
                f"kv_heads={self.kv_heads} with n_heads={self.n_heads} is not {name}, which has "
                f"{wanted}; leave kv_heads out, or take gqa"
            )


class MultiHeadConfig(AttentionConfig):
    """A KV head for each query head."""

    def __post_init__(self) -> None:
        AttentionConfig.__post_init__(self)
        self.require_kv_heads("mha", self.n_heads)


class GroupedConfig(AttentionConfig):
    """Four query heads to a KV head; of fewer than eight heads, down to two."""

    @classmethod
    def kv_heads_of(cls, heads: int) -> int:
        """A quarter of the query heads; of few heads half, so that it is not MHA."""
        return max(heads // 4, min(2, heads // 2), 1)


class MultiQueryConfig(AttentionConfig):
    """One KV head for all query heads."""

    def __post_init__(self) -> None:
        AttentionConfig.__post_init__(self)
        self.require_kv_heads("mqa", 1)

    @classmethod
    def kv_heads_of(cls, heads: int) -> int:
        """A single one."""
        return 1


class Attention(Mixer):
    """Causal softmax attention, full or windowed, with any number of KV heads."""

    Config: ClassVar[type[MixerConfig]] = AttentionConfig
    coded_rows = evictable = frozenset({"kv"})

    def __init__(self, config: AttentionConfig, place: Place, *, kv_parts: int = 2) -> None:
        """kv_parts: projections to KV heads that the layer has: keys and values."""
        super().__init__()
        self.config = c = config
        query, kv = c.n_heads * c.head_dim, c.kv_heads * c.head_dim
        self.kv_parts = kv_parts
        self.qkv = Projection(place.d_model, query, *[kv] * kv_parts, *[query] * c.output_gate)
        self.q_norm = RMSNorm(c.head_dim, eps=c.qk_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, eps=c.qk_eps) if c.qk_norm and kv_parts else None
        self.sink_logits = None
        if c.learned_sinks:
            self.sink_logits = nn.Parameter(torch.empty(c.n_heads))
            self.evictable = frozenset()
        self.out = Projection(query, place.d_model, residual=True)

    def _heads(self, x: Input) -> tuple[Tensor, Tensor | None]:
        """What the layer makes of x [B, T, D] before positions: queries, then keys and values, as
        heads [B, T, ·, d], normed, and the gate before its sigmoid, [B, T, H·d].
        """
        c, gate = self.config, None
        found = self.qkv(x)
        if c.output_gate:
            gates = self.qkv.sizes[-1]
            found, gate = found.split((found.shape[-1] - gates, gates), -1)
        heads = found.unflatten(-1, (-1, c.head_dim))
        return self._normed(heads), gate

    def _normed(self, heads: Tensor) -> Tensor:
        """Heads [B, T, ·, d] whose queries and keys have passed their norms."""
        c = self.config
        if self.q_norm is None:
            return heads
        q, kv = heads.tensor_split((c.n_heads,), 2)
        if self.k_norm is None:
            return torch.cat((self.q_norm(q), kv), 2)
        k, v = kv.tensor_split((c.kv_heads,), 2)
        return torch.cat((self.q_norm(q), self.k_norm(k), v), 2)

    def _rotated(self, heads: Tensor) -> tuple[Tensor, Tensor]:
        """Heads of a whole sequence -> rotated queries [B, T, H, d], rotated keys and values
        [B, T, 2, G, d].
        """
        c = self.config
        turned = c.n_heads + c.kv_heads
        q_k = self._turned(heads[..., :turned, :])
        if q_k.requires_grad:
            q, k = q_k.split((c.n_heads, c.kv_heads), 2)
            return q, torch.stack((k, heads[..., turned:, :]), 2)
        return heads[..., : c.n_heads, :], heads[..., c.n_heads :, :].unflatten(2, (2, c.kv_heads))

    def _turned(self, heads: Tensor) -> Tensor:
        """Heads [B, T, ·, d] of positions 0..T, rotated: in place where no gradient needs it."""
        return rotate(heads, self._angles(heads)) if self.config.turned else heads

    def _angles(self, x: Tensor) -> Tensor:
        """Rotary angles of positions 0..T, complex64 [T, 1, d/2]. x: [B, T, ...]."""
        c, tokens = self.config, x.shape[1]
        return rope_table(tokens, c.head_dim, c.rope_theta, x.device, c.rope_dim)[:tokens]

    def _all(self, kv: Tensor) -> Seen:
        """A whole sequence's own rows [B, T, *planes, d] as its tokens may see them."""
        c, tokens, rows = self.config, kv.shape[1], kv.movedim(1, -2)
        if c.window is None or tokens <= c.window:
            return Seen(rows, None, True)
        return Seen(rows, window_mask(tokens, c.window, c.sinks, kv.device), False)

    def forward(self, x: Tensor, shared: Shared | None = None) -> Tensor:
        """x: [B, T, D] -> [B, T, D]."""
        heads, gate = self._heads(x)
        q, kv = self._rotated(heads)
        return self._attend(q, self._all(kv), gate)

    @takes_unnormed
    def extend(self, x: Input, state: LayerState) -> Tensor:
        """x: [B, K, D] -> [B, K, D]."""
        c, gate = self.config, None
        if c.qk_norm or c.output_gate:
            heads, gate = self._heads(x)
            q, seen = rotate_append(
                heads, state, "kv", kv_heads=c.kv_heads, theta=c.rope_theta, rope_dim=c.rope_dim,
                backend=self.backend,
            )  # fmt: skip
        else:
            q, seen = project_append(
                x, self.qkv.stored, state, "kv", kv_heads=c.kv_heads, head_dim=c.head_dim,
                theta=c.rope_theta, rope_dim=c.rope_dim, backend=self.backend,
            )  # fmt: skip
        return self._attend(q, seen, gate)

    def _attend(self, q: Tensor, seen: Rows, gate: Tensor | None) -> Tensor:
        return self._output(attend(q, seen, self.sink_logits, backend=self.backend), gate)

    def _output(self, y: Tensor, gate: Tensor | None) -> Tensor:
        """Attention's output [B, K, H, d], gated and projected: [B, K, D]."""
        y = y.flatten(2)
        return self.out(y if gate is None else y * gate.sigmoid())

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
        starts = list(accumulate(self.qkv.sizes, initial=0))
        keys_values = [spans(start, groups, dim) for start in starts[1 : 1 + self.kv_parts]]
        together = self._heads_axis(
            "kv_heads" if share > 1 else "heads", groups, keys_values, kind="state",
            fields={"n_heads": share, "kv_heads": 1},
        )  # fmt: skip
        if share == 1:
            return (together,)
        apart = self._heads_axis(
            "heads", heads, [], kind="width", groups=groups, fields={"n_heads": groups}
        )
        return together, apart

    def _heads_axis(self, name: str, units: int, more: list[Tensor], **options: Any) -> Axis:
        """An axis of so many equal runs of query heads; `more` are other rows of `qkv` of each."""
        c = self.config
        each = c.n_heads // units
        channels = spans(0, units, each * c.head_dim)
        made = [channels, *more]
        if c.output_gate:
            made.append(channels + sum(self.qkv.sizes[:-1]))
        slices = [rows("qkv.weight", *made), columns("out.weight", channels)]
        if c.learned_sinks:
            slices.append(rows("sink_logits", spans(0, units, each)))
        signals = (read_by("out", channels),)
        return Axis(name=name, slices=tuple(slices), signals=signals, **options)

    def cost(self, step: Step) -> Cost:
        """FLOPs and bytes of one step."""
        c, (kv,) = self.config, self.state_spec().rows
        return Cost.of(
            linear_cost("q, k, v", self.qkv, step.tokens),
            *self._cost_before(step),
            attention_cost(
                kv,
                step,
                heads=c.n_heads,
                qk_dim=c.head_dim,
                v_dim=c.head_dim,
                kept=self.kept_spec(),
            ),
            *self._cost_after(step),
            linear_cost("attention out", self.out, step.tokens),
        )

    def _cost_before(self, step: Step) -> list[OpCost]:
        """What happens to queries and keys before attention."""
        c = self.config
        heads = c.n_heads + c.kv_heads * (self.kv_parts > 0)
        found = [OpCost(name="rope", vector_flops=3 * step.tokens * heads * c.turned)]
        norms = [norm.weight for norm in (self.q_norm, self.k_norm) if norm is not None]
        if norms:
            flops, read = 4 * step.tokens * heads * c.head_dim, sum(w.nbytes for w in norms)
            found.insert(0, OpCost(name="q, k norms", vector_flops=flops, weight_bytes=read))
        return found

    def _cost_after(self, step: Step) -> list[OpCost]:
        """What happens to attention's weights and output beside attention and projection."""
        c, found = self.config, list[OpCost]()
        if self.sink_logits is not None:
            flops, read = 3 * step.tokens * c.n_heads, self.sink_logits.nbytes
            found.append(OpCost(name="learned sinks", vector_flops=flops, weight_bytes=read))
        if c.output_gate:
            flops = 5 * step.tokens * c.n_heads * c.head_dim
            found.append(OpCost(name="output gate", vector_flops=flops))
        return found
