"""A mixture of experts in place of the MLP: what a step reads depends on what its tokens pick.

Each token goes to the `active` experts of `count` whose router logits are highest, weighted by the
softmax over these (Mixtral, arXiv 2401.04088, equations 1 and 2). Experts are as narrow as keeps
the FLOPs of one token those of the dense MLP, so weights held grow count / active times, and a step
of B tokens reads the experts that any of them picks: count · (1 - (1 - active / count)^B) of them
on average, where a router picks all alike.

A shape to deploy: models of it have random weights. Routers are not trained here, which would take
a loss that balances them.
"""

import torch
from torch import Tensor, nn

from archs.backends import Forms, NoFormError
from archs.cost import Cost, OpCost, Step, linear_cost
from archs.layers import Projection, SwiGLU
from archs.ops.dense import Unnormed, swiglu
from archs.sizes import Experts


class Mixture(nn.Module):
    """Experts, each a gated MLP, and the router between them."""

    backend: str = "torch"

    def __init__(self, d_model: int, hidden: int, experts: Experts) -> None:
        super().__init__()
        self.hidden = hidden
        self.experts = experts
        # A router's logits decide, as gates do.
        self.router = Projection(d_model, experts.count, gates=(0,))
        width = experts.width(hidden)
        self.mlps = nn.ModuleList(SwiGLU(d_model, width) for _ in range(experts.count))

    def after(self, x: Unnormed) -> Tensor:
        """The mixture's output for norm(x). [B, T, D] -> [B, T, D].

        Raises NoFormError for a backend without a form, and where a CUDA graph is recorded: which
        experts run is known once the router has spoken.
        """
        return self._mixed(x.normed(backend=self.backend))

    def _mixed(self, x: Tensor) -> Tensor:
        return _MIX[self.backend](self, x.flatten(0, -2)).view_as(x)

    def cost(self, step: Step) -> Cost:
        """FLOPs and bytes of one step; of bytes the mean over what its tokens may pick."""
        tokens, first = step.tokens * self.experts.active, self.mlps[0]
        assert isinstance(first, SwiGLU)
        read = self.experts.read(step.tokens)
        rows = max(1, round(tokens / read))

        def product(name: str, layer: Projection) -> OpCost:
            return OpCost(
                name=name,
                matrix_flops=2 * tokens * layer.in_features * layer.out_features,
                weight_bytes=round(read * layer.weight_bytes),
                rows=rows,
                storage=layer.storage,
                held_bytes=self.experts.count * layer.weight_bytes,
            )

        return Cost.of(
            linear_cost("router", self.router, step.tokens),
            OpCost(name="choice of experts", vector_flops=6 * step.tokens * self.experts.count),
            product("experts gate, up", first.gate_up),
            OpCost(name="experts silu", vector_flops=5 * tokens * first.hidden),
            product("experts down", first.down),
            OpCost(name="experts' sum", vector_flops=2 * tokens * first.down.out_features),
        )


def _mix_torch(mixture: Mixture, x: Tensor) -> Tensor:
    """One expert after the other over its tokens. x: [M, D] -> [M, D]."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        raise NoFormError(
            "a mixture of experts cannot be recorded as a CUDA graph: which experts run is known "
            "on the host once the router has spoken; measure it on a CPU, or predict it"
        )
    best, picked = mixture.router(x).topk(mixture.experts.active, -1)
    exact = torch.promote_types(x.dtype, torch.float32)
    shares = best.softmax(-1, dtype=exact).to(x.dtype)
    out = torch.zeros_like(x)
    for number in picked.unique().tolist():
        rows, place = (picked == number).nonzero(as_tuple=True)
        mlp = mixture.mlps[number]
        hidden = swiglu(mlp.gate_up(x[rows]), backend=mixture.backend)
        out.index_add_(0, rows, mlp.down(hidden) * shares[rows, place, None])
    return out


_MIX = Forms("mixture of experts", {"torch": _mix_torch})
