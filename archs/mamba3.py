"""Mamba-3 (arXiv 2603.15569): a trapezoidal rule, states that turn, and several columns of B and C.

in_proj -> z, x, B, C, Δ, A, λ, θ, without a convolution; B and C are normed, get a bias for each
head and are turned by angles that tokens add up to, π tanh(θ) Δ; the state S follows the rule of
`kernels.trapezoid.torch`, and y = Sᵀ C + D x is gated by silu(z). With rank R > 1 (MIMO), B and C
have R columns, x and z are scaled for each, and outputs are summed. Equals the paper's recurrence;
parameters are those of mamba-ssm's Mamba3 without its output norm, but for the order of the rows of
B and C where that is MIMO and turns states i and i + N/2 together.
"""

from dataclasses import dataclass, replace
from functools import partial
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
from archs.ops.dense import Input
from archs.ops.trapezoid import ANGLE, LAST, MEMORY, trapezoid
from archs.recurrent import chunk_vector_flops, fill_dt_bias, fill_ones, memory_format
from archs.spec import RECURRENT_LIMIT, FixedSpec, StateSpec
from archs.state import LayerState
from kernels.decay.torch import CHUNK
from kernels.trapezoid.torch import (
    TrapezoidSizes,
    TrapezoidWeights,
    trapezoid_chunk_matrix_flops,
    trapezoid_step_matrix_flops,
)

if TYPE_CHECKING:
    from archs.sizes import Scale


@dataclass(frozen=True, kw_only=True, slots=True)
class Mamba3Config(MixerConfig):
    """n_heads heads of head_dim channels; groups of heads share B and C of state_dim.

    rank: columns of B and C; 1: SISO. rope_fraction: share of the states that turn; 0: none does.
    a_floor: the least -A. dt_min, dt_max: between which step sizes begin; a token can turn a state
    by π times its step size at most.
    """

    n_heads: int
    head_dim: int
    state_dim: int
    groups: int = 1
    rank: int = 1
    rope_fraction: float = 0.5
    a_floor: float = 1e-4
    dt_min: float = 1e-3
    dt_max: float = 0.1
    eps: float = 1e-5

    def __post_init__(self) -> None:
        at_least(self, 1, "n_heads", "head_dim", "state_dim", "groups", "rank")
        positive(self, "a_floor", "dt_min", "dt_max", "eps")
        if self.dt_min > self.dt_max:
            raise UserError(
                f"dt_min={self.dt_min} is more than dt_max={self.dt_max}; step sizes begin between "
                "them, so exchange them or give others"
            )
        require_divisible("n_heads", self.n_heads, "groups", self.groups)
        if not 0 <= self.rope_fraction <= 1:
            raise UserError(
                f"rope_fraction={self.rope_fraction} is no share of the states; take 0 to 1, as "
                "published 0.5"
            )

    @classmethod
    def defaults(cls, scale: "Scale") -> dict[str, Any]:
        """Expansion 2; 64 channels and 128 states per head, less in small models, as `mamba2`."""
        inner = 2 * scale.d_model
        head_dim = min(64, scale.head_dim)
        state_dim = min(128, scale.d_model // 4)
        return {"n_heads": inner // head_dim, "head_dim": head_dim, "state_dim": state_dim}

    @property
    def sizes(self) -> TrapezoidSizes:
        """What the recurrence goes by."""
        return TrapezoidSizes(
            heads=self.n_heads, groups=self.groups, n=self.state_dim, p=self.head_dim,
            rank=self.rank, angles=int(self.state_dim * self.rope_fraction) // 2,
        )  # fmt: skip


class Mamba3(Mixer):
    """The trapezoidal recurrence between its two projections: a Mamba-3 block."""

    Config = Mamba3Config
    delicate = frozenset({"dt_bias", "D", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o"})

    def __init__(self, config: Mamba3Config, place: Place) -> None:
        super().__init__()
        self.config = config
        self.sizes = sizes = config.sizes
        parts = tuple(width for width in sizes.parts if width)
        self.inputs = Projection(place.d_model, *parts, gates=range(4, len(parts)))
        self.dt_bias = nn.Parameter(torch.empty(sizes.heads))
        self.D = nn.Parameter(torch.empty(sizes.heads))
        self.B_norm = nn.Parameter(torch.empty(sizes.n))
        self.C_norm = nn.Parameter(torch.empty(sizes.n))
        self.B_bias = nn.Parameter(torch.empty(sizes.rank, sizes.heads, sizes.n))
        self.C_bias = nn.Parameter(torch.empty(sizes.rank, sizes.heads, sizes.n))
        for name in self._mimo:
            setattr(self, name, nn.Parameter(torch.empty(sizes.rank, sizes.inner)))
        self.out = Projection(sizes.inner, place.d_model, residual=True)

    @property
    def _mimo(self) -> tuple[str, ...]:
        """The vectors of several columns; with one there are none."""
        return ("mimo_x", "mimo_z", "mimo_o") if self.sizes.rank > 1 else ()

    def initialisers(self) -> dict[str, Initialiser]:
        """Ones for D, norms and biases, step sizes log-uniform; columns begin as equal shares."""

        def fill_share(t: Tensor, _: torch.Generator) -> None:
            t.fill_(1 / self.sizes.rank)

        ones = ("D", "B_norm", "C_norm", "B_bias", "C_bias")
        c = self.config
        steps = partial(fill_dt_bias, low=c.dt_min, high=c.dt_max)
        rules: dict[str, Initialiser] = {"dt_bias": steps, **dict.fromkeys(ones, fill_ones)}
        mimo = {"mimo_x": fill_share, "mimo_z": fill_ones, "mimo_o": fill_share}
        return rules | {name: mimo[name] for name in self._mimo}

    def _weights(self) -> TrapezoidWeights:
        return TrapezoidWeights(
            self.dt_bias, self.D, self.B_norm, self.C_norm, self.B_bias, self.C_bias,
            self.config.eps, self.config.a_floor, *[getattr(self, name) for name in self._mimo],
        )  # fmt: skip

    def _mix(self, x: Input, state: LayerState | None = None) -> Tensor:
        y = trapezoid(
            self.inputs(x), self.sizes, self._weights(), state=state, backend=self.backend
        )
        return self.out(y)

    def forward(self, x: Tensor, shared: Shared | None = None) -> Tensor:
        """x: [B, T, D] -> [B, T, D]."""
        return self._mix(x)

    @takes_unnormed
    def extend(self, x: Input, state: LayerState) -> Tensor:
        """x: [B, K, D] -> [B, K, D]."""
        return self._mix(x, state)

    def state_spec(self) -> StateSpec:
        """One state-by-channel matrix and the angles of each head, and k and x of the last token.

        The last token is the tail of a convolution over two tokens, which is what the trapezoidal
        rule is. Angles have a kind that no format is given for: one that was rounded to few bits
        would turn all that follows.
        """
        s = self.sizes
        wide = memory_format(self.out.weight)
        memory = FixedSpec(name=MEMORY, shape=(s.heads, s.n, s.p), format=wide, shards=s.heads)
        angle = FixedSpec(
            name=ANGLE, kind="angle", shape=(s.heads, s.angles), format=wide, shards=s.heads
        )
        last = FixedSpec(
            name=LAST, kind="conv", shape=(1, s.last), format=Format.of(self.out.weight.dtype),
            shards=s.heads,
        )  # fmt: skip
        return StateSpec(fixed=(memory, last, angle) if s.angles else (memory, last))

    def axes(self) -> tuple[Axis, ...]:
        """Channels of each head, and heads of each group."""
        c, s = self.config, self.sizes
        after = 2 * s.inner + 2 * s.rank * s.groups * s.n

        def inside(
            name: str, groups: int, units: Tensor, fields: dict[str, int], of_heads: Tensor | None
        ) -> Axis:
            """Some of the inner channels, with what else belongs to whole heads."""
            gates = [] if of_heads is None else [of_heads + after + i * s.heads for i in range(3)]
            slices = [
                rows("inputs.weight", units, units + s.inner, *gates),
                *(columns(mimo, units) for mimo in self._mimo), columns("out.weight", units),
            ]  # fmt: skip
            if of_heads is not None:
                slices += [rows(vector, of_heads) for vector in ("dt_bias", "D")]
                slices += [columns(bias, of_heads) for bias in ("B_bias", "C_bias")]
            return Axis(
                name=name, kind="state", groups=groups, slices=tuple(slices),
                signals=(read_by("out", units),), fields=fields,
            )  # fmt: skip

        heads = spans(0, s.heads, 1)
        whole = spans(0, s.heads, s.p)
        return (
            inside("head_dim", s.heads, spans(0, s.inner, 1), {"head_dim": 1}, None),
            inside("heads", c.groups, whole, {"n_heads": c.groups}, heads),
        )

    def cost(self, step: Step) -> Cost:
        """FLOPs and bytes of one step."""
        s, spec = self.sizes, self.kept_spec()
        # Channels and states of all columns and heads.
        values, states = s.rank * s.inner, s.rank * s.heads * s.n
        if step.new_tokens <= RECURRENT_LIMIT:
            matrix = trapezoid_step_matrix_flops(step.batch, step.new_tokens, s)
            vector = step.tokens * s.inner * s.n * (1 + 4 * s.rank)
        else:
            matrix = trapezoid_chunk_matrix_flops(step.batch, step.new_tokens, s)
            own = s.rank * (2 * states + 2 * values + 4 * s.rank * s.heads)
            vector = step.tokens * own + chunk_vector_flops(
                replace(step, new_tokens=step.new_tokens * s.rank), CHUNK, s.heads, s.n, s.p,
                per_score=3, per_token=3 * s.p,
            )  # fmt: skip
        # Angles and gates of each head, norms of each group, and what is biased and turned.
        turned = s.heads * (8 * s.angles + 12) + 8 * s.rank * s.groups * s.n
        turned += 2 * states + 12 * s.rank * s.heads * s.angles
        small = self.parameters(recurse=False)
        return Cost.of(
            linear_cost("z, x, B, C, Δ, A, λ, θ", self.inputs, step.tokens),
            OpCost(
                name="norm, bias, rotation",
                vector_flops=step.tokens * turned,
                weight_bytes=sum(p.nbytes for p in small),
            ),
            OpCost(
                name="trapezoidal recurrence",
                matrix_flops=matrix,
                vector_flops=vector,
                **state_traffic(spec, step),
            ),
            OpCost(name="skip, gate", vector_flops=11 * step.tokens * values),
            linear_cost("ssm out", self.out, step.tokens),
        )
