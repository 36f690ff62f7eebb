"""Grouped latent attention (GLA, arXiv 2505.21487): latents that GPUs can hold apart.

The latent of `mla` becomes `groups` equal ones, each with a norm and an up-projection of its own
and each for as many query heads; one rotary key still serves all heads. A token has as many values
of state as in `mla`, but of two GPUs each holds and reads one latent of two, where both need that
of `mla` whole. In one group it is `mla`.

Equals the published code but for three details: its projections to and from latents have biases,
here nothing has; its rotary pairs are half-split (`kernels.rope.torch`); it keeps latents as they
are before their norms and norms them anew in every step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from archs.axes import Axis, columns, read_by, rows, spans
from archs.checks import at_least
from archs.cost import Cost, Step, attention_cost
from archs.formats import Format
from archs.layers import Projection
from archs.mixer import MixerConfig, Place, Shared, require_divisible, takes_unnormed
from archs.mla import LatentAttention, LatentConfig
from archs.ops.attention import attend_expanded, attend_tied
from archs.ops.dense import Input, by_head, norm_each
from archs.ops.rotary import append_tied, queries_and_key
from archs.spec import RowSpec, StateSpec
from archs.state import LayerState, Rows, Seen
from kernels.rope.torch import rope_table, rotate

if TYPE_CHECKING:
    from archs.sizes import Scale


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedLatentConfig(LatentConfig):
    """`mla` with `groups` latents; rank: of all of them together."""

    groups: int

    def __post_init__(self) -> None:
        LatentConfig.__post_init__(self)
        at_least(self, 1, "groups")
        require_divisible("n_heads", self.n_heads, "groups", self.groups)
        require_divisible("rank", self.rank, "groups", self.groups)

    @classmethod
    def defaults(cls, scale: "Scale") -> dict[str, Any]:
        """Two groups (GLA-2), one for an odd number of heads; else as `mla`."""
        return {**LatentConfig.defaults(scale), "groups": 1 + (scale.n_heads % 2 == 0)}

    @property
    def group_rank(self) -> int:
        """Width of one latent."""
        return self.rank // self.groups

    def absorbs(self, new_tokens: int, rows: int) -> bool:
        """As in `mla`, with the ranks of one group; values are read no wider than they are."""
        up = (rows - new_tokens) * self.group_rank * (self.nope_dim + self.v_dim)
        width = 2 * self.group_rank + self.rope_dim
        return new_tokens == 1 or up > new_tokens * rows * (width - 2 * self.expanded_dim)


class GroupedLatentAttention(LatentAttention):
    """Latent attention in groups of heads, each over a latent of its own."""

    Config: ClassVar[type[MixerConfig]] = GroupedLatentConfig
    config: GroupedLatentConfig

    def __init__(self, config: GroupedLatentConfig, place: Place) -> None:
        super().__init__(config, place)
        c, heads = config, config.n_heads // config.groups
        # Each group has an up-projection of its own instead.
        del self.kv_up
        self.kv_ups = nn.ModuleList(
            Projection(c.group_rank, heads * c.nope_dim, heads * c.v_dim, plain=True)
            for _ in range(c.groups)
        )

    def _ups(self) -> Sequence[Projection]:
        return [up for up in self.kv_ups if isinstance(up, Projection)]

    def _apart(self, latent: Tensor) -> Tensor:
        """[..., rank] -> [..., groups, rank / groups]."""
        return latent.unflatten(-1, (self.config.groups, -1))

    def forward(self, x: Tensor, shared: Shared | None = None) -> Tensor:
        """x: [B, T, D] -> [B, T, D], expanded."""
        c, tokens = self.config, x.shape[1]
        q_nope, slabs, latent, _ = self._down(x)
        if c.positions:
            angles = rope_table(tokens, c.rope_dim, c.rope_theta, x.device)[:tokens]
            slabs = [rotate(t, angles) for t in slabs]
        q_rope, key = queries_and_key(slabs)
        weight, eps = self._apart(self.kv_norm.weight), self.kv_norm.eps
        normed = norm_each(self._apart(latent), weight, eps, backend=self.backend)
        seen = Seen(normed.transpose(1, 2), None, True)
        return self._by_expanding(q_nope, q_rope, seen, Seen(key, None, True))

    @takes_unnormed
    def extend(self, x: Input, state: LayerState) -> Tensor:
        """x: [B, K, D] -> [B, K, D]."""
        c = self.config
        q_nope, slabs, latent, _ = self._down(x)
        q_rope, seen, keys = append_tied(
            slabs, self._apart(latent), self._apart(self.kv_norm.weight), state, "latent", "key",
            eps=self.kv_norm.eps, theta=c.theta, backend=self.backend,
        )  # fmt: skip
        absorbs = c.absorbs(x.shape[1], seen.length)
        return (self._by_absorbing if absorbs else self._by_expanding)(q_nope, q_rope, seen, keys)

    def _by_expanding(self, q_nope: Tensor, q_rope: Tensor, seen: Rows, key: Rows) -> Tensor:
        c = self.config
        latents = seen.rows.unbind(1)
        found = [up(x).split(up.sizes, -1) for up, x in zip(self._ups(), latents, strict=True)]
        k_nope, v = (
            torch.cat(parts, -1).unflatten(-1, (c.n_heads, -1)).transpose(1, 2)
            for parts in zip(*found, strict=True)
        )
        shared = key.rows[:, None].expand(-1, c.n_heads, -1, -1)
        q, k = torch.cat((q_nope, q_rope), -1), torch.cat((k_nope, shared), -1)
        return self.out(attend_expanded(q, k, v, seen, backend=self.backend).flatten(2))

    def _by_absorbing(self, q_nope: Tensor, q_rope: Tensor, seen: Rows, key: Rows) -> Tensor:
        c, heads = self.config, self.config.n_heads // self.config.groups
        ups = [up.weight.split(up.sizes) for up in self._ups()]

        up_k, up_v = zip(*([w.unflatten(0, (heads, -1)) for w in up] for up in ups), strict=True)
        q = by_head(q_nope, *up_k, backend=self.backend)
        out = attend_tied(q, q_rope, seen, key, scale=c.qk_dim**-0.5, backend=self.backend)
        return self.out(by_head(out, *(v.mT for v in up_v), backend=self.backend).flatten(2))

    def state_spec(self) -> StateSpec:
        """The latents of every token, which GPUs can hold apart, and the rotary key, which each
        needs: rank + rope values together.
        """
        c, stored = self.config, Format.of(self.out.weight.dtype)
        latent = RowSpec(
            name="latent", shape=(c.groups, c.group_rank), format=stored, shards=c.groups
        )
        return StateSpec(rows=(latent, RowSpec(name="key", shape=(c.rope_dim,), format=stored)))

    def axes(self) -> tuple[Axis, ...]:
        """Those of `mla`. A unit lies in every group, since groups stay equal: a channel of each
        latent, a head of each group.
        """
        c, first = self.config, sum(self.down.sizes[:-1])
        heads, groups = c.n_heads // c.groups, range(c.groups)
        query = "down" if self.q_up is None else "q_up"

        def of_all(start: int, count: int, width: int) -> Tensor:
            """`count` units of a group with their like in the others."""
            found = spans(start, c.groups * count, width).unflatten(0, (c.groups, count))
            return found.transpose(0, 1).flatten(1)

        channels, latent = spans(0, c.group_rank, 1), of_all(first, c.group_rank, 1)
        values = of_all(0, heads, c.v_dim)
        # The first group stands for all where the one weight of their norms is fitted.
        rank = Axis(
            name="rank",
            kind="state",
            slices=(
                rows("down.weight", latent), rows("kv_norm.weight", latent - first),
                *(columns(f"kv_ups.{g}.weight", channels) for g in groups),
            ),
            signals=tuple(read_by(f"kv_ups.{g}", channels) for g in groups),
            fields={"rank": c.groups},
            inverse=("kv_eps",),
            norm="kv_norm.weight",
            reader="kv_ups.0",
        )  # fmt: skip
        made = spans(0, heads, c.nope_dim), spans(heads * c.nope_dim, heads, c.v_dim)
        together = Axis(
            name="heads",
            kind="width",
            slices=(
                rows(
                    f"{query}.weight", of_all(0, heads, c.nope_dim),
                    of_all(c.n_heads * c.nope_dim, heads, c.rope_dim),
                ),
                *(rows(f"kv_ups.{g}.weight", *made) for g in groups),
                columns("out.weight", values),
            ),
            signals=(read_by("out", values),),
            fields={"n_heads": c.groups},
        )  # fmt: skip
        each, like = spans(0, heads * c.v_dim, 1), of_all(0, heads * c.v_dim, 1)
        value_dim = Axis(
            name="value_dim",
            kind="width",
            groups=heads,
            slices=(
                *(rows(f"kv_ups.{g}.weight", each + heads * c.nope_dim) for g in groups),
                columns("out.weight", like),
            ),
            signals=(read_by("out", like),),
            fields={"v_dim": 1},
        )
        more = (axis for axis in super().axes() if axis.name == "query_rank")
        return rank, together, value_dim, *more

    def cost(self, step: Step) -> Cost:
        """FLOPs and bytes of one step, in the form that `extend` takes."""
        c, seen = self.config, step.context + step.new_tokens
        absorbs = c.absorbs(step.new_tokens, seen)
        widths = (c.group_rank + c.rope_dim, c.group_rank) if absorbs else (c.expanded_dim,) * 2
        attention = attention_cost(
            self.state_spec().rows[0],
            step,
            heads=c.n_heads,
            qk_dim=widths[0],
            v_dim=widths[1],
            kept=self.kept_spec(),
        )
        return self._cost(step, attention, absorbs=absorbs)
