"""Mamba (arXiv 2312.00752): selective scan with short convolution, softplus step, D skip, gate.

in_proj -> x, z; conv 4 with bias and SiLU on x; x -> (Δ low-rank, B, C); h_t = e^{ΔA} h_{t-1} +
Δ B x; y = C·h + D x, times silu(z), out. Equals the `transformers` implementation of Mamba.
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
from archs.mixer import Initialiser, Mixer, MixerConfig, Place, Shared, takes_unnormed
from archs.ops.conv import convolve
from archs.ops.dense import Input
from archs.ops.selective import selective
from archs.recurrent import fill_dt_bias, fill_ones, memory_format
from archs.spec import RECURRENT_LIMIT, FixedSpec, StateSpec
from archs.state import LayerState
from kernels.selective.torch import selective_scan_matrix_flops, selective_step_matrix_flops

if TYPE_CHECKING:
    from archs.sizes import Scale


@dataclass(frozen=True, kw_only=True, slots=True)
class Mamba1Config(MixerConfig):
    """inner channels, each with state_dim states; the step size has rank dt_rank."""

    inner: int
    dt_rank: int
    state_dim: int = 16
    conv_width: int = 4

    def __post_init__(self) -> None:
        at_least(self, 1, "inner", "dt_rank", "state_dim", "conv_width")

    @classmethod
    def defaults(cls, scale: "Scale") -> dict[str, Any]:
        """Expansion 2 and rank ⌈d/16⌉, as published."""
        return {"inner": 2 * scale.d_model, "dt_rank": -(-scale.d_model // 16)}


class Mamba1(Mixer):
    """The selective scan (S6) between its convolution and its gate: a Mamba block."""

    Config = Mamba1Config
    delicate = frozenset({"A_log", "D", "dt_bias"})

    def __init__(self, config: Mamba1Config, place: Place) -> None:
        super().__init__()
        self.config = config
        inner, rank, n = config.inner, config.dt_rank, config.state_dim
        self.x_z = Projection(place.d_model, inner, inner)
        self.conv_weight = nn.Parameter(torch.empty(inner, config.conv_width))
        self.conv_bias = nn.Parameter(torch.empty(inner))
        self.dt_b_c = Projection(inner, rank, n, n, gates=(0,))
        self.dt = Projection(rank, inner, gates=(0,))
        self.dt_bias = nn.Parameter(torch.empty(inner))
        self.A_log = nn.Parameter(torch.empty(inner, n))
        self.D = nn.Parameter(torch.empty(inner))
        self.out = Projection(inner, place.d_model, residual=True)

    def initialisers(self) -> dict[str, Initialiser]:
        """A = -(1…N), D = 1, step sizes log-uniform, their projection U(±R^-0.5)."""
        bound = self.config.dt_rank**-0.5

        def fill_a(t: Tensor, _: torch.Generator) -> None:
            t.copy_(torch.arange(1, t.shape[1] + 1, device=t.device).log().expand_as(t))

        return {
            "A_log": fill_a,
            "D": fill_ones,
            "dt_bias": fill_dt_bias,
            "dt.weight": lambda t, g: t.uniform_(-bound, bound, generator=g),
        }

    def _mix(self, x: Input, state: LayerState | None = None) -> Tensor:
        c = self.config
        x, z = self.x_z(x).chunk(2, -1)
        x = convolve(x, self.conv_weight, self.conv_bias, state=state, backend=self.backend)
        low, b, out = self.dt_b_c(x).split((c.dt_rank, c.state_dim, c.state_dim), -1)
        y = selective(
            x, z, self.dt(low), b, out, self.A_log, self.D, self.dt_bias, state=state,
            backend=self.backend,
        )  # fmt: skip
        return self.out(y)

    def forward(self, x: Tensor, shared: Shared | None = None) -> Tensor:
        """x: [B, T, D] -> [B, T, D]."""
        return self._mix(x)

    @takes_unnormed
    def extend(self, x: Input, state: LayerState) -> Tensor:
        """x: [B, K, D] -> [B, K, D]."""
        return self._mix(x, state)

    def state_spec(self) -> StateSpec:
        """N states per channel, and the convolution's tail."""
        c = self.config
        tail = FixedSpec(
            name="conv",
            kind="conv",
            shape=(c.conv_width - 1, c.inner),
            format=Format.of(self.conv_weight.dtype),
            shards=c.inner,
        )
        ssm = FixedSpec(
            name="ssm",
            shape=(c.inner, c.state_dim),
            format=memory_format(self.out.weight),
            shards=c.inner,
        )
        return StateSpec(fixed=(tail, ssm))

    def axes(self) -> tuple[Axis, ...]:
        """States of every channel, channels, and the rank of their step sizes."""
        c = self.config
        n, inner, rank = (spans(0, count, 1) for count in (c.state_dim, c.inner, c.dt_rank))
        b, out = n + c.dt_rank, n + c.dt_rank + c.state_dim
        vectors = ("conv_weight", "conv_bias", "dt.weight", "dt_bias", "A_log", "D")
        return (
            Axis(
                name="state_dim",
                kind="state",
                slices=(rows("dt_b_c.weight", b, out), columns("A_log", n)),
                signals=(made_by("dt_b_c", b), made_by("dt_b_c", out)),
                fields={"state_dim": 1},
            ),
            Axis(
                name="inner",
                kind="state",
                slices=(
                    rows("x_z.weight", inner, inner + c.inner),
                    *(rows(name, inner) for name in vectors),
                    columns("dt_b_c.weight", inner), columns("out.weight", inner),
                ),
                signals=(read_by("out", inner),),
                fields={"inner": 1},
            ),
            Axis(
                name="dt_rank",
                kind="width",
                slices=(rows("dt_b_c.weight", rank), columns("dt.weight", rank)),
                signals=(read_by("dt", rank),),
                fields={"dt_rank": 1},
            ),
        )  # fmt: skip

    def cost(self, step: Step) -> Cost:
        """FLOPs and bytes of one step."""
        c, spec = self.config, self.kept_spec()
        count = (
            selective_step_matrix_flops
            if step.new_tokens <= RECURRENT_LIMIT
            else selective_scan_matrix_flops
        )
        small = (self.A_log, self.D, self.dt_bias)
        return Cost.of(
            linear_cost("x, z", self.x_z, step.tokens),
            OpCost(
                name="short conv",
                vector_flops=step.tokens * c.inner * (2 * c.conv_width + 5),
                weight_bytes=self.conv_weight.nbytes + self.conv_bias.nbytes,
            ),
            linear_cost("Δ, B, C", self.dt_b_c, step.tokens),
            linear_cost("Δ up", self.dt, step.tokens),
            OpCost(
                name="selective scan",
                matrix_flops=count(step.batch, step.new_tokens, c.inner, c.state_dim),
                vector_flops=step.tokens * c.inner * (5 * c.state_dim + 12),
                weight_bytes=sum(t.nbytes for t in small),
                **state_traffic(spec, step),
            ),
            linear_cost("ssm out", self.out, step.tokens),
        )
