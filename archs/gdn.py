"""Gated DeltaNet (arXiv 2412.06464): a linear-attention state corrected by the delta rule.

Short convolution and SiLU on q, k, v; normalised keys; decay g = -e^{A_log} · softplus(a + dt_bias)
and strength β = sigmoid(b) per value head; RMSNorm per head, then a SiLU gate. Equals the
`transformers` implementation in Qwen3-Next.
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
from archs.ops.dense import Input
from archs.ops.gated_delta import gated_delta
from archs.recurrent import (
    chunk_vector_flops,
    fill_dt_bias,
    fill_log_uniform,
    fill_ones,
    memory_format,
)
from archs.spec import RECURRENT_LIMIT, FixedSpec, StateSpec, TensorSpec
from archs.state import LayerState
from kernels.gated_delta.torch import CHUNK, gdn_chunk_matrix_flops, gdn_step_matrix_flops
from kernels.norm.torch import OutputNorm

if TYPE_CHECKING:
    from archs.sizes import Scale


@dataclass(frozen=True, kw_only=True, slots=True)
class GatedDeltaConfig(MixerConfig):
    """key_heads heads of key_dim channels; value_heads (a multiple) of value_dim channels."""

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int = 4
    eps: float = 1e-6

    def __post_init__(self) -> None:
        at_least(self, 1, "key_heads", "value_heads", "key_dim", "value_dim", "conv_width")
        positive(self, "eps")
        require_divisible("value_heads", self.value_heads, "key_heads", self.key_heads)

    @classmethod
    def defaults(cls, scale: "Scale") -> dict[str, Any]:
        """Keys half as wide as the model, values as wide: 4 d² parameters with the gate."""
        return {
            "key_heads": scale.n_heads,
            "value_heads": scale.n_heads,
            "key_dim": scale.head_dim // 2,
            "value_dim": scale.head_dim,
        }


class GatedDeltaNet(Mixer):
    """The gated delta rule with its short convolution, norms and output gate."""

    Config = GatedDeltaConfig
    delicate = frozenset({"A_log", "dt_bias"})

    def __init__(self, config: GatedDeltaConfig, place: Place) -> None:
        super().__init__()
        self.config = config
        keys = config.key_heads * config.key_dim
        values = config.value_heads * config.value_dim
        heads = config.value_heads
        sizes = (keys, keys, values, values, heads, heads)
        self.q_k_v_z_b_a = Projection(place.d_model, *sizes, gates=(4, 5))
        self.conv_weight = nn.Parameter(torch.empty(2 * keys + values, config.conv_width))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.norm_weight = nn.Parameter(torch.empty(config.value_dim))
        self.out = Projection(values, place.d_model, residual=True)

    def initialisers(self) -> dict[str, Initialiser]:
        """A ~ U(0.01, 16) and log-uniform step sizes (flash-linear-attention)."""
        return {
            "A_log": lambda t, g: fill_log_uniform(t, g, 0.01, 16.0),
            "dt_bias": fill_dt_bias,
            "norm_weight": fill_ones,
        }

    def _split(self, x: Input) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sizes = self.q_k_v_z_b_a.sizes
        mixed, z, b, a = self.q_k_v_z_b_a(x).split((sum(sizes[:3]), *sizes[3:]), -1)
        return mixed, z.unflatten(-1, (-1, self.config.value_dim)), b, a

    def _mix(self, x: Input, state: LayerState | None = None) -> Tensor:
        c = self.config
        mixed, z, b, a = self._split(x)
        mixed = convolve(mixed, self.conv_weight, state=state, backend=self.backend)
        keys = c.key_heads * c.key_dim
        q, k, v = mixed.split((keys, keys, mixed.shape[-1] - 2 * keys), -1)
        q, k = (t.unflatten(-1, (-1, c.key_dim)) for t in (q, k))
        y = gated_delta(
            q, k, v.unflatten(-1, (-1, c.value_dim)), a, b, self.A_log, self.dt_bias,
            OutputNorm(gate=z, weight=self.norm_weight, eps=c.eps, gate_first=False),
            state=state, backend=self.backend,
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
        """One key-by-value matrix per value head, and the convolution's tail."""
        c = self.config
        tail = FixedSpec(
            name="conv",
            kind="conv",
            shape=(c.conv_width - 1, self.conv_weight.shape[0]),
            format=Format.of(self.conv_weight.dtype),
            shards=c.key_heads,
        )
        memory = FixedSpec(
            name="memory",
            shape=(c.value_heads, c.key_dim, c.value_dim),
            format=memory_format(self.out.weight),
            shards=c.value_heads,
            inputs=TensorSpec(
                name="memory inputs",
                shape=(c.key_heads * c.key_dim + c.value_heads * (c.value_dim + 2),),
                format=Format.of(self.out.weight.dtype),
                shards=c.key_heads,
            ),
        )
        return StateSpec(fixed=(tail, memory))

    def axes(self) -> tuple[Axis, ...]:
        """Key and value channels of each head, key heads with their value heads, and value heads
        of each key head where there are several.
        """
        c, share = self.config, self.config.value_heads // self.config.key_heads
        keys, values = c.key_heads * c.key_dim, c.value_heads * c.value_dim
        k, v, z = keys, 2 * keys, 2 * keys + values
        gates = (z + values, z + values + c.value_heads)
        key, value = spans(0, keys, 1), spans(0, values, 1)
        key_dim = Axis(
            name="key_dim",
            kind="state",
            groups=c.key_heads,
            slices=(rows("q_k_v_z_b_a.weight", key, key + k), rows("conv_weight", key, key + k)),
            signals=(made_by("q_k_v_z_b_a", key), made_by("q_k_v_z_b_a", key + k)),
            fields={"key_dim": 1},
            # Outputs grow with their scale N^-0.5, and then are normed.
            inverse=("eps",),
        )
        value_dim = Axis(
            name="value_dim",
            kind="state",
            groups=c.value_heads,
            slices=(
                rows("q_k_v_z_b_a.weight", value + v, value + z), rows("conv_weight", value + v),
                columns("out.weight", value),
            ),
            signals=(read_by("out", value),),
            fields={"value_dim": 1},
            inverse=("eps",),
            norm="norm_weight",
            reader="out",
            folded=("norm_weight", "out.weight"),
        )  # fmt: skip

        def heads(name: str, count: int, keys_too: bool, fields: dict[str, int]) -> Axis:
            each = c.value_heads // count
            head = spans(0, count, each)
            channels = spans(0, count, each * c.value_dim)
            of_keys = spans(0, count, c.key_dim) if keys_too else spans(0, count, 0)
            convolved = (of_keys, of_keys + k, channels + v)
            return Axis(
                name=name,
                kind="state",
                groups=1 if keys_too else c.key_heads,
                slices=(
                    rows(
                        "q_k_v_z_b_a.weight", *convolved, channels + z, *(head + g for g in gates)
                    ),
                    rows("conv_weight", *convolved), rows("A_log", head), rows("dt_bias", head),
                    columns("out.weight", channels),
                ),
                signals=(read_by("out", channels),),
                fields=fields,
            )  # fmt: skip

        whole = heads("heads", c.key_heads, True, {"key_heads": 1, "value_heads": share})
        if share == 1:
            return key_dim, value_dim, whole
        apart = heads("value_heads", c.value_heads, False, {"value_heads": c.key_heads})
        return key_dim, value_dim, whole, apart

    def cost(self, step: Step) -> Cost:
        """FLOPs and bytes of one step."""
        c, spec = self.config, self.kept_spec()
        heads, n, p = c.value_heads, c.key_dim, c.value_dim
        values = step.tokens * heads * p
        if step.new_tokens <= RECURRENT_LIMIT:
            tokens = step.new_tokens + step.replayed
            matrix = gdn_step_matrix_flops(step.batch, tokens, heads, n, p)
            vector = 3 * step.batch * tokens * heads * p * n
        else:
            matrix = gdn_chunk_matrix_flops(step.batch, step.new_tokens, heads, c.key_heads, n, p)
            vector = chunk_vector_flops(
                step, CHUNK, heads, n, p, per_score=5, per_token=4 * n + 3 * p
            )
        small = (self.A_log, self.dt_bias, self.norm_weight)
        return Cost.of(
            linear_cost("q, k, v, gates", self.q_k_v_z_b_a, step.tokens),
            OpCost(
                name="short conv",
                vector_flops=step.tokens * self.conv_weight.shape[0] * (2 * c.conv_width + 5),
                weight_bytes=self.conv_weight.nbytes,
            ),
            OpCost(
                name="gated delta rule",
                matrix_flops=matrix,
                vector_flops=vector,
                **state_traffic(spec, step),
            ),
            OpCost(
                name="norm, gate",
                vector_flops=9 * values,
                weight_bytes=sum(t.nbytes for t in small),
            ),
            linear_cost("delta out", self.out, step.tokens),
        )
