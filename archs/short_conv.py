"""A short causal convolution before any mixer, itself a mixer that wraps one.

Recall tasks are learned far faster with it (arXiv 2312.04927), so a comparison offers it to all
architectures or to none. Depthwise, linear, with a residual around it.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from archs.axes import Axis
from archs.cost import Cost, OpCost, Step, state_traffic
from archs.formats import Format
from archs.mixer import Mixer, Shared
from archs.ops.conv import convolve
from archs.spec import FixedSpec, StateSpec
from archs.state import LayerState


class ShortConv(Mixer):
    """mixer(x + conv(x)). The wrapped mixer keeps its state names; ours is `pre_conv`."""

    def __init__(self, mixer: Mixer, d_model: int, width: int) -> None:
        super().__init__()
        self.mixer = mixer
        self.coded_rows = mixer.coded_rows
        self.evictable = mixer.evictable
        self.width = width
        self.weight = nn.Parameter(torch.empty(d_model, width))

    def forward(self, x: Tensor, shared: Shared | None = None) -> Tensor:
        """x: [B, T, D] -> [B, T, D]."""
        return self.mixer(x + convolve(x, self.weight, silu=False, backend=self.backend), shared)

    def extend(self, x: Tensor, state: LayerState) -> Tensor:
        """x: [B, K, D] -> [B, K, D]."""
        convolved = convolve(
            x, self.weight, state=state, name="pre_conv", silu=False, backend=self.backend
        )
        return self.mixer.extend(x + convolved, state)

    def state_spec(self) -> StateSpec:
        """The wrapped mixer's state and W - 1 input rows."""
        inner = self.mixer.state_spec()
        return replace(inner, fixed=(*inner.fixed, self._tail()))

    def _tail(self) -> FixedSpec:
        rows = (self.width - 1, self.weight.shape[0])
        return FixedSpec(
            name="pre_conv", shape=rows, format=Format.of(self.weight.dtype), kind="conv"
        )

    def axes(self) -> tuple[Axis, ...]:
        """Those of the wrapped mixer."""
        return tuple(axis.within("mixer") for axis in self.mixer.axes())

    def cost(self, step: Step) -> Cost:
        """FLOPs and bytes of one step."""
        conv = OpCost(
            name="short conv",
            vector_flops=2 * step.tokens * self.weight.numel(),
            weight_bytes=self.weight.nbytes,
            **state_traffic(self.state_format.stored(StateSpec(fixed=(self._tail(),))), step),
        )
        return Cost.of(conv) + self.mixer.cost(step)
