"""A user's own sparse attention: small keys of all tokens are scanned, few rows are gathered."""

from dataclasses import dataclass

import torch
from torch import Tensor

from archs.cost import Cost, OpCost, Step, linear_cost, state_traffic
from archs.formats import Format
from archs.layers import Projection
from archs.mixer import Mixer, MixerConfig, Place, Shared
from archs.spec import RowSpec, StateSpec
from archs.state import LayerState, Rows, Seen, mask_of, visible


@dataclass(frozen=True, kw_only=True, slots=True)
class PickedConfig(MixerConfig):
    """One head of `dim` channels over the `picks` rows whose keys of `key_dim` score best."""

    dim: int = 32
    key_dim: int = 8
    picks: int = 4


class PickedRows(Mixer):
    """softmax over the best rows of q kᵀ plus their keys' score; no positions."""

    Config = PickedConfig

    def __init__(self, config: PickedConfig, place: Place) -> None:
        super().__init__()
        self.config = config
        self.sizes = (config.dim,) * 3 + (config.key_dim,) * 2
        self.qkv_keys = Projection(place.d_model, *self.sizes)
        self.out = Projection(config.dim, place.d_model, residual=True)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        q, k, v, key_q, key = self.qkv_keys(x).split(self.sizes, -1)
        return q, torch.stack((k, v), 2), key_q, key

    def forward(self, x: Tensor, shared: Shared | None = None) -> Tensor:
        q, kv, key_q, key = self._split(x)
        at = torch.arange(x.shape[1], device=x.device)[None]
        mask = visible(at, at + 1, None, 0)
        return self._attend(q, key_q, Seen(key, mask, False), Seen(kv.movedim(1, 2), mask, False))

    def extend(self, x: Tensor, state: LayerState) -> Tensor:
        q, kv, key_q, key = self._split(x)
        return self._attend(q, key_q, state.append("key", key), state.append("kv", kv))

    def _attend(self, q: Tensor, key_q: Tensor, keys: Rows, kv: Rows) -> Tensor:
        scores = (key_q @ keys.rows.mT).masked_fill(~mask_of(keys, q.shape[1]), -torch.inf)
        best, at = scores.topk(min(self.config.picks, keys.length), -1)
        if at[0].numel() > keys.length:
            # All rows under a mask are fewer than the rows of each token.
            k, v = kv.rows.unbind(1)
            chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, at, True)
            logits = (q[:, :, None] * k[:, None]).sum(-1) * self.config.dim**-0.5 + scores
            weights = logits.masked_fill(~chosen, -torch.inf).softmax(-1)
            return self.out((weights[..., None] * v[:, None]).sum(2))
        batch = torch.arange(len(q), device=q.device)[:, None, None]
        k, v = kv.rows[batch, :, at].unbind(3)
        weights = ((q[:, :, None] * k).sum(-1) * self.config.dim**-0.5 + best).softmax(-1)
        return self.out((weights[..., None] * v).sum(2))

    def state_spec(self) -> StateSpec:
        c, stored = self.config, Format.of(self.qkv_keys.weight.dtype)
        key = RowSpec(name="key", shape=(c.key_dim,), format=stored)
        kv = RowSpec(name="kv", shape=(2, c.dim), format=stored, picks=c.picks)
        return StateSpec(rows=(key, kv))

    def cost(self, step: Step) -> Cost:
        c, spec = self.config, self.kept_spec()
        seen = spec.rows[0].visible_rows(step.context, step.new_tokens)
        read = min(c.picks, seen)
        read = seen if step.new_tokens * read > seen else read
        attention = OpCost(
            name="picked attention",
            matrix_flops=2 * step.tokens * seen * c.key_dim,
            vector_flops=step.tokens * (seen + read * (4 * c.dim + 8)),
            **state_traffic(spec, step),
        )
        projections = linear_cost("q, k, v, keys", self.qkv_keys, step.tokens)
        return Cost.of(projections, attention, linear_cost("out", self.out, step.tokens))
