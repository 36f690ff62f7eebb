"""Compressed sparse attention (CSA, DeepSeek-V4): few of the rows that pool four tokens each.

`hca` with small groups whose rows overlap: each pools the four tokens of its group and, by values
and gates of their own, the four before (`kernels.pooling.torch`, two series). An indexer of few
channels makes pooled keys of its own in the same way, scores them, I = Σ_h w_h · relu(q_h · k), and
a token reads the `picks` best rows alone, beside its window and the sinks. A step scans the index
keys, one in four tokens, and gathers rows.

Equals the attention of `transformers`' DeepSeek-V4 (there `compressed_sparse_attention`) without
YaRN. The choice is made by the rule of `dsa`, and the indexer learns as there: from the divergence
of its scores from attention, here from the weights of pooled rows among each other.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from archs.axes import Axis, columns, made_by, rows, spans
from archs.checks import at_least
from archs.cost import Cost, OpCost, Step, linear_cost, state_traffic
from archs.errors import UserError
from archs.hca import Down, HeavilyCompressedAttention, HeavilyCompressedConfig
from archs.layers import Projection, RMSNorm
from archs.mixer import MixerConfig, Place, Shared, asks_losses, leave_loss
from archs.ops.pooling import Grouped, append_index, attend_picked_rows
from archs.ops.sparse import Picked, pick_rows
from archs.spec import FixedSpec, RowSpec, StateSpec
from archs.state import LayerState, Seen, mask_of
from kernels.rope.torch import rotate_last
from kernels.sparse.torch import best_rows, index_flops, index_loss, index_scores, mean_attention

if TYPE_CHECKING:
    from archs.sizes import Scale

#: DeepSeek-V4's tokens of a pooled row, and how many of these a token reads.
MOST_EVERY, MOST_PICKS = 4, 512


@dataclass(frozen=True, kw_only=True, slots=True)
class CompressedSparseConfig(HeavilyCompressedConfig):
    """`hca` whose tokens read `picks` pooled rows each.

    index_heads, index_dim: of the indexer, whose last rope_dim channels have positions.
    """

    index_heads: int
    index_dim: int
    picks: int

    def __post_init__(self) -> None:
        HeavilyCompressedConfig.__post_init__(self)
        at_least(self, 1, "index_heads", "index_dim", "picks")
        if self.index_dim < self.rope_dim:
            raise UserError(
                f"index_dim={self.index_dim} is less than rope_dim={self.rope_dim}: index keys "
                "carry positions, too; make index_dim larger or rope_dim smaller"
            )

    @classmethod
    def defaults(cls, scale: "Scale") -> dict[str, Any]:
        """Those of `hca`, but four tokens a row at most; as many index heads as heads, a
        quarter as wide as rows; a quarter of the trained length is read, at most 512 rows.
        """
        given = HeavilyCompressedConfig.defaults(scale)
        every = min(MOST_EVERY, given["every"])
        return {
            **given,
            "every": every,
            "index_heads": given["n_heads"],
            "index_dim": max(given["rope_dim"], given["dim"] // 4),
            "picks": max(1, min(MOST_PICKS, scale.seq_len // 4 // every)),
        }

    def gathers(self, new_tokens: int, rows: int) -> bool:
        """Whether a step gathers the pooled rows of every token apart: where these are no more
        than all rows, which a longer step reads once, under a mask.
        """
        return 0 < new_tokens * min(self.picks, rows) <= rows

    @property
    def index_scale(self) -> float:
        """What scores are multiplied with."""
        return float((self.index_heads * self.index_dim) ** -0.5)


class CompressedSparseAttention(HeavilyCompressedAttention):
    """Attention over a window of rows and over a few picked ones that pool a few tokens each."""

    Config: ClassVar[type[MixerConfig]] = CompressedSparseConfig
    delicate = frozenset({"sinks", "pool_bias", "index_bias"})
    series = 2
    config: CompressedSparseConfig

    def __init__(self, config: CompressedSparseConfig, place: Place) -> None:
        super().__init__(config, place)
        c, wide = config, self.series * config.index_dim
        # Head weights decide a sign, as gates do.
        self.index_down = Projection(place.d_model, wide, wide, c.index_heads, gates=(1, 2))
        self.index_q = Projection(c.q_rank, c.index_heads * c.index_dim)
        self.index_norm = RMSNorm(c.index_dim, eps=c.eps)
        self.index_bias = nn.Parameter(torch.empty(c.every, wide))

    def initialisers(self) -> dict[str, Any]:
        """Those of `hca`, for both kinds of pooled rows."""
        given = super().initialisers()
        return {**given, "index_bias": given["pool_bias"]}

    def _index(self, x: Tensor, down: Down) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Index queries [B, K, Hi, di] before positions, head weights [B, K, Hi], scale included,
        and the values and gates of index keys, [B, K, S·di]. Their gradients end here: the indexer
        has a loss of its own.
        """
        c = self.config
        values, gates, weights = self.index_down(x.detach()).split(self.index_down.sizes, -1)
        queries = self.index_q(down.q_latent.detach()).unflatten(-1, (c.index_heads, -1))
        return queries, weights.float() * c.index_scale, values, gates

    def forward(self, x: Tensor, shared: Shared | None = None) -> Tensor:
        """x: [B, T, D] -> [B, T, D]. Leaves the indexer's loss where it is asked for."""
        c, at, angles = self.config, *self._places(x)
        down = self._down(x)
        near, far = self._all(down, at, angles)
        q, earlier = self._queries(down.q, angles), mask_of(far, x.shape[1])
        if far.length > c.picks or asks_losses(shared):
            queries, weights, values, gates = self._index(x, down)
            keys = self._all_pooled(values, gates, self.index_bias, self.index_norm, angles)
            scores = index_scores(rotate_last(queries, angles), weights, keys)
            if shared is not None and asks_losses(shared):
                attention = mean_attention(q, far.rows[:, None], scale=1.0, seen=earlier)
                leave_loss(shared, index_loss(scores, attention, earlier))
            if far.length > c.picks:
                picked = Picked(*best_rows(scores.detach(), earlier, c.picks), far.length)
                far = Seen(far.rows, picked.mask(), False)
        return self._out_of_all(q, near, far, angles)

    def extend(self, x: Tensor, state: LayerState) -> Tensor:  # type: ignore[override]
        """x: [B, K, D] -> [B, K, D]."""
        c, down = self.config, self._down(x)
        queries, weights, values, gates = self._index(x, down)
        q, near, far = self._append(down, state)
        grouped = Grouped(
            values, gates, self.index_bias, self.index_norm.weight, "index", "index begun"
        )
        queries, keys = append_index(queries, grouped, state, self._pooling, backend=self.backend)
        picked = pick_rows(queries, weights, keys, c.picks, backend=self.backend)
        if not c.gathers(x.shape[1], far.length):
            return self._attend(q, near, Seen(far.rows, picked.mask(), False), state)
        found = attend_picked_rows(
            q, near, far, picked, self.sinks, state, self._pooling, scale=1.0,
            backend=self.backend,
        )  # fmt: skip
        return self._out(found)

    def state_spec(self) -> StateSpec:
        """As `hca`'s, of whose pooled rows a token reads `picks`, and index keys beside them."""
        c, given = self.config, super().state_spec()
        (kv, pooled), (begun,) = given.rows, given.fixed
        index = RowSpec(
            name="index", shape=(c.index_dim,), format=pooled.format, every=c.every, kind="index"
        )
        index_begun = FixedSpec(
            name="index begun", shape=(2, self.series, c.index_dim), format=begun.format,
            kind=begun.kind,
        )  # fmt: skip
        return StateSpec(
            rows=(kv, replace(pooled, picks=c.picks), index), fixed=(begun, index_begun)
        )

    def axes(self) -> tuple[Axis, ...]:
        """Those of `hca`, whose queries' latent makes index queries, too, and index heads."""
        c = self.config
        latent, out = super().axes()
        shared = columns("index_q.weight", spans(0, c.q_rank, 1))
        weights = spans(sum(self.index_down.sizes[:2]), c.index_heads, 1)
        queries = spans(0, c.index_heads, c.index_dim)
        heads = Axis(
            name="index_heads",
            kind="width",
            slices=(rows("index_down.weight", weights), rows("index_q.weight", queries)),
            signals=(made_by("index_down", weights), made_by("index_q", queries)),
            fields={"index_heads": 1},
        )
        return replace(latent, slices=(*latent.slices, shared)), out, heads

    def cost(self, step: Step) -> Cost:
        """FLOPs and bytes of one step, in the form that `extend` takes: a scan of all index keys,
        then attention over picked rows, or over all of them under a mask.
        """
        c, kept = self.config, self.kept_spec()
        near, far, keys = (t.visible_rows(step.context, step.new_tokens) for t in kept.rows)
        read = min(c.picks, far) if c.gathers(step.new_tokens, far) else far
        return self._cost(
            step,
            linear_cost("index keys, weights", self.index_down, step.tokens),
            linear_cost("index q", self.index_q, step.tokens),
            self._pool_cost("index pooling", step, self.index_bias, self.index_norm, "index begun"),
            OpCost(
                name="index scan",
                matrix_flops=index_flops(step.tokens, c.index_heads, c.index_dim, keys),
                vector_flops=step.tokens * (keys + 3 * c.rope_dim) * (c.index_heads + 1),
                **state_traffic(StateSpec(rows=kept.rows[2:]), step),
            ),
            self._attention(step, near + read, StateSpec(rows=kept.rows[:2])),
        )
