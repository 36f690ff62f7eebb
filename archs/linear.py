"""Linear attention with a fixed decay per head: retention (RetNet, arXiv 2307.08621).

S_t = γ S_{t-1} + k_t v_tᵀ, y_t = S_tᵀ q_t, rotary positions on q and k, RMSNorm per head and then
a SiLU gate. Decays γ_h = 1 - 2^-e with exponents e spread from 5 to log2(T) + 1, so that the
slowest head spans the trained length. Equals its own recurrence (`kernels.decay_scan.decay_ref`).
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from archs.cost import Cost, OpCost, Step, linear_cost
from archs.errors import UserError
from archs.layers import Projection
from archs.mixer import Initialiser, Mixer, MixerConfig, Place, Shared, require_divisible
from archs.ops.decay import retention
from archs.ops.glue import gated_rms_norm
from archs.ops.rotary import rotate_new
from archs.recurrent import RECURRENT_LIMIT, fill_ones
from archs.spec import LayerState, StateSpec, TensorSpec
from kernels.decay_scan import decay_chunk_matrix_flops, decay_step_matrix_flops
from kernels.rope import rope_table, rotate

if TYPE_CHECKING:
    from archs.sizes import Scale


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearConfig(MixerConfig):
    """n_heads heads with keys of key_dim and values of value_dim channels each.

    longest: tokens that the slowest head's decay spans.
    """

    n_heads: int
    key_dim: int
    value_dim: int
    longest: int
    rope_theta: float = 10_000.0
    eps: float = 1e-5

    def __post_init__(self) -> None:
        require_divisible("key_dim", self.key_dim, "rotary pair", 2)
        if self.longest < 16:
            raise UserError(f"longest={self.longest} must be at least 16 tokens")

    @classmethod
    def defaults(cls, scale: "Scale") -> dict[str, Any]:
        """Keys half as wide as the model, values as wide: 4 d² parameters with the gate."""
        return {
            "n_heads": scale.n_heads,
            "key_dim": scale.head_dim // 2,
            "value_dim": scale.head_dim,
            "longest": scale.seq_len,
        }


class LinearAttention(Mixer):
    """Linear attention with a fixed decay per head (retention)."""

    Config = LinearConfig

    def __init__(self, config: LinearConfig, place: Place) -> None:
        super().__init__()
        self.config = config
        keys, values = config.n_heads * config.key_dim, config.n_heads * config.value_dim
        self.q_k_v_gate = Projection(place.d_model, keys, keys, values, values)
        self.norm_weight = nn.Parameter(torch.empty(config.value_dim))
        self.out = Projection(values, place.d_model, residual=True)
        self._decay: Tensor | None = None

    def initialisers(self) -> dict[str, Initialiser]:
        """The head norm starts at one."""
        return {"norm_weight": fill_ones}

    def log_decay(self, device: torch.device) -> Tensor:
        """log γ of each head, float32 [1, 1, H]."""
        if self._decay is None or self._decay.device != device:
            c = self.config
            with torch.inference_mode(False), torch.no_grad():
                last = max(5.0, math.log2(c.longest) + 1)
                exponents = torch.linspace(5.0, last, c.n_heads, dtype=torch.float64)
                decay = torch.log1p(-torch.exp2(-exponents))
                self._decay = decay.float().to(device)[None, None]
        return self._decay

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, K, D] -> q and k, not yet rotated [B, K, 2·H, N]; v and gate [B, K, H, P]."""
        c = self.config
        qk, v, gate = self.q_k_v_gate(x).split(
            (2 * c.n_heads * c.key_dim, *self.q_k_v_gate.sizes[2:]), -1
        )
        shape = (c.n_heads, c.value_dim)
        qk = qk.unflatten(-1, (-1, c.key_dim))
        return qk, v.unflatten(-1, shape), gate.unflatten(-1, shape)

    def _retain(
        self, qk: Tensor, v: Tensor, gate: Tensor, state: LayerState | None = None
    ) -> Tensor:
        c = self.config
        q, k = qk.chunk(2, 2)
        y = retention(
            q, k, v, self.log_decay(v.device), scale=c.key_dim**-0.5, state=state,
            backend=self.backend,
        )  # fmt: skip
        y = gated_rms_norm(y, gate, self.norm_weight, c.eps, gate_first=False, backend=self.backend)
        return self.out(y.flatten(2))

    def forward(self, x: Tensor, shared: Shared | None = None) -> Tensor:
        """x: [B, T, D] -> [B, T, D]."""
        c, tokens = self.config, x.shape[1]
        angles = rope_table(tokens, c.key_dim, c.rope_theta, x.device)[:tokens]
        qk, v, gate = self._split(x)
        return self._retain(rotate(qk, angles), v, gate)

    def extend(self, x: Tensor, state: LayerState) -> Tensor:
        """x: [B, K, D] -> [B, K, D]."""
        qk, v, gate = self._split(x)
        qk = rotate_new(qk, state, theta=self.config.rope_theta, backend=self.backend)
        return self._retain(qk, v, gate, state)

    def state_spec(self) -> StateSpec:
        """One key-by-value matrix per head."""
        c = self.config
        shape = (c.n_heads, c.key_dim, c.value_dim)
        return StateSpec(fixed=(TensorSpec(name="memory", shape=shape, dtype=torch.float32),))

    def cost(self, step: Step) -> Cost:
        """FLOPs and bytes of one step."""
        c, spec = self.config, self.state_spec()
        size = (c.n_heads, c.key_dim, c.value_dim)
        if step.new_tokens <= RECURRENT_LIMIT:
            matrix = decay_step_matrix_flops(step.batch, step.new_tokens, *size)
        else:
            matrix = decay_chunk_matrix_flops(
                step.batch, step.new_tokens, c.n_heads, c.n_heads, c.key_dim, c.value_dim
            )
        values = step.tokens * c.n_heads * c.value_dim
        return Cost.of(
            linear_cost("q, k, v, gate", self.q_k_v_gate, step.tokens),
            OpCost(name="rope", vector_flops=6 * step.tokens * c.n_heads * c.key_dim),
            OpCost(
                name="retention",
                matrix_flops=matrix,
                vector_flops=3 * values * c.key_dim,
                state_read_bytes=step.batch * spec.read_bytes(step.context, step.new_tokens),
                state_write_bytes=step.batch * spec.write_bytes(step.new_tokens),
            ),
            OpCost(
                name="norm, gate", vector_flops=9 * values, weight_bytes=self.norm_weight.nbytes
            ),
            linear_cost("retention out", self.out, step.tokens),
        )
