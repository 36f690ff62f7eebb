"""A gated short convolution as a mixer (LFM2, arXiv 2511.23404).

in_proj -> B, C, x; y = C · conv(B · x), depthwise and causal, and a projection out. What it
remembers is the convolution's tail of a few rows, the least of all mixers; it stands between layers
of attention (`shortconv:gqa=2:1`). Equals `transformers`' LFM2.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from archs.axes import Axis, columns, made_by, read_by, rows, spans
from archs.checks import at_least
from archs.cost import Cost, OpCost, Step, linear_cost, state_traffic
from archs.formats import Format
from archs.layers import Projection
from archs.mixer import Mixer, MixerConfig, Place, Shared, takes_unnormed
from archs.ops.conv import convolve
from archs.ops.dense import Input
from archs.spec import FixedSpec, StateSpec
from archs.state import LayerState

if TYPE_CHECKING:
    from archs.sizes import Scale


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedConvConfig(MixerConfig):
    """Channels that are convolved, over conv_width tokens."""

    channels: int
    conv_width: int = 3

    def __post_init__(self) -> None:
        at_least(self, 1, "channels")
        at_least(self, 2, "conv_width")

    @classmethod
    def defaults(cls, scale: "Scale") -> dict[str, Any]:
        """As many channels as the model has: 4 d² parameters."""
        return {"channels": scale.d_model}


class GatedConvolution(Mixer):
    """A short convolution between two gates."""

    Config = GatedConvConfig

    def __init__(self, config: GatedConvConfig, place: Place) -> None:
        super().__init__()
        self.config = config
        self.b_c_x = Projection(place.d_model, *[config.channels] * 3)
        self.conv_weight = nn.Parameter(torch.empty(config.channels, config.conv_width))
        self.out = Projection(config.channels, place.d_model, residual=True)

    def _mix(self, x: Input, state: LayerState | None = None) -> Tensor:
        into, out_of, values = self.b_c_x(x).split(self.b_c_x.sizes, -1)
        mixed = convolve(
            into * values, self.conv_weight, state=state, silu=False, backend=self.backend
        )
        return self.out(out_of * mixed)

    def forward(self, x: Tensor, shared: Shared | None = None) -> Tensor:
        """x: [B, T, D] -> [B, T, D]."""
        return self._mix(x)

    @takes_unnormed
    def extend(self, x: Input, state: LayerState) -> Tensor:
        """x: [B, K, D] -> [B, K, D]."""
        return self._mix(x, state)

    def state_spec(self) -> StateSpec:
        """The last W - 1 gated inputs."""
        tail = FixedSpec(
            name="conv",
            kind="conv",
            shape=(self.config.conv_width - 1, self.config.channels),
            format=Format.of(self.conv_weight.dtype),
        )
        return StateSpec(fixed=(tail,))

    def axes(self) -> tuple[Axis, ...]:
        """Channels."""
        channels = self.config.channels
        unit = spans(0, channels, 1)
        parts = (unit, unit + channels, unit + 2 * channels)
        axis = Axis(
            name="channels",
            kind="state",
            slices=(
                rows("b_c_x.weight", *parts),
                rows("conv_weight", unit),
                columns("out.weight", unit),
            ),
            signals=(read_by("out", unit), *(made_by("b_c_x", part) for part in parts)),
            fields={"channels": 1},
        )
        return (axis,)

    def cost(self, step: Step) -> Cost:
        """FLOPs and bytes of one step."""
        c = self.config
        return Cost.of(
            linear_cost("B, C, x", self.b_c_x, step.tokens),
            OpCost(
                name="gated conv",
                vector_flops=step.tokens * c.channels * (2 * c.conv_width + 2),
                weight_bytes=self.conv_weight.nbytes,
                **state_traffic(self.kept_spec(), step),
            ),
            linear_cost("conv out", self.out, step.tokens),
        )
