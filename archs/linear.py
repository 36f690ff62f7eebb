"""Linear attention with a fixed decay per head: retention (RetNet, arXiv 2307.08621).

S_t = γ S_{t-1} + k_t v_tᵀ, y_t = S_tᵀ q_t, rotary positions on q and k, RMSNorm per head and then
a SiLU gate. Decays γ_h = 1 - 2^-e with exponents e spread from 5 to log2(T) + 1, so that the
slowest head spans the trained length. Equals its own recurrence (`kernels.decay.torch.decay_ref`).
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from archs.axes import Axis, columns, read_by, rows, spans
from archs.checks import at_least, positive
from archs.cost import Cost, OpCost, Step, linear_cost, state_traffic
from archs.errors import UserError
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
from archs.ops.decay import retention
from archs.ops.dense import Input
from archs.recurrent import chunk_vector_flops, fill_ones, memory_format
from archs.spec import RECURRENT_LIMIT, FixedSpec, StateSpec, TensorSpec
from archs.state import LayerState
from kernels.decay.torch import CHUNK, decay_chunk_matrix_flops, decay_step_matrix_flops
from kernels.norm.torch import OutputNorm

if TYPE_CHECKING:
    from archs.sizes import Scale


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearConfig(MixerConfig):
    """n_heads heads with keys of key_dim and values of value_dim channels each.

    longest: tokens that the slowest head's decay spans.
    exponents: e of each head's decay; empty: spread evenly up to what `longest` says.
    """

    n_heads: int
    key_dim: int
    value_dim: int
    longest: int
    rope_theta: float = 10_000.0
    eps: float = 1e-5
    exponents: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        at_least(self, 1, "n_heads", "key_dim", "value_dim")
        positive(self, "rope_theta", "eps", "exponents")
        if self.exponents and len(self.exponents) != self.n_heads:
            raise UserError(
                f"{len(self.exponents)} exponents are not one for each of n_heads={self.n_heads}; "
                "give one a head, or none"
            )
        require_divisible("key_dim", self.key_dim, "rotary pair", 2)
        at_least(self, 16, "longest")

    def spread(self) -> tuple[float, ...]:
        """The exponents in use."""
        if self.exponents:
            return self.exponents
        last = max(5.0, math.log2(self.longest) + 1)
        return tuple(torch.linspace(5.0, last, self.n_heads, dtype=torch.float64).tolist())

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
            with torch.inference_mode(False), torch.no_grad():
                exponents = torch.tensor(self.config.spread(), dtype=torch.float64)
                decay = torch.log1p(-torch.exp2(-exponents))
                self._decay = decay.float().to(device)[None, None]
        return self._decay

    def _mix(self, x: Input, state: LayerState | None = None) -> Tensor:
        c = self.config
        qk, v, gate = self.q_k_v_gate(x).split(
            (2 * c.n_heads * c.key_dim, *self.q_k_v_gate.sizes[2:]), -1
        )
        v, gate = (t.unflatten(-1, (c.n_heads, c.value_dim)) for t in (v, gate))
        y = retention(
            qk.unflatten(-1, (-1, c.key_dim)), v, self.log_decay(v.device),
            OutputNorm(gate=gate, weight=self.norm_weight, eps=c.eps, gate_first=False),
            scale=c.key_dim**-0.5, theta=c.rope_theta, state=state, backend=self.backend,
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
        """One key-by-value matrix per head."""
        c = self.config
        shape = (c.n_heads, c.key_dim, c.value_dim)
        stored = memory_format(self.out.weight)
        inputs = TensorSpec(
            name="memory inputs",
            shape=(c.n_heads * (c.key_dim + c.value_dim),),
            format=Format.of(self.out.weight.dtype),
            shards=c.n_heads,
        )
        memory = FixedSpec(
            name="memory", shape=shape, format=stored, shards=c.n_heads, inputs=inputs
        )
        return StateSpec(fixed=(memory,))

    def axes(self) -> tuple[Axis, ...]:
        """Value channels of each head, and heads. Positions turn key channels: they stay."""
        c = self.config
        keys, values = c.n_heads * c.key_dim, c.n_heads * c.value_dim
        value, key_head = spans(0, values, 1), spans(0, c.n_heads, c.key_dim)
        head = spans(0, c.n_heads, c.value_dim)
        v, gate = 2 * keys, 2 * keys + values
        value_dim = Axis(
            name="value_dim",
            kind="state",
            groups=c.n_heads,
            slices=(
                rows("q_k_v_gate.weight", value + v, value + gate), columns("out.weight", value),
            ),
            signals=(read_by("out", value),),
            fields={"value_dim": 1},
            inverse=("eps",),
            norm="norm_weight",
            reader="out",
            folded=("norm_weight", "out.weight"),
        )  # fmt: skip
        heads = Axis(
            name="heads",
            kind="state",
            slices=(
                rows("q_k_v_gate.weight", key_head, key_head + keys, head + v, head + gate),
                columns("out.weight", head),
            ),
            signals=(read_by("out", head),),
            fields={"n_heads": 1},
            listed={"exponents": c.spread()},
        )
        return value_dim, heads

    def cost(self, step: Step) -> Cost:
        """FLOPs and bytes of one step."""
        c, spec = self.config, self.kept_spec()
        size = (c.n_heads, c.key_dim, c.value_dim)
        values = step.tokens * c.n_heads * c.value_dim
        if step.new_tokens <= RECURRENT_LIMIT:
            tokens = step.new_tokens + step.replayed
            matrix = decay_step_matrix_flops(step.batch, tokens, *size)
            vector = 3 * step.batch * tokens * c.n_heads * c.value_dim * c.key_dim
        else:
            matrix = decay_chunk_matrix_flops(
                step.batch, step.new_tokens, c.n_heads, c.n_heads, c.key_dim, c.value_dim
            )
            vector = chunk_vector_flops(step, CHUNK, *size, per_score=3, per_token=3 * c.value_dim)
        return Cost.of(
            linear_cost("q, k, v, gate", self.q_k_v_gate, step.tokens),
            OpCost(name="rope", vector_flops=6 * step.tokens * c.n_heads * c.key_dim),
            OpCost(
                name="retention",
                matrix_flops=matrix,
                vector_flops=vector,
                **state_traffic(spec, step),
            ),
            OpCost(
                name="norm, gate", vector_flops=9 * values, weight_bytes=self.norm_weight.nbytes
            ),
            linear_cost("retention out", self.out, step.tokens),
        )
