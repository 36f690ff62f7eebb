"""A user's own mixer of three kinds of rows: a window of its own, and means of every few tokens,
which the first such layer makes and all of them read; what is not yet a whole mean is a sum.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from archs.cost import Cost, OpCost, Step, linear_cost, state_traffic
from archs.formats import Format
from archs.layers import Projection
from archs.mixer import Mixer, MixerConfig, Place, Shared
from archs.spec import FixedSpec, RowSpec, StateSpec
from archs.state import LayerState, Rows, Seen, mask_of, visible


@dataclass(frozen=True, kw_only=True, slots=True)
class PooledConfig(MixerConfig):
    """One head of `dim` channels over `window` rows and means of `every` tokens."""

    dim: int = 32
    window: int = 5
    every: int = 3


class PooledRows(Mixer):
    """softmax(q [near k, mean k]ᵀ) [near v, mean v]; no positions."""

    Config = PooledConfig

    def __init__(self, config: PooledConfig, place: Place) -> None:
        super().__init__()
        self.config = config
        self.layer, first = place.layer, place.siblings[0]
        self.owner = None if first == place.layer else first
        self.qkv = Projection(place.d_model, *[config.dim] * 3)
        self.out = Projection(config.dim, place.d_model, residual=True)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries [B, K, d] and rows [B, K, 2, d]."""
        q, k, v = self.qkv(x).chunk(3, -1)
        return q, torch.stack((k, v), 2)

    def forward(self, x: Tensor, shared: Shared | None = None) -> Tensor:
        c, tokens = self.config, x.shape[1]
        q, kv = self._split(x)
        at = torch.arange(tokens, device=x.device)[None]
        near = Seen(kv.movedim(1, 2), visible(at, at + 1, c.window, 0), False)
        if self.owner is None:
            start = kv.new_zeros(len(x), 2, c.dim, dtype=torch.float32)
            means, _ = self._means(kv, start, at, None)
            rows = means[:, : tokens // c.every].movedim(1, 2)
            ends = (at + 1) // c.every
            far = Seen(rows, visible(torch.arange(rows.shape[2])[None], ends, None, 0), False)
            if shared is not None:
                shared[self.layer] = far
        else:
            assert shared is not None
            far = shared[self.owner]
        return self._attend(q, near, far)

    def extend(self, x: Tensor, state: LayerState) -> Tensor:
        q, kv = self._split(x)
        near = state.append("kv", kv)
        if self.owner is not None:
            return self._attend(q, near, state.seen("means"))
        begun = state.get("begun")
        means, sums = self._means(kv, begun, state.positions, state.valid)
        last = sums[:, -1]
        if state.new is not None:
            at = (state.new - 1).clamp(min=0)
            last = sums[torch.arange(len(sums)), at]
            last = torch.where((state.new > 0)[:, None, None], last, begun)
        state.put("begun", last, sums if state.each else None)
        return self._attend(q, near, state.append("means", means))

    def _means(
        self, kv: Tensor, begun: Tensor, at: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The means that may be completed [B, R, 2, d], and what is begun after each token."""
        every, tokens = self.config.every, kv.shape[1]
        at = at.expand(len(kv), -1)
        part = at // every - at[:, :1] // every
        fresh = kv.float() if valid is None else kv.float() * valid[:, :, None, None]
        sums = fresh.new_zeros(len(kv), -(-tokens // every) + 1, *kv.shape[2:])
        sums = sums.scatter_add(1, part[:, :, None, None].expand_as(fresh), fresh)
        sums = torch.cat((sums[:, :1] + begun[:, None], sums[:, 1:]), 1)
        running, partial = [], begun
        for t in range(tokens):
            partial = partial + fresh[:, t]
            running.append(partial)
            partial = partial.masked_fill(((at[:, t] + 1) % every == 0)[:, None, None], 0)
            running[-1] = partial
        return (sums[:, :-1] / every).to(kv.dtype), torch.stack(running, 1)

    def _attend(self, q: Tensor, *parts: Rows) -> Tensor:
        scores, values = [], []
        for seen in parts:
            k, v = seen.rows.unbind(1)
            score = q @ k.mT * self.config.dim**-0.5
            scores.append(score.masked_fill(~mask_of(seen, q.shape[1]), -torch.inf))
            values.append(v)
        weights = torch.cat(scores, -1).softmax(-1).split([s.shape[-1] for s in scores], -1)
        mixed = [w @ v for w, v in zip(weights, values, strict=True)]
        return self.out(mixed[0] + mixed[1])

    def state_spec(self) -> StateSpec:
        c, stored = self.config, Format.of(self.qkv.weight.dtype)
        kv = RowSpec(name="kv", shape=(2, c.dim), format=stored, window=c.window)
        means = RowSpec(
            name="means", shape=(2, c.dim), format=stored, every=c.every, owner=self.owner
        )
        begun = FixedSpec(name="begun", shape=(2, c.dim), format=Format.of(torch.float32))
        return StateSpec(rows=(kv, means), fixed=() if self.owner is not None else (begun,))

    def cost(self, step: Step) -> Cost:
        spec = self.kept_spec()
        seen = sum(t.visible_rows(step.context, step.new_tokens) for t in spec.rows)
        scores = step.tokens * seen
        means = 8 * step.tokens * self.config.dim if self.owner is None else 0
        attention = OpCost(
            name="pooled attention",
            matrix_flops=4 * scores * self.config.dim,
            vector_flops=5 * scores + means,
            **state_traffic(spec, step),
        )
        projections = linear_cost("q, k, v", self.qkv, step.tokens)
        return Cost.of(projections, attention, linear_cost("out", self.out, step.tokens))
