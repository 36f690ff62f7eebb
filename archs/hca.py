"""Heavily compressed attention (HCA, DeepSeek-V4): a row for every 128 tokens, and a window.

A token's row is key and value of all heads at once. It is seen within a window; what remains of
older tokens are rows that pool `every` tokens, channel by channel, by a softmax of learned gates
(`kernels.pooling.torch`). One softmax runs over both kinds of rows and a learned sink of each head.
The last `rope_dim` channels have positions, a pooled row that of its first token; since rows are
values too, outputs are turned back by their own token's position. Queries come from a latent and
are normed head by head; the way out is through a narrow matrix for each group of heads.

Equals the attention of `transformers`' DeepSeek-V4 (there `heavily_compressed_attention`) without
YaRN. The group that is not whole is one part, two float32 numbers a channel, where that keeps its
tokens' values and gates; it forks and rolls back as other fixed tensors do.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from archs.axes import Axis, columns, read_by, rows, spans
from archs.checks import at_least, positive
from archs.cost import Cost, OpCost, Step, linear_cost, state_traffic
from archs.errors import UserError
from archs.formats import Format
from archs.layers import Projection, RMSNorm
from archs.mixer import Mixer, MixerConfig, Place, Shared, require_divisible, takes_unnormed
from archs.ops.dense import Input, by_head
from archs.ops.matrix import Matrix
from archs.ops.pooling import (
    SINK_CHANNELS,
    Grouped,
    Own,
    Pooling,
    append_tokens,
    attend_all_pooled,
    attend_pooled,
)
from archs.recurrent import memory_format
from archs.spec import FixedSpec, RowSpec, StateSpec
from archs.state import LayerState, Rows, Seen, visible
from kernels.attention.torch import window_mask
from kernels.norm.torch import l2_norm
from kernels.pooling.torch import series_of, whole_rows
from kernels.rope.torch import rope_table, rotate_last

if TYPE_CHECKING:
    from archs.sizes import Scale

#: DeepSeek-V4's tokens of a pooled row, window, and groups of heads on the way out.
MOST_EVERY, MOST_WINDOW, MOST_GROUPS = 128, 128, 8


@dataclass(frozen=True, kw_only=True, slots=True)
class HeavilyCompressedConfig(MixerConfig):
    """n_heads query heads over rows of `dim` channels, the last rope_dim of which have positions.

    every: tokens of a pooled row; window: newest tokens whose own rows are seen. q_rank: width of
    the latent that queries come from. out_groups: groups of heads, each of which goes through
    out_rank channels on its way out. q_eps: of the norm of that latent; eps: of all others.
    """

    n_heads: int
    dim: int
    rope_dim: int
    q_rank: int
    out_groups: int
    out_rank: int
    every: int
    window: int
    rope_theta: float = 160_000.0
    eps: float = 1e-6
    q_eps: float = 1e-6

    def __post_init__(self) -> None:
        at_least(self, 1, "n_heads", "dim", "q_rank", "out_groups", "out_rank", "every", "window")
        positive(self, "rope_theta", "eps", "q_eps")
        require_divisible("n_heads", self.n_heads, "out_groups", self.out_groups)
        if self.rope_dim % 2 or not 2 <= self.rope_dim <= self.dim:
            raise UserError(
                f"rope_dim={self.rope_dim} must be even, at least 2 and at most dim={self.dim}; "
                "change one of them"
            )

    @property
    def unit_eps(self) -> float:
        """What is added to the squared length of a query head."""
        return self.dim * self.eps

    @classmethod
    def defaults(cls, scale: "Scale") -> dict[str, Any]:
        """DeepSeek-V4's ratios: twice the heads, rows of four times a head, at most D/2, a latent
        of D/4 for queries and 2·D channels on the way out. A pooled row for a sixteenth of the
        trained length, a window of an eighth, each at most 128 tokens.
        """
        heads, d_model = 2 * scale.n_heads, scale.d_model
        groups = MOST_GROUPS if heads % MOST_GROUPS == 0 else heads
        return {
            "n_heads": heads,
            "dim": min(d_model // 2, 4 * scale.head_dim),
            "rope_dim": scale.head_dim // 2,
            "q_rank": d_model // 4,
            "out_groups": groups,
            "out_rank": 2 * d_model // groups,
            "every": max(1, min(MOST_EVERY, scale.seq_len // 16)),
            "window": max(1, min(MOST_WINDOW, scale.seq_len // 8)),
        }


class Down(NamedTuple):
    """What products make of a layer's input, before norms and positions.

    q_latent: [B, K, q_rank], the one that is normed. q: [B, K, H, d]. row: [B, K, d]. values,
    gates: [B, K, S·d], what pooled rows are made of.
    """

    q_latent: Tensor
    q: Tensor
    row: Tensor
    values: Tensor
    gates: Tensor


class HeavilyCompressedAttention(Mixer):
    """Attention over a window of rows and over rows that pool many tokens each."""

    Config: ClassVar[type[MixerConfig]] = HeavilyCompressedConfig
    delicate = frozenset({"sinks", "pool_bias"})
    #: Series of values and gates, as `kernels.pooling.torch` has them.
    series: ClassVar[int] = 1
    config: HeavilyCompressedConfig

    def __init__(self, config: HeavilyCompressedConfig, place: Place) -> None:
        super().__init__()
        self.config = c = config
        inner, wide = c.n_heads * c.dim, self.series * c.dim
        self.down = Projection(place.d_model, c.q_rank, c.dim, wide, wide, gates=(3,))
        self.q_norm = RMSNorm(c.q_rank, eps=c.q_eps)
        self.q_up = Projection(c.q_rank, inner)
        self.row_norm = RMSNorm(c.dim, eps=c.eps)
        self.pool_norm = RMSNorm(c.dim, eps=c.eps)
        #: Added to the gates of a group's tokens, in their order.
        self.pool_bias = nn.Parameter(torch.empty(c.every, wide))
        self.sinks = nn.Parameter(torch.empty(c.n_heads))
        self.out_down = Projection(inner // c.out_groups, c.out_groups * c.out_rank, plain=True)
        self.out = Projection(c.out_groups * c.out_rank, place.d_model, residual=True)

    def initialisers(self) -> dict[str, Any]:
        """At first all tokens of a group are alike."""
        return {"pool_bias": lambda tensor, generator: tensor.zero_()}

    @property
    def _pooling(self) -> Pooling:
        c = self.config
        return Pooling(c.every, c.rope_dim, c.rope_theta, c.eps)

    def _down(self, x: Input) -> Down:
        """x: [B, K, D]."""
        q_down, row, values, gates = self.down(x).split(self.down.sizes, -1)
        q_latent = self.q_norm(q_down)
        q = self.q_up(q_latent).unflatten(-1, (self.config.n_heads, -1))
        return Down(q_latent, q, row, values, gates)

    def _queries(self, q: Tensor, angles: Tensor) -> Tensor:
        """Of length 1, their norm's times the usual d^-0.5, and turned."""
        return rotate_last(l2_norm(q, self.config.unit_eps), angles)

    def forward(self, x: Tensor, shared: Shared | None = None) -> Tensor:
        """x: [B, T, D] -> [B, T, D]."""
        at, angles = self._places(x)
        down = self._down(x)
        near, far = self._all(down, at, angles)
        return self._out_of_all(self._queries(down.q, angles), near, far, angles)

    def _out_of_all(self, q: Tensor, near: Seen, far: Seen, angles: Tensor) -> Tensor:
        """The layer's output of a whole sequence's queries, rows and pooled rows."""
        return self._out(attend_all_pooled(q, near, far, self.sinks, angles, scale=1.0))

    def _places(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A whole sequence's positions [1, T], and their angles."""
        c, tokens = self.config, x.shape[1]
        angles = rope_table(tokens, c.rope_dim, c.rope_theta, x.device)[:tokens]
        return torch.arange(tokens, device=x.device)[None], angles

    def _all(self, down: Down, at: Tensor, angles: Tensor) -> tuple[Seen, Seen]:
        """A whole sequence's own rows and pooled ones as its tokens may see them."""
        c, tokens, device = self.config, at.shape[1], at.device
        row = rotate_last(self.row_norm(down.row)[:, :, None], angles)[:, :, 0]
        near = Seen(row, window_mask(tokens, c.window, 0, device)[None, None], False)
        far = self._all_pooled(down.values, down.gates, self.pool_bias, self.pool_norm, angles)
        places = torch.arange(far.shape[1], device=device)[None]
        return near, Seen(far, visible(places, (at + 1) // c.every, None, 0), False)

    def _all_pooled(
        self, values: Tensor, gates: Tensor, bias: Tensor, norm: RMSNorm, angles: Tensor
    ) -> Tensor:
        """All pooled rows [B, T // every, C] of a whole sequence."""
        every, at = self.config.every, torch.arange(values.shape[1], device=values.device)[None]
        parts = series_of(values, gates, bias, at, self.series)
        pooled = norm(whole_rows(*parts, every).to(norm.weight.dtype))
        firsts = angles[: pooled.shape[1] * every : every]
        return rotate_last(pooled[:, :, None], firsts)[:, :, 0]

    @takes_unnormed
    def extend(self, x: Input, state: LayerState) -> Tensor:
        """x: [B, K, D] -> [B, K, D]."""
        return self._attend(*self._append(self._down(x), state), state)

    def _append(self, down: Down, state: LayerState) -> tuple[Tensor, Rows, Rows]:
        """Queries as they ask; the rows and the pooled ones that new tokens may see, stored."""
        own = Own(down.row, self.row_norm.weight, "kv", self.config.unit_eps)
        grouped = Grouped(
            down.values, down.gates, self.pool_bias, self.pool_norm.weight, "pooled", "begun"
        )
        return append_tokens(down.q, own, grouped, state, self._pooling, backend=self.backend)

    def _attend(self, q: Tensor, near: Rows, far: Rows, state: LayerState) -> Tensor:
        """[B, K, H, d] -> [B, K, D]."""
        found = attend_pooled(
            q, near, far, self.sinks, state, self._pooling, scale=1.0, backend=self.backend
        )
        return self._out(found)

    def _out(self, found: Tensor) -> Tensor:
        """What attention found, [B, K, H, d], projected: [B, K, D]."""
        c, found = self.config, found.flatten(2)
        # Who watches products holds even plain weights as a `Matrix`.
        stored = self.out_down.stored
        weight = stored.dense(found.dtype) if isinstance(stored, Matrix) else stored
        ways = weight.unflatten(0, (c.out_groups, -1)).mT
        grouped = by_head(found.unflatten(-1, (c.out_groups, -1)), ways, backend=self.backend)
        return self.out(grouped.flatten(2))

    def state_spec(self) -> StateSpec:
        """A window of rows, a row for every `every` tokens, and what is begun of the next one."""
        c, weight = self.config, self.row_norm.weight
        stored = Format.of(weight.dtype)
        begun = FixedSpec(
            name="begun", shape=(2, self.series, c.dim), format=memory_format(weight), kind="pool"
        )
        return StateSpec(
            rows=(
                RowSpec(name="kv", shape=(c.dim,), format=stored, window=c.window),
                RowSpec(name="pooled", shape=(c.dim,), format=stored, every=c.every),
            ),
            fixed=(begun,),
        )

    def axes(self) -> tuple[Axis, ...]:
        """The queries' latent and the channels on the way out. Rows stay: norms of their own and
        positions bind their channels.
        """
        c = self.config
        units, ways = spans(0, c.q_rank, 1), spans(0, c.out_groups * c.out_rank, 1)
        latent = Axis(
            name="query_rank",
            kind="width",
            slices=(
                rows("down.weight", units), rows("q_norm.weight", units),
                columns("q_up.weight", units),
            ),
            signals=(read_by("q_up", units),),
            fields={"q_rank": 1},
            inverse=("q_eps",),
            norm="q_norm.weight",
            reader="q_up",
        )  # fmt: skip
        out = Axis(
            name="out_rank",
            kind="width",
            groups=c.out_groups,
            slices=(rows("out_down.weight", ways), columns("out.weight", ways)),
            signals=(read_by("out", ways),),
            fields={"out_rank": 1},
        )
        return latent, out

    def cost(self, step: Step) -> Cost:
        """FLOPs and bytes of one step."""
        kept = self.kept_spec()
        near, far = (t.visible_rows(step.context, step.new_tokens) for t in kept.rows)
        return self._cost(step, self._attention(step, near + far, StateSpec(rows=kept.rows)))

    def _attention(self, step: Step, seen: int, read: StateSpec) -> OpCost:
        """Over so many rows and the sink, with the traffic of `read`."""
        c = self.config
        scores = step.tokens * c.n_heads * (seen + 1)
        return OpCost(
            name="attention",
            matrix_flops=4 * scores * (c.dim + SINK_CHANNELS),
            vector_flops=5 * scores,
            weight_bytes=self.sinks.nbytes,
            **state_traffic(read, step),
        )

    def _cost(self, step: Step, *attention: OpCost) -> Cost:
        """What stands around attention."""
        c, norms = self.config, (self.q_norm, self.row_norm)
        turned = (2 * c.n_heads + 1) * c.rope_dim
        return Cost.of(
            linear_cost("q latent, row, pooling down", self.down, step.tokens),
            OpCost(
                name="norms and rope",
                vector_flops=step.tokens
                * (4 * (c.q_rank + c.dim) + 3 * (c.n_heads * c.dim + turned)),
                weight_bytes=sum(n.weight.nbytes for n in norms),
            ),
            linear_cost("q up", self.q_up, step.tokens),
            self._pool_cost("pooling", step, self.pool_bias, self.pool_norm, "begun"),
            *attention,
            linear_cost("attention out, by group", self.out_down, step.tokens),
            linear_cost("attention out", self.out, step.tokens),
        )

    def _pool_cost(self, name: str, step: Step, bias: Tensor, norm: RMSNorm, begun: str) -> OpCost:
        """What makes pooled rows, with the traffic of what is begun of them."""
        fixed = tuple(t for t in self.kept_spec().fixed if t.name == begun)
        return OpCost(
            name=name,
            vector_flops=12 * step.tokens * bias.shape[1],
            # Each token reads its own.
            weight_bytes=norm.weight.nbytes + step.new_tokens * bias[0].nbytes,
            **state_traffic(StateSpec(fixed=fixed), step),
        )
