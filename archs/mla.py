"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434; as in DeepSeek-V3, 2412.19437).

Keys and values of all heads are projections of one small latent per token, and that latent is
what the state keeps, beside one rotary key that all heads share. Two forms of the same product:

- expanded: project the latents up to the keys and values of every head, then plain attention;
- absorbed: (q W_UK) · latent = q · (W_UK latent), so queries go down instead and attention has
  one KV head, as wide as a state row, whose values are its first `rank` columns.

Decode is absorbed; `absorbs` picks the cheaper one for longer steps. Equals the attention of
`transformers`' DeepSeek-V3 (interleaved rotary pairs, norms on both latents, none on the key) and,
without positions, of its Kimi Linear (arXiv 2510.26692).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from archs.axes import Axis, columns, read_by, rows, spans
from archs.checks import at_least, positive
from archs.cost import Cost, OpCost, Step, attention_cost, linear_cost
from archs.errors import UserError
from archs.formats import Format
from archs.layers import Projection, RMSNorm
from archs.mixer import Mixer, MixerConfig, Place, Shared, takes_unnormed
from archs.ops.attention import attend_expanded, attend_latent
from archs.ops.dense import Input, by_head
from archs.ops.rotary import append_latent, queries_and_key
from archs.spec import RowSpec, StateSpec
from archs.state import LayerState, Rows, Seen
from kernels.rope.torch import rope_table, rotate

if TYPE_CHECKING:
    from archs.sizes import Scale

#: From this width on queries come from a latent too.
Q_RANK_FROM_D_MODEL = 2048


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentConfig(MixerConfig):
    """Channels per head: nope_dim without and rope_dim with positions in keys, v_dim in values.

    rank: width of the latent that keys and values come from; q_rank: of the queries' own latent
    (None: queries come from the input). kv_eps, q_eps: of the norms of the two latents. positions:
    whether those rope_dim channels are turned at all; otherwise they are a part of the keys that
    all heads share, and other layers must tell tokens' order (NoPE).
    """

    n_heads: int
    rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    q_rank: int | None = None
    rope_theta: float = 10_000.0
    kv_eps: float = 1e-6
    q_eps: float = 1e-6
    positions: bool = True

    def __post_init__(self) -> None:
        at_least(self, 1, "n_heads", "rank", "nope_dim", "rope_dim", "v_dim", "q_rank")
        positive(self, "rope_theta", "kv_eps", "q_eps")
        if self.positions and self.rope_dim % 2:
            raise UserError(f"rope_dim={self.rope_dim} is odd; rotary pairs need an even one")

    @classmethod
    def defaults(cls, scale: "Scale") -> dict[str, Any]:
        """DeepSeek's ratios: rank 4, rope 1/2, q_rank 12 times a head; rank at most D/2."""
        dim = scale.head_dim
        rank = min(scale.d_model // 2, 4 * dim)
        return {
            "n_heads": scale.n_heads,
            "rank": rank,
            "nope_dim": dim,
            "rope_dim": dim // 2,
            "v_dim": dim,
            "q_rank": 3 * rank if scale.d_model >= Q_RANK_FROM_D_MODEL else None,
        }

    @property
    def theta(self) -> float | None:
        """Of the rotation; None: there is none."""
        return self.rope_theta if self.positions else None

    @property
    def qk_dim(self) -> int:
        """Channels of an expanded key."""
        return self.nope_dim + self.rope_dim

    @property
    def row_dim(self) -> int:
        """Channels of a state row: the latent and the rotary key."""
        return self.rank + self.rope_dim

    @property
    def expanded_dim(self) -> int:
        """Width at which expanded attention computes, narrower operands padded."""
        return max(self.qk_dim, self.v_dim)

    def absorbs(self, new_tokens: int, rows: int) -> bool:
        """Whether `new_tokens` over `rows` visible rows, their own included, take fewer FLOPs
        absorbed: per head, going up costs rank·(nope + v) for each past row, staying down
        2·(row_dim - expanded_dim) for each pair. Single tokens always do.
        """
        up = (rows - new_tokens) * self.rank * (self.nope_dim + self.v_dim)
        down = 2 * new_tokens * rows * (self.row_dim - self.expanded_dim)
        return new_tokens == 1 or up > down


class Down(NamedTuple):
    """What a layer makes of its input, before positions are turned into it.

    q_nope: [B, K, H, nope]. to_turn: the rotary queries and, as one more head, the rotary key
    [B, K, ·, rope], in one slab or two. latent: [B, K, rank], not yet normed. q_latent: what
    queries come from, [B, K, q_rank]; None where they come from the input.
    """

    q_nope: Tensor
    to_turn: list[Tensor]
    latent: Tensor
    q_latent: Tensor | None


class LatentAttention(Mixer):
    """Softmax attention over keys and values that are kept as one latent per token."""

    Config: ClassVar[type[MixerConfig]] = LatentConfig

    def __init__(self, config: LatentConfig, place: Place) -> None:
        super().__init__()
        self.config = c = config
        heads = c.n_heads
        query = (heads * c.nope_dim, heads * c.rope_dim)
        # The rotary key stands right after the rotary queries: one slab, one rotation.
        if c.q_rank is None:
            self.down = Projection(place.d_model, *query, c.rope_dim, c.rank)
            self.q_norm = self.q_up = None
        else:
            self.down = Projection(place.d_model, c.q_rank, c.rope_dim, c.rank)
            self.q_norm = RMSNorm(c.q_rank, eps=c.q_eps)
            self.q_up = Projection(c.q_rank, *query)
        self.kv_norm = RMSNorm(c.rank, eps=c.kv_eps)
        self.kv_up = Projection(c.rank, heads * c.nope_dim, heads * c.v_dim, plain=True)
        self.out = Projection(heads * c.v_dim, place.d_model, residual=True)

    def _down(self, x: Input) -> Down:
        """x: [B, K, D]."""
        c, q_latent = self.config, None
        down = self.down(x)
        if self.q_norm is None or self.q_up is None:
            q_nope, slab, latent = down.split(
                (c.n_heads * c.nope_dim, (c.n_heads + 1) * c.rope_dim, c.rank), -1
            )
            slabs = [slab]
        else:
            q_down, k_rope, latent = down.split(self.down.sizes, -1)
            q_latent = self.q_norm(q_down)
            q_nope, q_rope = self.q_up(q_latent).split(self.q_up.sizes, -1)
            slabs = [q_rope, k_rope]
        to_turn = [slab.unflatten(-1, (-1, c.rope_dim)) for slab in slabs]
        return Down(q_nope.unflatten(-1, (c.n_heads, -1)), to_turn, latent, q_latent)

    def forward(self, x: Tensor, shared: Shared | None = None) -> Tensor:
        """x: [B, T, D] -> [B, T, D], expanded."""
        c, tokens = self.config, x.shape[1]
        q_nope, slabs, latent, _ = self._down(x)
        if c.positions:
            angles = rope_table(tokens, c.rope_dim, c.rope_theta, x.device)[:tokens]
            slabs = [rotate(t, angles) for t in slabs]
        q_rope, key = queries_and_key(slabs)
        rows = torch.cat((self.kv_norm(latent), key), -1)
        return self._expanded(q_nope, q_rope, Seen(rows, None, True))

    @takes_unnormed
    def extend(self, x: Input, state: LayerState) -> Tensor:
        """x: [B, K, D] -> [B, K, D]."""
        down = self._down(x)
        q_rope, seen = self._append(down, state)
        absorbs = self.config.absorbs(x.shape[1], seen.length)
        return (self._absorbed if absorbs else self._expanded)(down.q_nope, q_rope, seen)

    def _append(self, down: Down, state: LayerState) -> tuple[Tensor, Rows]:
        """The rotary queries [B, K, H, rope], and the rows that the new tokens may see."""
        return append_latent(
            down.to_turn, down.latent, self.kv_norm.weight, state, "latent", eps=self.kv_norm.eps,
            theta=self.config.theta, backend=self.backend,
        )  # fmt: skip

    def _expanded(self, q_nope: Tensor, q_rope: Tensor, seen: Rows) -> Tensor:
        q, k, v = self._raised(q_nope, q_rope, seen)
        out = attend_expanded(q, k, v, seen, backend=self.backend)
        return self.out(out.flatten(2))

    def _raised(self, q_nope: Tensor, q_rope: Tensor, seen: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, K, H, ·], and keys and values of every head of the rows, [B, H, S, ·]."""
        c = self.config
        latent, k_rope = seen.rows.split((c.rank, c.rope_dim), -1)
        k_nope, v = self.kv_up(latent).split(self.kv_up.sizes, -1)
        k_nope, v = (t.unflatten(-1, (c.n_heads, -1)) for t in (k_nope, v))
        k = torch.cat((k_nope, k_rope[:, :, None].expand(-1, -1, c.n_heads, -1)), -1)
        return torch.cat((q_nope, q_rope), -1), k.transpose(1, 2), v.transpose(1, 2)

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, seen: Rows) -> Tensor:
        scale = self.config.qk_dim**-0.5

        def attend(q_latent: Tensor) -> Tensor:
            return attend_latent(q_latent, q_rope, seen, scale=scale, backend=self.backend)

        return self._in_latents(q_nope, attend)

    def _ups(self) -> Sequence[Projection]:
        """From latents up to keys and values."""
        return (self.kv_up,)

    def _in_latents(self, q_nope: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        """The layer's output of what `attend` makes of queries as wide as latents, [B, K, H, rank]
        both.
        """
        c = self.config
        up_k, up_v = (
            w.unflatten(0, (c.n_heads, -1)) for w in self.kv_up.weight.split(self.kv_up.sizes)
        )
        out = attend(by_head(q_nope, up_k, backend=self.backend))
        return self.out(by_head(out, up_v.mT, backend=self.backend).flatten(2))

    def state_spec(self) -> StateSpec:
        """The latent and the rotary key of every token: rank + rope values for all heads."""
        c = self.config
        stored = Format.of(self.kv_up.weight.dtype)
        return StateSpec(rows=(RowSpec(name="latent", shape=(c.row_dim,), format=stored),))

    def axes(self) -> tuple[Axis, ...]:
        """The latent, heads, value channels, and the queries' latent if there is one."""
        c = self.config
        heads, first = c.n_heads, sum(self.down.sizes[:-1])
        latent, values = spans(first, c.rank, 1), spans(0, heads, c.v_dim)
        nope, rope = spans(0, heads, c.nope_dim), spans(heads * c.nope_dim, heads, c.rope_dim)
        channels = spans(0, heads * c.v_dim, 1)
        query = "down" if self.q_up is None else "q_up"
        found = [
            Axis(
                name="rank",
                kind="state",
                slices=(
                    rows("down.weight", latent), rows("kv_norm.weight", latent - first),
                    columns("kv_up.weight", latent - first),
                ),
                signals=(read_by("kv_up", latent - first),),
                fields={"rank": 1},
                inverse=("kv_eps",),
                norm="kv_norm.weight",
                reader="kv_up",
            ),
            Axis(
                name="heads",
                kind="width",
                slices=(
                    rows(f"{query}.weight", nope, rope),
                    rows("kv_up.weight", nope, values + heads * c.nope_dim),
                    columns("out.weight", values),
                ),
                signals=(read_by("out", values),),
                fields={"n_heads": 1},
            ),
            Axis(
                name="value_dim",
                kind="width",
                groups=heads,
                slices=(
                    rows("kv_up.weight", channels + heads * c.nope_dim),
                    columns("out.weight", channels),
                ),
                signals=(read_by("out", channels),),
                fields={"v_dim": 1},
            ),
        ]  # fmt: skip
        if c.q_rank is not None:
            units = spans(0, c.q_rank, 1)
            found.append(
                Axis(
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
                )
            )  # fmt: skip
        return tuple(found)

    def cost(self, step: Step) -> Cost:
        """FLOPs and bytes of one step, in the form that `extend` takes."""
        c = self.config
        rows = step.context + step.new_tokens
        absorbs = c.absorbs(step.new_tokens, rows)
        width = c.row_dim if absorbs else c.expanded_dim
        attention = attention_cost(
            self.state_spec().rows[0],
            step,
            heads=c.n_heads,
            qk_dim=width,
            v_dim=width,
            kept=self.kept_spec(),
        )
        return self._cost(step, attention, absorbs=absorbs)

    def _cost(self, step: Step, *attention: OpCost, absorbs: bool) -> Cost:
        """What stands around attention."""
        c = self.config
        rows = step.context + step.new_tokens
        norms = [n.weight for n in (self.kv_norm, self.q_norm) if n is not None]
        query = [] if self.q_up is None else [linear_cost("q up", self.q_up, step.tokens)]
        up, raised = ("absorb k, v up", step.tokens) if absorbs else ("k, v up", step.batch * rows)
        return Cost.of(
            linear_cost("q, latent down", self.down, step.tokens),
            OpCost(
                name="latent norms",
                vector_flops=4 * step.tokens * sum(w.numel() for w in norms),
                weight_bytes=sum(w.nbytes for w in norms),
            ),
            *query,
            OpCost(
                name="rope",
                vector_flops=c.positions * 3 * step.tokens * (c.n_heads + 1) * c.rope_dim,
            ),
            *(linear_cost(up, part, raised) for part in self._ups()),
            *attention,
            linear_cost("attention out", self.out, step.tokens),
        )
