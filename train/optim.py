"""AdamW, or Muon for the hidden matrices with AdamW for the rest, over a model by name.

Weight decay spares vectors and what a mixer calls delicate (decays, step sizes). Muon
(https://kellerjordan.github.io/posts/muon/) replaces a matrix's momentum by the nearest
semi-orthogonal matrix; its step is scaled to AdamW's typical size (arXiv 2502.16982), so both
read one learning rate. A `Projection` holds several matrices; each is orthogonalised on its
own, and parts of one shape go through as one batched product. State is plain tensors by
parameter name. Build it after moving the model: parts are views of the parameters, and
`take_back` holds the model to that.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from archs.backbone import Model, delicate_parameters, lay_out
from archs.errors import UserError
from archs.layers import Projection
from train.recipe import Recipe

#: Rows of a training batch, for the layout of weights: many.
TRAINING_ROWS = 1 << 20
#: A part of a projection with fewer rows or columns (gates, step sizes) is a bundle of vectors.
MIN_MATRIX_SIDE = 32
MUON_MOMENTUM = 0.95
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one parameter that are optimised together.

    name: the parameter's, with the rows in brackets when they are not all of it.
    leaf: the parameter itself, or a leaf that shares those rows' storage.
    """

    name: str
    owner: nn.Parameter
    leaf: nn.Parameter
    rows: slice
    decayed: bool
    matrix: bool

    def bring_grad(self) -> Tensor | None:
        """This part's gradient, also set on its leaf; None when there is none."""
        if self.leaf is not self.owner:
            grad = self.owner.grad
            self.leaf.grad = None if grad is None else grad[self.rows]
        return self.leaf.grad


def parts_of(model: Model, *, split: bool) -> list[Part]:
    """The model's trainable parameters; projections by their `sizes` when `split`."""
    delicate = delicate_parameters(model)
    # A head is no hidden matrix, whether it is the embedding or its own.
    projections = {
        id(m.weight): m.sizes
        for m in model.modules()
        if isinstance(m, Projection) and m is not model.head and split
    }
    parts: list[Part] = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        decayed = p.dim() > 1 and name not in delicate
        sizes = projections.get(id(p), ())
        whole = Part(name, p, p, slice(0, p.shape[0] if p.dim() else 1), decayed, False)
        parts.extend(_split(whole, sizes) if sizes and name not in delicate else [whole])
    return parts


def _split(whole: Part, sizes: tuple[int, ...]) -> Iterator[Part]:
    start = 0
    for size in sizes:
        rows = slice(start, start + size)
        start += size
        matrix = min(size, whole.owner.shape[1]) >= MIN_MATRIX_SIDE
        if len(sizes) == 1:
            yield Part(whole.name, whole.owner, whole.owner, rows, whole.decayed, matrix)
            continue
        leaf = nn.Parameter(whole.owner.detach()[rows])
        name = f"{whole.name}[{rows.start}:{rows.stop}]"
        yield Part(name, whole.owner, leaf, rows, whole.decayed, matrix)


class Optimizer:
    """The update rule of a recipe over all trainable parameters of a model.

    Lays the weights out for training: fused AdamW pairs weight and gradient by their place in
    memory, and an engine may have stored matrices by columns.
    """

    def __init__(self, model: Model, recipe: Recipe) -> None:
        lay_out(model, TRAINING_ROWS)
        parts = parts_of(model, split=recipe.optimizer == "muon")
        #: The parameters themselves, for clipping.
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._homes = [p.data for p in self.parameters]
        self._parts = parts
        matrices = [p for p in parts if p.matrix]
        self._vectors = [p for p in parts if not p.matrix]
        self._muon = Muon(matrices, weight_decay=recipe.weight_decay) if matrices else None
        groups = [
            {
                "params": [p.leaf for p in self._vectors if p.decayed == decayed],
                "weight_decay": recipe.weight_decay if decayed else 0.0,
            }
            for decayed in (True, False)
        ]
        self._adamw = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=recipe.learning_rate,
            betas=recipe.betas,
            eps=recipe.eps,
            fused=True,
        )

    def take_back(self) -> None:
        """Bring parameters that were stored elsewhere since (`lay_out`) back to their own memory.

        Values stay; the loop calls it before each forward pass, so that sums keep their order, too.
        Raises UserError where one changed its dtype or device.
        """
        for parameter, home in zip(self.parameters, self._homes, strict=True):
            now = parameter.data
            if now.data_ptr() == home.data_ptr() and now.stride() == home.stride():
                continue
            if (now.dtype, now.device) != (home.dtype, home.device):
                raise UserError(
                    f"a weight became {now.dtype} on {now.device} during training, which began in "
                    f"{home.dtype} on {home.device}; evaluate a copy of the model"
                )
            grad = parameter.grad
            parameter.data = home.copy_(now)
            if grad is not None:
                parameter.grad = torch.empty_like(home).copy_(grad)

    def step(self, learning_rate: float) -> None:
        """One update from the parameters' gradients."""
        self.take_back()
        if self._muon is not None:
            for part in self._vectors:
                part.bring_grad()
            self._muon.step(learning_rate)
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate
        self._adamw.step()

    def zero_grad(self) -> None:
        """Drop all gradients, so that the next backward pass writes instead of adding."""
        for part in self._parts:
            part.leaf.grad = part.owner.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """The whole state by `PARAMETER.KIND`; the tensors are live, copy before changing."""
        state = {} if self._muon is None else self._muon.tensors()
        for part in self._vectors:
            for kind, value in self._adamw.state[part.leaf].items():
                state[f"{part.name}.{kind}"] = value
        return state

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned. Raises UserError when names are lacking."""
        if self._muon is not None:
            self._muon.load(tensors)
        for part in self._vectors:
            if f"{part.name}.step" not in tensors:
                continue  # It never had a gradient, so it has no state.
            for kind in ("step", "exp_avg", "exp_avg_sq"):
                value = _fetch(tensors, f"{part.name}.{kind}").to(part.leaf.device)
                self._adamw.state[part.leaf][kind] = value.clone()


class Muon:
    """Momentum orthogonalised by Newton-Schulz, for matrices that may be parts of a parameter.

    Equals torch.optim.Muon with nesterov and adjust_lr_fn="match_rms_adamw", part by part.
    """

    def __init__(self, parts: list[Part], *, weight_decay: float) -> None:
        self._weight_decay = weight_decay
        by_shape: dict[tuple[int, int], list[Part]] = {}
        for part in parts:
            rows, columns = part.leaf.shape
            by_shape.setdefault((min(rows, columns), max(rows, columns)), []).append(part)
        self._groups = [
            (group, torch.zeros(len(group), *shape, device=group[0].leaf.device))
            for shape, group in by_shape.items()
        ]

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """One update. Parts without a gradient count as a gradient of zero."""
        shrink = 1 - learning_rate * self._weight_decay
        for parts, momentum in self._groups:
            scale = 0.2 * math.sqrt(momentum.shape[2])
            grads = []
            for part, buffer in zip(parts, momentum, strict=True):
                grad = part.bring_grad()
                grads.append(torch.zeros_like(buffer) if grad is None else _wide(grad))
            stacked = torch.stack(grads)
            momentum.lerp_(stacked, 1 - MUON_MOMENTUM)
            updates = orthogonalised(stacked.lerp_(momentum, MUON_MOMENTUM))
            for part, update in zip(parts, updates, strict=True):
                weight = _wide(part.leaf)
                weight.mul_(shrink).add_(update, alpha=-learning_rate * scale)

    def tensors(self) -> dict[str, Tensor]:
        """Momentum by `PART.momentum`, wide side last."""
        return {
            f"{part.name}.momentum": buffer
            for parts, momentum in self._groups
            for part, buffer in zip(parts, momentum, strict=True)
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `tensors` returned."""
        for name, buffer in self.tensors().items():
            buffer.copy_(_fetch(tensors, name))


def orthogonalised(x: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrix, roughly: singular values end within about 0.7 to 1.2.

    x: [n, r, c] with r <= c. Quintic Newton-Schulz iteration with Muon's coefficients; in
    bfloat16 on CUDA, where it is exact enough and fast, in float32 on CPUs.
    """
    a, b, c = _NEWTON_SCHULZ
    y = x / x.norm(dim=(1, 2), keepdim=True).clamp_(min=1e-7)
    if x.is_cuda:
        y = y.bfloat16()
    for _ in range(steps):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return y.to(x.dtype)


def _wide(matrix: Tensor) -> Tensor:
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix


def _fetch(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise UserError(f"the checkpoint lacks optimiser state '{name}'; start the run afresh")
    return tensors[name]
