"""Mamba-2 (arXiv 2405.21060): state-space duality, one scalar decay per head.

in_proj -> z, x, B, C, Δ; conv 4 with bias and SiLU over x, B, C; S_t = e^{ΔA} S_{t-1} + B (Δ x)ᵀ,
y = Sᵀ C + D x; gate first, y · silu(z), then RMSNorm over groups. Equals the `transformers`
implementation of Mamba-2.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archs.cost import Cost, OpCost, Step, linear_cost
from archs.layers import Projection
from archs.mixer import Initialiser, Mixer, MixerConfig, Place, Shared, require_divisible
from archs.recurrent import RECURRENT_LIMIT, fill_dt_bias, fill_log_uniform, fill_ones, masked
from archs.spec import LayerState, StateSpec, TensorSpec
from kernels.causal_conv import causal_conv, conv_tail, conv_tails
from kernels.decay_scan import (
    decay_chunk,
    decay_chunk_matrix_flops,
    decay_step,
    decay_step_matrix_flops,
)
from kernels.norm import gated_rms_norm

if TYPE_CHECKING:
    from archs.sizes import Scale


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
        self.z_x_b_c_dt = Projection(place.d_model, self.inner, self.inner, shared, shared, heads)
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

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.z_x_b_c_dt(x).split(
            (self.inner, self.conv_weight.shape[0], self.config.n_heads), -1
        )

    def _scan_inputs(
        self, mixed: Tensor, dt: Tensor, valid: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Convolved channels and raw Δ -> x [B, K, H, P] and (C, B, Δ x, Δ A)."""
        c = self.config
        shared = c.groups * c.state_dim
        x, b, out = mixed.split((self.inner, shared, shared), -1)
        dt = masked(F.softplus(dt.float() + self.dt_bias), valid)
        x = x.unflatten(-1, (-1, c.head_dim))
        b, out = (t.unflatten(-1, (c.groups, -1)) for t in (b, out))
        return x, (out, b, x * dt[..., None].to(x.dtype), dt * -self.A_log.float().exp())

    def _finish(self, y: Tensor, x: Tensor, z: Tensor) -> Tensor:
        y = torch.addcmul(y, x, self.D[:, None].to(x.dtype)).flatten(2)
        group = self.inner // self.config.groups
        eps = self.config.eps
        y = gated_rms_norm(y, z, self.norm_weight, eps, gate_first=True, group=group)
        return self.out(y)

    def forward(self, x: Tensor, shared: Shared | None = None) -> Tensor:
        """x: [B, T, D] -> [B, T, D]."""
        z, mixed, dt = self._split(x)
        values, scan = self._scan_inputs(
            causal_conv(mixed, self.conv_weight, self.conv_bias), dt, None
        )
        return self._finish(decay_chunk(*scan)[0], values, z)

    def extend(self, x: Tensor, state: LayerState) -> Tensor:
        """x: [B, K, D] -> [B, K, D]."""
        z, mixed, dt = self._split(x)
        tail = state.get("conv")
        convolved = causal_conv(mixed, self.conv_weight, self.conv_bias, tail)
        tails = conv_tails(mixed, tail, self.config.conv_width) if state.each else None
        state.put("conv", conv_tail(mixed, tail, self.config.conv_width, new=state.new), tails)
        values, scan = self._scan_inputs(convolved, dt, state.valid)
        ssm = state.get("ssm")
        each = None
        if x.shape[1] <= RECURRENT_LIMIT:
            y, each = decay_step(*scan, ssm, each=state.each)
        else:
            y, ssm = decay_chunk(*scan, ssm)
        state.put("ssm", ssm, each)
        return self._finish(y, values, z)

    def state_spec(self) -> StateSpec:
        """One state-by-channel matrix per head, and the convolution's tail."""
        c = self.config
        tail = TensorSpec(
            name="conv",
            shape=(c.conv_width - 1, self.conv_weight.shape[0]),
            dtype=self.conv_weight.dtype,
        )
        ssm = TensorSpec(
            name="ssm", shape=(c.n_heads, c.state_dim, c.head_dim), dtype=torch.float32
        )
        return StateSpec(fixed=(tail, ssm))

    def cost(self, step: Step) -> Cost:
        """FLOPs and bytes of one step."""
        c, spec = self.config, self.state_spec()
        n, p = c.state_dim, c.head_dim
        if step.new_tokens <= RECURRENT_LIMIT:
            matrix = decay_step_matrix_flops(step.batch, step.new_tokens, c.n_heads, n, p)
        else:
            matrix = decay_chunk_matrix_flops(
                step.batch, step.new_tokens, c.n_heads, c.groups, n, p
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
                vector_flops=step.tokens * self.inner * (3 * n + 4),
                state_read_bytes=step.batch * spec.read_bytes(step.context, step.new_tokens),
                state_write_bytes=step.batch * spec.write_bytes(step.new_tokens),
            ),
            OpCost(
                name="gate, norm",
                vector_flops=9 * step.tokens * self.inner,
                weight_bytes=sum(t.nbytes for t in small),
            ),
            linear_cost("ssm out", self.out, step.tokens),
        )
