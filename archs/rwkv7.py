"""RWKV-7's time mixing (arXiv 2503.14456, section 4): a delta rule whose strength, like its decay,
has a value for each key channel, and which erases along another vector than it writes.

Each projection reads its own blend of a token and the one before it. Decays e^{-e^{-0.5} σ(d)} and
in-context learning rates σ(a) are low-rank projections of the input; what the state holds along the
normalised key κ̂ is taken out along κ̂ ∘ a, and the value is written along a key that a scales. A
norm per head, the current token's own contribution once more (r · k · r_k) v, and a low-rank gate.
No positions. Equals the paper's equations; flash-linear-attention's layer computes the same.

Later layers of the published model blend their values with the first layer's. Here a step reads of
another layer only rows that a store keeps, and it keeps them in pages: one of 64 tokens is as large
as all recurrent states at scale `tiny`, and a model with such rows is told as one of windows. So
`value_residual` is an option that is off by default.

Training and long steps are torch's under every backend.
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
from archs.mixer import Initialiser, Mixer, MixerConfig, Place, Shared
from archs.ops.shift import token_shift
from archs.ops.wkv import WkvWeights, wkv
from archs.recurrent import chunk_vector_flops, memory_format
from archs.spec import RECURRENT_LIMIT, FixedSpec, RowSpec, StateSpec, TensorSpec
from archs.state import LayerState, Rows, mask_of
from kernels.dplr.torch import CHUNK, dplr_chunk_matrix_flops, dplr_step_matrix_flops

if TYPE_CHECKING:
    from archs.sizes import Scale

#: Blends of a token and the one before it, in their order, and the powers by which they start.
BLENDS = {"receptance": 0.2, "decay": 0.9, "key": 0.7, "value": 0.7, "rate": 0.9, "gate": 0.2}
VALUE = list(BLENDS).index("value")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rwkv7Config(MixerConfig):
    """n_heads heads of key_dim channels of receptance and key and value_dim channels of value.

    decay_rank, rate_rank, gate_rank, value_rank: widths from which decays, in-context learning
    rates, output gates and gates of the value residual are projected up; eps: of the norm per head.
    value_residual: whether layers blend their values with those of the first layer of their kind,
    a row [H·P] of which the store then keeps; value_rank is of no use without it.
    The published model has key_dim and value_dim 64, and eps 64e-5.
    """

    n_heads: int
    key_dim: int
    value_dim: int
    decay_rank: int
    rate_rank: int
    gate_rank: int
    value_rank: int
    value_residual: bool = False
    eps: float = 64e-5

    def __post_init__(self) -> None:
        at_least(self, 1, "n_heads", "key_dim", "value_dim")
        at_least(self, 1, "decay_rank", "rate_rank", "gate_rank", "value_rank")
        positive(self, "eps")

    @classmethod
    def defaults(cls, scale: "Scale") -> dict[str, Any]:
        """The heads of `gdn`, so that both hold states of one size; ranks grow with √D as
        published, in steps of 4, not 32, for narrow models.
        """

        def rank(factor: float) -> int:
            return max(4, round(factor * scale.d_model**0.5 / 4) * 4)

        return {
            "n_heads": scale.n_heads,
            "key_dim": scale.head_dim // 2,
            "value_dim": scale.head_dim,
            "decay_rank": rank(2.5),
            "rate_rank": rank(2.5),
            "gate_rank": rank(5),
            "value_rank": rank(1.7),
        }


class Rwkv7(Mixer):
    """Blends with the token before, the recurrence, norm per head, bonus and gate."""

    Config = Rwkv7Config
    delicate = frozenset({"blend", "decay_bias"})

    def __init__(self, config: Rwkv7Config, place: Place) -> None:
        super().__init__()
        self.config = c = config
        self.place = place
        keys, values, d = c.n_heads * c.key_dim, c.n_heads * c.value_dim, place.d_model
        first = place.siblings[0]
        self.owner = None if first == place.layer else first
        self.blend = nn.Parameter(torch.empty(len(BLENDS), d))
        self.receptance = Projection(d, keys)
        self.key = Projection(d, keys)
        self.value = Projection(d, values)
        self.decay_down = Projection(d, c.decay_rank, gates=(0,))
        self.decay_up = Projection(c.decay_rank, keys, gates=(0,))
        self.decay_bias = nn.Parameter(torch.empty(keys))
        self.rate_down = Projection(d, c.rate_rank, gates=(0,))
        self.rate_up = Projection(c.rate_rank, keys, gates=(0,))
        self.rate_bias = nn.Parameter(torch.empty(keys))
        self.gate_down = Projection(d, c.gate_rank)
        self.gate_up = Projection(c.gate_rank, values)
        if self.reads_first:
            self.value_down = Projection(d, c.value_rank)
            self.value_up = Projection(c.value_rank, values)
            self.value_bias = nn.Parameter(torch.empty(values))
        self.removal_scale = nn.Parameter(torch.empty(keys))
        self.rate_scale = nn.Parameter(torch.empty(keys))
        self.bonus = nn.Parameter(torch.empty(keys))
        self.norm_weight = nn.Parameter(torch.empty(values))
        self.norm_bias = nn.Parameter(torch.empty(values))
        self.out = Projection(values, d, residual=True)

    @property
    def reads_first(self) -> bool:
        """Whether this layer's values are blended with those of another."""
        return self.config.value_residual and self.owner is not None

    def initialisers(self) -> dict[str, Initialiser]:
        """Ramps over channels and depth as published; low-rank projections up at a tenth of the
        usual size, which leaves decays and rates near their biases, where published ones down are
        zero.
        """
        c, place = self.config, self.place
        keys, values, d = c.n_heads * c.key_dim, c.n_heads * c.value_dim, place.d_model
        depth, left = place.layer / max(1, place.n_layers - 1), 1 - place.layer / place.n_layers
        within = torch.linspace(-1, 1, c.key_dim).repeat(c.n_heads)
        within = within * within.abs()
        ramp = 6 * torch.linspace(0, 1, keys) ** (1 + depth**0.3) - 6
        along, along_values = torch.linspace(-0.5, 0.5, keys), torch.linspace(-0.5, 0.5, values)
        powers = torch.tensor(list(BLENDS.values()))[:, None] * left
        found: dict[str, Initialiser] = {
            "blend": _fill(1 - (torch.arange(d) / d) ** powers),
            "key.weight": _normal(0.1),
            "decay_up.weight": _normal(0.1),
            "decay_bias": _fill(ramp + 0.5 + 2.5 * within),
            "rate_up.weight": _normal(0.1),
            "rate_bias": _fill(-0.19 + 0.3 * within + 0.4 * along),
            "removal_scale": _fill(0.71 - 0.1 * along),
            "rate_scale": _fill(torch.full((keys,), 1.02)),
            "bonus": _fill(torch.full((keys,), -0.04)),
            "norm_weight": _fill(
                torch.full((values,), ((place.layer + 1) / place.n_layers) ** 0.7)
            ),
        }
        if self.reads_first:
            found |= {
                "value_up.weight": _normal(0.1),
                "value_bias": _fill(0.73 - 0.4 * along_values),
            }
        return found

    def forward(self, x: Tensor, shared: Shared | None = None) -> Tensor:
        """x: [B, T, D] -> [B, T, D]. With a value residual the first layer leaves its values in
        `shared` for the others; ValueError where it has not.
        """
        blends = self._blends(x)
        v = self.value(blends[VALUE])
        if self.reads_first:
            if shared is None or self.owner not in shared:
                raise ValueError(
                    f"layer {self.place.layer} reads the values of layer {self.owner}: run that "
                    "layer first, with the same `shared`"
                )
            v = self._blended(v, shared[self.owner], blends[VALUE])
        elif self.config.value_residual and shared is not None:
            shared[self.place.layer] = v
        return self._mix(blends, v)

    def extend(self, x: Tensor, state: LayerState) -> Tensor:
        """x: [B, K, D] -> [B, K, D]."""
        blends = self._blends(x, state)
        v = self.value(blends[VALUE])
        if self.reads_first:
            v = self._blended(v, _newest(state.seen("values"), x.shape[1]), blends[VALUE])
        elif self.config.value_residual:
            v = _newest(state.append("values", v), x.shape[1])
        return self._mix(blends, v, state)

    def _blends(self, x: Tensor, state: LayerState | None = None) -> Tensor:
        """What each projection reads, in the order of `BLENDS`, [6, B, K, D]."""
        return token_shift(x, self.blend, state=state, backend=self.backend)

    def _blended(self, v: Tensor, first: Tensor, x: Tensor) -> Tensor:
        """Values [B, K, H·P] on their way to those of the first layer."""
        share = self.value_up(self.value_down(x)) + self.value_bias
        return v + (first - v) * share.sigmoid()

    def _mix(self, blends: Tensor, v: Tensor, state: LayerState | None = None) -> Tensor:
        c = self.config
        of_receptance, of_decay, of_key, _, of_rate, of_gate = blends.unbind(0)
        r, k = self.receptance(of_receptance), self.key(of_key)
        decay = self.decay_up(self.decay_down(of_decay).tanh())
        rate = self.rate_up(self.rate_down(of_rate))
        r, k, decay, rate = (t.unflatten(-1, (-1, c.key_dim)) for t in (r, k, decay, rate))
        y = wkv(
            r, k, v.unflatten(-1, (-1, c.value_dim)), decay, rate, self._weights(), eps=c.eps,
            state=state, backend=self.backend,
        )  # fmt: skip
        return self.out(y * self.gate_up(self.gate_down(of_gate).sigmoid()))

    def _weights(self) -> WkvWeights:
        c = self.config
        of_keys = (
            self.decay_bias, self.rate_bias, self.removal_scale, self.rate_scale, self.bonus
        )  # fmt: skip
        of_values = self.norm_weight, self.norm_bias
        return WkvWeights(
            *(t.view(-1, c.key_dim) for t in of_keys), *(t.view(-1, c.value_dim) for t in of_values)
        )

    def state_spec(self) -> StateSpec:
        """One key-by-value matrix per head and the last input; with a value residual the first
        layer's values of the newest token, too.
        """
        c = self.config
        plain = Format.of(self.out.weight.dtype)
        shift = FixedSpec(name="shift", kind="conv", shape=(1, self.place.d_model), format=plain)
        memory = FixedSpec(
            name="memory",
            shape=(c.n_heads, c.key_dim, c.value_dim),
            format=memory_format(self.out.weight),
            shards=c.n_heads,
            inputs=TensorSpec(
                name="memory inputs",
                shape=(c.n_heads * (3 * c.key_dim + c.value_dim),),
                format=plain,
                shards=c.n_heads,
            ),
        )
        values = RowSpec(
            name="values", kind="", shape=(c.n_heads * c.value_dim,), format=plain, window=1,
            owner=self.owner, shards=c.n_heads,
        )  # fmt: skip
        return StateSpec(rows=(values,) if c.value_residual else (), fixed=(shift, memory))

    def axes(self) -> tuple[Axis, ...]:
        """Key channels of each head, heads, and ranks. Value channels stay: a norm takes their
        mean away, which would change with each that goes.
        """
        c = self.config
        key, head_keys = spans(0, c.n_heads * c.key_dim, 1), spans(0, c.n_heads, c.key_dim)
        head_values = spans(0, c.n_heads, c.value_dim)
        of_keys = (
            "receptance.weight", "key.weight", "decay_up.weight", "decay_bias", "rate_up.weight",
            "rate_bias", "removal_scale", "rate_scale", "bonus",
        )  # fmt: skip
        of_values = ["value.weight", "gate_up.weight", "norm_weight", "norm_bias"]
        ranks = {"decay": c.decay_rank, "rate": c.rate_rank, "gate": c.gate_rank}
        if self.reads_first:
            of_values += ["value_up.weight", "value_bias"]
            ranks["value"] = c.value_rank
        key_dim = Axis(
            name="key_dim",
            kind="state",
            groups=c.n_heads,
            slices=tuple(rows(name, key) for name in of_keys),
            signals=(made_by("receptance", key), made_by("key", key)),
            fields={"key_dim": 1},
        )
        heads = Axis(
            name="heads",
            kind="state",
            slices=(
                *(rows(name, head_keys) for name in of_keys),
                *(rows(name, head_values) for name in of_values),
                columns("out.weight", head_values),
            ),
            signals=(read_by("out", head_values),),
            fields={"n_heads": 1},
        )

        def rank(name: str, count: int) -> Axis:
            units = spans(0, count, 1)
            return Axis(
                name=f"{name}_rank",
                kind="width",
                slices=(rows(f"{name}_down.weight", units), columns(f"{name}_up.weight", units)),
                signals=(read_by(f"{name}_up", units),),
                fields={f"{name}_rank": 1},
            )

        return (key_dim, heads, *(rank(*pair) for pair in ranks.items()))

    def cost(self, step: Step) -> Cost:
        """FLOPs and bytes of one step."""
        c = self.config
        heads, n, p, tokens = c.n_heads, c.key_dim, c.value_dim, step.tokens
        if step.new_tokens <= RECURRENT_LIMIT:
            taken = step.new_tokens + step.replayed
            matrix = dplr_step_matrix_flops(step.batch, taken, heads, n, p)
            vector = 5 * step.batch * taken * heads * n * p
        else:
            matrix = dplr_chunk_matrix_flops(step.batch, step.new_tokens, heads, n, p)
            # Sums, decays and their products by channel, once for each halving of a chunk.
            halvings = (CHUNK - 1).bit_length()
            vector = chunk_vector_flops(
                step, CHUNK, heads, n, p, per_score=4, per_token=(8 + 8 * halvings) * n + 2 * p
            )
        projections = [
            (name, module)
            for name, module in self.named_children()
            if isinstance(module, Projection)
        ]
        own = dict(self.named_parameters(recurse=False))
        blends = own.pop("blend")
        return Cost.of(
            OpCost(
                name="token shift",
                vector_flops=tokens * (1 + 2 * len(BLENDS)) * blends.shape[1],
                weight_bytes=blends.nbytes,
            ),
            *(linear_cost(name.replace("_", " "), module, tokens) for name, module in projections),
            OpCost(
                name="rwkv7 recurrence",
                matrix_flops=matrix,
                vector_flops=vector,
                **state_traffic(self.kept_spec(), step),
            ),
            OpCost(
                name="decays, rates, norm, bonus, gate",
                vector_flops=tokens * heads * (20 * n + 10 * p),
                weight_bytes=sum(t.nbytes for t in own.values()),
            ),
        )


def _newest(seen: Rows, new_tokens: int) -> Tensor:
    """Each new token's own row, [B, K, row], of rows with a window of one."""
    at = mask_of(seen, new_tokens).int().argmax(-1)[..., None]
    return seen.rows.take_along_dim(at, 1)


def _fill(values: Tensor) -> Initialiser:
    """What starts as these values; the generator is not drawn from."""
    return lambda tensor, generator: tensor.copy_(values)


def _normal(gain: float) -> Initialiser:
    """A matrix [N, D] drawn with deviation gain · D^-0.5."""
    return lambda tensor, generator: tensor.normal_(
        0.0, gain * tensor.shape[-1] ** -0.5, generator=generator
    )
