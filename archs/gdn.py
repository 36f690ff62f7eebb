"""Gated DeltaNet (arXiv 2412.06464): a linear-attention state corrected by the delta rule.

Short convolution and SiLU on q, k, v; normalised keys; decay g = -e^{A_log} · softplus(a + dt_bias)
and strength β = sigmoid(b) per value head; RMSNorm per head, then a SiLU gate. Equals the
`transformers` implementation in Qwen3-Next.

A token multiplies its state by e^g (I - β k kᵀ), whose eigenvalue along k is e^g (1 - β). With β up
to 2 it may be negative (arXiv 2411.12537): a state can change its sign, as parity needs. With n
keys, values and strengths a token takes n such steps, decaying in the first alone, and then reads
(Gated DeltaProduct, arXiv 2502.10297).
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from archs.axes import Axis, columns, made_by, read_by, rows, spans
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
    """key_heads heads of key_dim channels; value_heads (a multiple) of value_dim channels.

    beta_max: β = beta_max · sigmoid(b), in (0, 2]; beyond 2 states grow without bound.
    products: keys, values and strengths of each token.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int = 4
    eps: float = 1e-6
    beta_max: float = 1.0
    products: int = 1

    def __post_init__(self) -> None:
        at_least(
            self, 1, "key_heads", "value_heads", "key_dim", "value_dim", "conv_width", "products"
        )
        positive(self, "eps", "beta_max")
        if self.beta_max > 2:
            raise UserError(
                f"beta_max={self.beta_max} is above 2, where a state grows without bound; lower it"
            )
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
        heads, n = config.value_heads, config.products
        sizes = (keys, n * keys, n * values, values, n * heads, heads)
        self.q_k_v_z_b_a = Projection(place.d_model, *sizes, gates=(4, 5))
        self.conv_weight = nn.Parameter(torch.empty(sum(sizes[:3]), config.conv_width))
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

    def _mix(self, x: Input, state: LayerState | None = None) -> Tensor:
        c, sizes = self.config, self.q_k_v_z_b_a.sizes
        mixed, z, b, a = self.q_k_v_z_b_a(x).split((sum(sizes[:3]), *sizes[3:]), -1)
        mixed = convolve(mixed, self.conv_weight, state=state, backend=self.backend)
        q, k, v = mixed.split(sizes[:3], -1)
        each = (c.products,) if c.products > 1 else ()
        k, v = (t.unflatten(-1, (*each, -1, n)) for t, n in ((k, c.key_dim), (v, c.value_dim)))
        y = gated_delta(
            q.unflatten(-1, (-1, c.key_dim)), k, v, a, b.unflatten(-1, (*each, -1)),
            self.A_log, self.dt_bias,
            OutputNorm(
                gate=z.unflatten(-1, (-1, c.value_dim)), weight=self.norm_weight, eps=c.eps,
                gate_first=False,
            ),
            beta_max=c.beta_max, state=state, backend=self.backend,
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
        """One key-by-value matrix per value head, and the convolution's tail.

        Inputs of a token are its keys, values, raw decays and raw strengths.
        """
        c = self.config
        each = c.key_heads * c.key_dim + c.value_heads * (c.value_dim + 1)
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
                shape=(c.products * each + c.value_heads,),
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
        # Where each key, value and gate of a token begins.
        k = [keys * (1 + i) for i in range(c.products)]
        v = [keys * (1 + c.products) + values * i for i in range(c.products)]
        z = v[-1] + values
        gates = [z + values + c.value_heads * i for i in range(c.products + 1)]
        key, value = spans(0, keys, 1), spans(0, values, 1)
        query_and_keys = (key, *(key + at for at in k))
        key_dim = Axis(
            name="key_dim",
            kind="state",
            groups=c.key_heads,
            slices=(
                rows("q_k_v_z_b_a.weight", *query_and_keys), rows("conv_weight", *query_and_keys)
            ),
            signals=tuple(made_by("q_k_v_z_b_a", units) for units in query_and_keys),
            fields={"key_dim": 1},
            # Outputs grow with their scale N^-0.5, and then are normed.
            inverse=("eps",),
        )  # fmt: skip
        value_dim = Axis(
            name="value_dim",
            kind="state",
            groups=c.value_heads,
            slices=(
                rows("q_k_v_z_b_a.weight", *(value + at for at in v), value + z),
                rows("conv_weight", *(value + at for at in v)), columns("out.weight", value),
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
            convolved = (of_keys, *(of_keys + at for at in k), *(channels + at for at in v))
            return Axis(
                name=name,
                kind="state",
                groups=1 if keys_too else c.key_heads,
                slices=(
                    rows(
                        "q_k_v_z_b_a.weight", *convolved, channels + z, *(head + at for at in gates)
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
            products = c.products * (step.new_tokens + step.replayed)
            matrix = gdn_step_matrix_flops(step.batch, products, heads, n, p)
            vector = 3 * step.batch * products * heads * p * n
        else:
            products = c.products * step.new_tokens
            matrix = gdn_chunk_matrix_flops(step.batch, products, heads, c.key_heads, n, p)
            vector = chunk_vector_flops(
                replace(step, new_tokens=products), CHUNK, heads, n, p, per_score=5,
                per_token=4 * n + 3 * p,
            )  # fmt: skip
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
