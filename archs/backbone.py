"""The backbone that every architecture shares, and how it is initialised.

Embedding, L blocks of (RMSNorm, mixer, residual, RMSNorm, SwiGLU, residual), RMSNorm, head.
It never asks which mixer it holds. Initial values depend on the seed and the parameter's name
alone, so modules that two architectures share start equal.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from archs.backends import BACKENDS
from archs.cost import Cost, OpCost, Step
from archs.errors import UserError, unknown_name
from archs.experts import Mixture
from archs.layers import NORM_EPS, Embedding, Projection, RMSNorm, SwiGLU
from archs.mixer import Mixer, Shared
from archs.ops.dense import product
from archs.ops.matrix import Matrix, Weight, declared_bytes, rows_of, storage_of, weights_of
from archs.sizes import Experts
from archs.spec import StateSpec
from archs.state import LayerState

Built = TypeVar("Built", bound=nn.Module)
#: A residual stream as two summands, or one and None: the norm that reads it adds them.
Stream = tuple[Tensor, Tensor]


class Output(NamedTuple):
    """What a step gives: logits [B, K, V] of its tokens, or [B, V] of each sequence's last, and the
    final normed hidden states [B, K, D].
    """

    logits: Tensor
    hidden: Tensor


class Block(nn.Module):
    """One layer: mixer and MLP, each behind a norm and a residual. No MLP when `hidden` is 0;
    `experts` stand in its place where there are some.
    """

    def __init__(
        self, d_model: int, mixer: Mixer, hidden: int, norm_eps: float,
        experts: Experts | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm_mixer = RMSNorm(d_model, norm_eps)
        self.mixer = mixer
        self.norm_mlp = RMSNorm(d_model, norm_eps) if hidden else None
        self.mlp: SwiGLU | Mixture | None = None
        if hidden:
            self.mlp = Mixture(d_model, hidden, experts) if experts else SwiGLU(d_model, hidden)

    def forward(self, x: Tensor, residual: Tensor | None, shared: Shared) -> Stream:
        """x + residual is the stream [B, T, D]; so is what comes back, for the next norm to add."""
        normed, stream = self.norm_mixer.after(x, residual)
        return self._mlp(self.mixer(normed, shared), stream)

    def extend(self, x: Tensor, residual: Tensor | None, state: LayerState) -> Stream:
        """As `forward`, for K new tokens [B, K, D]."""
        before = self.norm_mixer.before(x, residual)
        extend: Callable[[Any, LayerState], Tensor] = self.mixer.extend
        norms = getattr(extend, "takes_unnormed", False)
        mixed = extend(before if norms else before.normed(backend=self.mixer.backend), state)
        return self._mlp(mixed, before.read())

    def _mlp(self, x: Tensor, residual: Tensor) -> Stream:
        if self.mlp is None or self.norm_mlp is None:
            return x, residual
        before = self.norm_mlp.before(x, residual)
        return self.mlp.after(before), before.read()

    def cost(self, step: Step) -> Cost:
        """FLOPs and bytes of one step."""
        norms = [n for n in (self.norm_mixer, self.norm_mlp) if n is not None]
        size = sum(n.weight.numel() for n in norms)
        norm = OpCost(
            name="norms and residuals", vector_flops=5 * step.tokens * size,
            weight_bytes=sum(n.weight.nbytes for n in norms),
        )  # fmt: skip
        cost = Cost.of(norm) + self.mixer.cost(step)
        return cost if self.mlp is None else cost + self.mlp.cost(step)


class Model(nn.Module):
    """A language model over one list of mixers.

    mixers: one per layer; hidden: MLP width of each layer, or of all, 0 for none; experts: what
    stands in place of each MLP; tied: whether the head is the embedding; norm_eps: of all norms but
    the mixers' own.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        d_model: int,
        mixers: Sequence[Mixer],
        hidden: int | Sequence[int],
        experts: Experts | None = None,
        tied: bool = True,
        norm_eps: float = NORM_EPS,
    ) -> None:
        super().__init__()
        widths = [hidden] * len(mixers) if isinstance(hidden, int) else list(hidden)
        self.embedding = Embedding(vocab_size, d_model)
        self.blocks = nn.ModuleList(
            Block(d_model, mixer, width, norm_eps, experts)
            for mixer, width in zip(mixers, widths, strict=True)
        )
        self.norm = RMSNorm(d_model, norm_eps)
        self.head = None if tied else Projection(d_model, vocab_size)
        self.vocab_size = vocab_size
        #: The name of the format of the weights (`archs.weights`); "": plain numbers.
        self.weight_format = ""
        self._widths = widths

    @property
    def hidden(self) -> int:
        """The MLP width of all layers. Raises ValueError where they have several."""
        if len(set(self._widths)) > 1:
            raise ValueError(f"layers have MLPs of widths {self._widths}; ask each `mlp.hidden`")
        return self._widths[0]

    @property
    def head_weight(self) -> Weight:
        """What makes logits of hidden states, [V, D]."""
        return self.embedding.weight if self.head is None else self.head.stored

    def use(self, backend: str) -> "Model":
        """Run all operations in their forms for `backend` (`archs.backends`), in place."""
        if backend not in BACKENDS:
            raise unknown_name("backend", backend, BACKENDS)
        for module in self.modules():
            if isinstance(module, Mixer | Projection | RMSNorm | SwiGLU | Mixture):
                module.backend = backend
        return self

    @property
    def state_format(self) -> str:
        """The name of the format of the state (`archs.state_formats`); "": as it is computed."""
        return str(self.layers[0].mixer.state_format)

    @property
    def backend(self) -> str:
        """The backend in use."""
        return self.norm.backend

    @property
    def layers(self) -> list[Block]:
        """The blocks, typed."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def embed(self, tokens: Tensor, hidden: Tensor | None = None) -> Tensor:
        """What the first layer reads. tokens: int64 [B, K] -> [B, K, D].

        hidden: [B, K, D], what heads read beside the tokens (`archs.heads`). Raises as
        `require_hidden`.
        """
        self.require_hidden(tokens, hidden)
        return rows_of(self.embedding.weight, tokens)

    def require_hidden(self, tokens: Tensor, hidden: Tensor | None) -> None:
        """Raise UserError for hidden states that this model does not read, or lacks."""
        if hidden is not None:
            raise UserError("hidden states are read by heads alone; give this model tokens only")

    def hidden_states(
        self, tokens: Tensor, hidden: Tensor | None = None, shared: Shared | None = None
    ) -> Tensor:
        """Final normed hidden states, parallel form. tokens: int64 [B, T] -> [B, T, D].

        shared: where layers leave what is no hidden state, losses of their own for one
        (`archs.mixer.asking_losses`).
        """
        return self.hidden_after((len(self.blocks),), tokens, hidden, shared)[0]

    def hidden_after(
        self, depths: Sequence[int], tokens: Tensor, hidden: Tensor | None = None,
        shared: Shared | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """As `hidden_states`, after each of these numbers of layers."""
        x, residual = self.embed(tokens, hidden), None
        shared = {} if shared is None else shared
        found: dict[int, Tensor] = {}
        for depth, block in enumerate(self.layers, 1):
            x, residual = block(x, residual, shared)
            if depth in depths:
                found[depth] = self.norm.after(x, residual)[0]
        return [found[depth] for depth in depths]

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> [..., V]."""
        return product(hidden, self.head_weight, backend=self.backend)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of every position. tokens: int64 [B, T] -> [B, T, V]."""
        return self.logits(self.hidden_states(tokens))

    def extend_hidden(
        self, tokens: Tensor, states: Sequence[LayerState], hidden: Tensor | None = None
    ) -> Tensor:
        """Final normed hidden states of K new tokens. tokens: int64 [B, K] -> [B, K, D]."""
        x, residual = self.embed(tokens, hidden), None
        for block, state in zip(self.layers, states, strict=True):
            x, residual = block.extend(x, residual, state)
        return self.norm.after(x, residual)[0]

    def extend(self, tokens: Tensor, states: Sequence[LayerState]) -> Tensor:
        """Logits of K new tokens. tokens: int64 [B, K] -> [B, K, V]."""
        return self.step(tokens, states, every_token=True).logits

    def extend_last(self, tokens: Tensor, states: Sequence[LayerState]) -> Tensor:
        """Logits of each sequence's last valid token only. tokens: int64 [B, K] -> [B, V]."""
        return self.step(tokens, states, every_token=False).logits

    def step(
        self, tokens: Tensor, states: Sequence[LayerState], hidden: Tensor | None = None, *,
        every_token: bool,
    ) -> Output:  # fmt: skip
        """K new tokens, int64 [B, K], with logits of all or of each sequence's last valid one."""
        found = self.extend_hidden(tokens, states, hidden)
        if every_token:
            return Output(self.logits(found), found)
        new = states[0].new
        if new is None:
            return Output(self.logits(found[:, -1]), found)
        last = (new - 1).clamp(min=0)
        rows = torch.arange(found.shape[0], device=found.device)
        return Output(self.logits(found[rows, last]), found)

    def state_specs(self) -> list[StateSpec]:
        """What each layer must remember, as it is kept."""
        return [block.mixer.kept_spec() for block in self.layers]

    def cost(self, step: Step, *, all_logits: bool = False) -> Cost:
        """FLOPs and bytes of one step; the head runs on each sequence's last token by default."""
        before, after = self.cost_around(step, all_logits=all_logits)
        return Cost.total([before, *(b.cost(step) for b in self.layers), after])

    def cost_around(self, step: Step, *, all_logits: bool = False) -> tuple[Cost, Cost]:
        """Of `cost`, what stands before the layers' operations and after them."""
        vocabulary, d_model = self.embedding.weight.shape
        rows = step.tokens if all_logits else step.batch
        table = step.tokens * declared_bytes(self.embedding.weight) // vocabulary
        embed, of_head = OpCost(name="embedding rows", weight_bytes=table), self.head_weight
        norm = OpCost(
            name="final norm", vector_flops=4 * step.tokens * d_model,
            weight_bytes=self.norm.weight.nbytes,
        )  # fmt: skip
        head = OpCost(
            name="head", matrix_flops=2 * rows * of_head.numel(),
            weight_bytes=declared_bytes(of_head), rows=rows, storage=storage_of(of_head),
        )  # fmt: skip
        return Cost.of(embed), Cost.of(norm, head)

    def non_embedding_parameters(self) -> int:
        """Parameters apart from the embedding and the head."""
        apart = {id(self.embedding.weight), id(self.head_weight)}
        return sum(p.numel() for p in weights_of(self) if id(p) not in apart)

    def state_bytes(
        self, context: int, *, page_size: int = 1, lookback: int = 0, replay: int = 0
    ) -> int:
        """Bytes of state of one sequence after `context` tokens; see `StateSpec.state_bytes`."""
        return sum(
            s.state_bytes(context, page_size=page_size, lookback=lookback, replay=replay)
            for s in self.state_specs()
        )


def replays(model: Model, rows: int) -> bool:
    """Whether rings of so many inputs make a difference to a model: some values declare inputs."""
    return any(spec.replayed(rows) for spec in model.state_specs())


def first_layers(model: Model, count: int) -> Model:
    """The model of the first `count` layers, with the same embedding, final norm and head.

    Weights are shared, so it takes no memory: a draft of the model itself (early exit,
    arXiv 2404.16710). Raises UserError unless some layers are left out.
    """
    require_exit(count, len(model.blocks))
    early = copy(model)
    vars(early)["_modules"] = dict(vars(model)["_modules"])
    early.blocks = nn.ModuleList(model.layers[:count])
    early._widths = model._widths[:count]
    return early


def require_exit(count: int, layers: int) -> None:
    """Raise UserError unless the first `count` of so many layers leave some out."""
    if not 1 <= count < layers:
        raise UserError(
            f"the first {count} layers of a model of {layers} are no draft of it; take 1 to "
            f"{layers - 1}"
        )


def initialise(model: nn.Module, seed: int, layers: int) -> None:
    """Fill all parameters of a model of L `layers`, or of a part, from `seed` and their names.

    Matrices: normal with d_in^-0.5, outputs into the residual stream (2L)^-0.5 smaller; the
    embedding d^-0.5, so that tied logits start near unit scale; norms 1, other vectors 0;
    whatever a mixer names in `initialisers` by its own rule.
    """
    special = {}
    residual = set()
    ones = set()
    for prefix, module in model.named_modules():
        if isinstance(module, Mixer):
            for name, rule in module.initialisers().items():
                special[f"{prefix}.{name}"] = rule
        if isinstance(module, Projection) and module.residual:
            residual.add(f"{prefix}.weight")
        if isinstance(module, RMSNorm):
            ones.add(f"{prefix}.weight")
    depth = (2 * layers) ** -0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator(parameter.device).manual_seed(_seed_of(seed, name))
            if name in special:
                special.pop(name)(parameter, generator)
            elif name in ones:
                parameter.fill_(1.0)
            elif parameter.dim() < 2:
                parameter.zero_()
            else:
                std = parameter.shape[-1] ** -0.5 * (depth if name in residual else 1.0)
                parameter.normal_(0.0, std, generator=generator)
    if special:
        raise ValueError(f"initialisers name parameters that do not exist: {sorted(special)}")


def delicate_parameters(model: nn.Module) -> set[str]:
    """Full names of parameters that stay in float32 and are never decayed."""
    return {
        f"{prefix}.{name}"
        for prefix, module in model.named_modules()
        if isinstance(module, Mixer)
        for name in module.delicate
    }


def cast(model: Built, dtype: torch.dtype) -> Built:
    """A model, or a part of one, in `dtype`, in place, delicate parameters apart."""
    delicate = delicate_parameters(model)
    for name, parameter in model.named_parameters():
        if name not in delicate:
            parameter.data = parameter.data.to(dtype)
    for module in model.modules():
        if isinstance(module, Matrix):
            module.give(dtype)
    return model


#: Up to this many rows a float32 product streams a column-major matrix faster on a CPU.
COLUMN_MAJOR_ROWS = 2


def lay_out(model: Model, rows: int) -> Model:
    """Store the matrices for products with `rows` tokens at once, in place; values stay.

    On a CPU a float32 product of one or two rows reads a column-major matrix at 1.2 to 1.8 times
    the rate; with more rows, in bfloat16 and on other devices row-major wins.
    """
    for weight in _matrices(model):
        if isinstance(weight, Matrix):
            weight.lay_out()
            continue
        turned = column_major(rows, weight)
        if turned != weight.t().is_contiguous():
            data = weight.data
            weight.data = data.t().contiguous().t() if turned else data.contiguous()
    return model


def column_major(rows: int, weight: Tensor) -> bool:
    """Whether products of so many rows with this matrix read it faster stored by columns."""
    narrow = rows <= COLUMN_MAJOR_ROWS and weight.dtype == torch.float32
    return narrow and weight.device.type == "cpu"


def _matrices(model: Model) -> Iterator[Weight]:
    if model.head is None:
        yield model.embedding.weight
    for module in model.modules():
        if isinstance(module, Projection):
            yield module.stored


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:7], "little")
