"""Native sparse attention (arXiv 2502.11089): block means, picked blocks and a window, gated.

Tokens lie in blocks of m. A token attends to the mean keys and values of all whole blocks; to the
rows of `picks` blocks, which are the first, its own, the one before, and those that get the largest
weights in the first attention, summed over the query heads of a KV head; and to its newest `window`
rows. Sigmoid gates of its input weigh the three, head by head. The state is that of `gqa` and one
row more for every m tokens: a step scans the latter and gathers from the former. Up to m · `picks`
tokens the second attention is dense attention.

Equals flash-linear-attention's `naive_nsa` behind rotary positions: means in place of the paper's
learned compression, the same blocks for both attentions, and keys and values that all three share.
A block's mean is made of its rows when its last token comes, so a block that is not whole needs no
state of its own.

The choice has no gradient; what it goes by learns as an attention of its own. Why it is the same in
every split: `kernels.blocks.torch`.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from archs.axes import Axis, rows, spans
from archs.checks import at_least
from archs.cost import Cost, OpCost, Step, linear_cost, state_traffic
from archs.errors import UserError
from archs.gqa import OPTIONS, Attention, GroupedConfig
from archs.layers import Projection
from archs.mixer import MixerConfig, Place, Shared
from archs.ops.blocks import Blocks, attend_all_blocks, attend_blocks
from archs.ops.rotary import project_append
from archs.spec import RowSpec, StateSpec
from archs.state import LayerState

if TYPE_CHECKING:
    from archs.sizes import Scale

#: The paper's blocks, how many of them a token reads, and its window, for long sequences.
MOST_BLOCK, MOST_PICKS, MOST_WINDOW = 64, 16, 512
#: The first block, a token's own and the one before are always read.
LEAST_PICKS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseBlockConfig(GroupedConfig):
    """`gqa` whose tokens read the means of blocks of `block` tokens, `picks` of these blocks, those
    that are always read among them, and the newest `window` rows.
    """

    block: int
    picks: int

    def __post_init__(self) -> None:
        GroupedConfig.__post_init__(self)
        for name in OPTIONS:
            value = getattr(self, name)
            if value is not None and value is not False:
                raise UserError(
                    f"{name}={value}: nsa's three attentions have no such form; leave it out"
                )
        at_least(self, 1, "block")
        at_least(self, LEAST_PICKS, "picks")
        if self.window is None:
            raise UserError("window=None: nsa reads a window of rows; give it 1 or more")
        if self.sinks:
            raise UserError(
                f"sinks={self.sinks}: nsa always reads the first block; leave sinks out"
            )

    @classmethod
    def defaults(cls, scale: "Scale") -> dict[str, Any]:
        """Blocks of a sixteenth of the trained length, at most 64; a quarter of it is read, at most
        16 blocks, beside a window of an eighth, at most 512.
        """
        block = max(1, min(MOST_BLOCK, scale.seq_len // 16))
        picks = max(LEAST_PICKS + 1, min(MOST_PICKS, scale.seq_len // 4 // block))
        window = max(1, min(MOST_WINDOW, scale.seq_len // 8))
        return {
            **GroupedConfig.defaults(scale), "block": block, "picks": picks, "window": window,
        }  # fmt: skip

    @property
    def blocks(self) -> Blocks:
        """What a token reads."""
        assert self.window is not None
        return Blocks(self.block, self.picks, self.window)


class SparseBlockAttention(Attention):
    """Grouped attention over block means, a few blocks and a window."""

    Config: ClassVar[type[MixerConfig]] = SparseBlockConfig
    #: Means of blocks are made of rows as they come.
    coded_rows = evictable = frozenset()
    config: SparseBlockConfig

    def __init__(self, config: SparseBlockConfig, place: Place) -> None:
        super().__init__(config, place)
        # Of the means, the picked blocks and the window, each for all heads.
        self.gate = Projection(place.d_model, *[config.n_heads] * 3, gates=(0, 1, 2))

    def forward(self, x: Tensor, shared: Shared | None = None) -> Tensor:
        """x: [B, T, D] -> [B, T, D]."""
        q, kv = self._rotated(self._heads(x)[0])
        found = attend_all_blocks(q, kv.movedim(1, -2), self.config.blocks)
        return self.out(found.gated(self._gates(x)).flatten(2))

    def extend(self, x: Tensor, state: LayerState) -> Tensor:  # type: ignore[override]
        """x: [B, K, D] -> [B, K, D]."""
        c = self.config
        q, seen = project_append(
            x, self.qkv.stored, state, "kv", kv_heads=c.kv_heads, head_dim=c.head_dim,
            theta=c.rope_theta, backend=self.backend,
        )  # fmt: skip
        found = attend_blocks(q, seen, state, "means", c.blocks, backend=self.backend)
        return self.out(found.gated(self._gates(x)).flatten(2))

    def _gates(self, x: Tensor) -> Tensor:
        """[B, K, 3, H]."""
        return self.gate(x).sigmoid().unflatten(-1, (3, -1))

    def state_spec(self) -> StateSpec:
        """K and V of every token, of which a token reads a few blocks, and their block means."""
        (kv,), c = super().state_spec().rows, self.config
        kv = replace(kv, window=None, picks=c.blocks.rows)
        means = RowSpec(
            name="means", shape=kv.shape, format=kv.format, shards=kv.shards, every=c.block
        )
        return StateSpec(rows=(kv, means))

    def axes(self) -> tuple[Axis, ...]:
        """Those of `gqa`, whose heads have gates."""
        heads = self.config.n_heads

        def gated(axis: Axis) -> Axis:
            own = spans(0, axis.count, heads // axis.count)
            gates = rows("gate.weight", own, own + heads, own + 2 * heads)
            return replace(axis, slices=(*axis.slices, gates))

        return tuple(gated(axis) for axis in super().axes())

    def cost(self, step: Step) -> Cost:
        """FLOPs and bytes of one step, in the form that `extend` takes: an attention over all block
        means, then two over gathered rows, or over all rows under masks.
        """
        c, blocks, kept = self.config, self.config.blocks, self.kept_spec()
        seen = step.context + step.new_tokens
        gathers = blocks.gathers(step.new_tokens, seen)
        picked = blocks.size * blocks.count if gathers else seen
        window = blocks.window if gathers else seen
        kv, means = (StateSpec(rows=(tensor,)) for tensor in kept.rows)
        each = step.tokens * c.n_heads
        whole = seen // blocks.size
        made = -(-step.new_tokens // blocks.size) * blocks.size
        return Cost.of(
            linear_cost("q, k, v", self.qkv, step.tokens),
            OpCost(name="rope", vector_flops=3 * step.tokens * sum(self.qkv.sizes[:2])),
            linear_cost("gates", self.gate, step.tokens),
            OpCost(
                name="block means",
                vector_flops=step.batch * made * 2 * c.kv_heads * c.head_dim,
            ),
            OpCost(
                name="attention over means",
                matrix_flops=4 * each * whole * c.head_dim,
                vector_flops=7 * each * whole,
                **state_traffic(means, step),
            ),
            OpCost(
                name="attention",
                matrix_flops=4 * each * (picked + window) * c.head_dim,
                vector_flops=5 * each * (picked + window),
                **state_traffic(kv, step),
            ),
            OpCost(name="gated sum", vector_flops=5 * each * c.head_dim + 3 * each),
            linear_cost("attention out", self.out, step.tokens),
        )
