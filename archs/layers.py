"""What all architectures share inside a block: norm, projections, SwiGLU.

Projections that read the same input are one matrix (`Projection`): fewer launches in decode,
and the optimiser still sees the parts by their `sizes`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from archs.axes import Axis, columns, read_by, rows, spans
from archs.cost import Cost, OpCost, Step, linear_cost
from archs.ops import dense
from archs.ops.dense import Input, Unnormed, norm_swiglu, product
from archs.ops.matrix import Matrix, Weight, declared_bytes, storage_of

#: What norms add to a mean square where nothing else is said.
NORM_EPS = 1e-5


class Leaf:
    """A module that takes no hooks: torch's call machinery would cost a small step a tenth."""

    def __call__(self, x: Tensor) -> Tensor:
        """`forward`, called directly."""
        return self.forward(x)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., D] -> [..., D']."""
        raise NotImplementedError


class RMSNorm(Leaf, nn.Module):
    """Root-mean-square norm over the last dimension, statistics in float32 (arXiv 1910.07467)."""

    backend: str = "torch"

    def __init__(self, dim: int, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., dim] -> same shape."""
        return dense.rms_norm(x, self.weight, self.eps, backend=self.backend)

    def before(self, x: Tensor, residual: Tensor | None) -> Unnormed:
        """x + residual [..., dim], to be normed by the product that reads it."""
        return Unnormed(x, residual, self.weight, self.eps)

    def after(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The norm of x + residual, and that sum; [..., dim] each."""
        if residual is None:
            return self(x), x
        return dense.add_rms_norm(x, residual, self.weight, self.eps, backend=self.backend)


class Embedding(nn.Embedding):
    """`nn.Embedding`; weights without memory get no numbers."""

    def reset_parameters(self) -> None:
        """As `nn.Embedding`'s."""
        if not self.weight.is_meta:
            super().reset_parameters()


class Projection(Leaf, nn.Linear):
    """Several projections of one input as one matrix; no bias. [..., D] -> [..., sum(sizes)].

    residual: it writes into the residual stream: initialised (2L)^-0.5 smaller.
    gates: which of `sizes` give decays, gates of states or step sizes: stored in few bits only
      where somebody asks for that.
    plain: other products than `forward` read the weights: they stay plain numbers.
    """

    backend: str = "torch"

    def __init__(
        self, d_in: int, *sizes: int, residual: bool = False, gates: Sequence[int] = (),
        plain: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(d_in, sum(sizes), bias=False)
        self.sizes = sizes
        self.residual = residual
        self.gates = tuple(gates)
        self.plain = plain
        #: What products see of the weights in training; None: the weights.
        self.view: Callable[[Tensor], Tensor] | None = None

    def reset_parameters(self) -> None:
        """As `nn.Linear`'s; weights without memory need no numbers."""
        if not self.weight.is_meta:
            super().reset_parameters()

    @property
    def stored(self) -> Weight:
        """The weights [N, D] as products see them, plain or packed."""
        return self.weight if self.view is None else self.view(self.weight)

    @property
    def weight_bytes(self) -> int:
        """Bytes that the format of the weights says, which is what a step reads of them."""
        return declared_bytes(self.stored)

    @property
    def storage(self) -> str:
        """The name of the format that decides how fast the weights are read; "" for plain ones."""
        return storage_of(self.stored)

    def store(self, weight: Matrix | nn.Parameter) -> None:
        """Hold the weights in another way."""
        del self.weight
        self.weight = weight  # type: ignore[assignment]

    def __call__(self, x: Input) -> Tensor:
        """`forward`, called directly."""
        return self.forward(x)

    def forward(self, x: Input) -> Tensor:
        """x: [..., D] -> [..., sum(sizes)]."""
        return product(x, self.stored, backend=self.backend)


class SwiGLU(nn.Module):
    """Gated MLP (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    backend: str = "torch"

    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.gate_up = Projection(d_model, hidden, hidden)
        self.down = Projection(hidden, d_model, residual=True)

    def after(self, x: Unnormed) -> Tensor:
        """The MLP of norm(x). [B, T, D] -> [B, T, D]."""
        return self.down(norm_swiglu(x, self.gate_up.stored, backend=self.backend))

    def axis(self) -> Axis:
        """Its hidden units, each a row of the gate, one of the values, and a column down."""
        units = spans(0, self.hidden, 1)
        return Axis(
            name="mlp",
            kind="width",
            slices=(
                rows("gate_up.weight", units, units + self.hidden), columns("down.weight", units),
            ),
            signals=(read_by("down", units),),
            fields={"hidden": 1},
        )  # fmt: skip

    def cost(self, step: Step) -> Cost:
        """FLOPs and bytes of one step."""
        return Cost.of(
            linear_cost("mlp gate, up", self.gate_up, step.tokens),
            OpCost(name="mlp silu", vector_flops=5 * step.tokens * self.hidden),
            linear_cost("mlp down", self.down, step.tokens),
        )
