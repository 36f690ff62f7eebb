"""Mamba-2 (arXiv 2405.21060): state-space duality, one scalar decay per head.

in_proj -> z, x, B, C, Δ; conv 4 with bias and SiLU over x, B, C; S_t = e^{ΔA} S_{t-1} + B (Δ x)ᵀ,
y = Sᵀ C + D x; gate first, y · silu(z), then RMSNorm over groups. Equals the `transformers`
implementation of Mamba-2.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from archs.axes import Axis, columns, made_by, read_by, rows, spans
from archs.checks import at_least, positive
from archs.cost import Cost, OpCost, Step, linear_cost, state_traffic
from archs.formats import Format
from archs.layers import Projection
from archs.mixer import (
    Initialiser,
    Mixer,
    MixerConfig,
    Place,
    Shared,
    require_divisible,
    takes_unnormed,
)
from archs.ops.conv import convolve
from archs.ops.decay import ssd
from archs.ops.dense import Input
from archs.recurrent import (
    chunk_vector_flops,
    fill_dt_bias,
    fill_log_uniform,
    fill_ones,
    memory_format,
)
from archs.spec import RECURRENT_LIMIT, FixedSpec, StateSpec, TensorSpec
from archs.state import LayerState
from kernels.decay.torch import CHUNK, decay_chunk_matrix_flops, decay_step_matrix_flops
from kernels.norm.torch import OutputNorm

if TYPE_CHECKING:
    from archs.sizes import Scale


_CONVOLUTION = ("conv_weight", "conv_bias")


@dataclass(frozen=True, kw_only=True, slots=True)
class Mamba2Config(MixerConfig):
    """n_heads heads of head_dim channels; groups of heads share B and C of state_dim."""

    n_heads: int
    head_dim: int
    state_dim: int
    groups: int = 1
    conv_width: int = 4
    eps: float = 1e-5

    def __post_init__(self) -> None:
        at_least(self, 1, "n_heads", "head_dim", "state_dim", "groups", "conv_width")
        positive(self, "eps")
        require_divisible("n_heads", self.n_heads, "groups", self.groups)

    @classmethod
    def defaults(cls, scale: "Scale") -> dict[str, Any]:
        """Expansion 2; 64 channels and 128 states per head, less in small models."""
        inner = 2 * scale.d_model
        head_dim = min(64, scale.head_dim)
        state_dim = min(128, scale.d_model // 4)
        return {"n_heads": inner // head_dim, "head_dim": head_dim, "state_dim": state_dim}


class Mamba2(Mixer):
    """State-space duality (SSD) between its convolution and its gated norm: a Mamba-2 block."""

    Config = Mamba2Config
    delicate = frozenset({"A_log", "D", "dt_bias"})

    def __init__(self, config: Mamba2Config, place: Place) -> None:
        super().__init__()
        self.config = config
        self.inner = config.n_heads * config.head_dim
        shared = config.groups * config.state_dim
        heads = config.n_heads
        sizes = (self.inner, self.inner, shared, shared, heads)
        self.z_x_b_c_dt = Projection(place.d_model, *sizes, gates=(4,))
        self.conv_weight = nn.Parameter(torch.empty(self.inner + 2 * shared, config.conv_width))
        self.conv_bias = nn.Parameter(torch.empty(self.inner + 2 * shared))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.norm_weight = nn.Parameter(torch.empty(self.inner))
        self.out = Projection(self.inner, place.d_model, residual=True)

    def initialisers(self) -> dict[str, Initialiser]:
        """A ~ U(1, 16), D = 1, step sizes log-uniform."""
        return {
            "A_log": lambda t, g: fill_log_uniform(t, g, 1.0, 16.0),
            "D": fill_ones,
            "dt_bias": fill_dt_bias,
            "norm_weight": fill_ones,
        }

    def _split(self, x: Input) -> tuple[Tensor, Tensor, Tensor]:
        return self.z_x_b_c_dt(x).split(
            (self.inner, self.conv_weight.shape[0], self.config.n_heads), -1
        )

    def _mix(self, x: Input, state: LayerState | None = None) -> Tensor:
        c = self.config
        z, mixed, dt = self._split(x)
        mixed = convolve(mixed, self.conv_weight, self.conv_bias, state=state, backend=self.backend)
        shared = c.groups * c.state_dim
        values, b, out = mixed.split((self.inner, shared, shared), -1)
        b, out = (t.unflatten(-1, (c.groups, -1)) for t in (b, out))
        norm = OutputNorm(
            gate=z, weight=self.norm_weight, eps=c.eps, gate_first=True,
            group=self.inner // c.groups,
        )  # fmt: skip
        y = ssd(
            values.unflatten(-1, (-1, c.head_dim)), dt, b, out, self.A_log, self.D, self.dt_bias,
            norm, state=state, backend=self.backend,
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
        """One state-by-channel matrix per head, and the convolution's tail."""
        c = self.config
        tail = FixedSpec(
            name="conv",
            kind="conv",
            shape=(c.conv_width - 1, self.conv_weight.shape[0]),
            format=Format.of(self.conv_weight.dtype),
        )
        ssm = FixedSpec(
            name="ssm",
            shape=(c.n_heads, c.state_dim, c.head_dim),
            format=memory_format(self.out.weight),
            shards=c.n_heads,
            inputs=TensorSpec(
                name="ssm inputs",
                shape=(self.inner + c.groups * c.state_dim + c.n_heads,),
                format=Format.of(self.out.weight.dtype),
                shards=c.groups,
            ),
        )
        return StateSpec(fixed=(tail, ssm))

    def axes(self) -> tuple[Axis, ...]:
        """States of each group, channels of each head, and heads of each group."""
        c, inner = self.config, self.inner
        shared, projection = c.groups * c.state_dim, "z_x_b_c_dt"
        n, channel = spans(0, shared, 1), spans(0, inner, 1)
        b, dt = 2 * inner, 2 * inner + 2 * shared
        state_dim = Axis(
            name="state_dim",
            kind="state",
            groups=c.groups,
            slices=(
                rows(f"{projection}.weight", n + b, n + b + shared),
                *(rows(name, n + inner, n + inner + shared) for name in _CONVOLUTION),
            ),
            signals=(made_by(projection, n + b), made_by(projection, n + b + shared)),
            fields={"state_dim": 1},
        )

        def inside(name: str, groups: int, units: Tensor, of_heads: Tensor | None) -> Axis:
            """Some of the inner channels, with what else belongs to whole heads."""
            more = () if of_heads is None else (of_heads + dt,)
            vectors = () if of_heads is None else ("dt_bias", "A_log", "D")
            return Axis(
                name=name,
                kind="state",
                groups=groups,
                slices=(
                    rows(f"{projection}.weight", units, units + inner, *more),
                    *(rows(name, units) for name in (*_CONVOLUTION, "norm_weight")),
                    *(rows(name, of_heads) for name in vectors if of_heads is not None),
                    columns("out.weight", units),
                ),
                signals=(read_by("out", units),),
                fields={"head_dim": 1} if of_heads is None else {"n_heads": groups},
                inverse=("eps",),
                norm="norm_weight",
                reader="out",
            )

        heads = spans(0, c.n_heads, 1)
        return (
            state_dim,
            inside("head_dim", c.n_heads, channel, None),
            inside("heads", c.groups, spans(0, c.n_heads, c.head_dim), heads),
        )

    def cost(self, step: Step) -> Cost:
        """FLOPs and bytes of one step."""
        c, spec = self.config, self.kept_spec()
        n, p = c.state_dim, c.head_dim
        if step.new_tokens <= RECURRENT_LIMIT:
            tokens = step.new_tokens + step.replayed
            matrix = decay_step_matrix_flops(step.batch, tokens, c.n_heads, n, p)
            vector = step.batch * tokens * self.inner * (3 * n + 4)
        else:
            matrix = decay_chunk_matrix_flops(
                step.batch, step.new_tokens, c.n_heads, c.groups, n, p
            )
            vector = 4 * step.tokens * self.inner + chunk_vector_flops(
                step, CHUNK, c.n_heads, n, p, per_score=3, per_token=3 * p
            )
        small = (self.A_log, self.D, self.dt_bias, self.norm_weight)
        return Cost.of(
            linear_cost("z, x, B, C, Δ", self.z_x_b_c_dt, step.tokens),
            OpCost(
                name="short conv",
                vector_flops=step.tokens * self.conv_weight.shape[0] * (2 * c.conv_width + 5),
                weight_bytes=self.conv_weight.nbytes + self.conv_bias.nbytes,
            ),
            OpCost(
                name="state-space duality",
                matrix_flops=matrix,
                vector_flops=vector,
                **state_traffic(spec, step),
            ),
            OpCost(
                name="gate, norm",
                vector_flops=9 * step.tokens * self.inner,
                weight_bytes=sum(t.nbytes for t in small),
            ),
            linear_cost("ssm out", self.out, step.tokens),
        )
