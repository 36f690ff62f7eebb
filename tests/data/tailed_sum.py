"""A user's own mixer with two remembered tensors: a decayed sum of inputs beside their tail."""

import torch
from torch import Tensor, nn

from archs.cost import Cost, OpCost, Step, linear_cost
from archs.formats import Format
from archs.layers import Projection
from archs.mixer import Mixer, MixerConfig, Place, Shared
from archs.spec import FixedSpec, StateSpec
from archs.state import LayerState


class TailedSum(Mixer):
    """s_t = 0.9 s_{t-1} + W (x_t + taps · x_{t-1}); y_t = out(s_t)."""

    Config = MixerConfig

    def __init__(self, config: MixerConfig, place: Place) -> None:
        super().__init__()
        self.value = Projection(place.d_model, place.d_model)
        self.out = Projection(place.d_model, place.d_model, residual=True)
        self.taps = nn.Parameter(torch.empty(1, place.d_model))

    def forward(self, x: Tensor, shared: Shared | None = None) -> Tensor:
        tail = x.new_zeros(x.shape[0], 1, x.shape[2])
        total = x.new_zeros(x.shape[0], x.shape[2], dtype=torch.float32)
        return self._run(x, tail, total, None)[0]

    def extend(self, x: Tensor, state: LayerState) -> Tensor:
        y, sums, tails = self._run(x, state.get("tail"), state.get("sum"), state.valid)
        state.put("tail", tails[:, -1], tails if state.each else None)
        state.put("sum", sums[:, -1], sums if state.each else None)
        return y

    def _run(
        self, x: Tensor, tail: Tensor, total: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        mixed = x + self.taps * torch.cat((tail, x[:, :-1]), 1)
        value = self.value(mixed)
        sums, tails = [], []
        for t in range(x.shape[1]):
            fresh, last = 0.9 * total + value[:, t].float(), x[:, t : t + 1]
            if valid is not None:
                fresh = torch.where(valid[:, t, None], fresh, total)
                last = torch.where(valid[:, t, None, None], last, tail)
            total, tail = fresh, last
            sums.append(total)
            tails.append(tail)
        each = torch.stack(sums, 1)
        return self.out(each.to(x.dtype)), each, torch.stack(tails, 1)

    def state_spec(self) -> StateSpec:
        width, dtype = self.taps.shape[1], self.taps.dtype
        tail = FixedSpec(name="tail", shape=(1, width), format=Format.of(dtype))
        total = FixedSpec(name="sum", shape=(width,), format=Format.of(torch.float32))
        return StateSpec(fixed=(tail, total))

    def cost(self, step: Step) -> Cost:
        spec = self.kept_spec()
        scan = OpCost(
            name="tailed sum",
            vector_flops=4 * step.tokens * self.taps.numel(),
            weight_bytes=self.taps.nbytes,
            state_read_bytes=step.batch * spec.read_bytes(step.context),
            state_write_bytes=step.batch * spec.write_bytes(),
        )
        return Cost.of(
            linear_cost("value", self.value, step.tokens),
            scan,
            linear_cost("out", self.out, step.tokens),
        )
