"""Kimi Delta Attention (Kimi Linear, arXiv 2510.26692, section 3): the gated delta rule with a
decay for each key channel.

Short convolution and SiLU on q, k, v; normalised q and k; log decays -e^{A_log} softplus(a +
dt_bias) with a low-rank projection a, A_log by head and dt_bias by channel; strength β = sigmoid(b)
by head; RMSNorm per head, then a sigmoid gate, low-rank too. No biases beside dt_bias, no
positions. Equals the `transformers` implementation in Kimi Linear.

With gates by channel it is Gated DeltaNet-2's rule (arXiv 2605.22791): what is erased is gated by
key channel and what is written by value channel, S_t = (I - k (b ∘ k)ᵀ) e^g S_{t-1} + k (w ∘ v)ᵀ,
where one strength does both otherwise. With every gate β it is the same. Their layer's bias of the
output gate is left out.
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
from archs.mixer import Initialiser, Mixer, MixerConfig, Place, Shared, takes_unnormed
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
class KimiDeltaConfig(MixerConfig):
    """n_heads heads of key_dim channels of q and k and value_dim channels of v.

    decay_rank, gate_rank: widths from which decays and output gates are projected up; eps: of the
    norm per head. The published model has 128 of each width, and eps 1e-5. channel_gates: erase
    and write gates for each channel in place of one strength per head.
    """

    n_heads: int
    key_dim: int
    value_dim: int
    decay_rank: int
    gate_rank: int
    conv_width: int = 4
    eps: float = 1e-5
    channel_gates: bool = False

    def __post_init__(self) -> None:
        at_least(
            self, 1, "n_heads", "key_dim", "value_dim", "decay_rank", "gate_rank", "conv_width"
        )
        positive(self, "eps")

    @classmethod
    def defaults(cls, scale: "Scale") -> dict[str, Any]:
        """The heads of `gdn`, so that the two differ in their gates and hold states of one size;
        ranks of a head's width, as published.
        """
        return {
            "n_heads": scale.n_heads,
            "key_dim": scale.head_dim // 2,
            "value_dim": scale.head_dim,
            "decay_rank": scale.head_dim,
            "gate_rank": scale.head_dim,
        }


class KimiDeltaAttention(Mixer):
    """The delta rule gated by channel, with its short convolution, norms and low-rank gates."""

    Config = KimiDeltaConfig
    delicate = frozenset({"A_log", "dt_bias"})

    def __init__(self, config: KimiDeltaConfig, place: Place) -> None:
        super().__init__()
        self.config = c = config
        keys, values = c.n_heads * c.key_dim, c.n_heads * c.value_dim
        strengths = (keys, values) if c.channel_gates else (c.n_heads,)
        sizes = (keys, keys, values, c.decay_rank, c.gate_rank, *strengths)
        self.q_k_v_f_z_b = Projection(place.d_model, *sizes, gates=(3, *range(5, len(sizes))))
        self.decay_up = Projection(c.decay_rank, keys, gates=(0,))
        self.gate_up = Projection(c.gate_rank, values)
        self.conv_weight = nn.Parameter(torch.empty(2 * keys + values, c.conv_width))
        self.A_log = nn.Parameter(torch.empty(c.n_heads))
        self.dt_bias = nn.Parameter(torch.empty(keys))
        self.norm_weight = nn.Parameter(torch.empty(c.value_dim))
        self.out = Projection(values, place.d_model, residual=True)

    def initialisers(self) -> dict[str, Initialiser]:
        """A ~ U(1, 16) and log-uniform step sizes (`transformers`, flash-linear-attention)."""
        return {
            "A_log": lambda t, g: fill_log_uniform(t, g, 1.0, 16.0),
            "dt_bias": fill_dt_bias,
            "norm_weight": fill_ones,
        }

    def _mix(self, x: Input, state: LayerState | None = None) -> Tensor:
        c, sizes = self.config, self.q_k_v_f_z_b.sizes
        mixed, f, z, b, *w = self.q_k_v_f_z_b(x).split((sum(sizes[:3]), *sizes[3:]), -1)
        mixed = convolve(mixed, self.conv_weight, state=state, backend=self.backend)
        q, k, v = mixed.split(sizes[:3], -1)
        q, k, a = (t.unflatten(-1, (-1, c.key_dim)) for t in (q, k, self.decay_up(f)))
        if c.channel_gates:
            b, v = b.unflatten(-1, (-1, c.key_dim)), v * w[0].sigmoid()
        v, gate = (t.unflatten(-1, (-1, c.value_dim)) for t in (v, self.gate_up(z)))
        y = gated_delta(
            q, k, v, a, b, self.A_log, self.dt_bias.view(-1, c.key_dim),
            OutputNorm(
                gate=gate, weight=self.norm_weight, eps=c.eps, gate_first=False, opened="sigmoid"
            ),
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
        """One key-by-value matrix per head, and the convolution's tail.

        Inputs of a token are its key, values (gated, where they are by channel), raw decays by
        channel and raw strengths.
        """
        c = self.config
        strengths = c.key_dim if c.channel_gates else 1
        tail = FixedSpec(
            name="conv",
            kind="conv",
            shape=(c.conv_width - 1, self.conv_weight.shape[0]),
            format=Format.of(self.conv_weight.dtype),
            shards=c.n_heads,
        )
        memory = FixedSpec(
            name="memory",
            shape=(c.n_heads, c.key_dim, c.value_dim),
            format=memory_format(self.out.weight),
            shards=c.n_heads,
            inputs=TensorSpec(
                name="memory inputs",
                shape=(c.n_heads * (2 * c.key_dim + c.value_dim + strengths),),
                format=Format.of(self.out.weight.dtype),
                shards=c.n_heads,
            ),
        )
        return StateSpec(fixed=(tail, memory))

    def axes(self) -> tuple[Axis, ...]:
        """Key and value channels of each head, heads, and the ranks of both gates."""
        c = self.config
        keys, values = c.n_heads * c.key_dim, c.n_heads * c.value_dim
        k, v, f = keys, 2 * keys, 2 * keys + values
        z, b = f + c.decay_rank, f + c.decay_rank + c.gate_rank
        key, value = spans(0, keys, 1), spans(0, values, 1)
        head = spans(0, c.n_heads, 1)
        head_keys, head_values = spans(0, c.n_heads, c.key_dim), spans(0, c.n_heads, c.value_dim)
        # Rows of the strengths that belong to a key channel, a value channel and a head.
        of_key, of_value, of_head = [], [], [head + b]
        if c.channel_gates:
            of_key, of_value = [key + b], [value + b + keys]
            of_head = [head_keys + b, head_values + b + keys]
        key_dim = Axis(
            name="key_dim",
            kind="state",
            groups=c.n_heads,
            slices=(
                rows("q_k_v_f_z_b.weight", key, key + k, *of_key),
                rows("conv_weight", key, key + k),
                rows("decay_up.weight", key), rows("dt_bias", key),
            ),
            signals=(made_by("q_k_v_f_z_b", key), made_by("q_k_v_f_z_b", key + k)),
            fields={"key_dim": 1},
            # Outputs grow with their scale N^-0.5, and then are normed.
            inverse=("eps",),
        )  # fmt: skip
        value_dim = Axis(
            name="value_dim",
            kind="state",
            groups=c.n_heads,
            slices=(
                rows("q_k_v_f_z_b.weight", value + v, *of_value), rows("conv_weight", value + v),
                rows("gate_up.weight", value), columns("out.weight", value),
            ),
            signals=(read_by("out", value),),
            fields={"value_dim": 1},
            inverse=("eps",),
            norm="norm_weight",
            reader="out",
            folded=("norm_weight", "out.weight"),
        )  # fmt: skip
        convolved = (head_keys, head_keys + k, head_values + v)
        heads = Axis(
            name="heads",
            kind="state",
            slices=(
                rows("q_k_v_f_z_b.weight", *convolved, *of_head), rows("conv_weight", *convolved),
                rows("decay_up.weight", head_keys), rows("dt_bias", head_keys),
                rows("A_log", head), rows("gate_up.weight", head_values),
                columns("out.weight", head_values),
            ),
            signals=(read_by("out", head_values),),
            fields={"n_heads": 1},
        )  # fmt: skip

        def rank(name: str, up: str, start: int, count: int) -> Axis:
            units = spans(0, count, 1)
            return Axis(
                name=name,
                kind="width",
                slices=(rows("q_k_v_f_z_b.weight", units + start), columns(f"{up}.weight", units)),
                signals=(read_by(up, units),),
                fields={name: 1},
            )

        return (
            key_dim, value_dim, heads, rank("decay_rank", "decay_up", f, c.decay_rank),
            rank("gate_rank", "gate_up", z, c.gate_rank),
        )  # fmt: skip

    def cost(self, step: Step) -> Cost:
        """FLOPs and bytes of one step."""
        c, spec = self.config, self.kept_spec()
        heads, n, p = c.n_heads, c.key_dim, c.value_dim
        if step.new_tokens <= RECURRENT_LIMIT:
            tokens = step.new_tokens + step.replayed
            matrix = gdn_step_matrix_flops(step.batch, tokens, heads, n, p)
            vector = 3 * step.batch * tokens * heads * p * n
        else:
            matrix = gdn_chunk_matrix_flops(
                step.batch, step.new_tokens, heads, heads, n, p, by_channel=True
            )
            # Sums, decays and their products by channel, once for each halving of a chunk.
            halvings = (CHUNK - 1).bit_length()
            vector = chunk_vector_flops(
                step, CHUNK, heads, n, p, per_score=5, per_token=(4 + 5 * halvings) * n + 3 * p
            )
        small = (self.A_log, self.dt_bias, self.norm_weight)
        return Cost.of(
            linear_cost("q, k, v, gates", self.q_k_v_f_z_b, step.tokens),
            OpCost(
                name="short conv",
                vector_flops=step.tokens * self.conv_weight.shape[0] * (2 * c.conv_width + 5),
                weight_bytes=self.conv_weight.nbytes,
            ),
            linear_cost("decays up", self.decay_up, step.tokens),
            linear_cost("output gates up", self.gate_up, step.tokens),
            OpCost(
                name="gated delta rule",
                matrix_flops=matrix,
                vector_flops=vector,
                **state_traffic(spec, step),
            ),
            OpCost(
                name="norm, gate",
                vector_flops=step.tokens * heads * (9 * p + 6 * n + 5 * (n + p) * c.channel_gates),
                weight_bytes=sum(t.nbytes for t in small),
            ),
            linear_cost("delta out", self.out, step.tokens),
        )
