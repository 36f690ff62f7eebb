"""A user's own mixer, outside the registry: an exponentially decayed sum of gated inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from archs.cost import Cost, OpCost, Step, linear_cost
from archs.formats import Format
from archs.layers import Projection
from archs.mixer import Mixer, MixerConfig, Place, Shared
from archs.spec import FixedSpec, StateSpec
from archs.state import LayerState


@dataclass(frozen=True, kw_only=True, slots=True)
class DecayedSumConfig(MixerConfig):
    """decay: what one step keeps of the sum."""

    decay: float = 0.9


class DecayedSum(Mixer):
    """s_t = decay · s_{t-1} + v_t; y_t = out(sigmoid(g_t) · s_t)."""

    Config = DecayedSumConfig

    def __init__(self, config: DecayedSumConfig, place: Place) -> None:
        super().__init__()
        self.decay = config.decay
        self.value_gate = Projection(place.d_model, place.d_model, place.d_model)
        self.out = Projection(place.d_model, place.d_model, residual=True)
        self.skip = nn.Parameter(torch.empty(place.d_model))

    def forward(self, x: Tensor, shared: Shared | None = None) -> Tensor:
        zero = x.new_zeros(x.shape[0], x.shape[2], dtype=torch.float32)
        return self._run(x, zero, None)[0]

    def extend(self, x: Tensor, state: LayerState) -> Tensor:
        y, each = self._run(x, state.get("sum"), state.valid)
        state.put("sum", each[:, -1], each if state.each else None)
        return y

    def _run(self, x: Tensor, total: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        value, gate = self.value_gate(x).chunk(2, -1)
        sums = []
        for t in range(x.shape[1]):
            fresh = self.decay * total + value[:, t].float()
            total = fresh if valid is None else torch.where(valid[:, t, None], fresh, total)
            sums.append(total)
        each = torch.stack(sums, 1)
        return self.out(gate.sigmoid() * each.to(x.dtype) + self.skip * x), each

    def state_spec(self) -> StateSpec:
        total = FixedSpec(
            name="sum", shape=(self.out.out_features,), format=Format.of(torch.float32)
        )
        return StateSpec(fixed=(total,))

    def cost(self, step: Step) -> Cost:
        spec = self.kept_spec()
        scan = OpCost(
            name="decayed sum",
            vector_flops=4 * step.tokens * self.out.out_features,
            weight_bytes=self.skip.nbytes,
            state_read_bytes=step.batch * spec.read_bytes(step.context),
            state_write_bytes=step.batch * spec.write_bytes(),
        )
        return Cost.of(
            linear_cost("value, gate", self.value_gate, step.tokens),
            scan,
            linear_cost("out", self.out, step.tokens),
        )
