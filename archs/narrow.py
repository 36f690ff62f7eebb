"""Smaller models from larger ones: units of axes, channels of the stream, or layers left out.

What is left keeps its weights and its order. The result is an ordinary model with a `ModelSpec` of
its own, each layer spelled out, so it is stored, loaded and served like any other. Nothing here
chooses what to leave out (`train.prune` does).
"""

from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor

from archs.axes import Axis
from archs.backbone import Block, Model
from archs.errors import MisfitError, UserError
from archs.layer import LayerSpec
from archs.layers import SwiGLU
from archs.registry import ModelSpec

#: How a block calls what has axes.
MIXER, MLP = "mixer", "mlp"


def axes_of(block: Block) -> dict[str, Axis]:
    """A block's axes by name, with parameters as the block names them."""
    found = [axis.within(MIXER) for axis in block.mixer.axes()]
    if isinstance(block.mlp, SwiGLU):
        found.append(block.mlp.axis().within(MLP))
    return {axis.name: axis for axis in found}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Choice:
    """The units of one axis of one layer that stay: int64 [n], ascending."""

    layer: int
    axis: Axis
    units: Tensor

    def __post_init__(self) -> None:
        axis, units = self.axis, self.units
        each = torch.bincount(units // axis.per_group, minlength=axis.groups)
        if not len(units) or len(each) != axis.groups or each.unique().numel() != 1:
            raise ValueError(
                f"{axis.name} keeps {each.tolist()} units of its groups; keep equally many of each"
            )

    @property
    def left(self) -> Tensor:
        """Which units stay, bool [count]."""
        return torch.zeros(self.axis.count, dtype=torch.bool).index_fill_(0, self.units, True)

    def indices(self, parameter: str, dim: int, size: int) -> Tensor:
        """What stays of one dimension of a parameter: int64, ascending."""
        stays = torch.ones(size, dtype=torch.bool)
        for part in self.axis.slices:
            if (part.parameter, part.dim) == (parameter, dim):
                stays[part.units[~self.left].flatten()] = False
        return stays.nonzero()[:, 0]


def without_units(
    model: Model, spec: ModelSpec, choices: Sequence[Choice]
) -> tuple[Model, ModelSpec]:
    """The model of only the chosen units, at most one axis a layer; the others are whole.

    Weights that `Axis.folded` names must have been folded (`folded`). Raises UserError on options
    that the mixer refuses and on packed weights.
    """
    given, weights = spec.spelled_out(), plain_weights(model)
    layers = list(given.layers)
    for choice in choices:
        prefix, axis = f"blocks.{choice.layer}.", choice.axis
        for parameter, dim in {(s.parameter, s.dim) for s in axis.slices}:
            name = f"{prefix}{parameter}"
            kept = choice.indices(parameter, dim, weights[name].shape[dim])
            weights[name] = weights[name].index_select(dim, kept.to(weights[name].device))
        if axis.folded is not None:
            name = f"{prefix}{axis.folded[0]}"
            weights[name] = weights[name][: len(choice.units) // axis.groups]
        layers[choice.layer] = _after(layers[choice.layer], choice)
    smaller = replace(given, layers=tuple(layers))
    return built(smaller, weights, model), smaller


def _after(layer: LayerSpec, choice: Choice) -> LayerSpec:
    axis, units = choice.axis, choice.units
    if axis.slices[0].parameter.startswith(f"{MLP}."):
        return replace(layer, **axis.options_after({}, units))
    return replace(layer, options=axis.options_after(layer.options, units))


def folded(model: Model, choices: Iterable[Choice]) -> Model:
    """The same function, with the weights that groups share (`Axis.folded`) inside matrices.

    A copy where anything changes; the model itself where nothing does.
    """
    folding = [(c.layer, c.axis.folded) for c in choices if c.axis.folded is not None]
    if not folding:
        return model
    model = deepcopy(model)
    with torch.no_grad():
        for layer, (shared, matrix) in folding:
            block = model.layers[layer]
            weight, target = block.get_parameter(shared), block.get_parameter(matrix)
            target.mul_(weight.repeat(target.shape[1] // len(weight)))
            weight.fill_(1.0)
    return model


def without_channels(model: Model, spec: ModelSpec, kept: Tensor) -> tuple[Model, ModelSpec]:
    """The model with these channels of its residual stream only: int64 [n], ascending.

    Which dimensions are the stream's follows from building the spec at both widths. Norms keep
    their weights; what they add to a mean grows as the mean does. Raises MisfitError where a mixer
    derives other sizes from the model's width, and on packed weights.
    """
    given = spec.spelled_out()
    scale, width = given.scale, len(kept)
    scale = replace(scale, d_model=width, head_dim=gcd(width, scale.head_dim))
    eps = given.norm_eps * given.scale.d_model / width
    smaller, weights = replace(given, scale=scale, norm_eps=eps), plain_weights(model)
    for name, narrow in smaller.outline().named_parameters():
        weight = weights[name]
        for dim, (old, new) in enumerate(zip(weight.shape, narrow.shape, strict=True)):
            if old == new:
                continue
            if (old, new) != (given.scale.d_model, width):
                raise MisfitError(
                    f"{name} has {old} entries in a model of d_model={given.scale.d_model} and "
                    f"{new} with {width}, so the width cannot be pruned; let its mixer take that "
                    "size from its options"
                )
            weight = weight.index_select(dim, kept.to(weight.device))
        weights[name] = weight
    return built(smaller, weights, model), smaller


def without_layers(
    model: Model, spec: ModelSpec, removed: Sequence[int]
) -> tuple[Model, ModelSpec]:
    """The model without these layers. Layers that share rows must go together (`teams`).

    Raises MisfitError where no layer is left, where some of a team are, and where the mixers'
    options would have others share rows; UserError on packed weights.
    """
    given = spec.spelled_out()
    kept = [i for i in range(len(given.layers)) if i not in removed]
    if not kept:
        raise MisfitError(f"removing {len(removed)} layers leaves none; remove fewer")
    for team in teams(model):
        if 0 < len(set(team) & set(removed)) < len(team):
            raise MisfitError(f"layers {team} share rows; remove all of them, or none")
    smaller = replace(
        given,
        scale=replace(given.scale, n_layers=len(kept)),
        layers=tuple(given.layers[i] for i in kept),
    )
    left = [[kept.index(i) for i in team] for team in teams(model) if team[0] in kept]
    if teams(smaller.outline()) != left:
        raise MisfitError(
            f"without layers {sorted(removed)} others would share rows than do now; keep those "
            "that share"
        )
    weights = plain_weights(model)
    for at in range(len(given.layers)):
        own = {
            name: weights.pop(name) for name in list(weights) if name.startswith(f"blocks.{at}.")
        }
        if at in kept:
            to = f"blocks.{kept.index(at)}."
            weights |= {to + name.split(".", 2)[2]: value for name, value in own.items()}
    return built(smaller, weights, model), smaller


def teams(model: Model) -> list[list[int]]:
    """Layers that share rows of state, as lists that hold each layer once, in order."""
    of: dict[int, list[int]] = {}
    for layer, spec in enumerate(model.state_specs()):
        owners = {rows.owner for rows in spec.rows if rows.owner is not None}
        team = sorted({layer, *(member for owner in owners for member in of[owner])})
        of |= dict.fromkeys(team, team)
    return [team for layer, team in of.items() if team[0] == layer]


def plain_weights(model: Model) -> dict[str, Tensor]:
    """A model's parameters by name. Raises UserError on packed ones: they have no units."""
    if model.weight_format:
        raise UserError(
            f"weights stored as {model.weight_format} cannot be pruned; prune the model that they "
            "were made of, then store it"
        )
    return {name: p.detach() for name, p in model.named_parameters()}


def built(spec: ModelSpec, weights: Mapping[str, Tensor], like: Model) -> Model:
    """The spec's model with copies of weights, in the mode and for the backend of another.

    Raises ValueError where an axis forgot a parameter.
    """
    model = spec.outline().to_empty(device=like.embedding.weight.device)
    for name, parameter in model.named_parameters():
        value = weights[name]
        if value.shape != parameter.shape:
            raise ValueError(
                f"{name} is {list(value.shape)} after pruning and {list(parameter.shape)} in the "
                "model; an axis leaves out a slice or an option"
            )
        parameter.data = value.clone(memory_format=torch.contiguous_format)
    return model.use(like.backend).train(like.training)
