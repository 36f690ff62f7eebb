"""DeepSeek Sparse Attention (DeepSeek-V3.2, arXiv 2512.02556): latent attention over few rows.

An indexer of few heads scores every earlier token, I = Σ_h w_h · relu(q_h · k), and attention reads
the latents of the `picks` best ones alone. The state is `mla`'s latents and one index key a token:
a step scans all keys and gathers `picks` latents. Up to `picks` tokens it is dense attention.

Equals the attention of `transformers`' DeepSeek-V3.2: index queries come from the queries' latent
(from the input where there is none), index keys pass a LayerNorm, and rotary positions turn the
first `rope_dim` channels of both. There these are half-split, here interleaved: the same after each
head's channels, those of the LayerNorm included, are permuted. Scores are float32 with the scale
(heads · channels)^-0.5. The published kernels rotate keys by a Hadamard matrix, which changes no
product, and round them to eight bits, which is a format here (`index:fp8`).

What the split law promises of the choice: it is a function of the stored keys and a token's query
alone, whatever else is in the step, and among equal scores the earlier row wins
(`kernels.sparse.torch`). Queries and keys themselves are products whose last bits depend on the
number of rows, so two rows whose scores differ by that rounding may still change places.

Attention's loss has no gradient in the choice. The indexer learns from KL(attention || softmax(I))
(equation 3), its inputs detached, so that nothing else learns from it. The loss is over all rows
in every step: here there is no dense model to start from, and rows that are not picked must be
able to come back. Attention itself is over the picked rows from the first step on.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from archs.axes import Axis, columns, made_by, rows, spans
from archs.checks import at_least, positive
from archs.cost import Cost, OpCost, Step, linear_cost, state_traffic
from archs.errors import UserError
from archs.formats import Format
from archs.layers import Projection
from archs.mixer import Initialiser, MixerConfig, Place, Shared, asks_losses, leave_loss
from archs.mla import Down, LatentAttention, LatentConfig
from archs.ops.rotary import queries_and_key
from archs.ops.sparse import IndexNorm, Picked, append_index, attend_picked, pick_rows
from archs.recurrent import fill_ones
from archs.spec import RowSpec, StateSpec
from archs.state import LayerState, Rows, Seen
from kernels.rope.torch import rope_table, rotate
from kernels.sparse.torch import (
    best_rows,
    index_flops,
    index_loss,
    index_scores,
    mean_attention,
    turn_first,
)

if TYPE_CHECKING:
    from archs.sizes import Scale

#: Most rows that a token reads at the default, those of DeepSeek-V3.2.
MOST_PICKS = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseLatentConfig(LatentConfig):
    """`mla` whose tokens read `picks` rows each.

    index_heads, index_dim: of the indexer, whose first rope_dim channels have positions. index_eps:
    of its keys' norm.
    """

    index_heads: int
    index_dim: int
    picks: int
    index_eps: float = 1e-6

    def __post_init__(self) -> None:
        LatentConfig.__post_init__(self)
        at_least(self, 1, "index_heads", "index_dim", "picks")
        positive(self, "index_eps")
        if not self.positions:
            raise UserError(
                "positions=false: the indexer of dsa turns its queries and keys; take mla for "
                "latents without positions"
            )
        if self.index_dim < self.rope_dim:
            raise UserError(
                f"index_dim={self.index_dim} is less than rope_dim={self.rope_dim}: index keys "
                "carry positions, too; make index_dim larger or rope_dim smaller"
            )

    @classmethod
    def defaults(cls, scale: "Scale") -> dict[str, Any]:
        """DeepSeek's ratios: half as many index heads as heads, as wide as those; a quarter of the
        trained length is read, at most 2048 rows.
        """
        return {
            **LatentConfig.defaults(scale),
            "index_heads": max(2, scale.n_heads // 2),
            "index_dim": scale.head_dim,
            "picks": max(1, min(MOST_PICKS, scale.seq_len // 4)),
        }

    def gathers(self, new_tokens: int, rows: int) -> bool:
        """Whether a step gathers the rows of every token apart: where these are no more than all
        rows, which a longer step reads once, under a mask. Single tokens always do.
        """
        return new_tokens * min(self.picks, rows) <= rows

    @property
    def index_scale(self) -> float:
        """What scores are multiplied with."""
        return (self.index_heads * self.index_dim) ** -0.5


class SparseLatentAttention(LatentAttention):
    """Latent attention over the rows that a small indexer picks for each token."""

    Config: ClassVar[type[MixerConfig]] = SparseLatentConfig
    config: SparseLatentConfig

    def __init__(self, config: SparseLatentConfig, place: Place) -> None:
        super().__init__(config, place)
        c, queries = config, config.index_heads * config.index_dim
        of_input = (c.index_dim, c.index_heads)
        # Head weights decide a sign, as gates do.
        if c.q_rank is None:
            self.index_down = Projection(place.d_model, *of_input, queries, gates=(1,))
            self.index_q = None
        else:
            self.index_down = Projection(place.d_model, *of_input, gates=(1,))
            self.index_q = Projection(c.q_rank, queries)
        self.index_norm_weight = nn.Parameter(torch.empty(c.index_dim))
        self.index_norm_bias = nn.Parameter(torch.empty(c.index_dim))

    def initialisers(self) -> dict[str, Initialiser]:
        """The LayerNorm of index keys starts as the identity."""
        return {"index_norm_weight": fill_ones}

    @property
    def _index_norm(self) -> IndexNorm:
        return IndexNorm(self.index_norm_weight, self.index_norm_bias, self.config.index_eps)

    def _index(self, x: Tensor, down: Down) -> tuple[Tensor, Tensor, Tensor]:
        """Index queries [B, K, Hi, di], keys [B, K, di] before their norm, and head weights
        [B, K, Hi], scale included. Their gradients end here: the indexer has a loss of its own.
        """
        c = self.config
        key, weights, *more = self.index_down(x.detach()).split(self.index_down.sizes, -1)
        if self.index_q is None or down.q_latent is None:
            (queries,) = more
        else:
            queries = self.index_q(down.q_latent.detach())
        return queries.unflatten(-1, (c.index_heads, -1)), key, weights.float() * c.index_scale

    def forward(self, x: Tensor, shared: Shared | None = None) -> Tensor:
        """x: [B, T, D] -> [B, T, D], expanded. Leaves the indexer's loss where it is asked for."""
        c, tokens = self.config, x.shape[1]
        angles = rope_table(tokens, c.rope_dim, c.rope_theta, x.device)[:tokens]
        down = self._down(x)
        q_rope, key = queries_and_key([rotate(t, angles) for t in down.to_turn])
        seen = Seen(torch.cat((self.kv_norm(down.latent), key), -1), None, True)
        if tokens > c.picks or asks_losses(shared):
            scores = self._scores(x, down, angles)
            if shared is not None and asks_losses(shared):
                q, k, _ = self._raised(down.q_nope, q_rope, seen)
                attention = mean_attention(q, k, scale=c.qk_dim**-0.5)
                leave_loss(shared, index_loss(scores, attention))
            if tokens > c.picks:
                earlier = torch.ones(1, tokens, tokens, dtype=torch.bool, device=x.device).tril()
                picked = Picked(*best_rows(scores.detach(), earlier, c.picks), tokens)
                seen = Seen(seen.rows, picked.mask(), False)
        return self._expanded(down.q_nope, q_rope, seen)

    def _scores(self, x: Tensor, down: Down, angles: Tensor) -> Tensor:
        """Of every token for every token, float32 [B, T, T]."""
        queries, key, weights = self._index(x, down)
        rope = self.config.rope_dim
        turned = turn_first(self._index_norm(key)[:, :, None], angles, rope)[:, :, 0]
        return index_scores(turn_first(queries, angles, rope), weights, turned)

    def extend(self, x: Tensor, state: LayerState) -> Tensor:  # type: ignore[override]
        """x: [B, K, D] -> [B, K, D]."""
        c, down = self.config, self._down(x)
        queries, key, weights = self._index(x, down)
        q_rope, seen = self._append(down, state)
        queries, keys = append_index(
            queries, key, self._index_norm, state, "index", rope_dim=c.rope_dim, theta=c.rope_theta,
            backend=self.backend,
        )  # fmt: skip
        picked = pick_rows(queries, weights, keys, c.picks, backend=self.backend)
        if c.gathers(x.shape[1], seen.length):
            return self._gathered(down.q_nope, q_rope, seen, picked)
        absorbs = c.absorbs(x.shape[1], seen.length)
        of_picked = Seen(seen.rows, picked.mask(), False)
        return (self._absorbed if absorbs else self._expanded)(down.q_nope, q_rope, of_picked)

    def _gathered(self, q_nope: Tensor, q_rope: Tensor, seen: Rows, picked: Picked) -> Tensor:
        scale = self.config.qk_dim**-0.5

        def attend(q_latent: Tensor) -> Tensor:
            return attend_picked(q_latent, q_rope, seen, picked, scale=scale, backend=self.backend)

        return self._in_latents(q_nope, attend)

    def state_spec(self) -> StateSpec:
        """The latents of `mla`, of which a token reads `picks`, and an index key of every token."""
        c, (latent,) = self.config, super().state_spec().rows
        stored = Format.of(self.index_norm_weight.dtype)
        index = RowSpec(name="index", shape=(c.index_dim,), format=stored, kind="index")
        return StateSpec(rows=(replace(latent, picks=c.picks), index))

    def axes(self) -> tuple[Axis, ...]:
        """Those of `mla`, of which the queries' latent makes index queries, too; index heads."""
        c, of_input = self.config, self.index_down.sizes[:2]
        weights = spans(c.index_dim, c.index_heads, 1)
        if c.q_rank is None:
            query, queries = "index_down", spans(sum(of_input), c.index_heads, c.index_dim)
            made = [rows("index_down.weight", weights, queries)]
        else:
            query, queries = "index_q", spans(0, c.index_heads, c.index_dim)
            made = [rows("index_down.weight", weights), rows("index_q.weight", queries)]
        heads = Axis(
            name="index_heads",
            kind="width",
            slices=tuple(made),
            signals=(made_by("index_down", weights), made_by(query, queries)),
            fields={"index_heads": 1},
        )
        return (*(self._read_by_index(axis) for axis in super().axes()), heads)

    def _read_by_index(self, axis: Axis) -> Axis:
        if axis.name != "query_rank":
            return axis
        units = spans(0, axis.count, 1)
        return replace(axis, slices=(*axis.slices, columns("index_q.weight", units)))

    def cost(self, step: Step) -> Cost:
        """FLOPs and bytes of one step, in the form that `extend` takes: a scan of all index keys,
        then attention over picked rows, or over all of them under a mask.
        """
        c, kept = self.config, self.kept_spec()
        seen = step.context + step.new_tokens
        gathers = c.gathers(step.new_tokens, seen)
        absorbs = gathers or c.absorbs(step.new_tokens, seen)
        width = c.row_dim if absorbs else c.expanded_dim
        scores = step.tokens * c.n_heads * (min(c.picks, seen) if gathers else seen)
        latent, index = (StateSpec(rows=(tensor,)) for tensor in kept.rows)
        norm = self._index_norm
        query = [] if self.index_q is None else [linear_cost("index q", self.index_q, step.tokens)]
        return self._cost(
            step,
            linear_cost("index key, weights", self.index_down, step.tokens),
            *query,
            OpCost(
                name="index norm and rope",
                vector_flops=step.tokens * (8 * c.index_dim + 3 * (c.index_heads + 1) * c.rope_dim),
                weight_bytes=norm.weight.nbytes + norm.bias.nbytes,
            ),
            OpCost(
                name="index scan",
                matrix_flops=index_flops(step.tokens, c.index_heads, c.index_dim, seen),
                vector_flops=step.tokens * seen * (c.index_heads + 1),
                **state_traffic(index, step),
            ),
            OpCost(
                name="attention",
                matrix_flops=4 * scores * width,
                vector_flops=5 * scores,
                **state_traffic(latent, step),
            ),
            absorbs=absorbs,
        )
